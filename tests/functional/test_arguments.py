"""Bad arguments of the public functions: each is refused in a line that names it, before anything has changed."""

from __future__ import annotations

import pytest
import torch
from helpers.arguments import DRAWING, cpu_normal, good_arguments, some_codes
from helpers.bits import assert_same_bits
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import maskpro_kernels as mk

pytestmark = pytest.mark.usefixtures("eager_reference")

WIDE = torch.zeros(2, 8, dtype=torch.float64)
NAN, HUGE = torch.tensor(torch.nan), 3e38
MASK = mk.expand_mask(some_codes(2, 2), "2:4")


def linear(**arguments) -> dict:
    return {"linear": nn.Linear(16, 6), "pattern": "2:4"} | arguments


def layer(**arguments) -> dict:
    good = {"weight": torch.zeros(2, 8), "bias": torch.zeros(2), "logits": torch.zeros(2, 8), "pattern": "2:4"}
    return good | arguments


# (function, argument, its value, other arguments that go with it)
BAD = [
    *(("sample_mask", "pattern", value, {}) for value in ("4:2", "2:5", "2:4 ", "0:4", "2:32", 3, None)),
    *(("sample_mask", "logits", value, {}) for value in ([0.0] * 8, WIDE, torch.zeros(2, 6), torch.tensor(1.0))),
    ("sample_mask", "logits", torch.zeros(2, 8).to_sparse(), {}),
    *(("sample_mask", "temperature", value, {}) for value in (0.0, torch.nan, 1e31, "1", True)),
    *(("sample_mask", "seed", value, {}) for value in (1 << 63, 1.0, True, torch.tensor([1]))),
    *(("sample_mask", "step", value, {}) for value in (-1, 1 << 32, torch.tensor(-1), torch.tensor(1.0))),
    ("sample_mask", "layer", 1 << 32, {}),
    ("sample_mask", "draw", 1 << 16, {}),
    # 2 rows of 2 groups each: the last index lies beyond 2**32
    *(("sample_mask", "group_offset", value, {}) for value in (-1, 0.5, (1 << 32) - 3)),
    *(("sample_mask", "group_row_stride", value, {}) for value in (1, 2.0)),
    ("sample_masked_weight", "weight", torch.zeros(2, 4), {}),
    ("top_n_mask", "scores", torch.zeros(2, 8, dtype=torch.int64), {}),
    *(("pack_mask", "mask", value, {}) for value in (torch.ones(2, 8), torch.ones(2, 8, dtype=torch.bool))),
    *(("expand_mask", "codes", value, {}) for value in ([3, 5], some_codes(2, 2).int(), some_codes(1)[0])),
    *(("mask_log_prob", "codes", value, {}) for value in (some_codes(2, 3), some_codes(2, 2).to("meta"))),
    *(("score_update_", "coef", value, {}) for value in ("1", torch.nan, 1e39, torch.tensor(1), NAN, [1.0])),
    ("score_update_", "coef", [1.0, 2.0], {"draw": [0]}),
    ("score_update_", "coef", [], {"draw": []}),
    ("score_update_", "coef", [HUGE, -HUGE], {"draw": [0, 1]}),
    ("score_update_", "coef", [2e8, 2e8], {"draw": [0, 1], "temperature": 1e-30}),
    *(("score_update_", "draw", value, {"coef": [1.0, 2.0]}) for value in ([0, 1 << 16], [3, torch.tensor(3)])),
    *(("masked_linear", "x", value, {}) for value in (None, torch.zeros(3, 4), torch.zeros(3, 8).bfloat16())),
    ("masked_linear", "x", torch.zeros(3, 8, device="meta"), {}),
    *(("masked_linear", "weight", value, {}) for value in (torch.zeros(8), WIDE)),
    *(("masked_linear", "logits", value, {}) for value in (torch.zeros(2, 4), WIDE)),
    *(("masked_linear", "bias", value, {}) for value in ("b", torch.zeros(3), torch.zeros(2).bfloat16())),
    ("codes_linear", "codes", some_codes(2, 3), {}),
    *(
        (function, "codes", mask, {})
        for function in ("codes_linear", "mask_log_prob")
        for mask in (MASK | True, MASK[:1], MASK.float(), MASK.to("meta"), MASK.to_sparse())
    ),
    ("pack_nm", "weight", torch.ones(2, 8), {"pattern": "2:4"}),
    ("pack_nm", "values", "int2", {"weight": torch.zeros(2, 8), "pattern": "2:4"}),
    ("MaskedLinear", "weight", torch.zeros(8), layer()),
    ("MaskedLinear", "logits", torch.zeros(2, 4), layer()),
    ("MaskedLinear", "bias", torch.zeros(3), layer()),
    ("MaskedLinear", "layer", -1, layer()),
    *(("from_linear", "linear", value, linear()) for value in (nn.Conv1d(4, 4, 1), nn.Linear(6, 4))),
    ("from_linear", "linear", nn.Linear(8, 4).double(), linear()),
    *(("from_linear", "init", value, linear()) for value in ("wanda", torch.full((6, 4), 7, dtype=torch.uint8))),
    *(("from_linear", "init", value, linear()) for value in (MASK, torch.ones(6, 16, dtype=torch.bool))),
    *(("from_linear", "gap", value, linear()) for value in (-1.0, "10")),
    ("from_linear", "gap", 70_000.0, linear(logits_dtype=torch.float16)),
    ("from_linear", "logits_dtype", torch.float64, linear()),
    *(("from_linear", "logits_device", value, linear()) for value in ("abacus", "meta", 1.5)),
]


