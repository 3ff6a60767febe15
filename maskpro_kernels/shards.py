"""Masked layers whose rows FSDP2 (``torch.distributed.fsdp.fully_shard``) has shared out over ranks.

Each rank holds its own rows of weight and logits. FSDP2 gathers a layer's rows ahead of each use. What it then sends of
a masked layer are the values that its mask keeps and their bitmask: each rank draws the masks of its own rows, which
needs no other rank. Logits stay where they are, on the ranks of their weight's rows.

The hooks are FSDP2's own: it calls ``fsdp_pre_all_gather`` and ``fsdp_post_all_gather`` of a shard that has them.
Which parameter has them, and that logits are none of its parameters, is told to it through its parameter groups, for
which torch has no public names.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import ops
from .held_draw import version_of, versions
from .pattern import NMPattern, bitmask_of

# FSDP2's (parameter, group) by the id of a sharded parameter
Params = dict[int, tuple]


def is_distributed(tensor: object) -> bool:
    """Whether a tensor is a DTensor."""
    return hasattr(tensor, "to_local")


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or the whole of a DTensor, to which all ranks of its mesh have to come."""
    return tensor.detach().full_tensor() if is_distributed(tensor) else tensor


def check_in_memory(
    argument: str, layer: nn.Module, name: str = "weight", weight: Tensor | None = None, sharded: bool = False
) -> None:
    """Raise ValueError unless a layer's weight, by default ``layer.weight``, lies on its device as a whole.

    Args:
        sharded: whether it may be a DTensor as well.
    """
    weight = layer.weight if weight is None else weight
    if weight.is_meta:
        offloads = getattr(getattr(layer, "_hf_hook", None), "offload", False)
        cure = "accelerate offloads it, give it a device in device_map" if offloads else "load it first"
        raise ValueError(f"{argument}: expected weights in memory, got {name} on meta: {cure}")
    if is_distributed(weight) and not sharded:
        raise ValueError(f"{argument}: expected plain tensors as weights, got a DTensor in {name}")


def local(tensor: Tensor) -> Tensor:
    """The tensor itself, or what this rank has of a DTensor."""
    return tensor.to_local() if is_distributed(tensor) else tensor


def first_row(tensor: Tensor) -> int:
    """The index of the first row that this rank has of a DTensor."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return offset[0]


def rows_of(whole: Tensor, like: Tensor) -> Tensor:
    """The rows of a whole [out, ...] that this rank has of a DTensor [out, ...]; all where ``like`` is none."""
    first = first_row(like) if is_distributed(like) else 0
    return whole[first : first + len(local(like))]


def like_shards(rows: Tensor, like: Tensor) -> Tensor:
    """The DTensor in the layout of another one, [out, K], of which this rank has these rows."""
    from torch.distributed.tensor import DTensor

    how = {"shape": like.shape, "stride": (like.shape[1], 1), "run_check": False}
    return DTensor.from_local(rows, like.device_mesh, like.placements, **how)


def sum_over_shards(part: Tensor, mesh, placements: Sequence) -> Tensor:
    """The sum over the shards of a DTensor of that layout of what each has of it, on all ranks; differentiable."""
    from torch.distributed.tensor import DTensor, Partial, Replicate

    of_sum = [Partial() if placement.is_shard() else Replicate() for placement in placements]
    return DTensor.from_local(part, mesh, of_sum, run_check=False).full_tensor()


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor, or the whole of a DTensor, has finite elements alone."""
    if not is_distributed(tensor):
        return bool(torch.isfinite(tensor).all())
    bad = (~torch.isfinite(tensor.detach().to_local())).sum()
    return not sum_over_shards(bad, tensor.device_mesh, tensor.placements)


class Place(NamedTuple):
    """Where the groups of some rows lie in their layer, as a ``Counter`` has it."""

    group_offset: int
    group_row_stride: int


