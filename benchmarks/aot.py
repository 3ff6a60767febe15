"""Ahead-of-time compilation of kernels on a machine without a GPU, and what the result costs.

``TRITON_INTERPRET`` must not be set where this runs.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from maskpro_kernels.ops.reference.plackett_luce import NODE_COUNT, NODE_STEP
from maskpro_kernels.ops.triton import (
    adamw_and_swaps,
    curvature,
    grouped,
    masked_gemm,
    packed_gemm,
    sampling,
    slopes,
    sparse_mma,
)
from maskpro_kernels.ops.triton.tiles import FACTORS, Rows, Tiles, configuration, gradient_rows, scores_in_short

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ELEMENTS = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}
# By the names of launches, where these are not those of a kernel in ``sampling``
FUNCTIONS = {
    "adamw": adamw_and_swaps.adamw_kernel,
    "best_swaps": adamw_and_swaps.best_swaps_kernel,
    "descend": slopes.descend_kernel,
    "score_updates": sampling.score_update_kernel,
    "sample_masks": grouped.sample_masks_kernel,
    "score_update_of_layers": grouped.score_update_of_layers_kernel,
    "score_updates_of_layers": grouped.score_update_of_layers_kernel,
}
# Products with packed weights, which have functions of their own here
PACKED = ("packed_linear", "sparse_mma")
# Arguments of several kernels
TYPES = {
    "inv_temperature": "fp32",
    "rate": "*fp32",
    "share": "fp32",
    "max_update": "fp32",
    "partial": "*fp32",
    "seed": "*i64",
    "step": "*i64",
    "layer": "*i64",
    "draw": "*i64",
    "draws": "*i64",
}

# Those that are tensors of float32
FLOATS = ("grad", "coef", "product", "gradient", "master", "first", "second", "scalars", "blocks", "change")


@dataclass(frozen=True)
class Built:
    """Cost of a compiled kernel: registers a thread, spilled registers, bytes of stack and of shared memory."""

    asm: dict
    registers: int
    spills: int
    stack: int
    shared: int


def build(
    kernel: str,
    target: str,
    n: int,
    m: int,
    logits: str = "fp32",
    weight: str = "bf16",
    out: str | None = None,
    **constants,
) -> Built:
    """Compile ``<kernel>_kernel`` of groups as ``launch`` would for logits and weights of those dtypes.

    Masked weights are of the weight's dtype unless ``out`` names another. "score_updates" is the update by several
    draws. ``constants`` take the place of those that ``launch`` passes by default.
    """
    function = FUNCTIONS.get(kernel) or getattr(sampling, f"{kernel}_kernel")
    code = "*u8" if m <= 8 else "*i32"
    types = (
        TYPES
        | {parameter.name: parameter.annotation_type for parameter in function.params if parameter.annotation_type}
        | dict.fromkeys(FLOATS, "*fp32")
        | {
            "logits": f"*{logits}",
            "scores": f"*{logits}",
            "source": code if constants.get("KIND") == "codes" else f"*{logits}",
            "weight": "*fp32" if kernel == "best_swaps" else f"*{weight}",
            "out": "*fp32" if kernel in ("mask_log_prob", "mask_score") else f"*{out or weight}",
            "codes": code,
            "swap": code,
            "table": "*i64",
            "flips": "*i32",
            "owners": "*i32",
        }
    )
    config = configuration(kernel, m, 0, target)
    values = {
        "N": n,
        "M": m,
        "BLOCK": config.block,
        "NODES": NODE_COUNT,
        "STEP": NODE_STEP,
        "KIND": "drawn",
        "WHOLE": True,
        "SEVERAL": kernel in ("score_updates", "score_updates_of_layers"),
        "SHORT": scores_in_short(target),
        "ELEMENT": ELEMENTS[logits],
        "CODE": tl.uint8 if m <= 8 else tl.int32,
        "BYTES": grouped.VECTOR_BYTES,
    } | constants
    constants = {name: values[name] for name in function.arg_names if name in values}
    return _compile(function, target, types, constants, config.options)


def build_product(
    product: str,
    target: str,
    n: int,
    m: int,
    tile: Tiles,
    operand: str = "bf16",
    logits: str = "fp32",
    weight: str | None = None,
    multiples: tuple[str, ...] = ("rows", "groups"),
    **constants,
) -> Built:
    """Compile ``<product>_kernel`` as ``launch_tiles`` would for operands and logits of those dtypes.

    The weight and the bias are of the operands' dtype unless ``weight`` names another. ``multiples`` are what is a
    multiple of 16. The straight-through kernels step the logits, or with ``UPDATE=False`` write their slope; with
    ``WEIGHT_GRAD=True`` the first also writes the gradient of the weight.
    """
    weight_grad = constants.pop("WEIGHT_GRAD", False)
    stepping = product.startswith("straight_through")
    values = {
        "N": n,
        "M": m,
        "KIND": "drawn",
        "LOG_PROB": False,
        "UPDATE": stepping,
        "OPERAND": ELEMENTS[operand],
        "PRECISION": "ieee",
        "BLOCK_OUT": tile.out,
        "BLOCK_T": tile.tokens,
        "BLOCK_K": tile.k,
    } | constants
    function = getattr(slopes if stepping else masked_gemm, f"{product}_kernel")
    code = "*u8" if m <= 8 else "*i32"
    words = product in ("masked_linear", "masked_linear_input_grad") and tile.few_codes(m) and "groups" in multiples
    types = (
        TYPES
        | {parameter.name: parameter.annotation_type for parameter in function.params if parameter.annotation_type}
        | dict.fromkeys(("x", "grad", "out"), f"*{operand}")
        | dict.fromkeys(("weight", "bias"), f"*{weight or operand}")
        | {"source": code if values["KIND"] == "codes" and not values["UPDATE"] else f"*{logits}", "codes": code}
        | ({"source": "*i32"} if values["KIND"] == "codes" and words else {})
        | dict.fromkeys(("grad_squares", "x_squares", "weight_grad", "gradient"), "*fp32")
        | ({"out": "*fp32"} if stepping else {})
        | {"rows": "i32", "groups": "i32"}
    )
    if stepping:
        values |= {"out": None} if values["UPDATE"] else {"partial": None, "rate": None}
        values |= {} if weight_grad else {"weight_grad": None}
        values |= {} if values["KIND"] == "codes" else {"codes": None}
    elif not values["LOG_PROB"]:
        values["partial"] = None
    constants = {name: values[name] for name in function.arg_names if name in values}
    return _compile(function, target, types, constants, tile.options, multiples)


def build_curvature(
    kernel: str,
    target: str,
    tokens: int,
    operand: str = "bf16",
    multiples: tuple[str, ...] = ("rows", "columns"),
    **constants,
) -> Built:
    """Compile ``<kernel>_kernel`` of a curvature as ``launch_blocks`` would, for ``tokens`` tokens.

    ``multiples`` are what is a multiple of 16. ``constants`` are arguments that are None.
    """
    function = getattr(curvature, f"{kernel}_kernel")
    config = gradient_rows(tokens, target) if kernel == "gradient_squares" else FACTORS
    types = (
        {parameter.name: parameter.annotation_type for parameter in function.params if parameter.annotation_type}
        | dict.fromkeys(("grad", "x"), f"*{operand}")
        | dict.fromkeys(("token_squares", "partial", "row_squares", "loss_tokens"), "*fp32")
        | dict.fromkeys(("factor_of_rows", "factor_of_columns"), "*fp32")
        | {"curvature": "fp32", "tokens_of_mean": "fp32", "rows": "i32", "columns": "i32"}
    )
    values = {"ROWS": config.rows, "BLOCK": config.block} | constants
    constants = {name: values[name] for name in function.arg_names if name in values}
    return _compile(function, target, types, constants, config.options, multiples)


def build_packed(
    kernel: str,
    target: str,
    n: int,
    m: int,
    config: Rows | Tiles | None = None,
    element: str = "bf16",
    unit: int = 16,
    multiples: tuple[str, ...] = ("rows",),
    bits: int = 16,
    metadata: bool = False,
) -> Built:
    """Compile ``<kernel>_kernel`` of packed weights as its launch would, with a bias and values of ``bits``.

    "unpack" with ``metadata`` in place of the bitmask.

    ``config`` is a row of the launch tables; "unpack" has its own. A row has a multiple of ``unit`` chunks.
    ``multiples`` are what is a multiple of 16.
    """
    function = getattr(packed_gemm, f"{kernel}_kernel")
    chunk = packed_gemm.chunk_length(n, m) if kernel != "unpack" else 8
    types = (
        {parameter.name: parameter.annotation_type for parameter in function.params if parameter.annotation_type}
        | dict.fromkeys(("x", "bias", "out"), f"*{element}")
        | {
            "values": "*i32",
            "scales": "*i32",
            "bitmask": {8: "*u8", 16: "*i16", 32: "*i32"}[chunk],
            "rows": "i32",
            "units": "i32",
        }
        | ({"x": "*i32"} if kernel == "packed_vector" else {})
    )
    values = {"N": n, "M": m}
    if kernel != "unpack":
        stored, group = {16: (DTYPES[element], 8), 8: (torch.int8, 128), 4: (torch.uint8, 64)}[bits]
        values |= packed_gemm.kernel_constants(n, m, DTYPES[element], target, stored, group) | {"UNIT": unit}
    if kernel != "unpack" and bits == 16:
        values["scales"] = None
    if kernel == "unpack":
        config = configuration("unpack", m, 0, target)
        types |= dict.fromkeys(("values", "out"), {"bf16": "*i16", "fp16": "*i16", "fp32": "*i32"}[element])
        types |= {"bitmask": "*i16"} if metadata else {}
        values |= {"BLOCK": config.block}
    elif isinstance(config, Rows):
        values |= {"ROWS": config.rows, "BLOCK": config.block}
    else:
        values |= {"OPERAND": ELEMENTS[element], "PRECISION": "ieee"}
        values |= {"BLOCK_OUT": config.out, "BLOCK_T": config.tokens, "BLOCK_K": config.k}
    return _compile(function, target, types, values, config.options, multiples)


def build_sparse(target: str, tile: Tiles, element: str = "bf16", unit: int = 16, bias: bool = True) -> Built:
    """Compile ``sparse_mma_kernel`` as its launch would, for rows of a multiple of ``unit`` groups."""
    types = {"tokens": "i64", "rows": "i32", "units": "i32"} | dict.fromkeys(("bias", "out"), f"*{element}")
    types |= dict.fromkeys(("x", "values", "metadata"), "*i32")
    values = {"M": 4, "UNIT": unit, "ELEMENT": sparse_mma.ELEMENTS[DTYPES[element]], "STAGES": tile.num_stages}
    values |= {"BLOCK_OUT": tile.out, "BLOCK_T": tile.tokens, "BLOCK_K": tile.k} | ({} if bias else {"bias": None})
    return _compile(sparse_mma.sparse_mma_kernel, target, types, values, tile.options, source=GluonASTSource)


def build_split_sum(target: str, element: str = "bf16", **constants) -> Built:
    """Compile ``split_sum_kernel`` as ``launch_elements`` would."""
    types = {"total": "i64", "partial": "*fp32", "bias": f"*{element}", "out": f"*{element}", "columns": "i32"}
    config = configuration("split_sum", 1, 0, target)
    values = {"BLOCK": config.block} | constants
    return _compile(masked_gemm.split_sum_kernel, target, types, values, config.options, ("columns",))


def _compile(function, target, types, constants, options, multiples=(), source=ASTSource) -> Built:
    """``multiples`` are the integers that are taken to be multiples of 16, as pointers are."""
    names = function.arg_names
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if signature[name].startswith("*") or name in multiples
    }
    source = source(fn=function, signature=signature, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=TARGETS[target], options={**options, "enable_fp_fusion": False})
    measure = _amd if target.startswith("gfx") else _nvidia
    return measure(compiled.asm, compiled.metadata.shared)


def warnings(built: Built) -> list[str]:
    """Return the numbers of ptxas's warnings about a kernel for sm_90 that multiplies by wgmma.

    C7515 for one: each wgmma waits for the one before.
    """
    if "wgmma.mma_async" not in built.asm.get("ptx", ""):
        return []
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(built.asm["ptx"])
        file.flush()
        command = [get_ptxas(90).path, "--gpu-name=sm_90a", "--output-file=/dev/null", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return re.findall(r"\((C\d+)\)", text)


def _nvidia(asm, shared) -> Built:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    fields = dict(re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", text))
    return Built(asm, int(fields["REG"]), int(fields["LOCAL"]), int(fields["STACK"]), shared)


def _amd(asm, shared) -> Built:
    text = asm["amdgcn"]

    def field(name):
        return int(re.search(rf"\.{name}:\s+(\d+)", text)[1])

    # scalar registers spill to lanes of vector registers, and these to accumulators where there is no memory for them
    memory = field("private_segment_fixed_size")
    return Built(asm, field("vgpr_count"), field("vgpr_spill_count") if memory else 0, memory, shared)
