"""The page of a plan: what a call computes as numbers, and what shows it in a browser."""

from attnkit.explorer.cells import CellPatch, Ends, RegionTable, cost, plain
from attnkit.explorer.page import save, write

__all__ = ["CellPatch", "Ends", "RegionTable", "cost", "plain", "save", "write"]