def check_layout(argument: str, name: str, weight: Tensor, pattern: NMPattern) -> None:
    """Raise ValueError unless a distributed weight [out, K] is one that FSDP2 has cut into rows."""
    mesh, placements = weight.device_mesh, weight.placements
    told = f"{argument}: expected a weight that fully_shard has cut into rows"
    if any(placement.is_partial() for placement in placements):
        raise ValueError(f"{told}, got {placements} in {name}: parts of a sum have no mask; redistribute it first")
    cuts = {at: placement.dim for at, placement in enumerate(placements) if hasattr(placement, "dim")}
    for at, dim in cuts.items():
        parts = mesh.size(at)
        if dim == 1 and weight.shape[1] % (parts * pattern.m):
            raise ValueError(
                f"{told}, got columns in {name}: {weight.shape[1]} over {parts} ranks are {weight.shape[1] / parts:g} "
                f"each, which cuts groups of {pattern.m}"
            )
    if list(cuts.values()) != [0] or not placements[next(iter(cuts))].is_shard():
        raise ValueError(
            f"{told} once, got {placements} in {name}; column shards and tensor parallelism have no code yet"
        )
    ranks = mesh.mesh.movedim(next(iter(cuts)), -1)
    if (ranks.diff() < 0).any():
        # FSDP2 gives out rows in the order of the ranks; by DTensor's offsets they would be others
        raise ValueError(f"{told}, over ranks in rising order, got a mesh of {mesh.mesh.tolist()} in {name}")
    if mesh.size() != torch.distributed.get_world_size():
        raise ValueError(
            f"{told}, over all ranks, got a mesh of {mesh.size()} of {torch.distributed.get_world_size()} in {name}"
        )


def check_no_flat_parameters(argument: str, model: nn.Module) -> None:
    """Raise ValueError if FSDP1 has flattened the parameters of a module."""
    for name, module in model.named_modules():
        if any(kind.__name__ == "FullyShardedDataParallel" for kind in type(module).__mro__):
            raise ValueError(
                f"{argument}: expected parameters as they are or sharded by fully_shard, got the flat ones of "
                f"FullyShardedDataParallel (FSDP1) in {name or 'the model itself'}"
            )


