"""The attention variants: ``python docs/make/variants.py`` writes docs/variants.md and pictures.

`VARIANTS` is the list, read from variants.yaml beside this file; tests read it too.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from ruamel.yaml import YAML

import attnkit as ak
from attnkit import fields, masks
from attnkit.display import Drawing, colour, svg
from attnkit.planner.calls import Launch
from attnkit.planner.lower import lower, search_for
from attnkit.planner.picture import drawing
from attnkit.planner.search import Search
from attnkit.progress import progress

DOCS = Path(__file__).parents[1]
LENGTH = 2048
Sizes = tuple[int, int]


@dataclass(frozen=True)
class Made:
    """What the code of a variant leaves behind: different layers, what they are called with."""

    layers: tuple[ak.Attention, ...]
    call: Mapping[str, masks.Mask]
    size: Sizes
    names: Mapping[str, Any]

    @property
    def mask(self) -> masks.Mask:
        """What the first layer sees."""
        return self.mask_of(self.layers[0])

    def mask_of(self, layer: ak.Attention) -> masks.Mask:
        """Return what a layer sees, with what it is called with."""
        return self.call.get("mask", layer.mask)

    def allowed(self, layer: ak.Attention) -> torch.Tensor:
        """Return the cells that a layer allows, ``[heads or 1, queries, keys]``."""
        mask = self.mask_of(layer)
        return mask.materialize(*self.size, heads=mask.heads or 1)[0]

    def tensors(self, layer: ak.Attention, **how: Any) -> tuple[torch.Tensor, ...]:
        """Return query, key and value for a layer."""
        (rows, keys), heads, dim = self.size, layer.num_kv_heads, layer.head_dim
        query = torch.empty(1, rows, layer.num_heads, dim, **how)
        return query, *(torch.empty(1, keys, heads, dim, **how) for _ in range(2))

    def plan(self, layer: ak.Attention) -> ak.Plan:
        """Return the fused calls of a training step in bfloat16; or what runs where none would."""
        layer = layer.bfloat16()
        given = self.tensors(layer, dtype=torch.bfloat16, device="meta", requires_grad=True)
        layer.backend = "emulated"
        try:
            return layer.plan(*given, **self.call)
        except ak.BackendRefused:
            layer.backend = "auto"
            return layer.plan(*given, **self.call)


@dataclass(frozen=True)
class Variant:
    """One attention pattern of the literature; what its fields are, variants.yaml says."""

    kind: str
    name: str
    what: str
    papers: tuple[str, ...]
    code: str
    small: Mapping[str, Any]
    size: Sizes = (LENGTH, LENGTH)
    short: Sizes = (48, 48)
    about: str = ""
    differs: str = ""
    call: str = ""
    ranks: bool = False

    @property
    def slug(self) -> str:
        """The name as headings are linked to, and as the picture's file is called."""
        return slug(self.name)

    @property
    def shown(self) -> str:
        """The code with its imports, as a reader copies it."""
        names = [name for name in ("masks", "pse") if f"{name}." in self.code]
        lines = ["import torch\n"] if "torch." in self.code else []
        lines.append("import attnkit as ak")
        lines += [f"from attnkit import {', '.join(names)}"] if names else []
        return "\n".join([*lines, "", self.code])

    @cached_property
    def whole(self) -> Made:
        """What the code leaves behind as it is shown: the page, its table and a picture ask."""
        return self.made()

    def made(self, sizes: Mapping[str, Any] | None = None) -> Made:
        """Run the code, of other sizes where some are given: those of `small`, in tests."""
        left = dict(sizes or {})
        tree = _Resized(left).visit(ast.parse(self.shown))
        if left:
            raise ValueError(f"{self.name}: no line of the code sets {', '.join(left)}")
        names: dict[str, Any] = {"__name__": self.name}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            exec(compile(ast.fix_missing_locations(tree), self.name, "exec"), names)
        layers = names["layers"] if "layers" in names else [names["layer"]]
        different = {layer.composition: layer for layer in layers}
        call = {self.call: names[self.call]} if self.call else {}
        return Made(
            tuple(different.values()), call, self.size if sizes is None else self.short, names
        )