@pytest.mark.parametrize(
    ("function", "argument", "value", "others"), BAD, ids=[f"{i}-{f}-{a}" for i, (f, a, *_) in enumerate(BAD)]
)
def test_a_bad_argument_is_refused(function, argument, value, others):
    called = mk.MaskedLinear.from_linear if function == "from_linear" else getattr(mk, function)
    arguments = good_arguments(function) | others | {argument: value}
    tensors = {name: v for name, v in arguments.items() if isinstance(v, torch.Tensor) and not v.is_meta}
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    with pytest.raises((TypeError, ValueError), match=rf"^{argument}: expected [^\n]*got [^\n]*$"):
        called(**arguments)
    for name, tensor in tensors.items():
        if tensor.layout is torch.strided:
            assert_same_bits(tensor, before[name])


@pytest.mark.parametrize("function", [*DRAWING, "straight_through_linear"])
def test_the_counter_takes_its_own_keywords_alone(function):
    good = good_arguments(function)
    for name in ("sed", "matrix"):
        with pytest.raises(TypeError, match=f"^{name}: expected keywords of the .* counter, seed, .*, got '{name}'$"):
            getattr(mk, function)(**good, **{name: 0})
    del good["seed"]
    with pytest.raises(TypeError, match="^seed: expected an int or a 0-dim int64 tensor, got none$"):
        getattr(mk, function)(**good)


@pytest.mark.parametrize("pattern", ["2:4", "5:16"])
def test_a_bool_mask_counts_as_its_codes(pattern):
    x, weight = cpu_normal(3, 32), cpu_normal(2, 32, seed=1)
    codes = mk.top_n_mask(cpu_normal(2, 32, seed=2), pattern)
    mask = mk.expand_mask(codes, pattern)
    calls = (
        lambda given: mk.codes_linear(x, weight, given, pattern=pattern),
        lambda given: mk.mask_log_prob(weight, given, pattern),
        lambda given: mk.MaskedLinear.from_linear(nn.Linear(32, 2), pattern, given).logits,
    )
    for call in calls:
        assert_same_bits(call(mask), call(codes))


def test_an_argument_is_described_in_a_line():
    with pytest.raises(TypeError, match=r"got list \[0, 1, 2, 3, 4, 5, ...\]$"):
        mk.sample_mask(list(range(100_000)), "2:4", seed=0)


@pytest.mark.parametrize("function", DRAWING)
def test_group_indices_reach_two_to_the_32_and_no_further(function):
    good = good_arguments(function)
    getattr(mk, function)(**good | {"group_offset": (1 << 32) - 4})
    getattr(mk, function)(**good | {"group_row_stride": (1 << 32) - 2})
    with pytest.raises(ValueError, match=rf"^group_\w+: expected .*{1 << 32}.*got "):
        getattr(mk, function)(**good | {"group_row_stride": (1 << 32) - 1})


def test_logits_that_cannot_change_are_refused():
    with torch.inference_mode():
        frozen = cpu_normal(2, 8)
        mk.score_update_(frozen, 0.5, pattern="2:4", seed=3)
    before = frozen.clone()
    with pytest.raises(ValueError, match="^logits: expected a tensor that may change"):
        mk.score_update_(frozen, 0.5, pattern="2:4", seed=3)
    assert_same_bits(frozen, before)


@pytest.mark.parametrize("strides", [(0, 1), (4, 1), (1, 1)])
def test_logits_that_overlap_in_memory_are_refused(strides):
    memory = torch.zeros(64)
    with pytest.raises(ValueError, match=r"^logits: expected elements that share no memory, got strides \("):
        mk.score_update_(memory.as_strided((2, 8), strides), 0.5, pattern="2:4", seed=3)
    assert not memory.any()


def test_logits_that_lie_apart_are_moved():
    """Columns of a larger tensor, and a transposed one."""
    for logits in (torch.zeros(2, 16)[:, ::2], torch.zeros(8, 2).t(), torch.zeros(64).as_strided((2, 8), (1, 2))):
        expected = mk.score_update_(logits.contiguous(), 0.5, pattern="2:4", seed=3)
        assert_same_bits(mk.score_update_(logits, 0.5, pattern="2:4", seed=3).contiguous(), expected)


def test_packed_products_refuse_sparse_tensors():
    weight = mk.sample_masked_weight(cpu_normal(4, 8), cpu_normal(4, 8, seed=1), "2:4", seed=0)
    with pytest.raises(TypeError, match=r"^weight: expected a dense tensor .*got a tensor of layout torch.sparse_coo"):
        mk.pack_nm(weight.to_sparse(), "2:4")
    with pytest.raises(TypeError, match=r"^x: expected a dense tensor .*got a tensor of layout torch.sparse_coo"):
        mk.nm_linear(cpu_normal(3, 8).to_sparse(), mk.pack_nm(weight, "2:4"))


def test_what_cannot_be_known_is_not_asked_for():
    """A traced graph and a fake tensor hold no values: a check that asked for them would end the trace."""
    logits, step = torch.zeros(2, 8), torch.tensor(3)

    def drawn(step):
        return mk.sample_mask(logits, "2:4", seed=0, step=step)

    compiled = torch.compile(drawn, backend="eager", fullgraph=True)
    assert_same_bits(compiled(step), drawn(step))
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert drawn(torch.tensor(3)).shape == (2, 2)