class RowShard:
    """The rows of a MaskedLinear that this rank holds, and what FSDP2 gathers of them.

    Args:
        layer: a MaskedLinear, whose weight and logits are DTensors of one layout.
        param, group: of FSDP2, that of the weight.

    Attributes:
        mesh, placements: of both.
        first: index of the first row in the layer.
    """

    def __init__(self, layer: nn.Module, param, group):
        self._layer, self._param, self._group = layer, param, group
        self.shape, self.mesh, self.placements = layer.weight.shape, layer.weight.device_mesh, layer.weight.placements
        self.first = first_row(layer.weight)
        param.reset_sharded_param = self._reset
        self._hook()

    @property
    def weight(self) -> Tensor:
        """[rows, K], that of this rank. FSDP2 looks for its hooks on this very object."""
        return self._param.sharded_param._local_tensor

    @property
    def logits(self) -> Tensor:
        """[rows, K], those of this rank."""
        return self._layer.logits._local_tensor

    def _hook(self) -> None:
        self.weight.fsdp_pre_all_gather, self.weight.fsdp_post_all_gather = self._pre, self._post
        self._gathered: tuple | None = None
        self._forget()

    def _reset(self) -> None:
        """FSDP2's own, for a weight that was moved, cast or loaded: it may be another object then."""
        type(self._param).reset_sharded_param(self._param)
        self._hook()

    def reshard(self) -> None:
        """Free what FSDP2 may have kept gathered: the layer has its shards then."""
        self._group._to_sharded()

    @torch.no_grad()
    def bake_into(self, linear: nn.Linear) -> None:
        """Give a layer weight, with zeros where the N largest logits of a group drop it, and bias, and leave them."""
        layer = self._layer
        self.reshard()
        self.weight.copy_(layer.top_n_weight().to_local())
        del self.weight.fsdp_pre_all_gather, self.weight.fsdp_post_all_gather, self._param.reset_sharded_param
        self._forget()
        linear.weight, linear.bias = layer.weight, layer.bias
        for param in self._group.fsdp_params:
            if param._module_info.module is layer:
                _lead_to(linear, param, self._group)

    def _forget(self) -> None:
        """What FSDP2 has allocated for another kind of gather."""
        self._param._init_extensions()
        self._param.all_gather_outputs = []
        vars(self._param).pop("_unsharded_param", None)

    @property
    def place(self) -> Place:
        groups = self.shape[1] // self._layer.pattern.m
        return Place(self.first * groups, groups)

    @property
    def mesh_dim(self) -> int:
        """That over which rows are cut."""
        return next(at for at, placement in enumerate(self.placements) if placement.is_shard())

    @property
    def rows_each(self) -> int:
        """Rows of a rank, of which the last ranks may have fewer."""
        return -(-self.shape[0] // self.mesh.size(self.mesh_dim))

    def rows_of(self, tensor: Tensor) -> Tensor:
        """Those of a whole [out, ...] that this rank has."""
        return tensor[self.first : self.first + len(self.weight)]

    def distributed(self, rows: Tensor) -> Tensor:
        """The DTensor [out, K] of which this rank has these rows."""
        return like_shards(rows, self._layer.logits)

    def summed(self, part: Tensor) -> Tensor:
        """``sum_over_shards`` of those of the layer."""
        return sum_over_shards(part, self.mesh, self.placements)

    def gathered_weight(self) -> Tensor:
        """The whole masked weight [out, K], as FSDP2 has gathered it for the module that runs.

        Raises:
            RuntimeError: if it has not.
        """
        layer = self._layer
        if is_distributed(layer.weight):
            raise RuntimeError(
                "weight: expected one that is gathered, got its shards; call the module that was given to fully_shard, "
                "which gathers the weights in it"
            )
        if self._gathered != self.mask_key():
            # FSDP2 keeps what it gathers of the outermost module, and knows of no masks
            self.reshard()
            self._group.unshard()
            self._group.wait_for_unshard()
        return layer.weight

    def mask_key(self) -> tuple:
        """Another one where the masked weight is."""
        layer = self._layer
        drawn = versions(self.logits, layer.counter_state) if layer.training else [version_of(self.logits)]
        return layer.training, id(self.logits), version_of(self.weight), *drawn

    def stays_gathered(self) -> Callable[[], bool]:
        """Tells whether the weight that is gathered is still under the mask of now."""
        key = self.mask_key()
        return lambda: self._gathered == key

    def _pre(self, mesh) -> tuple[tuple[Tensor], tuple]:
        layer, param = self._layer, self._param
        n, m = layer.pattern.n, layer.pattern.m
        codes = layer.drawn_codes() if layer.training else ops.top_n_mask(self.logits, n, m)
        values = _kept(self.weight, codes, n, m).to(param.param_dtype or param.orig_dtype)
        # one tensor: of several FSDP2 takes the first alone where a mesh has one rank
        sent = torch.cat([values.view(torch.uint8), bitmask_of(codes, m)], 1)
        short = self.rows_each - len(sent)
        return (nn.functional.pad(sent, (0, 0, 0, short)) if short else sent,), self.mask_key()

    def _post(self, gathered: Sequence[Tensor], key: tuple, dtype: torch.dtype, *, out: Tensor | None = None):
        (sent,) = gathered
        (rows, k), n, m = self.shape, self._layer.pattern.n, self._layer.pattern.m
        size = k // m * n * dtype.itemsize
        # a single row is contiguous as it lies, and has to be a copy all the same
        parts = sent[:rows].split([size, sent.shape[1] - size], 1)
        values, bitmask = (part.clone(memory_format=torch.contiguous_format) for part in parts)
        # FSDP2 allocates it anew for the next gather
        sent.untyped_storage().resize_(0)
        weight = ops.unpacked(values.view(dtype), bitmask, None, n, m)
        self._gathered = key
        if out is None:
            return weight, (weight,)
        # the same values as at the forward, which autograd may have kept a reference to
        with torch.autograd._unsafe_preserve_version_counter(out):
            out.copy_(weight)
        return None


def _kept(weight: Tensor, codes: Tensor, n: int, m: int) -> Tensor:
    """The values [rows, K N / M] of a weight [rows, K] that group codes [rows, K / M] keep."""
    bits = torch.arange(m, device=codes.device, dtype=codes.dtype)
    kept = (codes.unsqueeze(-1) >> bits & 1).flatten()
    rows, k = weight.shape
    # how many there are is known, and needs no wait for the device
    places = kept.nonzero_static(size=rows * k // m * n).squeeze(-1)
    return weight.flatten()[places].view(rows, k // m * n)


def check_takes_shards(logits_backward: Callable) -> None:
    """Raise ValueError unless it tells by ``takes_shards`` that it needs neither dense weight nor mask."""
    if not getattr(logits_backward, "takes_shards", False):
        raise ValueError(
            "logits_backward: expected one of MaskTrainer in a layer that fully_shard has cut, got "
            f"{type(logits_backward).__name__}"
        )


def check_not_sharded(layers: Mapping[str, nn.Module], reason: str) -> None:
    """Raise ValueError if fully_shard has cut a MaskedLinear into rows."""
    for name, layer in layers.items():
        if layer.shard is not None:
            raise ValueError(f"model: expected whole layers, got {name}, which fully_shard has cut: {reason}")


def attach(layers: Mapping[str, nn.Module], model: nn.Module) -> None:
    """Tell FSDP2, and the layers, what is to be gathered of layers that it has sharded; others stay as they are.

    Args:
        layers: MaskedLinear layers by name.
        model: that holds them.

    Raises:
        ValueError: if one is sharded in another way. Nothing has changed then.
    """
    alone = {name: layer for name, layer in layers.items() if layer.shard is None}
    params = resharded(model) if alone else {}
    new = {name: layer for name, layer in alone.items() if is_distributed(layer.weight) or is_distributed(layer.logits)}
    for name, layer in new.items():
        _check_logits(name, layer)
        check_row_shard("model", name, layer.weight, layer.pattern, params)
    for layer in new.values():
        if id(layer.logits) in params:
            _leave_out(*params[id(layer.logits)])
        for parameter in (layer.weight, layer.bias):
            if id(parameter) in params:
                _lead_to(layer, *params[id(parameter)])
        layer.shard = RowShard(layer, *params[id(layer.weight)])


def resharded(model: nn.Module) -> Params:
    """FSDP2's (parameter, group) by the id of each parameter that it has sharded: the model has its shards now.

    FSDP2 may have kept gathered what it has gathered last.

    Raises:
        ValueError: if torch is too old.
    """
    fsdp, params = sys.modules.get("torch.distributed.fsdp"), {}
    if fsdp is None:
        # nobody has called it, and it takes long to load
        return params
    sharded = (module._get_fsdp_state() for module in model.modules() if isinstance(module, fsdp.FSDPModule))
    for state in {id(state): state for state in sharded}.values():
        if not hasattr(state, "_fsdp_param_groups"):
            raise ValueError(f"torch: expected 2.13 or newer, as fully_shard is used here, got {torch.__version__}")
        for group in state._fsdp_param_groups:
            group._to_sharded()
            for param in group.fsdp_params:
                if getattr(param._module_info.module, param._module_info.param_name) is not param.sharded_param:
                    # as transformers loads: FSDP2 looks for it at its first forward
                    param.reset_sharded_param()
            params |= {id(param.sharded_param): (param, group) for param in group.fsdp_params}
    return params


def reset_iteration(model: nn.Module) -> None:
    """Bring FSDP2 back to where it stands between two iterations, behind an error inside of one: all is sharded then.

    The gradients of that iteration are lost.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None:
        for module in model.modules():
            # one that has not run yet has nothing to be reset
            if isinstance(module, fsdp.FSDPModule) and module._get_fsdp_state()._is_root:
                module.reset_iter_state()


def check_row_shard(argument: str, name: str, weight: Tensor, pattern: NMPattern, params: Params) -> None:
    """Raise ValueError unless the shards of a weight are such as a RowShard takes.

    Args:
        params: of ``resharded``.
    """
    if not is_distributed(weight):
        return
    check_layout(argument, name, weight, pattern)
    if id(weight) not in params:
        raise ValueError(
            f"{argument}: expected weights that fully_shard has sharded, got a DTensor of another origin in {name}"
        )
    param, group = params[id(weight)]
    if param.offload_to_cpu:
        raise ValueError(f"{argument}: expected shards that stay on their device, got a CPUOffloadPolicy in {name}")
    if group._use_post_forward_mesh:
        raise ValueError(f"{argument}: expected reshard_after_forward to be a bool, got a number of ranks in {name}")


def _check_logits(name: str, layer: nn.Module) -> None:
    if not is_distributed(layer.weight) or not is_distributed(layer.logits):
        weight, logits = ("sharded" if is_distributed(x) else "plain" for x in (layer.weight, layer.logits))
        raise ValueError(
            f"model: expected logits sharded as their weight is, got a {weight} weight and {logits} logits in {name}"
        )
    ways = [(x.device_mesh, x.placements) for x in (layer.weight, layer.logits)]
    if ways[0] != ways[1]:
        raise ValueError(
            f"model: expected logits with the mesh and placements of their weight, {ways[0]}, got {ways[1]} in {name}"
        )


def _leave_out(param, group) -> None:
    """Of what FSDP2 gathers: a parameter that stays sharded."""
    group.fsdp_params.remove(param)
    param._post_load_hook_handle.remove()


def _lead_to(layer: nn.Module, param, group) -> None:
    """Have FSDP2 put what it gathers into this layer, which may stand in the place of another one, and hook to it."""
    info = param._module_info
    before, info.module, info.shared_modules = info.module, layer, [layer] * len(info.shared_modules)
    if before is layer:
        return
    param._post_load_hook_handle.remove()
    param._post_load_hook_handle = layer.register_load_state_dict_post_hook(lambda *_: param.reset_sharded_param())
    of_state_dicts = (
        group._module_to_pre_save_state_dict_hook_handle,
        group._module_to_pre_load_state_dict_hook_handle,
    )
    if any(of_state_dicts):
        # else FSDP2 registers them at its first forward
        for handles in of_state_dicts:
            for handle in handles.values():
                handle.remove()
            handles.clear()
        group._register_state_dict_hooks()
