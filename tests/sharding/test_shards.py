"""Layers in parts: every shard draws and moves by the bits of the whole layer, also over two processes."""

from __future__ import annotations

import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.cases import slow
from helpers.in_ranks import all_in_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import maskpro_kernels as mk
from maskpro_kernels.learn import journal
from maskpro_kernels.learn.estimator import Draw, Entry, replay
from maskpro_kernels.learn.journal import JOURNAL
from maskpro_kernels.learn.model_masks import ModelMasks
from maskpro_kernels.learn.run import settings_of
from maskpro_kernels.modules import CounterState
from maskpro_kernels.ranks import Ranks

pytestmark = pytest.mark.usefixtures("eager_reference")

ROWS, K = 12, 64
PATTERNS = ["1:4", "2:4", "8:16"]
DTYPES = [torch.float32, torch.bfloat16]
PLACES = {
    "rows": (slice(5, 9), slice(0, K)),
    "columns": (slice(0, ROWS), slice(16, 48)),
    "rows and columns": (slice(3, 12), slice(48, 64)),
}


def whole_numbers(*shape: int, seed: int) -> torch.Tensor:
    """Products and sums of them are exact, in whatever order."""
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).float()


def a_layer(pattern: str, dtype: torch.dtype = torch.float32) -> mk.MaskedLinear:
    generator = torch.Generator().manual_seed(0)
    weight, logits = (torch.randn(ROWS, K, generator=generator) for _ in range(2))
    return mk.MaskedLinear(weight, None, logits.to(dtype), pattern, layer=3, counter_state=CounterState(seed=9)).train()


def shard_of(layer: mk.MaskedLinear, rows: slice, columns: slice) -> mk.MaskedLinear:
    weight, logits = (tensor.detach()[rows, columns].clone() for tensor in (layer.weight, layer.logits))
    place = mk.shard_counter(layer.pattern, layer.in_features, row=rows.start, column=columns.start)
    return mk.MaskedLinear(
        weight, None, logits, layer.pattern, layer=layer.layer, counter_state=layer.counter_state, **place
    ).train()


