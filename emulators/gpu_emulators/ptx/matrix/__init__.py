"""Matrix units: the layouts of their operands as functions of arrays, and the instructions that use them."""

from . import mbarriers, mma, tensor_access, tensor_products, warp_groups
