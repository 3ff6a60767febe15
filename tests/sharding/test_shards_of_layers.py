"""Gathered weights of a sharded layer, and the part on each rank."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.in_ranks import all_in_ranks
from helpers.sharded_jobs import Blocks, a_sharded_model, shard
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.fsdp._fully_shard import _fsdp_collectives
from torch.distributed.tensor import DTensor

import maskpro_kernels as mk
from maskpro_kernels.fsdp import resetting
from maskpro_kernels.learn.model_masks import ModelMasks
from maskpro_kernels.modules import masked_layers
from maskpro_kernels.prune.selection import READ_ELSEWHERE
from maskpro_kernels.shards import whole

WIDTH = 256


def gathered_bytes(model: nn.Module, x: torch.Tensor) -> int:
    """Bytes that this rank sends in a forward."""
    sent, real = [], _fsdp_collectives.DefaultAllGather.__call__

    def counted(self, output_tensor, input_tensor, *args, **kwargs):
        sent.append(input_tensor.nbytes)
        return real(self, output_tensor, input_tensor, *args, **kwargs)

    _fsdp_collectives.DefaultAllGather.__call__ = counted
    try:
        with torch.no_grad():
            model(x)
    finally:
        _fsdp_collectives.DefaultAllGather.__call__ = real
    return sum(sent)


def count_bytes(rank: int) -> tuple[int, int, int, int]:
    """(bytes sent of the dense model, of the masked one, weights of this rank, bytes of its other parameters)."""
    x, dense = torch.randn(4, WIDTH, dtype=torch.bfloat16), Blocks(WIDTH, torch.bfloat16)
    shard(dense, [2])
    model = a_sharded_model([2], width=WIDTH, dtype=torch.bfloat16)
    layers = masked_layers(model).values()
    weights = sum(layer.own_weight.numel() for layer in layers)
    others = sum(p.to_local().nbytes for name, p in model.named_parameters() if p.dim() == 1)
    assert all(isinstance(layer.logits, DTensor) for layer in layers)
    sent = gathered_bytes(dense, x), gathered_bytes(model, x)
    # nor are logits gathered while the layers run
    assert all(isinstance(layer.logits, DTensor) for layer in layers)
    return *sent, weights, others


def test_nine_bits_a_weight_are_gathered_and_no_logits():
    for of_dense, of_masked, weights, others in all_in_ranks(2, count_bytes):
        assert of_dense == 2 * weights + others
        assert of_masked == 9 * weights // 8 + others
        assert of_masked <= 0.6 * of_dense


@torch.no_grad()
def hold(rank: int) -> None:
    """Layers, masks and losses of a sharded model equal those of the whole one."""
    model, alone, x = a_sharded_model([2]), a_sharded_model(None), torch.randn(3, 16)
    assert_outputs_follow_the_masks(model, alone, x)
    assert_parts_and_sums_differ(model, alone)
    with ModelMasks(model).drawn(draw=1), ModelMasks(alone).drawn(draw=1):
        assert_same_bits(model(x), alone(x))
    assert_same_bits(model(x), alone(x))
    # cast: FSDP2 makes shards again, and the outermost layer had gathered others
    for one in (model, alone):
        one.bfloat16().float()
    assert_same_bits(model(x), alone(x))
    assert_finalized_weights_are_the_shards(model, alone, x)


def assert_outputs_follow_the_masks(model: nn.Module, alone: nn.Module, x: torch.Tensor) -> None:
    """Also of the outermost layer, which FSDP2 keeps gathered from forward to forward, and of one that ran before."""
    seen = []
    for move in (lambda _: None, mk.advance, lambda m: m.eval(), lambda m: m.train(), mk.advance):
        move(model)
        move(alone)
        seen.append(model(x))
        assert_same_bits(seen[-1], alone(x))
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])


def assert_parts_and_sums_differ(model: nn.Module, alone: nn.Module) -> None:
    torch.testing.assert_close(mk.log_prob(model), mk.log_prob(alone))
    masks, of_alone = ModelMasks(model), ModelMasks(alone)
    # FSDP2 has left the outermost layer gathered
    model.reshard()
    for (name, layer), other in zip(masked_layers(model).items(), masked_layers(alone).values(), strict=True):
        assert masks.flip_rate(name) == of_alone.flip_rate(name)
        assert_same_bits(whole(layer.masked_weight()), other.masked_weight())
        assert layer.own_logits.shape[0] == layer.own_weight.shape[0] == other.out_features // 2
        assert layer.logits.placements == layer.weight.placements


def assert_finalized_weights_are_the_shards(model: nn.Module, alone: nn.Module, x: torch.Tensor) -> None:
    with pytest.raises(
        ValueError, match=r"^model: expected whole layers, got blocks\.0\.1, which fully_shard has split"
    ):
        mk.finalize(model, to="packed")
    mk.finalize(model)
    mk.finalize(alone)
    assert type(model.out) is type(alone.out) is nn.Linear and isinstance(model.out.weight, DTensor)
    assert_same_bits(model(x), alone(x))
    assert_same_bits(whole(model.out.weight), alone.out.weight)


@torch.no_grad()
def gather_each_kind(rank: int) -> None:
    """Outputs have the bits of the whole model by each kind of code and of value; a rank has one row of the last."""
    for pattern, dtype in {"1:2": torch.float32, "4:8": torch.bfloat16, "9:16": torch.float16}.items():
        model, alone, x = Blocks(64, dtype, 2), Blocks(64, dtype, 2), torch.randn(3, 64, dtype=dtype)
        for one in (model, alone):
            mk.convert(one, pattern, targets=["*"], gap=2.0)
        shard(model, [2])
        for change in (mk.advance, lambda m: m.eval()):
            change(model)
            change(alone)
            assert_same_bits(model(x), alone(x))


@torch.no_grad()
def save_and_load(rank: int) -> None:
    """Content of a state_dict after a forward, and effect of an assigned one, before and after learning."""
    x = torch.randn(3, 16)
    for after in (False, True):
        model, alone = Blocks(), a_sharded_model(None)
        if not after:
            mk.convert(model, "2:4", targets=["*"], gap=2.0)
        shard(model, [2])
        if after:
            # FSDP2 hooks to the layers that it finds
            model(x)
            mk.convert(model, "2:4", targets=["*"], gap=2.0)
        for change in (masked_layers, mk.finalize):
            change(model)
            change(alone)
            model(x)
            assert_states_are_shards(model, alone)
            for one in (model, alone):
                state = {name: -2 * t if t.dim() == 2 else t for name, t in one.state_dict().items()}
                one.load_state_dict(state, assign=True)
            assert_same_bits(model(x), alone(x))


def assert_states_are_shards(model: nn.Module, alone: nn.Module) -> None:
    state, whole_state = model.state_dict(), alone.state_dict()
    assert state.keys() == whole_state.keys()
    for name, tensor in state.items():
        assert isinstance(tensor, DTensor) or name.endswith("_extra_state"), name
        assert_same_bits(whole(tensor), whole_state[name])


def go_back(rank: int) -> None:
    """Gradients of inputs are those of the whole model, and only under the mask of the forward."""
    model, alone = a_sharded_model([2]), a_sharded_model(None)
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
    for one in (model, alone):
        for layer in masked_layers(one).values():
            layer.logits.requires_grad_(False)
    for training in (True, False):
        grads = [gradient_in_16_bits(one.train(training), x) for one in (alone, model)]
        assert_same_bits(*grads)
    for change in (mk.advance, lambda m: m.train(not m.training)):
        y = model.train()(x).sum()
        change(model)
        with pytest.raises(RuntimeError, match=r"^weight: expected the mask of the forward in its backward, got"):
            with resetting(model):
                y.backward()
    masked_layers(model)["out"].weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"^weight: expected a frozen one in a layer that fully_shard has split, got"):
        model(x)


def gradient_in_16_bits(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Under autocast; nothing of a weight is kept from forward to backward but what FSDP2 frees in between."""
    kept, shapes = [], {layer.weight.shape for layer in masked_layers(model).values()}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x).float().sum()
    assert not [t for t in kept if t.shape in shapes and t.dtype == torch.bfloat16]
    return torch.autograd.grad(y, x)[0]


