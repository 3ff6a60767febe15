"""Weights in the format Marlin 2:4, in which compressed-tensors and vLLM stored 2:4 weights of 4 or 8 bits."""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch
from torch import Tensor

from ..functional.checks import describe
from ..functional.masks import expand_mask
from ..ops.pattern import PLACES

# Tensors of a weight: values, metadata and scales, as compressed-tensors names them, and vLLM's gptq_marlin_24
COMPRESSED_TENSORS = ("weight_packed", "meta", "scale_packed")
VLLM = ("B_24", "B_meta", "s")
# Columns that share a scale, where a row has several
GROUP = 128
# Settings of its weights in a config of compressed-tensors
SCHEMES = [
    {"num_bits": bits, "type": "int", "symmetric": True, "strategy": strategy, "group_size": group}
    for bits in (4, 8)
    for strategy, group in (("group", GROUP), ("channel", None), ("channel", -1))
]
# Code of 2:4 by the places of its values; 0 where they are no two places in order
CODES = {places: code for code, places in PLACES.items()}


def check_scheme(scheme: object) -> None:
    """Raise ValueError unless one of the config_groups of compressed-tensors is of weights alone, and of SCHEMES."""
    settings = scheme if isinstance(scheme, dict) else {}
    weights = settings.get("weights")
    found = {name: weights.get(name) for name in SCHEMES[0]} if isinstance(weights, dict) else weights
    activations = settings.get("input_activations") or settings.get("output_activations")
    if found not in SCHEMES or activations:
        raise ValueError(
            "checkpoint: expected weights in the format marlin-24 as symmetric integers of 4 or 8 bits, with a scale a "
            f"row or for {GROUP} columns, and activations unchanged, got weights {json.dumps(found)} and activations "
            f"{json.dumps(activations)}"
        )


def marlin_24_weight(name: str, tensors: Mapping[str, Tensor]) -> Tensor:
    """Dense weight float16 [out, K] with exact zeros: a value is its integer times its scale, rounded once.

    The layout is that of compressed-tensors 0.12 (``compressors/sparse_quantized_compressors/marlin_24.py`` and
    ``utils/permutations_24.py``): kept values [K / 2, out] in tiles of 16 x 64, with half of the range added.

    Args:
        name: of the layer, for errors.
        tensors: by their names in COMPRESSED_TENSORS or VLLM: int32 [K / 32, 2 out] for 4 bits and [K / 32, 4 out] for
            8, int16 [K / 32, 2 out], and float16 [1, out] or [K / 128, out]; out is divisible by 64.

    Raises:
        ValueError: if shapes or dtypes are not as above, metadata name no two places, or scales are not finite.
    """
    names = COMPRESSED_TENSORS if COMPRESSED_TENSORS[0] in tensors else VLLM
    values, metadata, scales = (tensors[part] for part in names)
    k = 32 * len(values) if values.dim() == 2 else 0
    rows = scales.shape[-1] if scales.dim() == 2 else 0
    groups = len(scales) if scales.dim() == 2 else 0
    fits = (
        values.dtype == torch.int32
        and metadata.dtype == torch.int16
        and scales.dtype == torch.float16
        and k > 0
        and rows > 0
        and rows % 64 == 0
        and values.shape[1] in (2 * rows, 4 * rows)
        and list(metadata.shape) == [k // 32, 2 * rows]
        and (groups == 1 or groups * GROUP == k)
    )
    if not fits:
        found = ", ".join(f"{part} {describe(tensors[part])}" for part in names)
        raise ValueError(
            f"checkpoint: expected {names[0]} int32 [K / 32, 2 out or 4 out], {names[1]} int16 [K / 32, 2 out] and "
            f"{names[2]} float16 [1 or K / {GROUP}, out] of {name}, with out divisible by 64, got {found}"
        )
    if not scales.isfinite().all():
        raise ValueError(f"checkpoint: {name}.{names[2]}: expected finite scales, got NaN or infinity")
    codes = _codes(metadata, rows, k)
    if not codes.all():
        raise ValueError(f"checkpoint: {name}.{names[1]}: expected two places in order for each 4 weights, got others")
    # compressed-tensors compares a group with the kept columns, so it orders two groups as a single one
    in_order = groups == 1 or (names == COMPRESSED_TENSORS and k // 2 <= GROUP)
    if not in_order:
        scales = scales.view(groups, -1, 4, 2).transpose(2, 3).reshape(groups, rows)
    scale_of_value = scales.t().float().repeat_interleave(k // 2 // groups, 1)
    # 0 times a negative scale is -0
    kept = (_integers(values, rows, k) * scale_of_value + 0.0).to(scales.dtype)
    return torch.zeros(rows, k, dtype=scales.dtype).masked_scatter_(expand_mask(codes, "2:4"), kept)


def _codes(metadata: Tensor, rows: int, k: int) -> Tensor:
    """Group codes [out, K / 4], 0 where metadata name no two places.

    A word is for four groups of a row. By columns / 32, and by bits of row and column / 16, words are ordered
    (column / 32, row / 64, row 1, rows 5 to 3, row 0, column 0, row 2).
    """
    words = metadata.reshape(k // 32, rows // 64, 2, 8, 2, 2, 2).permute(1, 3, 6, 2, 4, 0, 5).reshape(rows, k // 16)
    table = torch.tensor([CODES.get(places, 0) for places in range(16)], dtype=torch.uint8)
    return table[_halves(words.view(torch.uint8)).long()]


def _integers(values: Tensor, rows: int, k: int) -> Tensor:
    """Kept values [out, K / 2] as integers in float32, around 0.

    A chunk of 1,024 is a tile: 16 values of each of 64 rows of the weight. By bits of row and value it is ordered (rows
    5 and 4, row 3, values 2 and 1, rows 1 and 0), then (value 0, row 2, value 3) for 4 bits, and (row 2, value 0, value
    3) for 8.
    """
    chunks = values.contiguous().view(torch.uint8)
    if values.shape[1] == 2 * rows:
        tiles = _halves(chunks).reshape(k // 32, rows // 64, 4, 2, 4, 4, 2, 2, 2)
        in_order = tiles.permute(1, 2, 3, 7, 5, 0, 8, 4, 6)
        middle = 8
    else:
        tiles = chunks.reshape(k // 32, rows // 64, 4, 2, 4, 4, 2, 2, 2)
        in_order = tiles.permute(1, 2, 3, 6, 5, 0, 8, 4, 7)
        middle = 128
    return in_order.reshape(rows, k // 2).float() - middle


def _halves(bytes_of_rows: Tensor) -> Tensor:
    """The four lower and the four upper bits of each byte, as two."""
    return torch.stack((bytes_of_rows & 15, bytes_of_rows >> 4), -1).flatten(-2)