def assert_is_part(shard: mk.MaskedLinear, layer: mk.MaskedLinear, place: tuple[slice, slice]) -> None:
    assert_same_bits(shard.logits, layer.logits[place])


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("pattern", ["2:4", slow("1:4"), slow("8:16")])
def test_shards_draw_the_masks_of_the_whole_layer(pattern, place):
    layer = a_layer(pattern)
    shard, (rows, columns) = shard_of(layer, *place), place
    m = layer.pattern.m
    drawn = []
    for _ in range(2):
        codes = layer.drawn_codes()[rows, columns.start // m : columns.stop // m]
        assert_same_bits(shard.drawn_codes(), codes)
        masked = layer.masked_weight()[place]
        assert_same_bits(shard.masked_weight(), masked)
        x = torch.randn(5, shard.in_features)
        assert_same_bits(shard(x), nn.functional.linear(x, masked))
        expected = mk.mask_log_prob(shard.logits.detach(), codes, pattern).sum()
        assert_same_bits(shard.log_prob(), expected)
        drawn.append(codes)
        mk.advance(layer)
    assert not torch.equal(*drawn)


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_scores_move_shards_as_the_whole_layer(pattern, dtype, place):
    """With 16 bits the rounding, too, is that of the whole layer."""
    layer = a_layer(pattern, dtype)
    shard, before = shard_of(layer, *place), layer.logits.detach().clone()
    for step in range(2):
        entry = Entry(step, 1, 0.0, (Draw(0, 1.0, 0.5), Draw(1, 1.0, -0.25)), False)
        replay(ModelMasks({"layer": layer}), 9, entry)
        replay(ModelMasks({"layer": shard}), 9, entry)
        assert_is_part(shard, layer, place)
    mk.score_update_(layer.logits, 0.5, pattern=pattern, **layer.counter().keywords())
    mk.score_update_(shard.logits, 0.5, pattern=pattern, **shard.counter().keywords())
    assert_is_part(shard, layer, place)
    assert (layer.logits != before).any(1).all()


@pytest.mark.parametrize("passes", [1, 2], ids=["inside backward", "after two passes"])
@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_slopes_move_shards_as_the_whole_layer(pattern, dtype, place, passes):
    layer = a_layer(pattern, dtype)
    shard, (rows, columns), before = shard_of(layer, *place), place, layer.logits.detach().clone()
    estimator = mk.StraightThrough(lr=0.5)
    layers = {"layer": layer, "shard": shard}
    # the running one of a shard is its own
    estimator.begin(layers)
    estimator.load_state({"mean_squares": dict.fromkeys(layers, 100.0), "fisher_passes": {}})
    x, upstream = whole_numbers(5, K, seed=1), whole_numbers(5, ROWS, seed=2)
    with estimator.attached(0, Ranks(), passes, {}) as step:
        for _ in range(passes):
            loss = (layer(x) * upstream).sum() + (shard(x[:, columns]) * upstream[:, rows]).sum()
            step.backward(loss, 1.0 / passes)
    assert_is_part(shard, layer, place)
    assert (layer.logits != before).any(1).all()
    squares = estimator.state()["mean_squares"]
    assert squares["layer"] != squares["shard"]


def test_from_linear_takes_a_shard():
    torch.manual_seed(0)
    linear = nn.Linear(K, ROWS)
    whole = mk.MaskedLinear.from_linear(linear, "2:4", gap=1.0).train()
    place = mk.shard_counter("2:4", K, row=4)
    linear.weight, linear.bias = nn.Parameter(linear.weight[4:]), nn.Parameter(linear.bias[4:])
    shard = mk.MaskedLinear.from_linear(linear, "2:4", gap=1.0, **place).train()
    x = torch.randn(5, K)
    torch.testing.assert_close(shard(x), whole(x)[:, 4:])
    assert_same_bits(shard.masked_weight(), whole.masked_weight()[4:])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"group_offset": -1}, ValueError, "^group_offset: expected an int in"),
        ({"group_offset": 1.0}, TypeError, "^group_offset: expected an int"),
        ({"group_row_stride": 1}, ValueError, "^group_row_stride: expected at least 2, the groups"),
        ({"group_row_stride": True}, TypeError, "^group_row_stride: expected an int"),
        ({"group_offset": (1 << 32) - 3}, ValueError, "^group_offset: expected group indices below"),
        ({"group_row_stride": (1 << 32) - 1}, ValueError, "^group_offset: expected group indices below"),
    ],
)
def test_a_place_that_cannot_be_is_refused(arguments, error, message):
    linear = nn.Linear(8, 4)
    for make in (
        lambda: mk.MaskedLinear.from_linear(linear, "2:4", **arguments),
        lambda: mk.MaskedLinear(linear.weight, None, torch.zeros(4, 8), "2:4", **arguments),
    ):
        with pytest.raises(error, match=message):
            make()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"pattern": "4:2"}, ValueError, "^pattern: "),
        ({"in_features": 0}, ValueError, "^in_features: .*divisible by 4, above 0, got 0"),
        ({"in_features": 10}, ValueError, "^in_features: .*divisible by 4, above 0, got 10"),
        ({"in_features": "8"}, TypeError, "^in_features: expected an int"),
        ({"row": -1}, ValueError, "^row: expected an int in"),
        ({"column": 6}, ValueError, "^column: .*divisible by 4, so that no group is cut, got 6"),
        ({"column": 8}, ValueError, r"^column: expected an int in \[0, 8\), got 8"),
    ],
)
def test_shard_counter_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        mk.shard_counter(**{"pattern": "2:4", "in_features": 8} | arguments)


def test_a_shard_says_where_it_lies():
    layer = a_layer("2:4")
    assert shard_of(layer, *PLACES["columns"]).extra_repr().endswith("layer=3, group_offset=4, group_row_stride=16")
    assert "group_offset" not in repr(layer)


def test_a_state_goes_back_to_where_it_lay_and_nowhere_else():
    layer = a_layer("2:4")
    first, second = (shard_of(layer, slice(row, row + 4), slice(0, K)) for row in (0, 4))
    with torch.no_grad():
        second.logits.normal_()
    before = first.logits.detach().clone()
    with pytest.raises(RuntimeError, match=r"group_row_stride \[0, 16\], got those of another shard, \[64, 16\]"):
        first.load_state_dict(second.state_dict())
    assert_same_bits(first.logits, before)
    again = shard_of(layer, slice(4, 8), slice(0, K))
    again.load_state_dict(second.state_dict())
    assert_same_bits(again.drawn_codes(), second.drawn_codes())


