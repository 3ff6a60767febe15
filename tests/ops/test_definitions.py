"""The custom ops keep torch.library's contract."""

from __future__ import annotations

import inspect

import pytest
import torch
from helpers.arguments import cpu_normal, some_codes
from helpers.cases import slow

from maskpro_kernels.ops import definitions
from maskpro_kernels.ops.counter import MaskSource
from maskpro_kernels.ops.tables import cpu, reference, triton

# with gradients, by the operation without
OPERATIONS = sorted(
    name.removeprefix("maskpro::")
    for name in torch._C._dispatch_get_all_op_names()
    if name.startswith("maskpro::") and name != "maskpro::differentiable_nm_linear"
)


def op_arguments(name: str, dtype: torch.dtype) -> tuple:
    logits = cpu_normal(2, 8, dtype=dtype).requires_grad_(name == "mask_log_prob")
    weight = cpu_normal(2, 8, seed=1, dtype=dtype).requires_grad_(name.startswith("masked_weight"))
    codes = some_codes(2, 2)
    counter = (*(torch.tensor(value) for value in (7, 3, 5, 1)), 0, 2)
    drawn = (logits, "drawn", 2, 4, 1.0, *counter, None)
    held = (*drawn[:-1], codes)
    given = MaskSource(codes, "codes", 2, 4, 1.0).flat()
    x, bias = cpu_normal(3, 8, seed=2, dtype=dtype), cpu_normal(2, seed=3, dtype=dtype)
    grad = cpu_normal(3, 2, seed=4, dtype=dtype)
    return {
        "sample_mask": (logits, 2, 4, 1.0, *counter),
        "masked_weight": (weight, *drawn),
        "masked_weight of codes": (weight, *given),
        "masked_linear": (x, weight, bias, True, *drawn),
        "masked_linear of codes": (x, weight, None, False, *given),
        "masked_linear of a draw that is held": (x, weight, bias, True, *held),
        "masked_linear_input_grad": (grad, weight, *drawn),
        "masked_linear_weight_grad": (grad, x, *drawn),
        "top_n_mask": (logits, 2, 4),
        "mask_log_prob": (logits, codes, 2, 4, 0.5),
        "mask_score": (logits, codes, torch.ones(2, 2), 2, 4, 0.5),
        "score_update_": (logits, torch.tensor([0.5, 1.0]), 2, 4, 1.0, *counter[:3], torch.tensor([0, 1]), 0, 2),
    }[name]


@pytest.mark.parametrize("dtype", [torch.float32, slow(torch.bfloat16)], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "name",
    [
        "sample_mask",
        "masked_weight",
        "masked_weight of codes",
        "masked_linear",
        "masked_linear of codes",
        "masked_linear of a draw that is held",
        "masked_linear_input_grad",
        "masked_linear_weight_grad",
        "top_n_mask",
        "mask_log_prob",
        "mask_score",
        "score_update_",
    ],
)
def test_opcheck(name, dtype, launched):
    torch.library.opcheck(getattr(torch.ops.maskpro, name.split()[0]).default, op_arguments(name, dtype))
    assert launched


@pytest.mark.parametrize("table", [cpu, reference, triton], ids=lambda table: table.__name__.rpartition(".")[2])
def test_a_table_has_every_operation_with_the_arguments_of_its_definition(table):
    assert len(OPERATIONS) >= 17
    for name in OPERATIONS:
        definition = getattr(definitions, f"_{name}", None) or getattr(definitions, name)
        if hasattr(definition, "__wrapped__"):
            arguments = list(inspect.signature(definition).parameters)
        else:
            arguments = [argument.name for argument in definition._schema.arguments]
        parameters = inspect.signature(getattr(table, name)).parameters.values()
        assert [parameter.name for parameter in parameters if parameter.default is parameter.empty] == arguments, name
