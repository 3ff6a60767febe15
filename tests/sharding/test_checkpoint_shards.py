"""Checkpoints of models that ranks share: parts of tensors, and torch's loader before ``convert``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers.bits import assert_same_bits
from helpers.in_ranks import all_in_ranks
from helpers.sharded_jobs import Blocks, shard, whole_logits
from safetensors.torch import save_file

import maskpro_kernels as mk
from maskpro_kernels.shards import kinds_of_parts, read_parts

WIDTH = 128


def load_by_torch(rank: int, folder: Path) -> None:
    with torch.device("meta"):
        model = Blocks()
    shard(model, [2])
    model.to_empty(device="cpu")
    dcp.load(model.state_dict(), storage_reader=dcp.HuggingFaceStorageReader(str(folder)))
    alone, x = Blocks(), torch.randn(3, 16)
    alone.load_state_dict({name: tensor + 1 for name, tensor in alone.state_dict().items()})
    for one in (model, alone):
        mk.convert(one, "2:4", gap=2.0, targets=["blocks.*"])
    assert_same_bits(whole_logits(model), whole_logits(alone))
    assert_same_bits(model(x), alone(x))


def test_a_model_on_meta_is_cut_loaded_by_torch_and_converted(tmp_path):
    save_file({name: tensor + 1 for name, tensor in Blocks().state_dict().items()}, tmp_path / "model.safetensors")
    all_in_ranks(2, load_by_torch, folder=tmp_path)


def write_parts(folder: Path, weight: torch.Tensor, boxes: list[tuple[int, int, int, int]]) -> list[Path]:
    """As ``HuggingFaceStorageWriter(save_distributed=True)``: of each rank a file, with the place of its part."""
    folder.mkdir()
    for at, (top, bottom, left, right) in enumerate(boxes):
        place = json.dumps({"weight": {"saved_offsets": [top, left]}})
        file = folder / f"shard-{at + 1:05}-model-00001-of-00001.safetensors"
        part = weight[top:bottom, left:right].contiguous()
        save_file({"weight": part}, file, metadata={"DCP_SHARDING_INFO": place, "DCP_VERSION": "1.0"})
    return sorted(folder.iterdir())


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


def test_parts_are_loaded_if_they_have_each_element_once(tmp_path):
    weight = torch.arange(48.0).view(6, 8)
    for name, boxes in WHOLE.items():
        files = write_parts(tmp_path / name, weight, boxes)
        assert kinds_of_parts(files) == {"weight": ([6, 8], torch.float32)}
        loaded = {"weight": torch.empty(6, 8)}
        read_parts(files, loaded)
        assert_same_bits(loaded["weight"], weight)
    for name, boxes in NOT_WHOLE.items():
        files = write_parts(tmp_path / name, weight, boxes)
        with pytest.raises(ValueError, match="^snapshot: expected each element of weight once, got parts that lack"):
            kinds_of_parts(files)


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
