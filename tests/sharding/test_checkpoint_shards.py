"""Checkpoints into models on the meta device that ranks share: no rank holds the whole."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path

import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.held_bytes import counting_held
from helpers.in_ranks import all_in_ranks
from helpers.sharded_jobs import Blocks, shard, whole_logits
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor

import maskpro_kernels as mk
from maskpro_kernels.fsdp import whole

WIDTH = 128


class Tied(Blocks):
    """With an output that is the first embedding, a buffer of the checkpoint, and one that is computed."""

    def __init__(self, width: int = 16):
        super().__init__(width, outputs=width)
        self.embed = nn.Embedding(width, width)
        self.out.weight = self.embed.weight
        self.register_buffer("scale", torch.full((width,), 2.0))
        with torch.device("cpu"):
            self.register_buffer("shift", torch.ones(width), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(self.embed(x) * self.scale + self.shift)


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Other values than a new model has; of a parameter with two names under the last one alone."""
    names = {id(tensor): name for name, tensor in model.state_dict(keep_vars=True).items()}
    return {name: model.state_dict()[name] + 1 for name in names.values()}


def load_tied(rank: int, path: Path, mesh: list[int]) -> None:
    """Twice: from meta, and in place over other values, which FSDP2 has gathered."""
    alone, x = Tied(), torch.arange(16)
    alone.load_state_dict(tensors_of(alone), strict=False)
    with torch.device("meta"):
        model = Tied()
    shard(model, mesh)
    for _ in range(2):
        mk.load_checkpoint_shards(model, path)
        assert model.out.weight is model.embed.weight and isinstance(model.out.weight, DTensor)
        assert_same_bits(model(x), alone(x))
        model.reshard()
        with torch.no_grad():
            for tensor in (*model.parameters(), model.scale):
                tensor.zero_()
    mk.load_checkpoint_shards(model, path)
    for one in (model, alone):
        mk.convert(one, "2:4", gap=2.0, targets=["blocks.*"])
    assert_same_bits(whole_logits(model), whole_logits(alone))
    assert_same_bits(model(x), alone(x))


def test_models_are_loaded_with_ties_and_buffers(tmp_path):
    save_file(tensors_of(Tied()), tmp_path / "model.safetensors")
    all_in_ranks(2, load_tied, path=tmp_path, mesh=[2])


def get_in(rank: int, folder: Path) -> tuple[int, int, int, int]:
    """Bytes of weights and logits of this rank, of its largest shard, and most that it has held while they came."""
    with torch.device("meta"):
        model = Blocks(WIDTH, torch.bfloat16)
    shard(model, [2])
    with counting_held() as held:
        before = held.now()
        mk.load_checkpoint_shards(model, folder)
        mk.convert(model, "2:4", targets=["*"], logits_dtype=torch.bfloat16)
        peak = held.peak - before
    sizes = [parameter.to_local().nbytes for parameter in model.parameters()]
    alone = Blocks(WIDTH, torch.bfloat16)
    assert_same_bits({name: whole(model.get_parameter(name)) for name in alone.state_dict()}, alone.state_dict())
    mk.convert(alone, "2:4", targets=["*"], logits_dtype=torch.bfloat16)
    assert_same_bits(whole_logits(model), whole_logits(alone))
    return sum(sizes), max(sizes), peak, sum(parameter.nbytes for parameter in alone.parameters())


def test_no_rank_holds_more_than_its_shards_and_what_becomes_of_one(tmp_path):
    model = Blocks(WIDTH, torch.bfloat16)
    parts = list(model.state_dict().items())
    # of several files, as large checkpoints are
    for at in range(2):
        save_file(dict(parts[at::2]), tmp_path / f"model-{at}.safetensors")
    for own, largest, peak, all_ranks in all_in_ranks(2, get_in, folder=tmp_path):
        assert abs(own - all_ranks / 2) < all_ranks / 1000
        # masks are made of magnitudes in float32, and logits of masks
        assert own <= peak < own + 16 * largest, (own, largest, peak)


REFUSED = {
    "no folder": (lambda folder: folder / "none", "checkpoint: expected a folder with safetensors files, got "),
    "a layer less": (
        lambda folder: save_file({"out.weight": torch.ones(4, 16)}, folder / "model.safetensors"),
        "checkpoint: expected values for all tensors on meta and all that checkpoints have, got none for "
        "blocks.0.0.weight, blocks.0.0.bias, blocks.0.1.weight and 10 more in ",
    ),
    "another shape": (
        lambda folder: save_file(tensors_of(Blocks(outputs=8)), folder / "model.safetensors"),
        "checkpoint: expected out.weight of shape [4, 16], got [8, 16] in ",
    ),
    "half a file": (
        lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:100]),
        "checkpoint: expected whole safetensors files, got ",
    ),
}