def test_a_run_on_a_shard_is_resumed_and_replayed(tmp_path):
    place, batches = PLACES["rows and columns"], list(torch.randn(3, 5, 16))
    folder = tmp_path / "progress"

    def a_trainer(layer: mk.MaskedLinear, folder=None) -> mk.MaskTrainer:
        model = nn.Sequential(layer)
        return mk.MaskTrainer(
            model, lambda model, x: model(x).square().mean(), batches, mk.Reinforce(lr=2.0), seed=9, output_dir=folder
        )

    shard, whole = shard_of(a_layer("2:4"), *place), a_layer("2:4")
    first = a_trainer(shard, folder)
    first.run(4, progress=False)
    first.close()
    header, entries, *_ = journal.read_journal(folder / JOURNAL)
    for entry in entries:
        replay(ModelMasks({"0": whole}), 9, entry)
    assert_is_part(shard, whole, place)

    # from the journal alone, but for the first snapshot
    sorted(folder.glob("snapshot-*"))[-1].unlink()
    resumed = a_trainer(shard_of(a_layer("2:4"), *place), folder)
    assert resumed.resume() == 4
    assert_same_bits(resumed.layers["0"].logits, shard.logits)
    resumed.close()
    elsewhere = a_trainer(shard_of(a_layer("2:4"), slice(0, 9), place[1]), folder)
    with pytest.raises(ValueError, match="^output_dir: expected a run with "):
        elsewhere.resume()

    # a whole layer is named without a place
    assert header["run"]["layers"] == {"0": [3, "2:4", [9, 16], "torch.float32", 60, 16]}
    how = {"seed": 9, "accumulate": 1, "loss_fn": nn.functional.mse_loss}
    settings = settings_of(whole, {"0": whole}, mk.Reinforce(), batches, **how)
    assert settings["layers"] == {"0": [3, "2:4", [ROWS, K], "torch.float32"]}


class Halves(nn.Module):
    """A layer by its rows."""

    def __init__(self, layer: mk.MaskedLinear):
        super().__init__()
        middle = ROWS // 2
        self.parts = nn.ModuleList(shard_of(layer, slice(row, row + middle), slice(0, K)) for row in (0, middle))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([part(x) for part in self.parts], dim=-1)


def test_a_trainer_moves_two_shards_of_one_layer_as_the_whole_layer():
    layer = a_layer("2:4")
    layer.weight.copy_(whole_numbers(ROWS, K, seed=1))
    models = nn.Sequential(layer), Halves(layer)
    before = layer.logits.detach().clone()
    batches = list(whole_numbers(3, 5, K, seed=2))
    for model in models:
        trainer = mk.MaskTrainer(
            model, lambda model, x: model(x).square().mean(), batches, mk.Reinforce(lr=0.01), seed=9
        )
        trainer.run(3, progress=False)
    assert_same_bits(torch.cat([part.logits for part in models[1].parts]), layer.logits)
    assert not torch.equal(layer.logits, before)
    models[1].parts[1].group_offset = 0
    with pytest.raises(ValueError, match="^model: expected another layer id in each layer"):
        mk.MaskTrainer(models[1], lambda model, x: model(x).mean(), batches, mk.Reinforce(), seed=9)


def assert_distributed_weights_are_refused(rank: int) -> None:
    mesh, x = init_device_mesh("cpu", (2,)), torch.ones(2, 32)
    linear = nn.Linear(32, 48)
    linear.weight = nn.Parameter(distribute_tensor(linear.weight.detach(), mesh, [Shard(0)]))
    with pytest.raises(ValueError, match="^linear: expected plain tensors as weights, got a DTensor in weight"):
        mk.MaskedLinear.from_linear(linear, "2:4")
    for name in ("weight", "values"):
        model = nn.Sequential(nn.Linear(32, 48)).eval()
        mk.convert(model, "2:4")
        if name == "values":
            mk.finalize(model, to="packed")
        with pytest.raises(NotImplementedError, match="ColwiseParallel currently only support nn.Linear"):
            parallelize_module(model, mesh, {"0": ColwiseParallel()})
        spread = distribute_tensor(getattr(model[0], name).detach(), mesh, [Shard(0)])
        setattr(model[0], name, nn.Parameter(spread, requires_grad=False))
        with pytest.raises(ValueError, match=f"^{name}: expected a plain tensor, got a DTensor"):
            model(x)


def test_distributed_weights_are_refused_by_name():
    all_in_ranks(2, assert_distributed_weights_are_refused)
