"""The public functions: what they refuse, and that each does what its parts do."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from helpers.enumerated import exact_log_prob, exact_score
from torch import nn

import maskpro_kernels as mk
from maskpro_kernels.ops import dispatch, reference
from maskpro_kernels.ops.cpu import compiled_loop, kernels
from maskpro_kernels.pattern import GROUP_SIZES

PATTERNS = [f"{n}:{m}" for m in GROUP_SIZES for n in sorted({1, m // 2, m - 1})]
COUNTER = {"seed": 7, "step": 3, "layer": 2, "draw": 1}
LINEAR = ["masked_linear", "top_n_linear", "codes_linear"]
DRAWING = ["sample_mask", "sample_masked_weight", "score_update_", "masked_linear"]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def some_codes(*shape: int) -> torch.Tensor:
    """Codes of 2:4, all different where there are no more than six."""
    cycle = itertools.cycle([3, 5, 6, 9, 10, 12])
    return torch.tensor([next(cycle) for _ in range(torch.Size(shape).numel())], dtype=torch.uint8).view(shape)


def good_arguments(function: str) -> dict:
    logits, weight = normal(2, 8, seed=1), normal(2, 8, seed=2)
    return {
        "sample_mask": {"logits": logits, "pattern": "2:4", "seed": 0},
        "sample_masked_weight": {"weight": weight, "logits": logits, "pattern": "2:4", "seed": 0},
        "top_n_mask": {"scores": logits, "pattern": "2:4"},
        "pack_mask": {"mask": mk.expand_mask(some_codes(2, 2), "2:4"), "pattern": "2:4"},
        "expand_mask": {"codes": some_codes(2, 2), "pattern": "2:4"},
        "mask_log_prob": {"logits": logits, "codes": some_codes(2, 2), "pattern": "2:4"},
        "score_update_": {"logits": logits, "coef": 0.5, "pattern": "2:4", "seed": 0},
        "masked_linear": {
            "x": normal(3, 8, seed=3),
            "weight": weight,
            "logits": logits,
            "bias": normal(2, seed=4),
            "pattern": "2:4",
            "seed": 0,
        },
        "top_n_linear": {"x": normal(3, 8, seed=3), "weight": weight, "logits": logits, "pattern": "2:4"},
        "codes_linear": {"x": normal(3, 8, seed=3), "weight": weight, "codes": some_codes(2, 2), "pattern": "2:4"},
    }[function]


FUNCTIONS = [*DRAWING, "top_n_linear", "codes_linear", "top_n_mask", "pack_mask", "expand_mask", "mask_log_prob"]
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
    "step": [-1, 1 << 32, 1.0, True, torch.tensor(1.0), torch.tensor([0, 1])],
    "layer": [-1, 1 << 32, 0.5, True, None],
    "draw": [-1, 1 << 16, 0.5, True],
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
    ("score_update_", "logits"): [*BAD_TENSORS, torch.zeros(1, 8).expand(2, 8)],
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
for _function in LINEAR[:2]:
    BAD_OWN[_function, "logits"] = [
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
        assert torch.equal(tensor, before[name])


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


@pytest.mark.parametrize("pattern", PATTERNS)
def test_pack_and_expand_are_inverse(pattern):
    n, m = map(int, pattern.split(":"))
    keep = normal(3, 5, 2, m).argsort(-1).argsort(-1) < n
    mask = keep.flatten(-2)
    codes = mk.pack_mask(mask, pattern)
    assert codes.shape == (3, 5, 2)
    assert codes.dtype == (torch.uint8 if m <= 8 else torch.int32)
    assert torch.equal(mk.expand_mask(codes, pattern), mask)
    powers = 2 ** torch.arange(m, dtype=torch.int64)
    unsigned = (keep * powers).sum(-1)
    assert torch.equal(codes.to(torch.int64) % (1 << m), unsigned)


def test_bit_31_makes_a_code_negative():
    mask = torch.zeros(32, dtype=torch.bool)
    mask[[0, 31]] = True
    codes = mk.pack_mask(mask, "2:32")
    assert codes.tolist() == [-(1 << 31) + 1]
    assert torch.equal(mk.expand_mask(codes, "2:32"), mask)


def test_pack_names_the_first_wrong_group():
    mask = torch.tensor([[True, True, False, False] * 2, [True, False, True, False, True, True, True, False]])
    with pytest.raises(ValueError, match=r"2 of every 4 kept, got code 0x7 in group \(1, 1\) \(1 groups differ\)"):
        mk.pack_mask(mask, "2:4")


def test_top_n_takes_the_lower_index_of_equal_scores():
    scores = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0, 0.0, 0.0, 0.0]])
    assert mk.top_n_mask(scores, "2:4").tolist() == [[0b0110, 0b0011]]


@pytest.mark.parametrize("function", DRAWING)
def test_seed_and_step_may_be_tensors(function):
    ints, tensors = good_arguments(function), good_arguments(function)
    for name, value in (("seed", -(1 << 40) - 5), ("step", (1 << 32) - 1)):
        ints[name], tensors[name] = value, torch.tensor(value)
    one, other = getattr(mk, function)(**ints), getattr(mk, function)(**tensors)
    torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("changed", ["seed", "step", "layer", "draw"])
def test_every_part_of_the_counter_changes_the_draw(changed):
    logits = torch.zeros(1, 256)
    assert not torch.equal(
        mk.sample_mask(logits, "2:4", **COUNTER),
        mk.sample_mask(logits, "2:4", **COUNTER | {changed: COUNTER[changed] + 1}),
    )


def strided(contiguous: torch.Tensor) -> torch.Tensor:
    """The same values as every second column of a wider tensor."""
    wide = torch.full((*contiguous.shape[:-1], 2 * contiguous.shape[-1]), 99.0, dtype=contiguous.dtype)
    wide[..., ::2] = contiguous
    return wide[..., ::2]


@pytest.mark.parametrize(
    "rearranged",
    [strided, lambda t: t.mT.contiguous().mT, lambda t: t.transpose(0, 1).contiguous().transpose(0, 1)],
    ids=["columns", "transposed", "rows"],
)
def test_logits_need_not_be_contiguous(rearranged):
    contiguous = normal(2, 3, 8)
    other = rearranged(contiguous)
    assert not other.is_contiguous()
    assert torch.equal(mk.sample_mask(other, "2:4", **COUNTER), mk.sample_mask(contiguous, "2:4", **COUNTER))
    assert torch.equal(mk.top_n_mask(other, "2:4"), mk.top_n_mask(contiguous, "2:4"))
    assert torch.equal(
        mk.sample_masked_weight(rearranged(contiguous + 1), other, "2:4", **COUNTER),
        mk.sample_masked_weight(contiguous + 1, contiguous, "2:4", **COUNTER),
    )
    assert mk.score_update_(other, 0.5, pattern="2:4", **COUNTER) is other
    assert torch.equal(other, mk.score_update_(contiguous.clone(), 0.5, pattern="2:4", **COUNTER))


def test_update_of_strided_logits_leaves_what_lies_between():
    logits = strided(normal(2, 8))
    mk.score_update_(logits, 0.5, pattern="2:4", **COUNTER)
    assert (logits._base[:, 1::2] == 99.0).all()


@pytest.mark.parametrize("pattern", ["1:4", "2:4", "4:8"])
def test_update_subtracts_the_exact_score_at_the_temperature(pattern):
    temperature, coef = 0.5, 0.75
    n, m = map(int, pattern.split(":"))
    logits = normal(4, m)
    codes = mk.sample_mask(logits, pattern, temperature=temperature, **COUNTER)
    updated = mk.score_update_(logits.clone(), coef, pattern=pattern, temperature=temperature, **COUNTER)
    scaled = logits / temperature
    scores = torch.tensor(
        [[float(s) for s in exact_score(z, int(c))] for z, c in zip(scaled, codes[:, 0], strict=True)]
    )
    torch.testing.assert_close(updated, logits - coef * scores / temperature, rtol=0, atol=2e-6)


def test_update_takes_several_draws_at_the_logits_as_given():
    logits = normal(3, 8)
    coefs, draws = [0.5, torch.tensor(-0.25), 2.0], [4, 0, 9]
    arguments = {"pattern": "2:4", "seed": 7, "step": 3, "layer": 2}
    moves = [
        mk.score_update_(logits.clone(), c, draw=d, **arguments) - logits for c, d in zip(coefs, draws, strict=True)
    ]
    together = mk.score_update_(logits.clone(), coefs, draw=draws, **arguments)
    torch.testing.assert_close(together, logits + sum(moves), rtol=0, atol=1e-6)


@pytest.fixture(params=["kernels", "compiled", "eager"])
def route(request, monkeypatch):
    monkeypatch.setattr(dispatch, "interpreting", lambda: request.param == "kernels")
    monkeypatch.setattr(dispatch, "compiler_available", lambda: request.param == "compiled")
    return request.param


@pytest.mark.parametrize(
    ("function", "shape"),
    [*((function, (0, 8)) for function in FUNCTIONS), *((f, (0, 3, 8)) for f in FUNCTIONS if f not in LINEAR)],
)
def test_no_rows_give_no_rows(function, shape, route):
    groups = (*shape[:-1], shape[-1] // 4)
    empty = {"logits": torch.zeros(shape), "weight": torch.zeros(shape), "scores": torch.zeros(shape)}
    empty |= {"mask": torch.zeros(shape, dtype=torch.bool), "codes": torch.zeros(groups, dtype=torch.uint8)}
    empty |= {"bias": torch.zeros(0)}
    arguments = good_arguments(function)
    result = getattr(mk, function)(**arguments | {name: v for name, v in empty.items() if name in arguments})
    if function == "masked_linear":
        y, log_prob = result
        assert y.shape == (3, 0)
        assert log_prob.item() == 0.0
    elif function in LINEAR:
        assert result.shape == (3, 0)
    else:
        assert result.shape in (shape, groups)
        assert result.numel() == 0


@pytest.mark.parametrize("rows", [1, 0])
def test_a_weight_may_be_part_of_longer_rows(rows, route):
    """Of a single row, or none, torch takes any stride for contiguous."""
    weight, logits, x = normal(3, 9)[:rows, :8], normal(rows, 8, seed=1), normal(2, 8, seed=2)
    assert weight.is_contiguous() and weight.stride(0) == 9
    dense, codes = weight.clone(memory_format=torch.contiguous_format), mk.top_n_mask(logits, "2:4")
    counter = {"seed": 3, "step": 4}
    masked = mk.sample_masked_weight(weight, logits, "2:4", **counter)
    assert torch.equal(masked, mk.sample_masked_weight(dense.view(rows, 8), logits, "2:4", **counter))
    assert torch.equal(masked != 0, mk.expand_mask(mk.sample_mask(logits, "2:4", **counter), "2:4"))
    expected = x @ (weight * mk.expand_mask(codes, "2:4")).T
    torch.testing.assert_close(mk.codes_linear(x, weight, codes, pattern="2:4"), expected)


def op_arguments(name: str, dtype: torch.dtype) -> tuple:
    logits = normal(2, 8, dtype=dtype).requires_grad_(name in ("mask_log_prob", "masked_linear"))
    weight = normal(2, 8, seed=1, dtype=dtype).requires_grad_()
    codes = some_codes(2, 2)
    counter = (2, 4, 1.0, torch.tensor(7), torch.tensor(3), 5)
    drawn = (logits, "drawn", *counter, 1, 0, 2)
    given = (codes, "codes", 2, 4, 1.0, None, None, 0, 0, 0, 0)
    x, bias = normal(3, 8, seed=2, dtype=dtype).requires_grad_(), normal(2, seed=3, dtype=dtype)
    grad = normal(3, 2, seed=4, dtype=dtype)
    return {
        "sample_mask": (logits, *counter, 1, 0, 2),
        "masked_weight": (weight, *drawn),
        "masked_weight of codes": (weight, *given),
        "masked_linear": (x, weight, bias, True, *drawn),
        "masked_linear of codes": (x, weight, None, False, *given),
        "masked_linear_input_grad": (grad, weight.detach(), *drawn),
        "masked_linear_weight_grad": (grad, x.detach(), *drawn),
        "top_n_mask": (logits, 2, 4),
        "mask_log_prob": (logits, codes, 2, 4, 0.5),
        "mask_score": (logits, codes, torch.ones(2, 2), 2, 4, 0.5),
        "score_update_": (logits, torch.tensor([0.5, 1.0]), *counter, torch.tensor([0, 1]), 0, 2),
    }[name]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "name",
    [
        "sample_mask",
        "masked_weight",
        "masked_weight of codes",
        "masked_linear",
        "masked_linear of codes",
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


def test_cpu_tensors_go_to_the_compiled_reference_without_the_interpreter(monkeypatch):
    calls = []

    def recorded(scores, *, n, m):
        calls.append((n, m))
        return reference.top_n_mask(scores, n=n, m=m)

    monkeypatch.setattr(dispatch, "interpreting", lambda: False)
    monkeypatch.setattr(dispatch, "compiler_available", lambda: True)
    monkeypatch.setattr(kernels, "top_n_mask", recorded)
    assert mk.top_n_mask(torch.tensor([3.0, 1.0, 2.0, 0.0]), "2:4").tolist() == [0b0101]
    assert calls == [(2, 4)]


@pytest.fixture
def compiled_route(monkeypatch):
    """CPU tensors go to the compiled reference, whose graphs are made anew."""
    monkeypatch.setattr(dispatch, "interpreting", lambda: False)
    monkeypatch.setattr(dispatch, "compiler_available", lambda: True)
    monkeypatch.setattr(kernels, "compiled_loop", functools.cache(compiled_loop.compiled_loop.__wrapped__))


@pytest.mark.parametrize("error", [FileNotFoundError("cache"), RuntimeError("no compiled frames")], ids=repr)
def test_a_graph_that_cannot_be_compiled_runs_eagerly(compiled_route, error, monkeypatch):
    tries = []

    def failing(*_, **__):
        tries.append(error)
        raise error

    monkeypatch.setattr(compiled_loop.CompiledLoop, "_compiled", failing)
    with pytest.warns(UserWarning, match=f"compilation failed .{error}"):
        codes = mk.top_n_mask(torch.tensor([3.0, 1.0, 2.0, 0.0]), "2:4")
    assert codes.tolist() == [0b0101]
    mk.top_n_mask(torch.tensor([3.0, 1.0, 2.0, 0.0]), "2:4")
    assert len(tries) == 1
    logits = normal(5, 64)
    expected = reference_update(logits)
    with pytest.warns(UserWarning, match="compilation failed"):
        assert torch.equal(mk.score_update_(logits, 0.5, pattern="2:4", seed=3), expected)


def test_an_error_of_a_run_is_raised(compiled_route, monkeypatch):
    def failing(tensors, out):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(compiled_loop.CompiledLoop, "_compiled", lambda *_: failing)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="out of memory"):
            mk.top_n_mask(torch.zeros(1, 4), "2:4")


def test_results_do_not_follow_the_default_dtype(compiled_route):
    torch.set_default_dtype(torch.bfloat16)
    try:
        logits = normal(8, 8, dtype=torch.float32).requires_grad_()
        log_prob = mk.mask_log_prob(logits, mk.top_n_mask(logits.detach(), "2:4"), "2:4")
        log_prob.sum().backward()
    finally:
        torch.set_default_dtype(torch.float32)
    assert log_prob.dtype == logits.grad.dtype == torch.float32
    codes = reference.top_n_mask(logits.detach(), n=2, m=4)
    expected = reference.mask_score(logits.detach(), codes, torch.ones(8, 2), 1.0, n=2, m=4)
    assert torch.equal(logits.grad, expected)


def test_logits_of_inference_mode_are_refused_outside_of_it():
    with torch.inference_mode():
        logits = normal(2, 8)
        mk.score_update_(logits, 0.5, pattern="2:4", seed=3)
    before = logits.clone()
    with pytest.raises(ValueError, match="^logits: expected a tensor that may change"):
        mk.score_update_(logits, 0.5, pattern="2:4", seed=3)
    assert torch.equal(logits, before)


def reference_update(logits: torch.Tensor) -> torch.Tensor:
    """What ``score_update_(logits, 0.5, pattern="2:4", seed=3)`` gives, by the eager reference."""
    updated = logits.clone()
    seed, step, draws, layer, offset, stride = (torch.tensor(i) for i in (3, 0, [0], 0, 0, logits.shape[1] // 4))
    coef, inverse = torch.tensor([0.5]), torch.tensor(1.0)
    reference.score_update_(updated, coef, seed, step, draws, inverse, layer, offset, stride, n=2, m=4)
    return updated


def linear_arguments(shape: tuple[int, ...] = (2, 3, 8)) -> dict[str, torch.Tensor]:
    tensors = {"x": normal(*shape), "weight": normal(5, 8, seed=1)}
    tensors |= {"logits": normal(5, 8, seed=2), "bias": normal(5, seed=3)}
    return {name: tensor.requires_grad_() for name, tensor in tensors.items()}


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_masked_linear_is_linear_under_the_drawn_mask(temperature):
    given, plain = linear_arguments(), linear_arguments()
    draw = {"pattern": "2:4", "temperature": temperature, **COUNTER}
    y, log_prob = mk.masked_linear(**given, **draw)
    codes = mk.sample_mask(plain["logits"].detach(), **draw)
    expected = nn.functional.linear(plain["x"], plain["weight"] * mk.expand_mask(codes, "2:4"), plain["bias"])
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)

    scaled = (plain["logits"].detach() / temperature).view(-1, 4)
    groups = list(zip(scaled, codes.flatten().tolist(), strict=True))
    assert log_prob.shape == () and log_prob.dtype == torch.float32
    assert log_prob.item() == pytest.approx(float(sum(exact_log_prob(z, c) for z, c in groups)), rel=1e-5)

    upstream = normal(*y.shape, seed=9)
    ((y * upstream).sum() + 3.0 * log_prob).backward()
    (expected * upstream).sum().backward()
    for name in ("x", "weight", "bias"):
        torch.testing.assert_close(given[name].grad, plain[name].grad, rtol=1e-5, atol=1e-6)
    scores = torch.tensor([[float(s) for s in exact_score(z, c)] for z, c in groups]).view(5, 8)
    torch.testing.assert_close(given["logits"].grad, 3.0 * scores / temperature, rtol=0, atol=1e-5)


def test_masked_linear_without_log_prob():
    given = linear_arguments()
    y, log_prob = mk.masked_linear(**given, pattern="2:4", log_prob=False, **COUNTER)
    assert log_prob is None
    assert torch.equal(y, mk.masked_linear(**given, pattern="2:4", **COUNTER)[0])
    y.sum().backward()
    assert given["logits"].grad is None
    assert given["weight"].grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(8,), (1, 8), (0, 8), (2, 3, 8)])
def test_masked_linear_without_bias(shape, dtype):
    x, weight, logits = normal(*shape, dtype=dtype), normal(5, 8, seed=1, dtype=dtype), normal(5, 8, seed=2)
    y, _ = mk.masked_linear(x, weight, logits, pattern="2:4", **COUNTER)
    masked = mk.sample_masked_weight(weight, logits, "2:4", **COUNTER)
    assert masked.dtype == y.dtype == dtype
    assert y.shape == (*shape[:-1], 5)
    torch.testing.assert_close(y, nn.functional.linear(x, masked))


def test_sample_masked_weight_has_exact_zeros_where_the_draw_drops():
    weight, logits = normal(4, 16), normal(4, 16, seed=1)
    masked = mk.sample_masked_weight(weight, logits, "4:8", **COUNTER)
    kept = mk.expand_mask(mk.sample_mask(logits, "4:8", **COUNTER), "4:8")
    assert torch.equal(masked[kept], weight[kept])
    assert (masked[~kept].view(torch.int32) == 0).all()


@pytest.mark.parametrize("coef", [0.5, (0.5, -0.25)], ids=["one draw", "two draws"])
def test_score_update_compiles_without_a_graph_break(coef):
    draw = (0, 1) if isinstance(coef, tuple) else 0

    def update(logits, step):
        return mk.score_update_(logits, coef, pattern="2:4", seed=7, step=step, draw=draw)

    torch._dynamo.reset()
    graph = torch.compile(update, fullgraph=True, backend="aot_eager")
    # of its own memory, and a column of a larger tensor
    for logits in (normal(3, 8), normal(3, 16)[:, ::2]):
        expected, found = logits.clone(), logits.clone()
        for step in range(2):
            update(expected, torch.tensor(step))
            graph(found, torch.tensor(step))
        assert torch.equal(found, expected) and not torch.equal(found, logits)


class Layer(nn.Module):
    """A user's own module around masked_linear."""

    def __init__(self):
        super().__init__()
        for name, tensor in linear_arguments().items():
            if name != "x":
                self.register_parameter(name, nn.Parameter(tensor.detach().clone()))

    def forward(self, x, seed, step):
        return mk.masked_linear(x, self.weight, self.logits, self.bias, pattern="2:4", seed=seed, step=step, layer=2)


def test_masked_linear_compiles_without_a_graph_break():
    torch._dynamo.reset()
    eager, whole = Layer(), Layer()
    graph = torch.compile(whole, fullgraph=True, backend="aot_eager")
    for step in range(2):
        arguments = (normal(3, 8), torch.tensor(7), torch.tensor(step))
        (y, log_prob), (y_graph, log_prob_graph) = eager(*arguments), graph(*arguments)
        assert torch.equal(y, y_graph)
        assert torch.equal(log_prob, log_prob_graph)
        (y.sum() + log_prob).backward()
        (y_graph.sum() + log_prob_graph).backward()
    for parameter, same in zip(eager.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, same.grad, rtol=1e-6, atol=1e-6)