def test_other_checkpoints_are_refused_and_the_model_stays_on_meta(tmp_path):
    with torch.device("meta"):
        model = Blocks()
    for damage, reported in REFUSED.values():
        path = damage(tmp_path)
        with pytest.raises(ValueError) as error:
            mk.load_checkpoint_shards(model, path if isinstance(path, Path) else tmp_path)
        assert str(error.value).startswith(reported), error.value
        assert all(parameter.is_meta for parameter in model.parameters())
    with torch.device("meta"):
        model.register_buffer("places", torch.arange(4), persistent=False)
    save_file(tensors_of(Blocks()) | {"another": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="got none for places, a buffer that checkpoints leave out"):
        mk.load_checkpoint_shards(model, tmp_path)
    model.places = torch.arange(4)
    with pytest.warns(UserWarning, match="left out tensors that the model does not have: another$"):
        mk.load_checkpoint_shards(model, tmp_path / "model.safetensors", device="cpu")
    assert_same_bits(dict(model.state_dict()), tensors_of(Blocks()))


def a_layer() -> nn.Linear:
    with torch.device("meta"):
        return nn.Linear(8, 6, bias=False)


def write_parts(folder: Path, weight: torch.Tensor, boxes: list[tuple[int, int, int, int]]) -> None:
    """As ``HuggingFaceStorageWriter(save_distributed=True)``: of each rank a file, with the place of its part."""
    folder.mkdir()
    for at, (top, bottom, left, right) in enumerate(boxes):
        place = json.dumps({"weight": {"saved_offsets": [top, left]}})
        file = folder / f"shard-{at + 1:05}-model-00001-of-00001.safetensors"
        part = weight[top:bottom, left:right].contiguous()
        save_file({"weight": part}, file, metadata={"DCP_SHARDING_INFO": place, "DCP_VERSION": "1.0"})


# (top, bottom, left, right) of the parts of six rows by eight columns
WHOLE = {
    "rows": [(0, 2, 0, 8), (2, 4, 0, 8), (4, 6, 0, 8)],
    "blocks": [(0, 3, 0, 4), (0, 3, 4, 8), (3, 6, 0, 4), (3, 6, 4, 8)],
    "rows that one rank has not": [(0, 6, 0, 8), (6, 6, 0, 8)],
}
NOT_WHOLE = {
    "no first rows": [(2, 4, 0, 8), (4, 6, 0, 8)],
    "no rows between": [(0, 2, 0, 8), (4, 6, 0, 8)],
    "a block less": [(0, 3, 0, 4), (0, 3, 4, 8), (3, 6, 4, 8)],
    "rows twice": [(0, 2, 0, 8), (2, 4, 0, 8), (2, 4, 0, 8), (4, 6, 0, 8)],
    # these have as many elements as the weight
    "rows twice for others": [(0, 2, 0, 8), (0, 2, 0, 8), (4, 6, 0, 8)],
    "rows of two saves": [(0, 3, 0, 8), (2, 4, 0, 8), (5, 6, 0, 8)],
    "columns of two saves": [(0, 6, 0, 4), (0, 3, 2, 6), (3, 6, 4, 8)],
}


def test_parts_are_loaded_where_they_hold_each_element_once(tmp_path):
    weight = torch.arange(48.0).view(6, 8)
    for name, boxes in WHOLE.items():
        write_parts(tmp_path / name, weight, boxes)
        model = a_layer()
        mk.load_checkpoint_shards(model, tmp_path / name)
        assert_same_bits(model.weight, weight)
    for name, boxes in NOT_WHOLE.items():
        write_parts(tmp_path / name, weight, boxes)
        with pytest.raises(ValueError, match="^checkpoint: expected each element of weight once, got parts that lack"):
            mk.load_checkpoint_shards(a_layer(), tmp_path / name)
    write_parts(tmp_path / "no last rows", weight, WHOLE["rows"][:-1])
    with pytest.raises(ValueError, match=r"^checkpoint: expected weight of shape \[6, 8\], got \[4, 8\] in "):
        mk.load_checkpoint_shards(a_layer(), tmp_path / "no last rows")


def test_quantized_values_are_refused(tmp_path):
    dtype = torch.float8_e4m3fn
    # four bits are packed: their shape would be another one as well
    save_file({"weight": torch.ones(6, 4).to(dtype)}, tmp_path / "model.safetensors")
    line = f"checkpoint: expected weight as torch.float32, got {dtype} in {str(tmp_path)!r}: "
    with pytest.raises(ValueError, match=f"^{re.escape(line)}dequantize it first$"):
        mk.load_checkpoint_shards(a_layer(), tmp_path)


def test_floats_are_converted_and_integers_are_not(tmp_path):
    dtype = torch.bfloat16
    values = torch.arange(48).view(6, 8) / 7
    save_file({"weight": values.to(dtype), "seen": torch.tensor(2**40 + 1)}, tmp_path / "model.safetensors")
    model = a_layer()
    model.register_buffer("seen", torch.tensor(0, device="meta"))
    mk.load_checkpoint_shards(model, tmp_path)
    assert_same_bits(model.weight, values.to(dtype).float())
    assert model.seen == 2**40 + 1


class Shared(nn.Module):
    """Of one module under two names."""

    def __init__(self):
        super().__init__()
        self.a = self.b = a_layer()


@pytest.mark.parametrize("names", [["b.weight"], ["a.weight", "b.weight"]])
def test_a_shared_module_is_loaded_by_any_of_its_names(names, tmp_path):
    weight = torch.arange(48.0).view(6, 8)
    save_file({name: weight.clone() for name in names}, tmp_path / "model.safetensors")
    model = Shared()
    with warnings.catch_warnings(action="error"):
        mk.load_checkpoint_shards(model, tmp_path)
    assert model.a is model.b
    assert_same_bits(model.b.weight, weight)


def take_other_masks(rank: int) -> str:
    model = Blocks(WIDTH)
    layers = {name: model.get_submodule(name).weight.detach() for name in ("blocks.0.1", "blocks.1.1", "out")}
    codes = {name: mk.top_n_mask(weight if rank else -weight, "2:4") for name, weight in layers.items()}
    shard(model, [2])
    with pytest.raises(ValueError) as error:
        mk.convert(model, "2:4", targets=["blocks.*.1", "out"], init=codes)
    assert not any(isinstance(module, mk.MaskedLinear) for module in model.modules())
    return str(error.value)


def test_ranks_have_one_mask():
    reported = all_in_ranks(2, take_other_masks)
    assert reported == ["ranks: expected the settings of rank 0 on all of them, got other init on rank 1"] * 2
