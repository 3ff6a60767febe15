"""What the public functions refuse, by name, before anything has changed."""

from __future__ import annotations

import pytest
import torch
from helpers.arguments import DRAWING, FUNCTIONS, LINEAR, cpu_normal, good_arguments, some_codes
from helpers.bits import assert_same_bits
from torch._subclasses.fake_tensor import FakeTensorMode

import maskpro_kernels as mk

BAD_PATTERNS = ["4:2", "2:5", "x", "", "2:4 ", "0:4", "4:4", "-1:4", 3, None, (2, 4)]
BAD_TENSORS = [
    [0.0] * 8,
    None,
    torch.zeros(2, 8, dtype=torch.float64),
    torch.zeros(2, 8, dtype=torch.int64),
    torch.zeros(2, 6),
    torch.zeros(3, 2),
    torch.tensor(1.0),
    torch.zeros(2, 0),
]
BAD_CODES = [
    [3, 5],
    some_codes(2, 2).to(torch.int64),
    some_codes(2, 2).to(torch.int32),
    some_codes(2, 2).to(torch.float32),
    some_codes(2, 2).to(torch.bool),
    torch.tensor(3, dtype=torch.uint8),
]
BAD_COUNTERS = {
    "temperature": [0, 0.0, -1.0, torch.inf, torch.nan, 1e31, 1e-31, "1", True, None],
    "seed": [1 << 63, -(1 << 63) - 1, 1.0, True, "0", None, torch.tensor(1, dtype=torch.int32), torch.tensor([1])],
    "step": [-1, 1 << 32, 1.0, True, torch.tensor(1.0), torch.tensor([0, 1]), torch.tensor(-1), torch.tensor(1 << 32)],
    "layer": [-1, 1 << 32, 0.5, True, None, torch.tensor(-1), torch.tensor(1 << 32)],
    "draw": [-1, 1 << 16, 0.5, True, torch.tensor(-1), torch.tensor(1 << 16)],
    # 2 rows of 2 groups each: from 2**32 - 3 the last index lies beyond 2**32
    "group_offset": [-1, 1 << 32, (1 << 32) - 3, 0.5, True],
    "group_row_stride": [0, 1, -2, 1 << 32, 2.0, True],
}
BAD_OWN = {
    ("sample_mask", "logits"): BAD_TENSORS,
    ("sample_masked_weight", "logits"): BAD_TENSORS[:4],
    ("sample_masked_weight", "weight"): [
        None,
        torch.zeros(2, 4),
        torch.zeros(2, 8, dtype=torch.float64),
        torch.zeros(2, 8, dtype=torch.int32),
        torch.zeros(2, 8, device="meta"),
    ],
    ("top_n_mask", "scores"): BAD_TENSORS,
    ("pack_mask", "mask"): [
        None,
        torch.ones(2, 8),
        torch.ones(2, 8, dtype=torch.uint8),
        torch.ones(2, 6, dtype=torch.bool),
        torch.tensor(True),
        torch.ones(2, 8, dtype=torch.bool),
        torch.zeros(2, 8, dtype=torch.bool),
        torch.tensor([True, True, False, False, True, True, True, False]),
        torch.tensor([True, True, False, False, True, False, False, False]),
    ],
    ("expand_mask", "codes"): BAD_CODES,
    ("mask_log_prob", "logits"): BAD_TENSORS,
    ("mask_log_prob", "codes"): [
        *BAD_CODES,
        some_codes(2, 3),
        some_codes(1, 2),
        some_codes(4),
        some_codes(2, 2, 1),
        torch.zeros(2, 2, dtype=torch.uint8, device="meta"),
    ],
    ("score_update_", "logits"): [
        *BAD_TENSORS,
        torch.zeros(1, 8).expand(2, 8),
        # rows that share half of their elements
        torch.zeros(16).as_strided((2, 8), (4, 1)),
        torch.zeros(32).as_strided((2, 8), (1, 1)),
        torch.zeros(64).as_strided((2, 8), (3, 2)),
    ],
    ("score_update_", "coef"): [
        torch.nan,
        torch.inf,
        1e39,
        "1",
        True,
        None,
        torch.tensor(1),
        torch.zeros(1, 1),
        [1.0],
        [],
        torch.tensor([1.0]),
        torch.tensor(torch.nan),
        torch.tensor(-torch.inf),
        torch.tensor(1e300, dtype=torch.float64),
        torch.nn.Parameter(torch.tensor(torch.nan)),
    ],
    ("codes_linear", "codes"): [*BAD_CODES, some_codes(2, 3), some_codes(4)],
}
for _function in LINEAR:
    BAD_OWN |= {
        (_function, "x"): [
            None,
            [0.0] * 8,
            torch.tensor(1.0),
            torch.zeros(3, 4),
            torch.zeros(3, 8, dtype=torch.bfloat16),
            torch.zeros(3, 8, dtype=torch.int64),
            torch.zeros(3, 8, device="meta"),
        ],
        (_function, "weight"): [None, torch.zeros(8), torch.zeros(1, 2, 8), torch.zeros(2, 8, dtype=torch.float64)],
        (_function, "bias"): ["b", torch.zeros(3), torch.zeros(2, dtype=torch.float64)],
    }
