"""Bad input: each error names what was given, the rule, and the remedy."""

from __future__ import annotations

import base64
import zlib

import numpy as np
import pytest
import torch

from attnkit import masks
from attnkit.errors import AttnkitError, CompositionError, CompositionTypeError
from attnkit.masks import And, Cut, Not, parse

C = masks.Causal()
CELLS = torch.ones(4, 4, dtype=torch.bool)
IDS = torch.tensor([0, 0, 1])

# what is asked, the type of the error, and words that the message must hold
BAD = {
    "tensor on the right": (lambda: C & CELLS, TypeError, "tensor of shape (4, 4)|Dense.keep"),
    "tensor on the left": (lambda: CELLS & C, TypeError, "tensor of shape (4, 4)|Dense.keep"),
    "array on the left": (lambda: np.ones((2, 2), bool) | C, TypeError, "numpy array|Dense.keep"),
    "none on the right": (lambda: C | None, TypeError, "None|both sides"),
    "none on the left": (lambda: None & C, TypeError, "None|both sides"),
    "minus a tensor": (lambda: C - CELLS, TypeError, "tensor of shape (4, 4)|Dense.keep"),
    "tensor minus": (lambda: CELLS - C, TypeError, "tensor of shape (4, 4)|Dense.keep"),
    "unhashable": (lambda: C & [1], TypeError, "[1] (list)|both sides"),
    "and of one": (lambda: And((C, C)), ValueError, "And|two or more masks that differ"),
    "and of no list": (lambda: And(C), TypeError, "list of masks|Causal()"),
    "not of an int": (lambda: Not(3), TypeError, "Not takes a mask|3 (int)"),
    "another name": (
        lambda: masks.SlidingWindow(window=64),
        TypeError,
        "takes no 'window'|did you mean size=64?|arguments are size, align",
    ),
    "a longer name": (
        lambda: masks.Band(right=0, left_window=3),
        TypeError,
        "'left_window'|did you mean left=3?",
    ),
    "a misspelt name": (lambda: masks.Causal(aling="top_left"), TypeError, "align='top_left'?"),
    "a name too many": (lambda: masks.Causal("top_left", size=3), TypeError, "'size'|align"),
    "empty window": (lambda: masks.SlidingWindow(0), ValueError, "empty window|at least 1"),
    "window of a tensor": (
        lambda: masks.SlidingWindow(torch.tensor(4)),
        TypeError,
        "tensor(4)|int(size)",
    ),
    "window of numpy": (lambda: masks.SlidingWindow(np.int64(4)), TypeError, "int64|int(size)"),
    "window of bool": (lambda: masks.SlidingWindow(True), TypeError, "True|bool|an int >= 1"),
    "empty band": (lambda: masks.Band(-3, 1), ValueError, "left=-3, right=1|left + right"),
    "band of float": (lambda: masks.Band(1.5, 1), TypeError, "left=1.5|an int"),
    "align": (lambda: masks.Causal("left"), ValueError, "'left'|bottom_right|top_left"),
    "align of window": (lambda: masks.SlidingWindow(2, None), ValueError, "None|bottom_right"),
    "empty columns": (lambda: masks.Columns(3, 3), ValueError, "Columns(3, 3)|start <= index"),
    "negative rows": (lambda: masks.Rows(-1), ValueError, "Rows start=-1|>= 0"),
    "chunk of 0": (lambda: masks.Chunked(0), ValueError, "Chunked size=0|>= 1"),
    "grid of nothing": (lambda: masks.Neighborhood((), 3), ValueError, "0 axes|1, 2 or 3"),
    "grid of four axes": (lambda: masks.Neighborhood((2,) * 4, 1), ValueError, "4 axes|1, 2 or 3"),
    "grid of no height": (lambda: masks.Neighborhood((0, 4), 1), ValueError, "shape[0]=0|>= 1"),
    "grid of float": (lambda: masks.Neighborhood((4.0, 4), 1), TypeError, "shape[0]=4.0|an int"),
    "grid of a word": (lambda: masks.Neighborhood("8x8", 1), TypeError, "'8x8'|(height, width)"),
    "grid of a tensor": (lambda: masks.Neighborhood(CELLS, 1), TypeError, "(height, width)"),
    "grid of bool": (lambda: masks.Neighborhood(True, 1), TypeError, "True|(height, width)"),
    "grid of 2**80 tokens": (
        lambda: masks.Neighborhood((1 << 40, 1 << 40), 1),
        ValueError,
        "more tokens than int64",
    ),
    "grid of other lengths": (
        lambda: masks.Neighborhood((8, 8), 3).materialize(65, 65),
        ValueError,
        "Neighborhood((8, 8), 3) is built for q_len=64|q_len=65",
    ),
    "kernel of 0": (lambda: masks.Neighborhood(8, 0), ValueError, "kernel=0|>= 1"),
    "kernel of bool": (lambda: masks.Neighborhood((8, 8), (True, 3)), TypeError, "kernel[0]=True"),
    "kernel of other axes": (
        lambda: masks.Neighborhood((8, 8), (3, 3, 3)),
        ValueError,
        "kernel=(3, 3, 3) has 3 entries|(8, 8) has 2 axes|one for each",
    ),
    "kernel beyond the grid": (
        lambda: masks.Neighborhood((8, 4), 5),
        ValueError,
        "kernel=5 with dilation=1|axis 1|at most 4",
    ),
    "dilated kernel beyond the grid": (
        lambda: masks.Neighborhood(8, 3, dilation=3),
        ValueError,
        "kernel=3 with dilation=3|at most 8",
    ),
    "dilation of 0": (lambda: masks.Neighborhood(8, 3, 0), ValueError, "dilation=0|>= 1"),
    "causal of a word": (
        lambda: masks.Neighborhood(8, 3, 1, "yes"),
        TypeError,
        "causal='yes'|True",
    ),
    "causal of int": (
        lambda: masks.Neighborhood((8, 8), 3, 1, (1, 0)),
        TypeError,
        "causal[0]=1|True or False",
    ),
    "tiles that do not divide": (
        lambda: masks.SlidingTiles((8, 9), 4, 1),
        ValueError,
        "tile=4 does not divide axis 1|9 tokens|Keys",
    ),
    "tiles of 0": (lambda: masks.SlidingTiles(8, 0, 1), ValueError, "SlidingTiles tile=0|>= 1"),
    "even window of tiles": (
        lambda: masks.SlidingTiles((8, 8), 2, 2),
        ValueError,
        "window=2 along axis 0|4 tiles of 2|odd number of tiles|all of them (4)",
    ),
    "more tiles than there are": (
        lambda: masks.SlidingTiles(8, 2, 5),
        ValueError,
        "window=5 along axis 0|4 tiles",
    ),
    "tiles of other axes": (
        lambda: masks.SlidingTiles((8, 8), (2, 2, 2), 1),
        ValueError,
        "tile=(2, 2, 2) has 3 entries|2 axes",
    ),
    "video of other lengths": (
        lambda: masks.SlidingTiles((2, 4, 4), 2, 1).region(30, 32),
        ValueError,
        "built for q_len=32|q_len=30",
    ),
    "windows that do not divide": (
        lambda: masks.ShiftedWindows((8, 8), (4, 3)),
        ValueError,
        "window=3 does not divide axis 1|8 tokens",
    ),
    "shift of a window": (
        lambda: masks.ShiftedWindows(8, 4, 4),
        ValueError,
        "shift=4 along axis 0|windows of 4|below the window",
    ),
    "shift of all": (
        lambda: masks.ShiftedWindows(8, 8, 4),
        ValueError,
        "shift=4|covers its axis|shift is 0 there",
    ),
    "negative shift": (lambda: masks.ShiftedWindows(8, 4, -1), ValueError, "shift=-1|>= 0"),
    "shift of float": (lambda: masks.ShiftedWindows(8, 4, 2.0), TypeError, "shift=2.0|an int"),
    "placed tensor": (lambda: masks.Placed(CELLS), TypeError, "Placed takes a mask|(4, 4)"),
    "placed before a float": (lambda: masks.Placed(C, 1.0), TypeError, "Placed before=1.0|an int"),
    "placed after -1": (lambda: masks.Placed(C, after=-1), ValueError, "Placed after=-1|>= 0"),
    "placed before three": (
        lambda: masks.Placed(C, (1, 2, 3)),
        TypeError,
        "before=(1, 2, 3) has 3 entries|(queries, keys)",
    ),
    "placed without room": (
        lambda: masks.Placed(C, 3, 2).materialize(4, 8),
        ValueError,
        "more tokens before and after its mask than|4 x 8",
    ),
    "placed grid of other lengths": (
        lambda: masks.Placed(masks.Neighborhood(4, 3), before=2).region(7, 7),
        ValueError,
        "built for q_len=6|q_len=7",
    ),
    "table of numbers": (
        lambda: masks.Blocks(CELLS.int(), 2, 2),
        TypeError,
        "int32|it is a bool tensor|compare first",
    ),
    "table of float lists": (lambda: masks.Blocks([[0.5]], 2, 2), TypeError, "float32|bool"),
    "table of unequal rows": (
        lambda: masks.Blocks([[True], [True, True]], 2, 2),
        TypeError,
        "as long as each other",
    ),
    "table of nothing": (lambda: masks.Blocks(CELLS[:0], 2, 2), ValueError, "(0, 4)|one block"),
    "table of one axis": (lambda: masks.Blocks(CELLS[0], 2, 2), ValueError, "(4,)|[q_blocks, kv"),
    "table of five axes": (
        lambda: masks.Blocks(CELLS[None, None, None], 2, 2),
        ValueError,
        "(1, 1, 1, 4, 4)|[heads, q_blocks, kv_blocks]",
    ),
    "table of words": (lambda: masks.Blocks("no yes", 2, 2), ValueError, "'no yes'|'#.. ##. .##'"),
    "picture of unequal rows": (lambda: masks.Blocks("## #", 2, 2), ValueError, "'## #'|as long"),
    "table of a bomb": (
        lambda: masks.Blocks(zip_bomb("1x1x4x4"), 2, 2),
        ValueError,
        "Blocks got packed|does not fit the shape",
    ),
    "table of nobody": (lambda: masks.Blocks(None, 2, 2), TypeError, "None|bool tensor"),
    "blocks of 0": (lambda: masks.Blocks("#", 0, 2), ValueError, "q_block=0|>= 1"),
    "blocks of float": (lambda: masks.Blocks("#", 2, 2.0), TypeError, "kv_block=2.0|an int"),
    "causal blocks of int": (lambda: masks.Blocks("#", 2, 2, 1), TypeError, "causal=1|True or F"),
    "blocks anchored in the middle": (
        lambda: masks.Blocks("#", 2, 2, align="middle"),
        ValueError,
        "'middle'|bottom_right",
    ),
    "blocks that do not cover": (
        lambda: masks.Blocks("## ##", 4, 4).materialize(9, 8),
        ValueError,
        "built for q_len=8|q_len=9",
    ),
    "blocks that reach elsewhere": (
        lambda: masks.Blocks("## ##", 4, 4, kv_len=9),
        ValueError,
        "kv_len=9, but 2 blocks of 4|to 5 at least and to 8 at most|are 3",
    ),
    "blocks for other heads": (
        lambda: masks.Blocks(CELLS[None].expand(3, 4, 4), 1, 1).materialize(4, 4, heads=4),
        ValueError,
        "3 heads|there are 4",
    ),
    "tree of nothing": (lambda: masks.Tree([]), ValueError, "Tree parents is empty"),
    "tree of float": (lambda: masks.Tree([-1, 0.0]), TypeError, "parents[1]=0.0|an int"),
    "tree of one number": (lambda: masks.Tree(-1), TypeError, "Tree parents|sequence of int"),
    "parent out of range": (
        lambda: masks.Tree([-1, 2]),
        ValueError,
        "parents[1]=2 is no token of the tree|2, counted from 0",
    ),
    "parent of -2": (lambda: masks.Tree([-1, -2]), ValueError, "parents[1]=-2|>= -1"),
    "tree with a cycle": (
        lambda: masks.Tree([-1, 3, 0, 1]),
        ValueError,
        "parents[1]=3 leads into a cycle|ends in no root|-1",
    ),
    "tree of its own parent": (lambda: masks.Tree([0]), ValueError, "parents[0]=0|cycle"),
    "tree below a cycle": (lambda: masks.Tree([1, 2, 1]), ValueError, "parents[0]=1|cycle"),
    "trees of unlike sizes": (
        lambda: masks.Tree([[-1], [-1, 0]]),
        ValueError,
        "[1, 2] tokens by batch element",
    ),
    "trees and a number": (lambda: masks.Tree([[-1], 0]), TypeError, "Tree parents|sequence"),
    "prefix of a tree of float": (lambda: masks.Tree([-1], 2.0), TypeError, "prefix=2.0|an int"),
    "tree of other lengths": (
        lambda: masks.Tree([-1, 0]).region(3, 4),
        ValueError,
        "q_len=2|q_len=3",
    ),
    "tree behind another prefix": (
        lambda: masks.Tree([-1, 0], prefix=3).region(2, 4),
        ValueError,
        "kv_len=5|kv_len=4",
    ),
    "tree without its keys": (
        lambda: masks.Tree([-1, 0]).region(2, 1),
        ValueError,
        "the last 2 keys|kv_len=1",
    ),
    "step of 0": (lambda: masks.Dilated(0), ValueError, "Dilated step=0|>= 1"),
    "no lengths": (lambda: masks.Documents([]), ValueError, "lengths is empty|at least one"),
    "negative length": (lambda: masks.Documents([2, -1]), ValueError, "lengths[1]=-1|>= 0"),
    "float length": (lambda: masks.Documents([2, 3.0]), TypeError, "lengths[1]=3.0|int"),
    "numpy length": (lambda: masks.Documents([np.int64(2)]), TypeError, "int(lengths[0])"),
    "text for lengths": (lambda: masks.Documents("23"), TypeError, "'23' (str)|sequence of int"),
    "one length": (lambda: masks.Padding(5), TypeError, "5 (int)|sequence of int"),
    "float tensor": (lambda: masks.Documents(torch.zeros(2, 2)), TypeError, "float32|integers"),
    "lengths 2-D": (lambda: masks.Padding(torch.ones(2, 2).int()), TypeError, "(2, 2)|1-D"),
    "sums differ": (lambda: masks.Documents([[1, 2], [1]]), ValueError, "[3, 1]|padding"),
    "counts differ": (lambda: masks.Documents([2, 3], [5]), ValueError, "(2, 3)|differ in shape"),
    "ids come back": (
        lambda: masks.Documents.from_ids([1, 2, 1]),
        ValueError,
        "document 1 of batch element 0|contiguous|SameId",
    ),
    "ids 3-D": (lambda: masks.Documents.from_ids(IDS[None, None]), TypeError, "(1, 1, 3)|[B, S]"),
    "ids of float": (lambda: masks.Documents.from_ids(IDS / 2), TypeError, "float32|integer"),
    "ids ragged": (lambda: masks.Documents.from_ids([[1], [1, 2]]), TypeError, "[[1], [1, 2]]"),
    "no ids": (lambda: masks.Documents.from_ids([]), TypeError, "(0,)|per token"),
    "cumulative without 0": (
        lambda: masks.Documents.from_cu_seqlens([2, 5]),
        ValueError,
        "cu_seqlens=(2, 5)|starts with 0|Documents(lengths)",
    ),
    "cumulative falls": (lambda: masks.Documents.from_cu_seqlens([0, 5, 3]), ValueError, "falls"),
    "side": (lambda: masks.Padding([2], "up"), ValueError, "'up'|'right' or 'left'"),
    "dense of float": (lambda: masks.Dense.keep(torch.ones(2, 2)), TypeError, "float32|pse.Dense"),
    "dense 1-D": (lambda: masks.Dense.drop(CELLS[0]), ValueError, "shape (4,)|[Sq, Skv]"),
    "dense without batch": (lambda: masks.Dense.keep(CELLS[None][:0]), ValueError, "(0, 4, 4)"),
    "dense on meta": (lambda: masks.Dense.keep(CELLS.to("meta")), ValueError, "meta"),
    "dense of noise": (lambda: masks.Dense("noise"), ValueError, "'noise'|Dense.keep"),
    "dense with bits to spare": (lambda: masks.Dense("1x1x1x1:eJz7DwABAAEA"), ValueError, "beyond"),
    "no heads": (lambda: masks.PerHead([]), ValueError, "no masks|each query head"),
    "heads of a mask": (lambda: masks.PerHead(C), TypeError, "list of masks|Causal()"),
    "heads of ints": (lambda: masks.PerHead([C, 3]), TypeError, "3 (int)"),
    "nested heads": (lambda: masks.PerHead([masks.PerHead([C])]), ValueError, "nest|& or |"),
    "no function": (lambda: masks.Predicate(3), TypeError, "fn(b, h, i, j)|3 (int)"),
    "function of no batch": (lambda: masks.Predicate(len, batch=0), ValueError, "batch=0"),
    "cut by an int": (lambda: C[3], TypeError, "two slices|mask[a:b, c:d]"),
    "cut with a step": (lambda: C[0:4:2, :], TypeError, "without a step"),
    "cut from the end": (lambda: C[-2:, :], ValueError, "slice(-2, None, None)|q_len - 2"),
    "cut to the end": (lambda: C[:, :-1], ValueError, "slice(None, -1, None)|kv_len - 1"),
    "slices from the end": (
        lambda: masks.Slices([(-2, 4, 0, 4, None, 0)], 4, 4),
        ValueError,
        "(-2, 4, 0, 4, None, 0)|count from the first|q_len - 2",
    ),
    "a span of one end": (lambda: masks.Spans([(3,)]), TypeError, "(3,)|(start, stop)"),
    "a span of nothing": (lambda: masks.Spans([(3, 3)]), ValueError, "(3, 3)|start <= index"),
    "a span from the end": (lambda: masks.Spans([[(-3, 3)]]), ValueError, "-3|>= 0"),
    "spans of a length": (lambda: masks.Spans(3), TypeError, "3 (int)|Spans.of"),
    "spans beside spans": (lambda: masks.Spans([[(0, 1)], 3]), TypeError, "3 (int)|batch element"),
    "keys of one end": (lambda: masks.Keys([(3,)]), TypeError, "(3,)|(start, stop)"),
    "keys of nothing": (lambda: masks.Keys([(3, 3)]), ValueError, "(3, 3)|start < stop"),
    "keys that touch": (lambda: masks.Keys([(0, 3), (3, 4)]), ValueError, "gap between two"),
    "keys behind the end": (lambda: masks.Keys([(0, None), (3, 4)]), ValueError, "the last may"),
    "keys from the end": (lambda: masks.Keys([[(-3, 3)]]), ValueError, "-3|>= 0"),
    "keys of a tensor": (lambda: masks.Keys(IDS), TypeError, "a tensor|Padding.of"),
    "keys beside keys": (lambda: masks.Keys([[(0, 1)], 3]), TypeError, "3 (int)|batch element"),
    "numbers of a tensor": (lambda: masks.SameId(IDS), TypeError, "a tensor|SameId.of"),
    "numbers of no token": (lambda: masks.SameId([(1, 0)]), ValueError, "tokens of a run=0|>= 1"),
    "numbers of nobody": (lambda: masks.SameId([]), TypeError, "the runs of a text"),
    "numbers of one end": (lambda: masks.SameId([(3,)]), TypeError, "(3,)|how many tokens"),
    "numbers of unlike texts": (
        lambda: masks.SameId([[(0, 2)], [(0, 3)]]),
        ValueError,
        "[2, 3] queries|is None",
    ),
    "numbers of unlike batches": (
        lambda: masks.SameId([[(0, 2)]] * 2, [[(0, 3)]] * 3),
        ValueError,
        "[2, 3] batch elements",
    ),
    "numbers of float": (lambda: masks.SameId.of(IDS / 2), TypeError, "float32|integer"),
    "none of float": (lambda: masks.SameId.of(IDS, none=0.5), TypeError, "0.5|an int"),
    "a phase of float": (lambda: masks.Chunked(2, phase=0.5), TypeError, "phase"),
    "a phase before all": (lambda: masks.Chunked(2, phase=-1), ValueError, "phase=-1|>= 0"),
    "blocks before none": (lambda: masks.BlockCausal(2, before=-1), ValueError, "before=-1|>= 0"),
    "types of float": (lambda: masks.from_token_types(IDS / 2), TypeError, "float32|integer"),
    "types by name": (
        lambda: masks.from_token_types(IDS, both_ways=["image"]),
        TypeError,
        "both_ways='image'|an int",
    ),
    "cut backwards": (lambda: C[3:1, :], ValueError, "(3, 1)|start <= index"),
    "cut of unknown lengths": (lambda: C[0:2, 0:2], ValueError, "q_len is not known|q_len=..."),
    "cut too far": (
        lambda: masks.Documents([2, 3])[0:9, :],
        ValueError,
        "(0, 9)|q_len=5|clipped",
    ),
    "cut says another length": (
        lambda: masks.Documents([2]).cut((0, 1), (0, 1), q_len=7),
        ValueError,
        "q_len=2|q_len=7|leave it out",
    ),
    "cut of no range": (lambda: Cut(C, 5, (0, 1)), TypeError, "q_range=5|(start, stop)"),
    "lengths that disagree": (
        lambda: masks.Documents([2, 3]) & masks.Documents([6]),
        ValueError,
        "q_len|Documents((2, 3)): 5|Documents((6,)): 6|same lengths",
    ),
    "batches that disagree": (
        lambda: masks.Padding([1]) | masks.Prefix([1, 2]),
        ValueError,
        "batch sizes|one entry per batch element",
    ),
    "heads that disagree": (
        lambda: masks.PerHead([C, C]) & masks.PerHead([C]),
        ValueError,
        "head counts|one entry per query head",
    ),
    # asked of a mask that is well-built
    "other lengths": (lambda: masks.Documents([2, 3]).region(6, 6), ValueError, "q_len=5|q_len=6"),
    "other lengths, inside": (
        lambda: (C & masks.Documents([2, 3])).materialize(6, 6),
        ValueError,
        "Documents((2, 3)) is built for q_len=5|cut it",
    ),
    "padding too long, inside": (
        lambda: (C | masks.Padding([9])).region(4, 4),
        ValueError,
        "Padding((9,))|9 keys|kv_len is 4",
    ),
    "dense of another size": (
        lambda: masks.Dense.keep(CELLS).region(4, 5),
        ValueError,
        "kv_len=4|kv_len=5",
    ),
    "other batch": (
        lambda: masks.Padding([2, 3]).materialize(4, 4, batch=3),
        ValueError,
        "2 batch elements|there are 3|one entry",
    ),
    "other heads": (
        lambda: (masks.PerHead([C, C]) & C).materialize(2, 2, heads=3),
        ValueError,
        "2 heads|there are 3",
    ),
    "batch out of range": (lambda: masks.Padding([2]).show(2, 2, batch=1), ValueError, "batch=1"),
    "negative head": (lambda: C.region(2, 2, head=-1), ValueError, "head=-1"),
    "negative length of rows": (lambda: C.region(-1, 2), ValueError, "q_len=-1|>= 0"),
    "length of float": (lambda: C.materialize(2, 2.0), TypeError, "kv_len=2.0|int"),
    "length of numpy": (lambda: C.region(np.int64(2), 2), TypeError, "int(q_len)"),
    "negative batch": (lambda: C.materialize(2, 2, batch=-1), ValueError, "batch=-1"),
    "no region": (lambda: masks.Dilated(2).region(4, 4), ValueError, "Dilated(2)|materialize()"),
    "picture of width 0": (lambda: C.show(2, 2, width=0), ValueError, "width=0"),
    "function of numbers": (
        lambda: masks.Predicate(lambda b, h, i, j: i - j).materialize(2, 2),
        TypeError,
        "int64|bool tensor",
    ),
    "function of another shape": (
        lambda: masks.Predicate(lambda b, h, i, j: CELLS).materialize(2, 2),
        ValueError,
        "(4, 4)|one cell|single bool",
    ),
    # text
    "no text": (lambda: parse(3), TypeError, "text of a mask|3 (int)"),
    "open bracket": (lambda: parse("Causal("), ValueError, "'Causal('|column"),
    "misspelt": (lambda: parse("Causl()"), ValueError, "Causl|did you mean 'Causal'"),
    "no mask in text": (lambda: parse("3"), ValueError, "'3'|not a mask"),
    "function in text": (lambda: parse("<masks.Predicate f>"), ValueError, "no text form"),
    "unknown argument": (lambda: parse("Causal(side=3)"), TypeError, "side|did you mean align"),
    "unpacked arguments": (lambda: parse("Causal(**{})"), ValueError, "key=value"),
    "starred arguments": (lambda: parse("Causal(*[1])"), ValueError, "not part of the language"),
    "subscripted tuple": (lambda: parse("(1, 2)[5]"), ValueError, "out of range"),
    "code": (lambda: parse("__import__('os')"), ValueError, "unknown mask __import__"),
    "lambda": (lambda: parse("PerHead(lambda: 0)"), ValueError, "not part of the language"),
    "null byte": (lambda: parse("\0"), ValueError, "null"),
    "too deep": (lambda: parse("~" * 20000 + "Full()"), ValueError, "cannot read the mask"),
    "bad argument in text": (lambda: parse("Full() & Chunked(0)"), ValueError, "Chunked size=0"),
    "keyword twice": (
        lambda: parse("SlidingWindow(size=3, size=4)"),
        ValueError,
        "SlidingWindow got 'size' twice|say it once",
    ),
    "10 MB of text": (lambda: parse("Full() | " * 10**6), ValueError, "too long|262144|4194304"),
    "10 MB in quotes": (lambda: parse(f"Dense('{'x' * 10**7}')"), ValueError, "too long"),
    "4 MB in quotes": (
        lambda: parse(f"Dense('{'x' * 4 * 10**6}')"),
        ValueError,
        "not a packed mask",
    ),
    "5,000 digits": (lambda: parse(f"Chunked({'9' * 5000})"), ValueError, "cannot read the mask"),
    "4,000 digits": (lambda: parse(f"Chunked({'9' * 4000})"), ValueError, "int of 13288 bits"),
    "deep brackets": (lambda: parse("(" * 10**5 + ")" * 10**5), ValueError, "nested"),
    "a long name": (lambda: parse("f" * 10**5 + "()"), ValueError, "unknown mask"),
    "a power": (lambda: parse("Chunked(9**9**9**9)"), ValueError, "not part of the language"),
    "sum of masks": (lambda: parse("Full() + Full()"), ValueError, "cannot read the mask"),
}


