"""What layers that a tensor-parallel plan has cut do not take: one line each, by name, before anything changes."""

from __future__ import annotations

import pytest
import torch
from helpers.in_ranks import all_in_ranks
from helpers.rank_jobs import rank_trainer
from helpers.refusals import assert_lines, lines_of
from helpers.tensor_jobs import Exact, a_loss, a_mesh, a_split_model, batches_of_whole_numbers, split
from helpers.tiny_llama import tiny_model
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import maskpro_kernels as mk
import maskpro_kernels.hf
from maskpro_kernels.checkpoints.logits import save_logits
from maskpro_kernels.modules import masked_layers

PLAN = "model: expected a weight that a tensor-parallel plan has cut into rows or columns"
UP, DOWN = "blocks.0.up", "blocks.0.down"
CUT = f"got {UP}, which a tensor-parallel plan has cut"


def placed_by_hand(mesh: DeviceMesh, *placements, layer: str = "down") -> None:
    """A model of which one weight is placed so, and converted."""
    model = Exact(bias=False)
    linear = model.blocks[0][layer]
    linear.weight = nn.Parameter(distribute_tensor(linear.weight.detach(), mesh, placements))
    before = dict(model.named_modules())
    try:
        mk.convert(model, "2:4")
    finally:
        assert dict(model.named_modules()) == before


def with_parts_of_a_sum() -> None:
    model = Exact(bias=False)
    linear = model.blocks[0]["up"]
    linear.weight = nn.Parameter(DTensor.from_local(linear.weight.detach(), a_mesh([2]), [Partial()]))
    mk.convert(model, "2:4")


def with_a_bias_of_its_own() -> None:
    model = Exact()
    linear = model.blocks[0]["up"]
    linear.weight = nn.Parameter(distribute_tensor(linear.weight.detach(), a_mesh([2]), [Shard(0)]))
    mk.convert(model, "2:4")


def with_a_part_of_the_layers() -> None:
    model = Exact()
    parallelize_module(model, a_mesh([2]), {UP: ColwiseParallel(), DOWN: RowwiseParallel()})
    mk.convert(model, "2:4")
    trained(model)


def with_shards_of_both_kinds() -> None:
    model = Exact()
    parallelize_module(model, a_mesh([2]), {UP: ColwiseParallel(), DOWN: RowwiseParallel()})
    mk.convert(model, "2:4", gap=2.0)
    fully_shard(model.blocks[1]["up"], mesh=a_mesh([2]))
    trained(model)


def with_rows_that_are_cut_unevenly() -> None:
    model, mesh = Exact(width=6, bias=False), init_device_mesh("cpu", (2, 1), mesh_dim_names=("fsdp", "tp"))
    linear = model.blocks[0]["up"] = nn.Linear(8, 5, bias=False)
    parallelize_module(linear, mesh["tp"], ColwiseParallel())
    fully_shard(model, mesh=mesh["fsdp"])
    mk.convert(model, "2:4", targets=[UP])


def with_other_logits() -> None:
    model = a_split_model([2])
    layer = model.blocks[0]["up"]
    layer.logits = nn.Parameter(torch.zeros(32, 16))
    layer.shard = None
    trained(model)


def fed_by_hand() -> None:
    a_split_model([2]).blocks[0]["up"].forward(torch.zeros(3, 16))


def trained(model: nn.Module, how: str = "reinforce", **others) -> mk.MaskTrainer:
    return rank_trainer(how, model=model, loss_fn=a_loss, batches=batches_of_whole_numbers(), **others)


def saved_by_transformers(finalized: bool) -> None:
    model = tiny_model()
    mk.convert(model, "2:4", gap=2.0)
    for block in model.model.layers:
        fully_shard(block, mesh=a_mesh([2]))
    masked_layers(model)
    if finalized:
        mk.finalize(model)
    model.save_pretrained("nowhere")