def slug(heading: str) -> str:
    """Return what a heading is linked by."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


class _Resized(ast.NodeTransformer):
    """Puts other values in place of those that names are set to, and takes them out of a dict."""

    def __init__(self, sizes: dict[str, Any]) -> None:
        self.sizes = sizes

    def visit_Assign(self, node: ast.Assign) -> ast.Assign:
        target = node.targets[0]
        if isinstance(target, ast.Name) and target.id in self.sizes:
            value = _written(self.sizes.pop(target.id), isinstance(node.value, ast.Tuple))
            node.value = ast.parse(repr(value), mode="eval").body
        return node


def _written(value: Any, as_tuple: bool) -> Any:
    """Return a value of YAML, which has lists only, as Python writes it: lists of tuples."""
    if not isinstance(value, list):
        return value
    inside = [_written(one, True) for one in value]
    return tuple(inside) if as_tuple else inside


def read() -> Iterator[Variant]:
    """Yield what stands in the list."""
    text = Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8")
    for kind in YAML(typ="safe").load(text):
        for one in kind["variants"]:
            texts = {name: one[name].strip() for name in ("what", "differs") if name in one}
            sizes = {name: tuple(one[name]) for name in ("size", "short") if name in one}
            rest = {"papers": tuple(one["papers"]), "small": one.get("small", {})}
            of = {"kind": kind["kind"], "about": kind.get("about", "").strip()}
            yield Variant(**{**one, **texts, **sizes, **rest, **of})


VARIANTS = tuple(read())


def block_diffusion(length: int, block: int) -> masks.Mask:
    """Return the mask of block diffusion, of a text of `length` tokens and its noisy copy."""
    (variant,) = (one for one in VARIANTS if one.name == "Block diffusion")
    return variant.made({"half": length // 2, "block": block}).mask


# -- the page ------------------------------------------------------------------------------------


def page() -> str:
    """Return the whole page."""
    lines = [_HEAD.format(count=len(VARIANTS), length=LENGTH)]
    groups = [(kind, list(group)) for kind, group in groupby(VARIANTS, lambda one: one.kind)]
    for kind, group in groups:
        lines += [f"[{kind}](#{slug(kind)})", "", *map(_thumbnail, group), ""]
    for kind, group in groups:
        about = [group[0].about, ""] if group[0].about else []
        lines += [f"## {kind}", "", *about, *map(_section, group)]
    return "\n".join([*lines, _COMPARED, comparison(), ""])


_HEAD = """\
# Variants

Find the attention of a paper here, and copy it: {count} patterns of the literature as code that
runs, with the plan of the fused calls that compute it on Ascend. Every block leaves a `layer`, or
several `layers`, to be called as `layer(q, k, v)` with tensors `[batch, tokens, heads, 64]`.

Pictures show queries from top to bottom and keys from left to right. A colour is a call, or a
sequence of one; shades are biases, or how much of a field is seen. Plans are for {length:,} tokens
unless they say otherwise, 8 heads of 64, bfloat16, training, and proven by `Plan.verify()`. Prices
rank plans; they are no times of a device. [Reading a report](start/explain.md) says the rest.

Tests run every block, compare what it allows, cell by cell, and every weight with a plain function
written from the paper, and the fused calls with the definition, gradients too.

To train one, give its mask and bias to `ak.MultiHeadAttention(dim, heads, mask=..., pse=...)`,
the layer of a transformer: [first layer](start/first-layer.md),
[training](notebooks/4-training.ipynb).
"""

_COMPARED = """\
## Side by side and gathered

