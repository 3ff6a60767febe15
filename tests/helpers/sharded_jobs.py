"""A model that fully_shard has cut over ranks, as each of them makes it, and the run that they take together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

import maskpro_kernels as mk
from helpers.rank_jobs import rank_trainer, records_of_run
from maskpro_kernels.modules import MaskedLinear, masked_layers
from maskpro_kernels.shards import whole

# FSDP2 can be reset after an error inside of a forward or backward
resets = pytest.mark.skipif(not hasattr(FSDPModule, "reset_iter_state"), reason="torch has reset_iter_state since 2.13")

NAMES = {1: ("fsdp",), 2: ("replicate", "fsdp")}


class Blocks(nn.Module):
    """Two blocks with norms, and a layer at the outermost level, which FSDP2 leaves gathered."""

    def __init__(self, width: int = 16, dtype: torch.dtype = torch.float32, outputs: int = 4):
        super().__init__()
        torch.manual_seed(0)
        hidden = width + width // 2
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width))
            for _ in range(2)
        )
        self.out = nn.Linear(width, outputs)
        self.to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.out(x)


def a_mesh(shape: Sequence[int]):
    return init_device_mesh("cpu", tuple(shape), mesh_dim_names=NAMES[len(shape)])


def logits_of(model: nn.Module) -> set[nn.Parameter]:
    """Logits of a model, which FSDP2 must ignore."""
    return {layer.logits for layer in model.modules() if isinstance(layer, MaskedLinear)}


def shard(model: nn.Module, mesh: Sequence[int], **how) -> None:
    how = {"mesh": a_mesh(mesh), "ignored_params": logits_of(model)} | how
    for block in model.blocks:
        fully_shard(block, **how)
    fully_shard(model, **how)


def a_sharded_model(mesh: Sequence[int] | None, after: bool = False, **of_model) -> Blocks:
    """Converted, and sharded where there is a mesh; ``after``: converted after that."""
    model = Blocks(**of_model)
    if mesh is not None and after:
        shard(model, mesh)
    mk.convert(model, "2:4", targets=["*"], gap=2.0)
    if mesh is not None and not after:
        shard(model, mesh)
    return model


def whole_logits(model: nn.Module) -> list[torch.Tensor]:
    return [whole(layer.logits.detach()).clone() for layer in masked_layers(model).values()]


def learn_sharded(rank: int, mesh: Sequence[int] | None, how: str, steps: int, after: bool = False, **others):
    """(whole logits, records without their seconds) of a run, resumed if ``output_dir`` has one."""
    trainer = rank_trainer(how, model=a_sharded_model(mesh, after), **others)
    records = records_of_run(trainer, steps)
    return whole_logits(trainer.model), records


def learn_each(rank: int, runs: Mapping[str, Mapping]) -> dict[str, tuple]:
    """``learn_sharded`` of several runs, one after the other, by name."""
    return {name: learn_sharded(rank, **how) for name, how in runs.items()}
