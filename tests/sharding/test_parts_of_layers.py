"""What layers that a tensor-parallel plan has cut give, and what a rank has of them, by those of the whole model."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.in_ranks import all_in_ranks
from helpers.tensor_jobs import Exact, a_mesh, a_split_model, batches_of_whole_numbers, split
from torch import nn
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import maskpro_kernels as mk
from maskpro_kernels.learn.model_masks import ModelMasks
from maskpro_kernels.modules import masked_layers
from maskpro_kernels.shards import whole


@torch.no_grad()
def hold(rank: int, mesh: list[int], grid: str | None = None) -> None:
    model, alone, x = a_split_model(mesh, grid=grid), a_split_model(None), batches_of_whole_numbers()[0]
    seen = []
    for move in (lambda _: None, mk.advance, lambda m: m.eval(), lambda m: m.train(), mk.advance):
        move(model)
        move(alone)
        seen.append(model(x))
        assert_same_bits(seen[-1], alone(x))
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])
    with ModelMasks(model).drawn(draw=1), ModelMasks(alone).drawn(draw=1):
        assert_same_bits(model(x), alone(x))
    if grid is None:
        with mk.dense(model), mk.dense(alone):
            assert_same_bits(model(x), alone(x))
            assert_same_bits(model(x), Exact()(x))
    else:
        # the outermost module stays gathered
        model.reshard()
    assert_parts_are_told_from_sums(model, alone, math.prod(mesh))
    assert_states_are_of_whole_layers(model, x)
    mk.finalize(model)
    mk.finalize(alone)
    assert_same_bits(model(x), alone(x))
    if grid is not None:
        model.reshard()
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            assert type(layer) is nn.Linear and isinstance(layer.weight, DTensor)
            assert_same_bits(whole(layer.weight), alone.get_submodule(name).weight)


def assert_parts_are_told_from_sums(model: nn.Module, alone: nn.Module, ranks: int) -> None:
    torch.testing.assert_close(mk.log_prob(model), mk.log_prob(alone))
    masks, of_alone = ModelMasks(model), ModelMasks(alone)
    for (name, layer), other in zip(masked_layers(model).items(), masked_layers(alone).values(), strict=True):
        assert masks.flip_rate(name) == of_alone.flip_rate(name)
        assert_same_bits(whole(layer.masked_weight()), other.masked_weight())
        assert layer.own_logits.numel() == layer.own_weight.numel() == other.weight.numel() // ranks
        assert (layer.logits.placements, layer.logits.device_mesh) == (
            layer.weight.placements,
            layer.weight.device_mesh,
        )


def assert_states_are_of_whole_layers(model: nn.Module, x: torch.Tensor) -> None:
    """Gathered they are those of one process."""
    another = a_split_model(None)
    another.load_state_dict({name: whole(tensor) for name, tensor in model.state_dict().items()})
    assert_same_bits(another(x), model(x))


def go_back(rank: int) -> None:
    """Gradients of inputs, and those that pass straight through a draw to logits."""
    grads = []
    for mesh in (None, [2]):
        model = a_split_model(mesh)
        x = batches_of_whole_numbers()[0].requires_grad_()
        for layer in masked_layers(model).values():
            layer.logits_backward = mk.straight_through_gradient
        model(x).square().sum().backward()
        grads.append([x.grad, *(whole(layer.logits.grad) for layer in masked_layers(model).values())])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


def take_each_kind(rank: int) -> None:
    """Patterns and dtypes, under autocast, and codes of one's own; gradients of log-probabilities are of parts."""
    for pattern, dtype in {"1:2": torch.bfloat16, "4:8": torch.float16}.items():
        model, alone = (a_split_model(mesh, pattern, dtype=dtype, bias=False) for mesh in ([2], None))
        for name, layer in masked_layers(model).items():
            assert_same_bits(whole(layer.masked_weight()), masked_layers(alone)[name].masked_weight())
        x = batches_of_whole_numbers()[0].to(dtype)
        with torch.no_grad():
            torch.testing.assert_close(model(x), alone(x), rtol=0.05, atol=0.5)
    model, alone = Exact(), Exact()
    split(model, a_mesh([2]))
    codes = {
        name: mk.top_n_mask(-layer.weight.detach().abs(), "2:4")
        for name, layer in alone.named_modules()
        if isinstance(layer, nn.Linear)
    }
    for one in (model, alone):
        mk.convert(one, "2:4", targets=["*"], init=codes, gap=2.0)
        mk.log_prob(one).backward()
    for layer, other in zip(masked_layers(model).values(), masked_layers(alone).values(), strict=True):
        assert_same_bits(whole(layer.logits.detach()), other.logits.detach())
        assert_same_bits(whole(layer.logits.grad), other.logits.grad)
    x = batches_of_whole_numbers()[0]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(x), alone(x), rtol=0.05, atol=0.5)


def share_unevenly(rank: int) -> None:
    """Of 32 rows over three ranks the last one has ten; the outputs are gathered by the plan."""
    model, alone, x = Exact(), Exact(), batches_of_whole_numbers()[0]
    plan = {f"blocks.{at}.up": ColwiseParallel(output_layouts=Replicate()) for at in range(2)}
    parallelize_module(model, a_mesh([3]), plan)
    for one in (model, alone):
        mk.convert(one, "2:4", targets=["*.up"], gap=2.0)
    assert model.blocks[0]["up"].own_weight.shape == (10 if rank == 2 else 11, 16)
    with torch.no_grad():
        assert_same_bits(model(x), alone(x))


def keep_hooks(rank: int) -> None:
    """A hook of one's own keeps a layer from being converted, beside those of the plan."""
    model, x = Exact(), batches_of_whole_numbers()[0]
    split(model, a_mesh([2]))
    seen = []
    model.blocks[0]["up"].register_forward_hook(lambda *_: seen.append(1))
    with pytest.warns(UserWarning, match="of its matrix weights have a mask"):
        found = mk.convert(model, "2:4")
    assert list(found.skipped) == ["blocks.0.up"] and "hooks" in found.skipped["blocks.0.up"]
    model(x)
    assert seen


def test_layers_give_what_whole_ones_give():
    all_in_ranks(2, hold, mesh=[2])


@pytest.mark.parametrize("grid", ["before", "behind"])
def test_layers_that_fully_shard_cuts_again_give_what_whole_ones_give(grid):
    all_in_ranks(4, hold, mesh=[2, 2], grid=grid)


def test_gradients_are_those_of_whole_layers():
    all_in_ranks(2, go_back)


def test_patterns_dtypes_and_codes_of_ones_own():
    all_in_ranks(2, take_each_kind)


def test_rows_may_be_shared_unevenly():
    all_in_ranks(3, share_unevenly)


def test_other_hooks_keep_a_layer_as_it_is():
    all_in_ranks(2, keep_hooks)
