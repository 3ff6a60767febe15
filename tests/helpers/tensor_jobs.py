"""A model that a tensor-parallel plan has cut over ranks, as each of them makes it, and the run that they take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import maskpro_kernels as mk
from helpers.rank_jobs import rank_trainer, records_of_run
from helpers.sharded_jobs import whole_logits

NAMES = {1: ("tp",), 2: ("fsdp", "tp")}


class Exact(nn.Module):
    """Two blocks of layers whose products of whole numbers have no rounding, in whatever order they are summed up."""

    def __init__(self, width: int = 16, bias: bool = True, dtype: torch.dtype = torch.float32):
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(width, 2 * width, bias), "down": nn.Linear(2 * width, width, bias)})
            for _ in range(2)
        )
        with torch.no_grad():
            for parameter in self.parameters():
                whole_numbers = torch.randint(-4, 5, parameter.shape, generator=draw)
                parameter.copy_(whole_numbers / 4)
        self.to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block["down"](block["up"](x).relu())
        return x


def a_mesh(shape: Sequence[int]) -> DeviceMesh:
    return init_device_mesh("cpu", tuple(shape), mesh_dim_names=NAMES[len(shape)])


def split(model: nn.Module, mesh: DeviceMesh) -> None:
    plan = {f"blocks.*.{name}": style() for name, style in (("up", ColwiseParallel), ("down", RowwiseParallel))}
    parallelize_module(model, mesh["tp"], plan)


def a_split_model(mesh: Sequence[int] | None, pattern: str = "2:4", grid: str | None = None, **of_model) -> Exact:
    """Converted, and cut where there is a mesh.

    Args:
        grid: whether fully_shard cuts again over the first dimension of the mesh, "before" or "behind" ``convert``.
    """
    model, mesh = Exact(**of_model), None if mesh is None else a_mesh(mesh)
    if mesh is not None:
        split(model, mesh)
    if mesh is not None and grid == "before":
        fully_shard(model, mesh=mesh["fsdp"])
    mk.convert(model, pattern, targets=["*"], gap=2.0)
    if mesh is not None and grid == "behind":
        fully_shard(model, mesh=mesh["fsdp"])
    return model


def batches_of_whole_numbers(count: int = 8) -> list[torch.Tensor]:
    return [
        torch.randint(-3, 4, (4, 16), generator=torch.Generator().manual_seed(place)).float() for place in range(count)
    ]


def a_loss(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Of outputs that have no rounding, by sums that have none."""
    return model(x).abs().sum() / 1024


class Signed:
    """``a_loss``, whose curvature passes with random signs of the outputs tell."""

    def __call__(self, model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return a_loss(model, x)

    def fisher_loss(self, model: nn.Module, x: torch.Tensor, seed: int) -> torch.Tensor:
        y = model(x)
        signs = 2 * torch.randint(2, y.shape, generator=torch.Generator().manual_seed(seed)) - 1
        return (y * signs).sum() / 64


def learn_split(rank: int, mesh: Sequence[int] | None, how: str, steps: int, grid: str | None = None, **others):
    """(whole logits, records without their seconds) of a run, which goes on where ``output_dir`` holds one."""
    of = {"model": a_split_model(mesh, grid=grid), "batches": batches_of_whole_numbers(), "loss_fn": a_loss}
    trainer = rank_trainer(how, **of | others)
    records = records_of_run(trainer, steps)
    return whole_logits(trainer.model), records


def learn_each_split(rank: int, runs: Mapping[str, Mapping]) -> dict[str, tuple]:
    """``learn_split`` of several runs, one after the other, by name."""
    return {name: learn_split(rank, **how) for name, how in runs.items()}
