"""A model that fully_shard has cut over ranks, as each of them makes it, and the run that they take together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import maskpro_kernels as mk
from helpers.rank_jobs import rank_trainer
from maskpro_kernels.modules import masked_layers

NAMES = {1: ("fsdp",), 2: ("replicate", "fsdp")}


class Blocks(nn.Module):
    """Two blocks with norms, and a layer at the outermost level."""

    def __init__(self, dtype: torch.dtype = torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16)) for _ in range(2)
        )
        self.out = nn.Linear(16, 8)
        self.to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.out(x)


def shard(model: nn.Module, mesh: Sequence[int], **how) -> None:
    mesh = init_device_mesh("cpu", tuple(mesh), mesh_dim_names=NAMES[len(mesh)])
    for block in model.blocks:
        fully_shard(block, mesh=mesh, **how)
    fully_shard(model, mesh=mesh, **how)


def a_sharded_model(mesh: Sequence[int] | None, behind: bool = False, dtype=torch.float32, **how) -> nn.Module:
    """Converted, and sharded where there is a mesh; ``behind``: converted after that."""
    model = Blocks(dtype)
    if mesh is not None and behind:
        shard(model, mesh, **how)
    mk.convert(model, "2:4", targets=["*"], gap=2.0)
    if mesh is not None and not behind:
        shard(model, mesh, **how)
    return model


def whole_logits(model: nn.Module) -> list[torch.Tensor]:
    logits = (layer.logits.detach() for layer in masked_layers(model).values())
    return [tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone() for tensor in logits]


def learn_sharded(
    rank: int, mesh, how: str = "reinforce", steps: int = 3, resume: bool = False, behind=False, **others
):
    """(whole logits, records without their seconds) of a run."""
    model = a_sharded_model(mesh, behind)
    trainer = rank_trainer(how, model=model, **others)
    if resume:
        trainer.resume()
    records = trainer.run(steps - trainer.steps_done, progress=False)
    trainer.close()
    return whole_logits(model), [vars(record) | {"seconds": 0.0} for record in records]