The best plan whose pieces have their keys side by side, and the best one that may also
[gather keys](how-it-works/gathered.md) from several places, neither with a mask of one entry per
cell; and what is chosen. At this length that may be one call with a full mask: up to 4,096 x 4,096
entries it is weighed like any other plan. In longer texts it is the last resort.
"""


def _thumbnail(variant: Variant) -> str:
    file = f"images/variants/{variant.slug}.svg"
    return (
        f'<a href="#{variant.slug}" title="{variant.name}">'
        f'<img src="{file}" alt="{variant.name}" height="{_extent(variant.size)[0]}"></a>'
    )


def _section(variant: Variant) -> str:
    """Return the page's section on one variant."""
    lines = [
        f"### {variant.name}",
        "",
        f"![the cells of {variant.name}](images/variants/{variant.slug}.svg)",
        "",
        variant.what,
        "",
        *(f"- {_cited(paper)}" for paper in variant.papers),
        "",
        f"```python\n{variant.shown}```",
        "",
    ]
    if variant.differs:
        lines += [f"*What differs:* {variant.differs}", ""]
    made = variant.whole
    for layer in made.layers:
        plan = made.plan(layer)
        share = float(made.allowed(layer).float().mean())
        lines += [
            f'<details markdown="1"><summary>{told(plan, share)}</summary>',
            "",
            f"```text\n{plan.explain()}\n```",
            "",
            "</details>",
            "",
        ]
    return "\n".join(lines)


def _cited(paper: str) -> str:
    """Return a reference with its title linked: "authors, year. title. where"."""
    authors, rest = re.split(r"(?<=\d{4})\. ", paper, maxsplit=1)
    title, where = re.fullmatch(r"(.*?)\.? (\S+)", rest).groups()  # type: ignore[union-attr]
    if where.startswith("arXiv:"):
        return f"{authors}. [{title}](https://arxiv.org/abs/{where[6:]})."
    return f"{authors}. [{title}]({where})."


def told(plan: ak.Plan, allowed: float) -> str:
    """Return in one line the share of cells, the calls of a plan, its sequences and its price."""
    (q_len, kv_len), *_ = plan.request.sequences
    of = "" if q_len == kv_len == LENGTH else f" of {q_len:,} x {kv_len:,}"
    share = f"{100 * allowed:.1f} % of the cells{of}"
    if plan.price is None:
        codes = dict.fromkeys(refusal.code for refusal in lower(plan.request).refusals)
        return f"{share}; no fused call: {', '.join(codes)}"
    return f"{share}; on Ascend {calls_of(plan)}"


def calls_of(plan: ak.Plan | None) -> str:
    """Return the calls of a plan, their sequences, whether rows are merged, and the price."""
    if plan is None or plan.price is None:
        return "none"
    calls = " + ".join(step.label for step in plan.steps)
    sequences = sum(len(step.blocks) for step in plan.steps if step.call.is_packed)
    counted = f", {sequences:,} sequences" if sequences else ""
    merged = plan.steps[0].partial and not all(parts.once for parts in plan.by_heads)
    return f"{calls}{counted}{', merged' * merged}: {plan.price.nanoseconds / 1e3:,.0f} us"


# -- keys side by side, and gathered ---------------------------------------------------------------


def comparison() -> str:
    """Return the table of the best plans whose keys lie side by side, or are gathered, too."""
    lines = ["| mask | keys side by side | keys gathered, too | chosen |", "|---|---|---|---|"]
    for variant in VARIANTS:
        if variant.ranks and variant.kind != "Images and video":
            made = variant.whole
            plan = made.plan(made.layers[0])
            cut = replace(search_for(plan.request, Search(gathers=False)), backend="emulated")
            ways = calls_of(without_mask(cut)), calls_of(without_mask(plan))
            chosen = calls_of(plan) + (", full mask" if reads_all(plan.steps[0]) else "")
            linked = f"[{variant.name}](#{variant.slug})"
            lines.append(f"| {linked} | {' | '.join(ways)} | {chosen} |")
    return "\n".join(lines)