# what is refused, and how the line begins
REFUSED = {
    "parts of a sum": (with_parts_of_a_sum, f"{PLAN}, got (Partial(sum),) in {UP}: parts of a sum have no mask"),
    "copies": (
        lambda: placed_by_hand(a_mesh([2]), Replicate()),
        f"{PLAN}, over one dimension of ranks, got (Replicate(),) on DeviceMesh(",
    ),
    "mixed placements": (
        lambda: placed_by_hand(a_mesh([2, 1]), Shard(0), Shard(1)),
        f"{PLAN}, over one dimension of ranks, got (Shard(dim=0), Shard(dim=1)) on DeviceMesh(",
    ),
    "ranks in another order": (
        lambda: placed_by_hand(DeviceMesh("cpu", [1, 0]), Shard(0)),
        f"{PLAN}, over ranks of one and the same distance, as in a mesh of all ranks, got [1, 0] of 2 in {DOWN}",
    ),
    "a whole bias": (
        with_a_bias_of_its_own,
        f"model: expected a bias that a tensor-parallel plan has cut as its weight, got a plain tensor in {UP}",
    ),
    "a part of the model": (
        with_a_part_of_the_layers,
        f"model: expected a tensor-parallel plan to cut all masked layers or none, got {UP}, which it has cut, and "
        "blocks.1.up, which nothing has",
    ),
    "both kinds": (
        with_shards_of_both_kinds,
        f"model: expected a tensor-parallel plan to cut all masked layers or none, got {UP}, which it has cut, and "
        "blocks.1.up, which fully_shard has",
    ),
    "uneven rows": (
        with_rows_that_are_cut_unevenly,
        "model: expected a weight that fully_shard has cut into rows, as many on each rank under a plan, got 5 over 2 "
        f"ranks in {UP}",
    ),
    "dense forwards of rows": (
        lambda: mk.dense(a_split_model([2, 1], grid="before")).__enter__(),
        f"model: expected whole layers, got {UP}, which fully_shard has cut: ranks are sent kept values alone",
    ),
    "plain logits": (
        with_other_logits,
        f"model: expected logits sharded as their weight is, got a sharded weight and plain logits in {UP}",
    ),
    "a plain input": (fed_by_hand, "input: expected a DTensor of DeviceMesh("),
    "an initial mask": (
        lambda: mk.convert(_split(), "2:4", init="sparsegpt", calibration=[torch.zeros(2, 16)]),
        "init: expected one of magnitude, random, wanda, reconstruction, a mask file or group codes in a model that is",
    ),
    "logits elsewhere": (
        lambda: mk.convert(_split(), "2:4", logits_device="cpu"),
        "logits_device: expected None in a model that is cut over ranks",
    ),
    "weights that learn": (
        lambda: trained(a_split_model([2]), "trained weights").begin(),
        f"model: expected whole layers, {CUT}: weights learn as wholes alone",
    ),
    "an optimizer": (
        lambda: mk.MaskOptimizer(a_split_model([2])),
        f"model: expected plain tensors as weights, got a DTensor in {UP}",
    ),
    "packing": (
        lambda: mk.finalize(a_split_model([2]), to="packed"),
        f"model: expected whole layers, {CUT}: pack the whole model",
    ),
    "packing of a layer": (
        lambda: mk.Sparse24Linear.from_masked(a_split_model([2]).blocks[0]["up"]),
        "layer: expected a whole one, got a DTensor as its weight; pack the whole model",
    ),
    "a mask file": (
        lambda: save_logits(a_split_model([2]), "nowhere", {}),
        f"model: expected whole layers, {CUT}: no rank has all logits",
    ),
    "a checkpoint of masked layers": (
        lambda: saved_by_transformers(finalized=False),
        "model: expected whole tensors, got a DTensor in model.layers.0.self_attn.q_proj.",
    ),
    "a checkpoint of dense layers": (
        lambda: saved_by_transformers(finalized=True),
        "model: expected whole tensors, got a DTensor in model.layers.0.self_attn.q_proj.",
    ),
}


def _split() -> Exact:
    model = Exact()
    split(model, a_mesh([2]))
    return model


def refuse_all(rank: int) -> dict[str, str]:
    return lines_of(REFUSED)


def test_what_has_no_code_is_refused_by_name():
    for told in all_in_ranks(2, refuse_all):
        assert_lines(told, REFUSED)


def of_three_ranks_two(rank: int) -> str:
    pair = DeviceMesh("cpu", [0, 1])
    if rank == 2:
        return "none"
    with pytest.raises(ValueError) as error:
        placed_by_hand(pair, Shard(0))
    return str(error.value)


@pytest.mark.slow
def test_ranks_that_no_mesh_of_all_has_are_refused():
    *told, _ = all_in_ranks(3, of_three_ranks_two)
    line = f"{PLAN}, over ranks of one and the same distance, as in a mesh of all ranks, got [0, 1] of 3 in {DOWN}"
    assert told == [line, line]
