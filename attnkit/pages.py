"""`PagedCache`: keys and values in pages, which texts of unlike lengths take as they need them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from attnkit.arguments import check_int
from attnkit.cache import KVCache
from attnkit.errors import CompositionError
from attnkit.memory import Memory, Pair, Range
from attnkit.strips import gaps
from attnkit.texts import HeldText, Runs, paired

__all__ = ["PagedCache", "Pages"]


class Pages(Memory):
    """Keys and values ``[pages, page, n, d]``, and for each text a list of its pages, in order.

    A page belongs to every text that lists it; who writes to one that others list, too, takes a
    copy. So to reorder or copy texts moves no keys.
    """

    def __init__(self, like: Pair, batch: int, pages: int, page: int) -> None:
        # Tokens lie end to end, not those of a head: so paged kernels have it.
        with torch.inference_mode(False):
            keys, values = (tensor.new_empty((pages, page, *tensor.shape[-2:])) for tensor in like)
        self.pair = keys, values
        self.tables: list[list[int]] = [[] for _ in range(batch)]
        self.owners = [0] * pages

    @property
    def batch(self) -> int:
        """The number of texts."""
        return len(self.tables)

    @property
    def page(self) -> int:
        """The tokens of a page."""
        return self.pair[0].shape[1]

    @property
    def room(self) -> int:
        """The tokens that all pages have room for."""
        return len(self.owners) * self.page

    @property
    def free(self) -> int:
        """The number of pages that no text has."""
        return self.owners.count(0)

    def table(self) -> Tensor:
        """Return the pages of each text, ``[b, most]``, 0 behind the last one."""
        most = max(map(len, self.tables))
        rows = [row + [0] * (most - len(row)) for row in self.tables]
        return torch.tensor(rows, dtype=torch.int32).to(self.pair[0].device, non_blocking=True)

    def read(self, used: int) -> Pair:
        """Return the first `used` tokens of each text, gathered from its pages."""
        most = -(-used // self.page)
        index, size = self.table()[:, :most].flatten(), most * self.page
        keys, values = (
            tensor.index_select(0, index).view(self.batch, size, *tensor.shape[2:])[:, :used]
            for tensor in self.pair
        )
        return keys, values

    def lacking(self, firsts: Sequence[int], counts: Sequence[int]) -> int:
        """Return how many pages are missing to write `counts` tokens behind the first ones."""
        wanted, written = 0, Counter[int]()
        for row, first, count in self._each(firsts, counts):
            kept = -(-first // self.page)
            wanted += max(0, -(-(first + count) // self.page) - kept)
            if count and first % self.page:
                written[row[kept - 1]] += 1
        # Of those who go on in one page, the last one need not copy it if nobody else has it.
        wanted += sum(min(some, self.owners[page] - 1) for page, some in written.items())
        return max(0, wanted - self.free)

    def write(self, new: Pair, firsts: Sequence[int], counts: Sequence[int]) -> None:
        """Write ``[b, s, n, d]``, or packed ``[t, n, d]``, behind the first tokens of each text."""
        places: list[int] = []
        for row, first, count in self._each(firsts, counts):
            self._own_last(row, first, count)
            while len(row) * self.page < first + count:
                row.append(self._take())
            columns = range(first, first + count)
            places += (row[c // self.page] * self.page + c % self.page for c in columns)
        index = torch.tensor(places, dtype=torch.long).to(new[0].device, non_blocking=True)
        for tensor, tokens in zip(self.pair, new, strict=True):
            flat = tokens if tokens.ndim == 3 else tokens.flatten(0, 1)
            tensor.view(-1, *tensor.shape[2:]).index_copy_(0, index, flat.detach())

    def trim(self, held: Sequence[int]) -> None:
        """Give back the pages behind the first tokens of each text."""
        for row, first, _ in self._each(held, (0,)):
            kept = -(-first // self.page)
            self._release(row[kept:])
            del row[kept:]

    def keep(self, places: Sequence[Sequence[Range]], room: int) -> None:
        """Keep the pages that hold tokens at some places of each text, or of all."""
        for k, row in enumerate(self.tables):
            spans = places[k if len(places) > 1 else 0]
            kept = {n for a, b in spans for n in range(a // self.page, -(-b // self.page))}
            self._release(row[n] for n in range(len(row)) if n not in kept)
            row[:] = [row[n] for n in sorted(kept)]

    def pick(self, index: Tensor, used: int) -> None:
        """Make text k what text ``index[k]`` was: it lists the same pages."""
        before = [page for row in self.tables for page in row]
        self.tables = [list(self.tables[k]) for k in index.tolist()]
        for row in self.tables:
            for page in row:
                self.owners[page] += 1
        self._release(before)

    def _each(
        self, firsts: Sequence[int], counts: Sequence[int]
    ) -> Iterable[tuple[list[int], int, int]]:
        several = [list(some) * (self.batch // len(some)) for some in (firsts, counts)]
        return zip(self.tables, *several, strict=True)

    def _own_last(self, row: list[int], first: int, count: int) -> None:
        """Copy the page that a text goes on in, where others have it, too."""
        at, used = divmod(first, self.page)
        if not count or not used or self.owners[row[at]] == 1:
            return
        copied, page = row[at], self._take()
        for tensor in self.pair:
            tensor[page, :used] = tensor[copied, :used]
        self._release([copied])
        row[at] = page

    def _take(self) -> int:
        page = self.owners.index(0)
        self.owners[page] = 1
        return page

    def _release(self, pages: Iterable[int]) -> None:
        for page in pages:
            self.owners[page] -= 1


class PagedCache(KVCache):
    """A `KVCache` whose texts share `pages` pages of `page` tokens each.

    For batches of texts that are of very unlike lengths, come and go: a text takes a page when it
    needs one, and `truncate` and `reorder` give back what nobody lists. Copies of a text share
    its pages until they write (`expand`, `reorder`), so a prompt is held once.

    Steps gather the pages of each text: keys and values are read once more than those of a
    `KVCache`. `table` is what paged kernels take (the block table of
    ``npu_fused_infer_attention_score``, with ``[pages, page, n * d]``); none is called here.

    `rolling`: where pages lack, those are given back that hold no key the mask can show again.

    Raises `CompositionError` where pages lack, and what `KVCache` raises.

    >>> import torch
    >>> cache, tokens = PagedCache(pages=4, page=2), torch.zeros(4, 1, 8)
    >>> _ = cache.append(tokens, tokens, [1, 3])
    >>> cache, cache.table.tolist()
    (PagedCache(lengths=(1, 3), free=1, pages=4, page=2), [[0, 0], [1, 2]])
    >>> cache.append(tokens, tokens, [4, 0])
    Traceback (most recent call last):
    ...
    attnkit.errors.CompositionError: PagedCache(lengths=(1, 3), free=1, pages=4, page=2) lacks 1 \