class ReadsItself(Blocks):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + nn.functional.linear(x, self.out.weight)


def use_in_other_ways(rank: int) -> None:
    """In 16 bits by a policy of FSDP2, gathered before the layers are known, and with gradients of the logits."""
    reader = ReadsItself()
    shard(reader, [2])
    found = mk.convert(reader, "2:4", calibration=[torch.randn(3, 16)])
    assert found.skipped == {"out": READ_ELSEWHERE} and len(found.converted) == 4
    model, x = Blocks(), torch.randn(3, 16)
    mk.convert(model, "2:4", targets=["*"], gap=2.0)
    for layer in masked_layers(model).values():
        layer.logits.requires_grad_(False)
    shard(model, [2], mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    with torch.no_grad():
        # FSDP2 gathers weights and logits, as of any model before `masked_layers`
        before = model(x)
        masked_layers(model)
        assert_same_bits(model(x), before)
        assert before.dtype == torch.bfloat16 and before.isfinite().all()
    model = Blocks()
    mk.convert(model, "2:4", targets=["*"], gap=2.0)
    shard(model, [2], reshard_after_forward=False)
    alone = a_sharded_model(None)
    for _ in range(2):
        assert_same_bits(model(x), alone(x))
        for one in (model, alone):
            mk.advance(one)
    model.unshard()
    mk.advance(model)
    with pytest.raises(RuntimeError, match=r"^weight: expected one gathered under the current mask, got one under"):
        with resetting(model):
            model(x)
    model = a_sharded_model([2])
    mk.log_prob(model).backward()
    grads = [whole(layer.logits.grad) for layer in masked_layers(model).values()]
    alone = a_sharded_model(None)
    mk.log_prob(alone).backward()
    for grad, layer in zip(grads, masked_layers(alone).values(), strict=True):
        torch.testing.assert_close(grad, layer.logits.grad)


def test_layers_masks_and_losses_are_those_of_the_whole_model():
    all_in_ranks(2, hold)


def test_patterns_and_dtypes_are_gathered():
    all_in_ranks(2, gather_each_kind)


def test_states_hold_dense_shards_and_are_loaded():
    all_in_ranks(2, save_and_load)


def test_gradients_are_those_of_the_mask_of_the_forward():
    all_in_ranks(2, go_back)


def test_sharded_layers_take_a_policy_and_give_gradients():
    all_in_ranks(2, use_in_other_ways)


class Shards(nn.Module):
    """Stands in for a module of fully_shard; names of called methods go to ``calls``, and those in ``failing`` fail."""

    def __init__(self, name: str, calls: list, failing: Sequence[str] = (), inner: Sequence[nn.Module] = ()):
        super().__init__()
        self.name = name
        self.calls = calls
        self.failing = failing
        self.inner = nn.ModuleList(inner)

    def _note(self, method: str) -> None:
        self.calls.append((self.name, method))
        if method in self.failing:
            raise RuntimeError(f"{method} of {self.name}")

    def reset_iter_state(self) -> None:
        self._note("reset_iter_state")

    def reshard(self) -> None:
        self._note("reshard")


@pytest.mark.parametrize("failing", [(), ("reset_iter_state",), ("reshard",), ("reset_iter_state", "reshard")])
def test_the_first_error_is_raised_and_later_ones_are_its_notes(monkeypatch, failing):
    """Only the outermost modules are reset; all return to their shards."""
    calls = []
    monkeypatch.setattr(torch.distributed.fsdp, "FSDPModule", Shards)
    roots = [Shards("root", calls, failing, [Shards("inner", calls)]), Shards("other", calls)]
    with pytest.raises(ValueError, match="^the first") as raised, resetting(nn.Sequential(*roots)):
        raise ValueError("the first")
    assert calls == [
        *((name, "reset_iter_state") for name in ("root", "other")),
        *((name, "reshard") for name in ("root", "inner", "other")),
    ]
    notes = [f"afterwards {method} of FSDP2: RuntimeError: {method} of root" for method in failing]
    assert str(raised.value) == "the first" and getattr(raised.value, "__notes__", []) == notes


def test_without_an_error_the_one_of_reshard_is_raised(monkeypatch):
    monkeypatch.setattr(torch.distributed.fsdp, "FSDPModule", Shards)
    with pytest.raises(RuntimeError, match="^reshard of root$"), resetting(Shards("root", [], ["reshard"])):
        pass
