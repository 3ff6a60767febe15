"""Matrix units: the layouts of their operands as functions of arrays, and the instructions that use them."""

from . import mma, warp_groups

__all__ = ["mma", "warp_groups"]
