"""Checkpoints into models on the meta device that ranks share: no rank holds the whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.held_bytes import counting_held
from helpers.in_ranks import all_in_ranks
from helpers.sharded_jobs import Blocks, a_mesh, shard, whole_logits
from helpers.tiny_llama import tiny_model
from safetensors.torch import save_file
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import maskpro_kernels as mk
from maskpro_kernels.checkpoints.mask_file import save_masks
from maskpro_kernels.modules import masked_layers
from maskpro_kernels.shards import whole

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
    """Twice: from meta, and in place, where FSDP2 has gathered and other values stand."""
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
        "checkpoint: expected values for all of the model that is on meta or stored, got none for blocks.0.0.weight, "
        "blocks.0.0.bias, blocks.0.1.weight and 10 more in ",
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
    for damage, told in REFUSED.values():
        path = damage(tmp_path)
        with pytest.raises(ValueError) as error:
            mk.load_checkpoint_shards(model, path if isinstance(path, Path) else tmp_path)
        assert str(error.value).startswith(told), error.value
        assert all(parameter.is_meta for parameter in model.parameters())
    with torch.device("meta"):
        model.register_buffer("places", torch.arange(4), persistent=False)
    save_file(tensors_of(Blocks()) | {"another": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="got none for places, a buffer that checkpoints leave out"):
        mk.load_checkpoint_shards(model, tmp_path)
    model.places = torch.arange(4)
    with pytest.warns(UserWarning, match="it holds what the model has not, and is left out: another$"):
        mk.load_checkpoint_shards(model, tmp_path / "model.safetensors", device="cpu")
    assert_same_bits(dict(model.state_dict()), tensors_of(Blocks()))


def load_llamas(rank: int, folder: Path) -> None:
    for tied in (True, False):
        load_llama(folder / str(tied), tied)


def load_llama(folder: Path, tied: bool) -> None:
    """By the loader of transformers, and by this one."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.distributed import DistributedConfig

    ids = torch.arange(12).unsqueeze(0)
    alone = tiny_model(tie_word_embeddings=tied)
    by_transformers = LlamaForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(fsdp_size=2))
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig.from_pretrained(folder))
    # rotary angles are computed, and stored nowhere
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    for block in model.model.layers:
        fully_shard(block, mesh=a_mesh([2]))
    fully_shard(model, mesh=a_mesh([2]))
    mk.load_checkpoint_shards(model, folder)
    for one in (model, by_transformers, alone):
        mk.convert(one, "2:4", gap=2.0)
    with torch.no_grad():
        expected = alone.eval()(ids).logits
        assert_same_bits(model.eval()(ids).logits, expected)
        assert_same_bits(by_transformers.eval()(ids).logits, expected)


@pytest.mark.slow
def test_llamas_come_in_sharded(tmp_path):
    for tied in (True, False):
        tiny_model(tie_word_embeddings=tied).save_pretrained(tmp_path / str(tied))
    all_in_ranks(2, load_llamas, folder=tmp_path)


def masks_of(model: Blocks, others: int) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    """(name, group codes, weight): by magnitude, but for the first rows, which keep the smallest weights."""
    layers = {name: model.get_submodule(name).weight.detach() for name in ("blocks.0.1", "blocks.1.1", "out")}
    sizes = {name: torch.cat([-weight[:others].abs(), weight[others:].abs()]) for name, weight in layers.items()}
    return [(name, mk.top_n_mask(sizes[name], "2:4"), weight) for name, weight in layers.items()]


def take_masks(rank: int, files: dict[int, Path]) -> None:
    for others, path in files.items():
        model = Blocks(WIDTH)
        shard(model, [2])
        mk.convert(model, "2:4", targets=["blocks.*.1", "out"], gap=2.0, init=path)
        logits = dict(zip(masked_layers(model), whole_logits(model), strict=True))
        for name, codes, _ in masks_of(Blocks(WIDTH), others):
            assert_same_bits(mk.top_n_mask(logits[name], "2:4"), codes)


def test_masks_of_files_are_taken_by_rows(tmp_path):
    """Also of a file that holds what differs from magnitudes, which takes the weights of all rows."""
    files = {}
    for others, needs in {10_000: None, 1: "magnitude"}.items():
        files[others] = tmp_path / f"{others}.safetensors"
        saved = save_masks(files[others], masks_of(Blocks(WIDTH), others), "2:4", model="blocks", against=needs)
        assert saved.needs == needs
    all_in_ranks(2, take_masks, files=files)


def take_other_masks(rank: int, files: list[Path]) -> str:
    model = Blocks(WIDTH)
    shard(model, [2])
    with pytest.raises(ValueError) as error:
        mk.convert(model, "2:4", targets=["blocks.*.1", "out"], init=files[rank])
    assert not any(isinstance(module, mk.MaskedLinear) for module in model.modules())
    return str(error.value)


@pytest.mark.parametrize("there", [True, False], ids=["another file", "no file"])
def test_ranks_have_one_mask_or_none(there, tmp_path):
    """As where a path leads each rank to a disk of its own."""
    files = [tmp_path / "of 0.safetensors", tmp_path / "of 1.safetensors"]
    for others, path in list(enumerate(files, 1))[: 2 if there else 1]:
        save_masks(path, masks_of(Blocks(WIDTH), others), "2:4", model="blocks")
    told = all_in_ranks(2, take_other_masks, files=files)
    if there:
        assert told == ["ranks: expected what rank 0 has on all of them, got other init on rank 1"] * 2
    else:
        assert told[0] == f"rank 1: {told[1]}"
        assert told[1].startswith('init: expected "magnitude", a mask file or group codes in a model that is cut')