pages for (4, 0) tokens more; give it more pages, or drop texts (reorder, truncate)
    """

    def __init__(self, pages: int, page: int = 16, *, rolling: bool = False) -> None:
        self.pages = check_int("PagedCache: pages", pages, 1)
        self.page = check_int("PagedCache: page", page, 1)
        super().__init__(rolling=rolling)

    @property
    def free(self) -> int:
        """The number of pages that no text has.

        >>> PagedCache(8).free
        8
        """
        return self.pages if self._memory is None else self._paged.free

    @property
    def table(self) -> Tensor:
        """The pages of each text, ``[b, most]``, 0 behind the last one.

        >>> cache = PagedCache(pages=4, page=2)
        >>> _ = cache.append(torch.zeros(1, 3, 1, 8), torch.zeros(1, 3, 1, 8))
        >>> cache.table
        tensor([[0, 1]], dtype=torch.int32)
        """
        return self._paged.table()

    def is_full(self, counts: Sequence[int]) -> bool:
        """Whether a rolling cache must forget before it takes `counts` tokens more.

        >>> PagedCache(4, rolling=True).is_full([100])
        False
        """
        if not self._rolling or self._memory is None:
            return False
        return self._paged.lacking([text.held for text in self._texts], counts) > 0

    def keep(self, runs: Sequence[Runs]) -> None:
        """Give back the pages that hold no token at some positions of each text.

        >>> cache = PagedCache(pages=8, page=4)
        >>> _ = cache.append(torch.zeros(1, 30, 2, 8), torch.zeros(1, 30, 2, 8))
        >>> cache.keep([((0, 2), (21, 30))])
        >>> cache.texts[0].runs, cache.free
        (((0, 4), (20, 30)), 4)
        """
        whole = [self._whole_pages(text, some) for text, some in paired(self._texts, runs)]
        super().keep(whole)

    def truncate(self, length: int | Sequence[int]) -> None:
        """Drop the tokens from `length` on, and give back their pages.

        >>> cache = PagedCache(pages=8, page=4)
        >>> _ = cache.append(torch.zeros(2, 9, 2, 8), torch.zeros(2, 9, 2, 8))
        >>> cache.truncate([0, 5])
        >>> cache.free
        6
        """
        super().truncate(length)
        if self._memory is not None:
            self._paged.trim([text.held for text in self._texts])

    def _whole_pages(self, text: HeldText, runs: Runs) -> Runs:
        """Return the positions of all tokens on the pages that hold some of `runs`."""
        size, found = self.page, list[Range]()
        for first, last in text.spans(runs):
            found += text.positions((first // size * size, -(-last // size) * size))
        return tuple(gaps(gaps(found, 0, text.length), 0, text.length))

    @property
    def _paged(self) -> Pages:
        memory = self._rows
        if not isinstance(memory, Pages):
            raise CompositionError(f"{type(self).__name__}: its memory is not paged")
        return memory

    def _room_for(self, new: Pair, batch: int, counts: Sequence[int], stop: int) -> Memory:
        memory = self._memory
        if memory is None:
            memory = Pages(new, batch, self.pages, self.page)
        firsts = [text.held for text in self._texts]
        lacks = memory.lacking(firsts, counts) if isinstance(memory, Pages) else 0
        if lacks:
            raise CompositionError(
                f"{self} lacks {lacks} pages for {tuple(counts)} tokens more; give it more pages, "
                "or drop texts (reorder, truncate)"
            )
        return memory

    def __repr__(self) -> str:
        unlike = len(self._texts) > 1
        lengths = f"lengths={self.lengths}" if unlike else f"length={self.length}"
        rolling = ", rolling=True" if self._rolling else ""
        size = f"pages={self.pages}, page={self.page}"
        return f"PagedCache({lengths}, free={self.free}, {size}{rolling})"
