"""Masks and updates of the public functions: each does what its parts do."""

from __future__ import annotations

import pytest
import torch
from helpers.arguments import DRAWING, cpu_normal, good_arguments
from helpers.bits import assert_same_bits
from helpers.cases import slow
from helpers.enumerated import exact_score
from helpers.products import DRAW
from helpers.routes import take_route

import maskpro_kernels as mk
from maskpro_kernels.ops.pattern import GROUP_SIZES

PATTERNS = [f"{n}:{m}" for m in GROUP_SIZES for n in sorted({1, m // 2, m - 1})]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_pack_and_expand_are_inverse(pattern):
    n, m = map(int, pattern.split(":"))
    keep = cpu_normal(3, 5, 2, m).argsort(-1).argsort(-1) < n
    mask = keep.flatten(-2)
    codes = mk.pack_mask(mask, pattern)
    assert codes.shape == (3, 5, 2)
    assert codes.dtype == (torch.uint8 if m <= 8 else torch.int32)
    assert_same_bits(mk.expand_mask(codes, pattern), mask)
    powers = 2 ** torch.arange(m, dtype=torch.int64)
    unsigned = (keep * powers).sum(-1)
    assert_same_bits(codes.to(torch.int64) % (1 << m), unsigned)


def test_pack_names_the_first_wrong_group():
    mask = torch.tensor([[True, True, False, False] * 2, [True, False, True, False, True, True, True, False]])
    with pytest.raises(ValueError, match=r"2 of every 4 kept, got code 0x7 in group \(1, 1\) \(1 groups differ\)"):
        mk.pack_mask(mask, "2:4")


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
        mk.sample_mask(logits, "2:4", **DRAW), mk.sample_mask(logits, "2:4", **DRAW | {changed: DRAW[changed] + 1})
    )


def strided(contiguous: torch.Tensor) -> torch.Tensor:
    """Equal values as every second column of a wider tensor."""
    wide = torch.full((*contiguous.shape[:-1], 2 * contiguous.shape[-1]), 99.0, dtype=contiguous.dtype)
    wide[..., ::2] = contiguous
    return wide[..., ::2]


@pytest.mark.parametrize(
    "rearranged",
    [strided, lambda t: t.mT.contiguous().mT, lambda t: t.transpose(0, 1).contiguous().transpose(0, 1)],
    ids=["columns", "transposed", "rows"],
)
def test_logits_need_not_be_contiguous(rearranged):
    contiguous = cpu_normal(2, 3, 8)
    other = rearranged(contiguous)
    assert not other.is_contiguous()
    assert_same_bits(mk.sample_mask(other, "2:4", **DRAW), mk.sample_mask(contiguous, "2:4", **DRAW))
    assert_same_bits(mk.top_n_mask(other, "2:4"), mk.top_n_mask(contiguous, "2:4"))
    assert_same_bits(
        mk.sample_masked_weight(rearranged(contiguous + 1), other, "2:4", **DRAW),
        mk.sample_masked_weight(contiguous + 1, contiguous, "2:4", **DRAW),
    )
    assert mk.score_update_(other, 0.5, pattern="2:4", **DRAW) is other
    assert_same_bits(other, mk.score_update_(contiguous.clone(), 0.5, pattern="2:4", **DRAW))


def test_update_of_strided_logits_leaves_what_lies_between():
    logits = strided(cpu_normal(2, 8))
    mk.score_update_(logits, 0.5, pattern="2:4", **DRAW)
    assert (logits._base[:, 1::2] == 99.0).all()


@pytest.mark.parametrize("pattern", ["1:4", "2:4", "4:8"])
def test_update_subtracts_the_exact_score_at_the_temperature(pattern):
    temperature, coef = 0.5, 0.75
    n, m = map(int, pattern.split(":"))
    logits = cpu_normal(4, m)
    codes = mk.sample_mask(logits, pattern, temperature=temperature, **DRAW)
    updated = mk.score_update_(logits.clone(), coef, pattern=pattern, temperature=temperature, **DRAW)
    scaled = logits / temperature
    scores = torch.tensor(
        [[float(s) for s in exact_score(z, int(c))] for z, c in zip(scaled, codes[:, 0], strict=True)]
    )
    torch.testing.assert_close(updated, logits - coef * scores / temperature, rtol=0, atol=2e-6)


def test_update_takes_several_draws_at_the_logits_as_given():
    logits = cpu_normal(3, 8)
    coefs, draws = [0.5, torch.tensor(-0.25), 2.0], [4, 0, 9]
    arguments = {"pattern": "2:4", "seed": 7, "step": 3, "layer": 2}
    moves = [
        mk.score_update_(logits.clone(), c, draw=d, **arguments) - logits for c, d in zip(coefs, draws, strict=True)
    ]
    together = mk.score_update_(logits.clone(), coefs, draw=draws, **arguments)
    torch.testing.assert_close(together, logits + sum(moves), rtol=0, atol=1e-6)


@pytest.fixture(params=["kernels", "compiled", "eager"])
def route(request, monkeypatch):
    take_route(monkeypatch, request.param)
    return request.param


@pytest.mark.parametrize("shape", [(0, 8), (0, 3, 8)])
@pytest.mark.parametrize("function", [*DRAWING[:3], "top_n_mask", "pack_mask", "expand_mask", "mask_log_prob"])
def test_no_rows_give_no_rows(function, shape, route):
    groups = (*shape[:-1], shape[-1] // 4)
    empty = {"logits": torch.zeros(shape), "weight": torch.zeros(shape), "scores": torch.zeros(shape)}
    empty |= {"mask": torch.zeros(shape, dtype=torch.bool), "codes": torch.zeros(groups, dtype=torch.uint8)}
    arguments = good_arguments(function)
    result = getattr(mk, function)(**arguments | {name: v for name, v in empty.items() if name in arguments})
    assert result.shape in (shape, groups)
    assert result.numel() == 0


def test_a_layer_of_no_rows_gives_no_outputs(route):
    x, rows = cpu_normal(3, 8), torch.zeros(0, 8)
    y, log_prob = mk.masked_linear(x, rows, rows, torch.zeros(0), pattern="2:4", seed=0)
    assert y.shape == (3, 0) and log_prob.item() == 0.0
    codes = torch.zeros(0, 2, dtype=torch.uint8)
    assert mk.codes_linear(x, rows, codes, pattern="2:4").shape == (3, 0)


@pytest.mark.parametrize("rows", [1, 0])
def test_a_weight_may_be_part_of_longer_rows(rows, route):
    """Of a single row, or none, torch takes any stride for contiguous."""
    weight, logits, x = cpu_normal(3, 9)[:rows, :8], cpu_normal(rows, 8, seed=1), cpu_normal(2, 8, seed=2)
    assert weight.is_contiguous() and weight.stride(0) == 9
    dense, codes = weight.clone(memory_format=torch.contiguous_format), mk.top_n_mask(logits, "2:4")
    counter = {"seed": 3, "step": 4}
    masked = mk.sample_masked_weight(weight, logits, "2:4", **counter)
    assert_same_bits(masked, mk.sample_masked_weight(dense.view(rows, 8), logits, "2:4", **counter))
    assert_same_bits(masked != 0, mk.expand_mask(mk.sample_mask(logits, "2:4", **counter), "2:4"))
    expected = x @ (weight * mk.expand_mask(codes, "2:4")).T
    torch.testing.assert_close(mk.codes_linear(x, weight, codes, pattern="2:4"), expected)


def test_sample_masked_weight_has_exact_zeros_where_the_draw_drops():
    weight, logits = cpu_normal(4, 16), cpu_normal(4, 16, seed=1)
    masked = mk.sample_masked_weight(weight, logits, "4:8", **DRAW)
    kept = mk.expand_mask(mk.sample_mask(logits, "4:8", **DRAW), "4:8")
    assert_same_bits(masked[kept], weight[kept])
    assert (masked[~kept].view(torch.int32) == 0).all()


@pytest.mark.parametrize("coef", [slow(0.5), (0.5, -0.25)], ids=["one draw", "two draws"])
def test_score_update_compiles_without_a_graph_break(coef):
    draw = (0, 1) if isinstance(coef, tuple) else 0

    def update(logits, step):
        return mk.score_update_(logits, coef, pattern="2:4", seed=7, step=step, draw=draw)

    torch._dynamo.reset()
    graph = torch.compile(update, fullgraph=True, backend="aot_eager")
    # of its own memory, and a column of a larger tensor
    for logits in (cpu_normal(3, 8), cpu_normal(3, 16)[:, ::2]):
        expected, found = logits.clone(), logits.clone()
        for step in range(2):
            update(expected, torch.tensor(step))
            graph(found, torch.tensor(step))
        assert torch.equal(found, expected) and not torch.equal(found, logits)
