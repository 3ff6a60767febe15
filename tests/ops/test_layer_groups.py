"""Layers that are drawn and updated together have the bits of each by itself, on every route."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.cases import cases
from helpers.compiled import DTYPES, STEP, misaligned
from helpers.layers import COEFS, DRAWS, ManyLayers, numbers
from helpers.routes import take_route

from maskpro_kernels.ops import reference
from maskpro_kernels.ops.cpu import kernels as cpu_kernels
from maskpro_kernels.ops.layer_groups import draw_layers_, kind_of, update_layers_
from maskpro_kernels.ops.triton import tiles

ROUTES = ["kernels", "compiled", "eager"]
PATTERNS = [(1, 2), (2, 4), (4, 8), (8, 16)]
KERNELS = ("sample_masks", "score_update_of_layers", "score_updates_of_layers")


# Of 2:4, in the ordinary suite
DTYPES_AND_SHARDS = [(torch.float32, True), (torch.bfloat16, False)]


@pytest.fixture(params=ROUTES)
def route(request, monkeypatch):
    take_route(monkeypatch, request.param)
    return request.param


@pytest.mark.parametrize(
    ("on", "pattern", "dtype", "shard"),
    cases(
        itertools.product(ROUTES, PATTERNS, DTYPES, (False, True)),
        slow=lambda on, pattern, *of: pattern != (2, 4) or of not in DTYPES_AND_SHARDS,
    ),
    ids=str,
)
def test_bits_are_those_of_each_layer(on, pattern, dtype, shard, monkeypatch, launched):
    take_route(monkeypatch, on)
    of = ManyLayers(*pattern, dtype, shard)
    codes, moved, by_codes, several = of.drawn(), of.updated(), of.updated(by_codes=True), of.updated(draws=3)
    assert [launched[name] for name in KERNELS] == ([2, 2, 1] if on == "kernels" else [0, 0, 0])
    take_route(monkeypatch, "eager")
    assert_same_bits(codes, of.drawn_alone())
    expected = of.updated_alone()
    assert_same_bits(moved, expected)
    assert_same_bits(by_codes, expected)
    assert_same_bits(several, of.updated_alone(draws=3))
    large = [(new, layer.logits) for new, layer in zip(moved, of.layers, strict=True) if layer.logits.numel() > 100]
    assert len(large) == 3 and not any(torch.equal(*pair) for pair in large)


FAR = [0.0, -0.0, 1.0, -1.0, 1e-40, 1e30, -1e30, 2.5e38, -1e38, -3e38]


# kernels promise nothing of logits that are not finite
@pytest.mark.parametrize(("on", "odd"), [*((route, False) for route in ROUTES), ("compiled", True), ("eager", True)])
@pytest.mark.parametrize("pattern", [(1, 4), (2, 4), (3, 4), (4, 8)], ids=str)
def test_logits_that_lie_far_apart_move_as_in_each_layer(pattern, on, odd, monkeypatch):
    take_route(monkeypatch, on)
    of, generator = ManyLayers(*pattern, sizes=[(64, 16), (8, 64)]), torch.Generator().manual_seed(0)
    values = torch.tensor(FAR + [torch.inf, -torch.inf, torch.nan] * odd)
    for layer in of.layers:
        layer.logits.copy_(values[torch.randint(len(values), layer.logits.shape, generator=generator)])
    expected = of.updated_alone()
    assert_same_bits(of.drawn(), of.drawn_alone())
    for by_codes in (False, True):
        assert_same_bits(of.updated(by_codes=by_codes), expected, m=pattern[1])


@pytest.mark.slow
def test_scores_of_codes_that_keep_the_largest_of_logits_far_apart(route, monkeypatch):
    """2:4, a group a block: the second largest lies further below the largest than float32 reaches."""
    monkeypatch.setattr(tiles, "INTERPRETER_BLOCK", 1)
    of = ManyLayers(2, 4, sizes=[(6, 12)])
    far = [(3e38, -3e38, -3.1e38, -3.2e38), (3.4e38, -3.4e38, -3.4e38, -3.4e38), (3e38, 2e38, -3e38, -3e38)]
    orders = [order for group in far for order in itertools.permutations(group)]
    of.layers[0].logits.copy_(torch.tensor(orders).view(of.layers[0].logits.shape))
    expected = of.updated_alone()
    assert expected[0].isfinite().all()
    assert_same_bits(of.drawn(), of.drawn_alone())
    assert_same_bits(of.updated(by_codes=True), expected)


def test_an_update_of_another_draw_leaves_codes_that_are_held(route):
    of = ManyLayers(2, 4)
    group = of.group()
    draw_layers_(group, 1.0, *numbers(), torch.tensor(1))
    held = [codes.clone() for codes in group.codes]
    update_layers_(group, torch.tensor([0.5]), 1.0, *numbers(), torch.tensor([2]))
    assert_same_bits(group.codes, held)


def test_a_program_takes_several_blocks_of_its_layer(monkeypatch, launched):
    """As on a GPU, where layers are of many more blocks than there are programs."""
    monkeypatch.setattr(tiles, "INTERPRETER_BLOCK", 64)
    monkeypatch.setattr(tiles, "PROGRAMS_A_PROCESSOR", 0)
    of = ManyLayers(2, 4)
    codes, moved = of.drawn(), of.updated()
    assert [launched[name] for name in KERNELS] == [1, 1, 0]
    take_route(monkeypatch, "eager")
    assert_same_bits(codes, of.drawn_alone())
    assert_same_bits(moved, of.updated_alone())


def test_flips_are_counted(route):
    """Those of groups whose codes are not of the N largest logits, ties to the lower index."""
    of = ManyLayers(2, 4)
    pairs = zip(of.drawn_alone(), of.layers, strict=True)
    expected = [(codes != reference.top_n_mask(layer.logits, n=2, m=4)).float().mean() for codes, layer in pairs]
    found = torch.tensor(of.flip_rates())
    torch.testing.assert_close(found, torch.stack(expected).nan_to_num())
    assert 0.01 < found[0] < 0.9


def test_numbers_are_read_at_their_places(route):
    """As a captured CUDA graph does: what changes in them counts, and nothing that it reads is made again."""
    of = ManyLayers(2, 4)
    group, (seed, step), draw = of.group(), numbers(STEP - 1), torch.tensor(0)
    draw_layers_(group, 1 / 0.7, seed, step, draw)
    table, addresses = group._addresses, [codes.data_ptr() for codes in group.codes]
    first = [codes.clone() for codes in group.codes]
    step.fill_(STEP)
    draw.fill_(DRAWS[0])
    draw_layers_(group, 1 / 0.7, seed, step, draw)
    assert_same_bits(group.codes, of.drawn())
    assert not all(map(torch.equal, first, group.codes))
    assert group._addresses is table and [codes.data_ptr() for codes in group.codes] == addresses


def test_what_autograd_has_saved_of_them_is_known_to_have_changed(route):
    group = ManyLayers(2, 4).group()

    def versions():
        return [tensor._version for tensor in (*(layer.logits for layer in group.layers), *group.codes)]

    draw_layers_(group, 1.0, *numbers(), torch.tensor(0))
    before = versions()
    draw_layers_(group, 1.0, *numbers(), torch.tensor(1))
    update_layers_(group, torch.tensor(COEFS[:1]), 1.0, *numbers(), torch.tensor([1]), by_codes=True)
    assert all(new > old for new, old in zip(versions(), before, strict=True))


def test_layers_that_a_kernel_is_compiled_for_apart_are_of_different_kinds():
    whole, half, shard = (ManyLayers(2, 4, *how).layers[0] for how in ((), (torch.half,), (torch.float32, True)))
    odd = whole._replace(logits=misaligned(whole.logits, 1))
    kinds = [kind_of(layer, 2, 4) for layer in (whole, shard, half, odd)] + [kind_of(whole, 1, 4)]
    assert len(set(kinds)) == 5
    assert kind_of(whole._replace(layer=7), 2, 4) == kinds[0]


def test_addresses_that_no_vector_starts_from(route):
    of = ManyLayers(2, 4, moved=lambda logits: misaligned(logits, 1))
    assert not of.group().aligned
    codes, moved = of.drawn(), of.updated()
    assert_same_bits(codes, of.drawn_alone())
    assert_same_bits(moved, of.updated_alone())


def test_where_nothing_compiles_layers_come_one_by_one(monkeypatch):
    take_route(monkeypatch, "compiled")
    of = ManyLayers(2, 4)
    monkeypatch.setattr(cpu_kernels, "_run_over_layers", lambda *_, **__: False)
    assert_same_bits(of.drawn(), of.drawn_alone())
    assert_same_bits(of.updated(), of.updated_alone())
    assert_same_bits(of.updated(by_codes=True), of.updated_alone())
