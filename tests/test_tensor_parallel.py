"""transformers is to split checkpoints over devices: masked and packed ones are refused, the dense one is split."""

from __future__ import annotations

import os

import pytest
import torch
from helpers.in_ranks import all_in_ranks
from helpers.tiny_llama import tiny_model
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import maskpro_kernels as mk
import maskpro_kernels.hf

WORLD = 2
KINDS = ("masked", "packed", "dense")


def split(rank: int, folder: str) -> dict[str, str | float]:
    """Of each kind why it is refused, or how far its logits over two ranks are from those of the whole model."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD), MASTER_ADDR="127.0.0.1", MASTER_PORT="29500"
    )
    tokens, told = torch.arange(12).view(2, 6), {}
    for kind in KINDS:
        path = f"{folder}/{kind}"
        try:
            parts = AutoModelForCausalLM.from_pretrained(path, distributed_config=DistributedConfig(tp_size=WORLD))
        except ValueError as error:
            told[kind] = str(error)
            continue
        whole = AutoModelForCausalLM.from_pretrained(path)
        told[kind] = float((parts(tokens).logits - whole(tokens).logits).abs().max().detach())
    return told


@pytest.mark.slow
def test_sparse_layers_are_not_split_and_the_dense_export_is(tmp_path, eager_reference):
    for kind in KINDS:
        model = tiny_model(num_key_value_heads=2)
        mk.convert(model, "2:4")
        if kind != "masked":
            mk.finalize(model, to=kind)
        model.save_pretrained(tmp_path / kind)
    for told in all_in_ranks(WORLD, split, folder=str(tmp_path)):
        for kind in ("masked", "packed"):
            assert told[kind].startswith(
                "distributed_config: expected whole layers of a checkpoint with masked or pack"
            )
            assert "tp_size=2" in told[kind] and "write the dense one" in told[kind]
        assert told["dense"] < 1e-5