def without_mask(plan: ak.Plan) -> ak.Plan | None:
    """Return the cheapest way of a plan that reads no mask of one entry per cell."""
    ways = [plan.solution, *plan.alternatives]
    spared = [way for way in ways if not any(map(reads_all, way.launches))]
    best = min(spared, key=lambda way: way.price.nanoseconds, default=None)
    return None if best is None else replace(plan, steps=best.launches, alternatives=())


def reads_all(launch: Launch) -> bool:
    """Whether a call reads a mask with an entry for each cell of the score matrices."""
    mask = launch.call.atten_mask
    return mask is not None and mask.kind == "full" and not launch.partial


# -- pictures --------------------------------------------------------------------------------------

FIELDS = 64
_STYLE = "svg{color:#1f2933}@media(prefers-color-scheme:dark){svg{color:#e4e7eb}}"


def picture(variant: Variant) -> str:
    """Return the picture of a variant: a panel for each layer, two where heads differ."""
    made = variant.whole
    panels: dict[str, None] = {}
    for layer in made.layers:
        for head in {0, (made.mask_of(layer).heads or 1) - 1}:
            panels[svg.inline(_drawn(made, layer, head), side=4 * FIELDS)] = None
    sizes = re.findall(r'width="(\d+)" height="(\d+)"', next(iter(panels)))
    width, height = map(int, sizes[0])
    step = width + 16
    moved = (f'<g transform="translate({k * step})">{one}</g>' for k, one in enumerate(panels))
    whole = step * len(panels) - 16
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{whole}" height="{height}" '
        f'viewBox="0 0 {whole} {height}"><style>{_STYLE}</style>{"".join(moved)}</svg>\n'
    )


def _extent(size: Sizes) -> Sizes:
    """Return height and width of a panel, in fields."""
    return max(10, FIELDS * size[0] // max(size)), max(10, FIELDS * size[1] // max(size))


def _drawn(made: Made, layer: ak.Attention, head: int) -> Drawing:
    """Return the fields of one head: a colour for each call, shades where a bias is added."""
    plan, mask = made.plan(layer), made.mask_of(layer)
    in_place = plan.steps and plan.in_order is None and not mask.comes_with_call
    if layer.pse is None and in_place and mask.is_region(*made.size):
        return drawing(plan, 0, head, FIELDS)
    cells = made.allowed(layer)
    shades = cells[head % len(cells)].double()
    if layer.pse is not None:
        shades = shades * _shade(layer, shades)
    share = F.adaptive_avg_pool2d(shades[None], [min(FIELDS, n) for n in _extent(made.size)])[0]
    return Drawing(*made.size, (fields.layer(share.numpy(), colour(0)),))


def _shade(layer: ak.Attention, cells: torch.Tensor) -> torch.Tensor:
    """Return a bias as shades: the largest that is allowed is 1."""
    for tensor in layer.pse.tensors:
        if tensor.requires_grad and not tensor.any():  # before it is trained
            torch.nn.init.normal_(tensor, generator=torch.Generator().manual_seed(0))
    bias = layer.pse.for_heads(0, 1).materialize(*cells.shape)[0, 0].double().detach()
    known = bias[cells > 0]
    return 0.15 + 0.85 * (bias - known.min()) / (known.max() - known.min())


def main() -> None:
    """Write the page, and the pictures unless told ``--text``."""
    (DOCS / "variants.md").write_text(page(), encoding="utf-8")
    if "--text" in sys.argv:
        return
    folder = DOCS / "images" / "variants"
    for old in folder.glob("*"):
        old.unlink()
    with progress("drawing variants", len(VARIANTS)) as bar:
        for variant in VARIANTS:
            (folder / f"{variant.slug}.svg").write_text(picture(variant), encoding="utf-8")
            bar.step(variant.slug)


if __name__ == "__main__":
    main()
