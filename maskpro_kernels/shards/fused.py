"""The matrices of all experts of a mixture in one parameter that ranks share, as those of single layers, and back.

A tensor-parallel plan has cut the rows or the columns of every expert's matrix: what a rank has of it is a view.
fully_shard has given each rank whole experts. Of single layers it gives each rank rows of every one, and so do these:
ranks exchange what they have once, and FSDP2 is told that it gathers these layers in the place of the parameter. For
that torch has no public names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .dtensors import is_distributed, local
from .rows import Params, hook_state_dicts


class Fusion(NamedTuple):
    """How a parameter holds the matrices of experts.

    Attributes:
        parts: of how many matrices an expert's rows are made, one behind the other.
        transposed: whether it is [experts, K, out]; else it is [experts, out, K].
    """

    parts: int
    transposed: bool

    @property
    def rows(self) -> int:
        """The dimension of rows."""
        return 2 if self.transposed else 1

    @property
    def columns(self) -> int:
        return 3 - self.rows

    def shape(self, experts: int, rows: int, k: int) -> torch.Size:
        """Of the parameter, by the shape of a single matrix."""
        return torch.Size((experts, k, self.parts * rows) if self.transposed else (experts, self.parts * rows, k))

    def apart(self, fused: Tensor) -> Tensor:
        """A view [parts, experts, out / parts, K]."""
        single = fused.unflatten(self.rows, (self.parts, -1)).movedim(self.rows, 0)
        return single.mT if self.transposed else single

    def together(self, single: Sequence[Tensor]) -> Tensor:
        """A new tensor of matrices: those of the first part of all experts, then those of the next one."""
        experts, first = len(single) // self.parts, single[0]
        fused = torch.empty(self.shape(experts, *first.shape), dtype=first.dtype, device=first.device)
        views = self.apart(fused)
        for place, matrix in enumerate(single):
            views[divmod(place, experts)].copy_(matrix)
        return fused


def plan_of(parameter: Tensor, params: Params):
    """torch's layout by which a tensor-parallel plan has cut a parameter, FSDP2's cut apart; None without a plan."""
    if id(parameter) in params:
        return params[id(parameter)][0]._unsharded_dtensor_spec
    return parameter._spec if is_distributed(parameter) else None


def reason_against_fused(parameter: Tensor, how: Fusion, params: Params) -> str | None:
    """Why a parameter that ranks share is not taken apart; None where it can be.

    Args:
        params: of ``resharded``.
    """
    if id(parameter) in params:
        param, _ = params[id(parameter)]
        if param.fsdp_placement.dim or param._module_info.shared_modules:
            return "fully_shard has cut its parameter otherwise than by experts, or other modules share it"
    spec = plan_of(parameter, params)
    if spec is None:
        return None
    if len(spec.placements) != 1:
        return f"a plan has cut its parameter over several dimensions of ranks, {spec.mesh}"
    (placement,) = spec.placements
    if not hasattr(placement, "dim"):
        return None
    if placement.dim == 0:
        return "its experts are spread over devices"
    pieces = getattr(placement, "split_factor", 1)
    if pieces != (how.parts if placement.dim == how.rows else 1):
        return f"a plan has cut its parameter into other pieces than {how.parts} matrices an expert: {placement}"
    return None


def matrix_of(fused: Tensor, how: Fusion, part: int, expert: int) -> Tensor:
    """One matrix [out / parts, K] of one expert: a view, or a DTensor of one where a plan has cut the parameter."""
    own = how.apart(local(fused))[part, expert]
    return _matrix_like(own.contiguous(), fused.shape, fused._spec, how) if is_distributed(fused) else own


def _matrix_like(own: Tensor, shape: torch.Size, spec, how: Fusion) -> Tensor:
    """The DTensor of one matrix, of which a rank has this part, by shape and plan of the parameter that holds it."""
    from torch.distributed.tensor import DTensor, Shard

    (placement,) = spec.placements
    if hasattr(placement, "dim"):
        placement = Shard(0 if placement.dim == how.rows else 1)
    rows, k = shape[how.rows] // how.parts, shape[how.columns]
    whole = {"shape": torch.Size((rows, k)), "stride": (k, 1), "run_check": False}
    return DTensor.from_local(own, spec.mesh, [placement], **whole)


def fused_of(matrices: Sequence[Tensor], how: Fusion) -> Tensor:
    """The parameter of single matrices, in the order of ``Fusion.together``; of DTensors of a plan the DTensor."""
    fused = how.together([local(matrix) for matrix in matrices])
    first = matrices[0]
    return _fused_like(fused, len(matrices), first.shape, first._spec, how) if is_distributed(first) else fused


def _fused_like(own: Tensor, count: int, matrix: torch.Size, spec, how: Fusion) -> Tensor:
    """The DTensor of all experts, of which a rank has this part, by shape and plan of one of so many matrices."""
    from torch.distributed.tensor import DTensor, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    (placement,) = spec.placements
    if hasattr(placement, "dim"):
        in_pieces = placement.dim == 0 and how.parts > 1
        dim = how.columns if placement.dim else how.rows
        placement = _StridedShard(dim, split_factor=how.parts) if in_pieces else Shard(dim)
    shape = how.shape(count // how.parts, *matrix)
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(own, spec.mesh, [placement], shape=shape, stride=stride, run_check=False)


@torch.no_grad()
def layers_of_shards(
    module: nn.Module, name: str, how: Fusion, params: Params
) -> tuple[list[list[nn.Linear]], Callable[[], None]]:
    """Layers [parts][experts] in the place of a parameter that fully_shard has cut, to which all ranks have to come.

    The rows of each are cut over the ranks, as if fully_shard had been given it.

    Args:
        module, name: that hold the parameter.
        params: of ``resharded``.

    Returns:
        (layers, what has FSDP2 gather the parameter again, which is still there).
    """
    parameter = getattr(module, name)
    param, group = params[id(parameter)]
    spec = param._unsharded_dtensor_spec
    rows, k = parameter.shape[how.rows] // how.parts, parameter.shape[how.columns]
    # of all experts, under a plan what the ranks have that share its part
    _, _, *part = how.apart(torch.empty(param._orig_size, device="meta")).shape
    whole = torch.Size((how.parts, len(parameter), *part))
    own = _exchanged(how.apart(parameter._local_tensor), whole, param.mesh_info, 1, 2)
    layers, new = [], []
    for of_part in own:
        layers.append([nn.Linear(k, rows, bias=False, device="meta") for _ in of_part])
        for layer, matrix in zip(layers[-1], of_part, strict=True):
            like = torch.empty(part, dtype=parameter.dtype, device="meta")
            like = like if spec is None else _matrix_like(like, parameter.shape, spec, how)
            new.append(_sharded(layer, "weight", like, matrix.clone(), parameter.requires_grad, param, group))
    _regroup(group, [param], new)

    def undo() -> None:
        group._to_sharded()
        handle = module.register_load_state_dict_post_hook(lambda *_: param.reset_sharded_param())
        param._post_load_hook_handle = handle
        _regroup(group, new, [param])

    return layers, undo


@torch.no_grad()
def parameter_of_shards(layers: Sequence[nn.Linear], how: Fusion, params: Params) -> Callable[[nn.Module, str], None]:
    """What ``layers_of_shards`` has taken apart, or ``convert`` before fully_shard was called, as one parameter again.

    All ranks have to come. Each has whole experts then.

    Args:
        layers: in the order of ``Fusion.together``, all of one group of FSDP2.
        params: of ``resharded``.

    Returns:
        What gives a module the parameter of that name.
    """
    weights = [layer.weight for layer in layers]
    param, group = params[id(weights[0])]
    spec, experts = param._unsharded_dtensor_spec, len(layers) // how.parts
    whole = torch.Size((how.parts, experts, *param._orig_size))
    own = torch.stack([weight._local_tensor for weight in weights]).unflatten(0, (how.parts, experts))
    own = _exchanged(own, whole, param.mesh_info, 2, 1)
    like = torch.empty(how.shape(experts, *param._orig_size), dtype=own.dtype, device="meta")
    like = like if spec is None else _fused_like(like, len(layers), weights[0].shape, spec, how)
    fused = how.together([*own.flatten(0, 1)]) if own.shape[1] else own.new_empty(how.shape(0, *param._orig_size))
    learns, old = any(weight.requires_grad for weight in weights), [params[id(weight)][0] for weight in weights]

    def give(module: nn.Module, name: str) -> None:
        _regroup(group, old, [_sharded(module, name, like, fused, learns, param, group)])

    return give


def _exchanged(own: Tensor, whole: torch.Size, mesh_info, cut: int, to: int) -> Tensor:
    """What this rank has of a tensor that FSDP2's ranks share by another of its dimensions."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    mesh = mesh_info.mesh

    def placements(dim: int) -> list:
        return [Shard(dim) if at == mesh_info.shard_mesh_dim else Replicate() for at in range(mesh.ndim)]

    stride = torch.empty(whole, device="meta").stride()
    shared = DTensor.from_local(own.contiguous(), mesh, placements(cut), shape=whole, stride=stride, run_check=False)
    moved = shared.redistribute(placements=placements(to)).to_local()
    return moved.wait() if hasattr(moved, "wait") else moved


def _sharded(module: nn.Module, name: str, like: Tensor, own: Tensor, learns: bool, beside, group):
    """FSDP2's account of a parameter that it is to gather as others of its group; the module has its shard then.

    Args:
        like: the parameter on meta, not cut by FSDP2.
        own: what this rank has of it.
        beside: FSDP2's account of one that is cut over the same ranks.
    """
    from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam, ParamModuleInfo

    of_group = beside.post_forward_mesh_info, beside.device, None, beside.mp_policy, group.offload_policy
    param = FSDPParam(nn.Parameter(like, learns), ParamModuleInfo(module, name), beside.mesh_info, *of_group)
    module._parameters[name] = nn.Parameter(param.to_sharded_dtensor(own), learns)
    param.reset_sharded_param()
    return param


def _regroup(group, old: Sequence, new: Sequence) -> None:
    """Have a group of FSDP2 gather others than before."""
    left = set(map(id, old))
    group.fsdp_params[:] = [param for param in group.fsdp_params if id(param) not in left] + list(new)
    for param in old:
        param._post_load_hook_handle.remove()
    for param in new:
        # the group may have run before, and would not do so again
        param.init_dtype_attrs(group.mp_policy)
    hook_state_dicts(group)