BAD_OWN["masked_linear", "logits"] = [
    None,
    torch.zeros(2, 4),
    torch.zeros(2, 8, dtype=torch.float64),
    torch.zeros(2, 8, dtype=torch.int32),
]
BAD_ARGUMENTS = [
    *((function, "pattern", value) for function in FUNCTIONS for value in BAD_PATTERNS),
    *((function, name, v) for function in DRAWING for name, values in BAD_COUNTERS.items() for v in values),
    *((function, name, value) for (function, name), values in BAD_OWN.items() for value in values),
]


def value_id(value) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype)[6:]}{list(value.shape)}{value.device.type}"
    return repr(value)


def test_a_wrong_argument_is_told_in_a_line():
    logits = torch.zeros(2, 8)
    with pytest.raises(TypeError) as told:
        mk.sample_mask(list(range(100_000)), "2:4", seed=0)
    assert str(told.value) == "logits: expected a tensor, got list [0, 1, 2, 3, 4, 5, ...]"
    with pytest.raises(
        ValueError, match=r"^weight: expected a tensor like logits, \[2, 8\] on cpu, got a tensor \[8, 2\]"
    ):
        mk.sample_masked_weight(torch.zeros(8, 2), logits, "2:4", seed=0)


def assert_refused(function: str, argument: str, arguments: dict) -> None:
    """The error names the argument, what was expected and what came, and no tensor given has changed."""
    tensors = {name: v for name, v in arguments.items() if isinstance(v, torch.Tensor) and not v.is_meta}
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    with pytest.raises((TypeError, ValueError), match=rf"^{argument}: expected .*got "):
        getattr(mk, function)(**arguments)
    for name, tensor in tensors.items():
        assert_same_bits(tensor, before[name])


@pytest.mark.parametrize(
    ("function", "argument", "value"), BAD_ARGUMENTS, ids=[f"{f}-{a}-{value_id(v)}" for f, a, v in BAD_ARGUMENTS]
)
def test_bad_argument_is_refused(function, argument, value, eager_reference):
    assert_refused(function, argument, good_arguments(function) | {argument: value})


@pytest.mark.parametrize(
    ("coef", "draw", "argument"),
    [
        (1.0, [0], "coef"),
        ([1.0, 2.0], 0, "coef"),
        ([1.0, 2.0], [0], "coef"),
        ([1.0], [0, 1], "coef"),
        ([], [], "coef"),
        ([1.0, torch.nan], [0, 1], "coef"),
        (torch.ones(3), [0, 1], "coef"),
        ([1.0, 2.0], [0, 1 << 16], "draw"),
        ([1.0, 2.0], [0, 0.5], "draw"),
        ([1.0, 2.0], [3, 3], "draw"),
        ([1.0, 2.0], [torch.tensor(3), 3], "draw"),
        ([3e38, 3e38], [0, 1], "coef"),
        ([3e38, -3e38], [0, 1], "coef"),
        (torch.tensor([3e38, 3e38]), [0, 1], "coef"),
        ([1.0, torch.tensor(torch.nan)], [0, 1], "coef"),
    ],
)
def test_coefficients_that_do_not_fit_the_draws_are_refused(coef, draw, argument, eager_reference):
    assert_refused("score_update_", argument, good_arguments("score_update_") | {"coef": coef, "draw": draw})


