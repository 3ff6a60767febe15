"""Models with masked and packed layers that are to be split over devices: refused, and the dense one is split."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
from helpers.in_ranks import all_in_ranks, in_ranks
from helpers.tiny_llama import tiny_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import maskpro_kernels as mk
import maskpro_kernels.hf

WORLD = 2


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder with checkpoints of one model."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for kind in ("masked", "packed", "dense"):
        model = tiny_model(num_key_value_heads=2)
        mk.convert(model, "2:4")
        if kind != "masked":
            mk.finalize(model, to=kind)
        model.save_pretrained(folder / kind)
    return folder


def split_by_transformers(rank: int, folder: str) -> float:
    """How far the logits of a model over two ranks are from those of the whole one."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD), MASTER_ADDR="127.0.0.1", MASTER_PORT="29500"
    )
    tokens = torch.arange(12).view(2, 6)
    how = DistributedConfig(tp_size=WORLD)
    split = AutoModelForCausalLM.from_pretrained(folder, distributed_config=how)
    whole = AutoModelForCausalLM.from_pretrained(folder)
    return float((split(tokens).logits - whole(tokens).logits).abs().max().detach())


@pytest.mark.parametrize("kind", ["masked", "packed"])
def test_transformers_does_not_split_sparse_layers(folders, kind):
    for error in in_ranks(WORLD, split_by_transformers, folder=str(folders / kind)):
        assert type(error) is ValueError
        assert "distributed_config: expected whole layers of a checkpoint" in str(error)
        assert "tp_size=2" in str(error) and "write the dense one" in str(error)


def test_transformers_splits_the_dense_export(folders):
    assert max(all_in_ranks(WORLD, split_by_transformers, folder=str(folders / "dense"))) < 1e-5


def split_by_torch(rank: int, kind: str) -> str:
    mesh = init_device_mesh("cpu", (WORLD,))
    model = torch.nn.Sequential(torch.nn.Linear(16, 8))
    mk.convert(model, "2:4")
    if kind == "packed":
        mk.finalize(model, to="packed")
    model.eval()
    told = []
    try:
        parallelize_module(model, mesh, {"0": ColwiseParallel()})
    except NotImplementedError as error:
        told.append(str(error))
    # as who distributes parameters by hand leaves them
    name = "values" if kind == "packed" else "weight"
    spread = distribute_tensor(getattr(model[0], name).detach(), mesh, [Replicate()])
    setattr(model[0], name, torch.nn.Parameter(spread, requires_grad=False))
    try:
        model(torch.ones(2, 16))
    except ValueError as error:
        told.append(str(error))
    dist.barrier()
    return told


@pytest.mark.parametrize(("kind", "name"), [("masked", "weight"), ("packed", "values")])
def test_distributed_tensors_are_refused(kind, name):
    for plan, forward in all_in_ranks(WORLD, split_by_torch, kind=kind):
        assert plan == "ColwiseParallel currently only support nn.Linear and nn.Embedding!"
        assert forward.startswith(f"{name}: expected a plain tensor, got a DTensor")