def zip_bomb(shape):
    bits = zlib.compressobj(9)
    packed = b"".join(bits.compress(bytes(1 << 20)) for _ in range(32)) + bits.flush()
    return f"{shape}:{base64.b64encode(packed).decode()}"


HUGE = 10**5000
BAD |= {
    "a bomb": (lambda: masks.Dense(zip_bomb("1x1x4x4")), ValueError, "does not fit the shape"),
    "a shape of 2**80 cells": (
        lambda: masks.Dense(zip_bomb("1x1x1099511627776x1099511627776")),
        ValueError,
        "1 to 8589934592 cells",
    ),
    "a shape that nothing packs": (
        lambda: masks.Dense("1x1x92681x92681:eNpjAAAAAQAB"),
        ValueError,
        "does not fit the shape",
    ),
    "dense of a tensor": (
        lambda: masks.Dense(CELLS),
        TypeError,
        "Dense.keep(tensor)|Dense.drop(tensor)|shape (4, 4)",
    ),
    "window of 2**63": (lambda: masks.SlidingWindow(1 << 63), ValueError, "64-bit|at most"),
    "window of 5,000 digits": (
        lambda: masks.SlidingWindow(HUGE),
        ValueError,
        "<int of 16610 bits>",
    ),
    "window of -5,000 digits": (lambda: masks.SlidingWindow(-HUGE), ValueError, "empty window"),
    "lengths of 2**70": (lambda: masks.Documents([1 << 70]), ValueError, "lengths[0]|64-bit"),
    "ids of 2**70": (lambda: masks.Documents.from_ids([1 << 70]), TypeError, "from_ids"),
    "rows of 2**70": (lambda: C.region(1 << 70, 4), ValueError, "q_len|64-bit"),
    "bytes of lengths": (lambda: masks.Documents(bytearray(b"12")), TypeError, "sequence of int"),
    "lengths without end": (lambda: masks.Padding(range(10**12)), ValueError, "1000000000000"),
    "dense of sparse": (lambda: masks.Dense.keep(CELLS.to_sparse()), ValueError, "sparse_coo"),
    "dense of nested": (
        lambda: masks.Dense.keep(torch.nested.as_nested_tensor([CELLS, CELLS[:2]])),
        ValueError,
        "nested",
    ),
    "dense of mkldnn": (
        lambda: masks.Dense.drop(torch.ones(2, 2).to_mkldnn()),
        ValueError,
        "mkldnn",
    ),
    "dense of complex": (
        lambda: masks.Dense.keep(torch.ones(2, 2, dtype=torch.complex64)),
        TypeError,
        "complex64",
    ),
    "lengths on meta": (lambda: masks.Padding(IDS.to("meta")), ValueError, "meta device"),
    "lengths of sparse": (lambda: masks.Documents(IDS.to_sparse()), ValueError, "sparse"),
    "ids on meta": (lambda: masks.Documents.from_ids(IDS.to("meta")), ValueError, "meta device"),
    "cells on meta": (lambda: masks.recover(CELLS.to("meta")), ValueError, "meta device"),
    "align of an array": (lambda: masks.Causal(np.ones(3)), ValueError, "bottom_right"),
    "bounds of 5,000 digits": (
        lambda: masks.recover([(0, HUGE)], kv_len=4),
        ValueError,
        "<int of 16610 bits>",
    ),
    "picture of no number": (lambda: C.show(None, 2), TypeError, "q_len=None"),
    "cut by an array": (lambda: C[np.ones(2) :, :], TypeError, "q_range start"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_explained(name):
    ask, kind, words = BAD[name]
    with pytest.raises(kind) as caught:
        ask()
    assert isinstance(caught.value, AttnkitError)
    assert isinstance(caught.value, CompositionError)
    assert isinstance(caught.value, CompositionTypeError) is (kind is TypeError)
    message = str(caught.value)
    assert len(message) < 1200
    missing = [word for word in words.split("|") if word and word not in message]
    assert not missing, f"{missing} not in {message!r}"