@pytest.mark.parametrize("function", DRAWING)
def test_group_indices_reach_two_to_the_32_and_no_further(function, eager_reference):
    good = good_arguments(function)
    getattr(mk, function)(**good | {"group_offset": (1 << 32) - 4})
    getattr(mk, function)(**good | {"group_row_stride": (1 << 32) - 2})
    with pytest.raises(ValueError, match=rf"^group_\w+: expected .*{1 << 32}.*got "):
        getattr(mk, function)(**good | {"group_row_stride": (1 << 32) - 1})


def test_masked_linear_refuses_logits_of_another_shape(eager_reference):
    with pytest.raises(ValueError, match=r"^(logits|weight): expected .*got "):
        mk.masked_linear(**good_arguments("masked_linear") | {"logits": torch.zeros(2, 4)})


def test_logits_of_inference_mode_are_refused_outside_of_it():
    with torch.inference_mode():
        logits = cpu_normal(2, 8)
        mk.score_update_(logits, 0.5, pattern="2:4", seed=3)
    before = logits.clone()
    with pytest.raises(ValueError, match="^logits: expected a tensor that may change"):
        mk.score_update_(logits, 0.5, pattern="2:4", seed=3)
    assert_same_bits(logits, before)


def test_coefficients_whose_sum_over_the_temperature_overflows_are_refused(eager_reference):
    arguments = good_arguments("score_update_") | {"coef": [2e8, 2e8], "draw": [0, 1], "temperature": 1e-30}
    assert_refused("score_update_", "coef", arguments)


def test_logits_that_lie_apart_without_overlap_are_moved(eager_reference):
    """Strides alone are no reason to refuse: columns of a larger tensor, and a transposed one."""
    for logits in (torch.zeros(2, 16)[:, ::2], torch.zeros(8, 2).t(), torch.zeros(64).as_strided((2, 8), (1, 2))):
        expected = mk.score_update_(logits.contiguous(), 0.5, pattern="2:4", seed=3)
        assert_same_bits(mk.score_update_(logits, 0.5, pattern="2:4", seed=3).contiguous(), expected)


DENSE_ONLY = [
    (function, name)
    for function in FUNCTIONS
    for name, value in good_arguments(function).items()
    if isinstance(value, torch.Tensor)
]


@pytest.mark.parametrize("layout", [torch.Tensor.to_sparse_coo, torch.Tensor.to_sparse_csr], ids=["coo", "csr"])
@pytest.mark.parametrize(("function", "name"), DENSE_ONLY)
def test_sparse_tensors_are_refused(function, name, layout, eager_reference):
    arguments = good_arguments(function)
    if name == "bias" and layout is torch.Tensor.to_sparse_csr:
        pytest.skip("a vector has no compressed rows")
    arguments[name] = layout(arguments[name])
    with pytest.raises(TypeError, match=rf"^{name}: expected a dense tensor, got one of layout torch.sparse_"):
        getattr(mk, function)(**arguments)


def test_packed_products_refuse_sparse_tensors():
    weight = mk.sample_masked_weight(cpu_normal(4, 8), cpu_normal(4, 8, seed=1), "2:4", seed=0)
    with pytest.raises(TypeError, match=r"^weight: expected a dense tensor, got one of layout torch.sparse_coo"):
        mk.pack_nm(weight.to_sparse(), "2:4")
    with pytest.raises(TypeError, match=r"^x: expected a dense tensor, got one of layout torch.sparse_coo"):
        mk.nm_linear(cpu_normal(3, 8).to_sparse(), mk.pack_nm(weight, "2:4"))


def test_what_cannot_be_known_is_not_asked_for(eager_reference):
    """A traced graph and a fake tensor hold no values: a check that asked for them would end the trace."""
    logits, step = torch.zeros(2, 8), torch.tensor(3)

    def drawn(step):
        return mk.sample_mask(logits, "2:4", seed=0, step=step)

    compiled = torch.compile(drawn, backend="eager", fullgraph=True)
    assert_same_bits(compiled(step), drawn(step))
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert drawn(torch.tensor(3)).shape == (2, 2)
