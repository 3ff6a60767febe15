"""Masked layers whose rows FSDP2 (``torch.distributed.fsdp.fully_shard``) has cut over ranks.

Each rank holds its own rows of weight and logits. FSDP2 gathers a layer's rows ahead of each use. What it then sends of
a masked layer are the values that its mask keeps and their bitmask: each rank draws the masks of its own rows, which
needs no other rank. Logits stay where they are, on the ranks of their weight's rows.

The hooks are FSDP2's own: it calls ``fsdp_pre_all_gather`` and ``fsdp_post_all_gather`` of a shard that has them.
Which parameter has them, and that logits are none of its parameters, is set in its parameter groups, for which torch
has no public names.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import ops
from .counter import version_of, versions
from .pattern import bitmask_of

# FSDP2's (parameter, group) by the id of a sharded parameter
Params = dict[int, tuple]


class Place(NamedTuple):
    """Where the groups of some rows lie in their layer, as a ``Counter`` has it."""

    group_offset: int
    group_row_stride: int


def is_distributed(tensor: object) -> bool:
    """Tell whether a tensor is a DTensor."""
    return hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """The tensor itself, or the part of a DTensor that this rank has."""
    return tensor.to_local() if is_distributed(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or the whole of a DTensor; all ranks of its mesh have to call it."""
    return tensor.detach().full_tensor() if is_distributed(tensor) else tensor


def part_of(tensor: Tensor, like: Tensor, each: int = 1) -> Tensor:
    """The part of a whole [out, K / each] whose rows this rank has of a DTensor ``like`` [out, K]; else all of it."""
    if not is_distributed(like):
        return tensor
    (row, column), (rows, columns) = _offset_of(like), local(like).shape
    return tensor[row : row + rows, column // each : (column + columns) // each]


def like_shards(part: Tensor, like: Tensor, each: int = 1) -> Tensor:
    """The DTensor [out, K / each] in the layout of another one, [out, K], of which this rank has this part."""
    from torch.distributed.tensor import DTensor

    shape = torch.Size((like.shape[0], like.shape[1] // each))
    how = {"shape": shape, "stride": (shape[1], 1), "run_check": False}
    return DTensor.from_local(part, like.device_mesh, like.placements, **how)


def is_finite(tensor: Tensor) -> bool:
    """Tell whether all elements of a tensor, or of the whole of a DTensor, are finite."""
    if not is_distributed(tensor):
        return bool(torch.isfinite(tensor).all())
    bad = (~torch.isfinite(tensor.detach().to_local())).sum()
    return not _sum_over_shards(bad, tensor.device_mesh, tensor.placements)


def _sum_over_shards(part: Tensor, mesh, placements: Sequence) -> Tensor:
    """The sum of each shard's part, on all ranks; differentiable."""
    from torch.distributed.tensor import DTensor, Partial, Replicate

    of_sum = [Partial() if hasattr(placement, "dim") else Replicate() for placement in placements]
    return DTensor.from_local(part, mesh, of_sum, run_check=False).full_tensor()


def _offset_of(tensor: Tensor) -> tuple[int, ...]:
    """Where the part of a DTensor that this rank has begins in the whole, along each dimension."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return offset


def check_in_memory(
    argument: str, layer: nn.Module, name: str = "weight", weight: Tensor | None = None, sharded: bool = False
) -> None:
    """Raise ValueError unless a layer's weight, by default ``layer.weight``, lies on its device as a whole.

    Args:
        sharded: allow a DTensor.
    """
    weight = layer.weight if weight is None else weight
    if weight.is_meta:
        offloads = getattr(getattr(layer, "_hf_hook", None), "offload", False)
        cure = "accelerate offloads it, give it a device in device_map" if offloads else "load it first"
        raise ValueError(f"{argument}: expected weights in memory, got {name} on meta: {cure}")
    if is_distributed(weight) and not sharded:
        raise ValueError(
            f"{argument}: expected plain tensors as weights, got a DTensor in {name}; of a model that ranks share "
            "convert takes refit, and MaskTrainer learns"
        )


def check_no_flat_parameters(argument: str, model: nn.Module) -> None:
    """Raise ValueError if FSDP1 has flattened the parameters of a module."""
    for name, module in model.named_modules():
        if any(kind.__name__ == "FullyShardedDataParallel" for kind in type(module).__mro__):
            raise ValueError(
                f"{argument}: expected parameters as they are or sharded by fully_shard, got the flat ones of "
                f"FullyShardedDataParallel (FSDP1) in {name or 'the model itself'}"
            )


def check_not_wrapped(layers: Mapping[str, nn.Module]) -> None:
    """Raise ValueError if fully_shard was given a layer itself: another one in its place would not be gathered."""
    for name, layer in layers.items():
        if hasattr(layer, "reshard"):
            raise ValueError(
                f"model: expected fully_shard around a module that holds masked layers, got one around "
                f"{name or 'the only one'} itself"
            )


def check_not_sharded(layers: Mapping[str, nn.Module], reason: str) -> None:
    """Raise ValueError if a MaskedLinear has been cut over ranks."""
    for name, layer in layers.items():
        if layer.shard is not None:
            raise ValueError(f"model: expected whole layers, got {name}, which fully_shard has cut: {reason}")


def check_cut_by_fsdp(model: nn.Module, params: Params) -> None:
    """Raise ValueError if a parameter is a DTensor that fully_shard has not made, such as of a tensor-parallel plan.

    Args:
        params: of ``resharded``.
    """
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            if not is_distributed(parameter) or parameter is getattr(module, "logits", None):
                continue
            if id(parameter) not in params or params[id(parameter)][0]._unsharded_dtensor_spec is not None:
                raise ValueError(
                    "model: tensor parallel and other DTensors than those of fully_shard are not supported; use FSDP2 "
                    f"(fully_shard); got {parameter.placements} in {name or 'the model itself'}"
                )


def check_row_shard(name: str, weight: Tensor, params: Params) -> None:
    """Raise ValueError unless a weight is whole, or cut by fully_shard into rows over all ranks.

    Args:
        params: of ``resharded``.
    """
    if id(weight) not in params:
        return
    param, group = params[id(weight)]
    mesh, placements, world = weight.device_mesh, weight.placements, torch.distributed.get_world_size()
    expected = "model: expected a weight that fully_shard has cut into rows"
    cuts = {at: placement.dim for at, placement in enumerate(placements) if hasattr(placement, "dim")}
    if list(cuts.values()) != [0] or not placements[next(iter(cuts))].is_shard():
        raise ValueError(f"{expected} once, got {placements} in {name}")
    if (mesh.mesh.movedim(next(iter(cuts)), -1).diff() < 0).any():
        # FSDP2 gives out rows in the order of the ranks; by DTensor's offsets they would be others
        raise ValueError(f"{expected}, over ranks in rising order, got a mesh of {mesh.mesh.tolist()} in {name}")
    if mesh.size() != world:
        raise ValueError(f"{expected}, over all ranks, got a mesh of {mesh.size()} of {world} in {name}")
    if param.offload_to_cpu:
        raise ValueError(f"model: expected shards that stay on their device, got a CPUOffloadPolicy in {name}")
    if group._use_post_forward_mesh:
        raise ValueError(f"model: expected reshard_after_forward to be a bool, got a number of ranks in {name}")


class RowShard:
    """The rows of a MaskedLinear that this rank holds, and what FSDP2 gathers of them.

    Args:
        layer: a MaskedLinear, whose weight and logits are DTensors of one layout.
        param, group: of FSDP2, that of the weight.

    Attributes:
        shape: of the whole weight.
        mesh, placements: of weight and logits.
        offset: (row, 0) of the whole layer at which the rows of this rank begin.
    """

    def __init__(self, layer: nn.Module, param, group):
        self._layer, self._param, self._group = layer, param, group
        self.shape, self.mesh, self.placements = layer.weight.shape, layer.weight.device_mesh, layer.weight.placements
        self.offset = _offset_of(layer.weight)
        param.reset_sharded_param = self._reset
        self._hook()

    @property
    def weight(self) -> Tensor:
        """[rows, K], that of this rank. FSDP2 looks for its hooks on this very object."""
        return self._param.sharded_param._local_tensor

    @property
    def bias(self) -> Tensor | None:
        """The whole one [out], as FSDP2 has gathered it."""
        return self._layer.bias

    @property
    def logits(self) -> Tensor:
        """[rows, K], those of this rank."""
        return self._layer.logits._local_tensor

    @property
    def place(self) -> Place:
        groups = self.shape[1] // self._layer.pattern.m
        return Place(self.offset[0] * groups, groups)

    @property
    def layout(self) -> list:
        """The mesh, its ranks, the placements and the shape, which all ranks have alike."""
        return [str(self.mesh), self.mesh.mesh.tolist(), str(self.placements), *self.shape]

    @property
    def mesh_dim(self) -> int:
        """The dimension of ``mesh`` over which rows are cut; over the other one they are copied."""
        return next(at for at, placement in enumerate(self.placements) if hasattr(placement, "dim"))

    def distributed(self, part: Tensor) -> Tensor:
        """The DTensor [out, K] of which this rank has this part."""
        return like_shards(part, self._layer.logits)

    def part_of(self, tensor: Tensor) -> Tensor:
        """The rows of a whole [out, ...] that this rank has."""
        return tensor[self.offset[0] : self.offset[0] + len(self.weight)]

    def summed(self, part: Tensor) -> Tensor:
        """The sum of each shard's part, on all ranks; differentiable."""
        return _sum_over_shards(part, self.mesh, self.placements)

    def forward(self, input: Tensor) -> Tensor:
        """y [..., out] of an input [..., K], by the weight that is gathered."""
        layer = self._layer
        if layer.training and layer.logits_backward is not None:
            check_takes_shards(layer.logits_backward)
        weight, key = self.gathered_weight(), self._gathered_key()
        return layer.gathered_product(input, weight, lambda: self._gathered == key)

    def gathered_weight(self) -> Tensor:
        """The masked weight [out, K], as FSDP2 has gathered it for the module that runs.

        Raises:
            RuntimeError: if it has not.
        """
        layer = self._layer
        if is_distributed(layer.weight):
            raise RuntimeError(
                "weight: expected one that is gathered, got its shards; call the module that was given to fully_shard, "
                "which gathers the weights in it"
            )
        if self._gathered != self._gathered_key():
            # FSDP2 keeps what it gathers of the outermost module, and knows of no masks
            self.reshard()
            self._group.unshard()
            self._group.wait_for_unshard()
        return layer.weight

    def reshard(self) -> None:
        """Free what may have been kept gathered: the layer has its shards then."""
        self._group._to_sharded()

    @torch.no_grad()
    def bake_into(self, linear: nn.Linear) -> None:
        """Give a dense layer the weight, with zeros where a mask by the N largest logits drops it, and the bias."""
        layer, own = self._layer, self.weight
        self.reshard()
        own.copy_(layer.top_n_weight().to_local())
        linear.weight, linear.bias = layer.weight, layer.bias
        # layer and shard hold each other, and would hold these
        layer.weight = layer.bias = None
        del own.fsdp_pre_all_gather, own.fsdp_post_all_gather, self._param.reset_sharded_param
        self._forget()
        for param in self._group.fsdp_params:
            if param._module_info.module is layer:
                _lead_to(linear, param, self._group)

    def _gathered_key(self) -> tuple:
        """A value that changes where the masked weight does."""
        layer = self._layer
        drawn = versions(self.logits, layer.counter_state) if layer.training else [version_of(self.logits)]
        return layer.training, id(self.logits), version_of(self.weight), *drawn

    def _hook(self) -> None:
        self.weight.fsdp_pre_all_gather, self.weight.fsdp_post_all_gather = self._pre, self._post
        self._gathered: tuple | None = None
        self._forget()

    def _reset(self) -> None:
        """FSDP2's own, for a weight that was moved, cast or loaded: it may be another object then."""
        type(self._param).reset_sharded_param(self._param)
        self._hook()

    def _forget(self) -> None:
        """Drop what FSDP2 has allocated for another kind of gather."""
        self._param._init_extensions()
        self._param.all_gather_outputs = []
        vars(self._param).pop("_unsharded_param", None)

    def _pre(self, mesh) -> tuple[tuple[Tensor], tuple]:
        layer, param = self._layer, self._param
        n, m = layer.pattern.n, layer.pattern.m
        codes = layer.drawn_codes() if layer.training else ops.top_n_mask(self.logits, n, m)
        values = _kept(self.weight, codes, n, m).to(param.param_dtype or param.orig_dtype)
        # one tensor: of several FSDP2 takes the first alone where a mesh has one rank
        sent = torch.cat([values.view(torch.uint8), bitmask_of(codes, m)], 1)
        # the last ranks may have fewer rows
        short = -(-self.shape[0] // self.mesh.size(self.mesh_dim)) - len(sent)
        return (nn.functional.pad(sent, (0, 0, 0, short)) if short else sent,), self._gathered_key()

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
    """Raise ValueError unless its ``takes_shards`` is true: it then needs neither dense weight nor mask."""
    if not getattr(logits_backward, "takes_shards", False):
        raise ValueError(
            "logits_backward: expected one of MaskTrainer in a layer that fully_shard has cut, got "
            f"{type(logits_backward).__name__}"
        )


def attach(layers: Mapping[str, nn.Module], model: nn.Module) -> None:
    """Give layers that fully_shard has cut a ``RowShard``, and FSDP2 what it is to gather of them.

    Args:
        layers: MaskedLinear layers by name.
        model: that holds them.

    Raises:
        ValueError: if one is cut in a way that is not supported. Nothing has changed then.
    """
    others = {name: layer for name, layer in layers.items() if layer.shard is None}
    params = resharded(model) if others else {}
    cut = {name: x for name, x in others.items() if is_distributed(x.weight) or is_distributed(x.logits)}
    if cut:
        check_cut_by_fsdp(model, params)
    for name, layer in cut.items():
        _check_logits(name, layer)
        check_row_shard(name, layer.weight, params)
    for layer in cut.values():
        if id(layer.logits) in params:
            # FSDP2 is not to gather them
            param, group = params[id(layer.logits)]
            group.fsdp_params.remove(param)
            param._post_load_hook_handle.remove()
        for parameter in (layer.weight, layer.bias):
            if id(parameter) in params:
                _lead_to(layer, *params[id(parameter)])
        layer.shard = RowShard(layer, *params[id(layer.weight)])


def _check_logits(name: str, layer: nn.Module) -> None:
    """Raise ValueError unless the logits of a layer have the mesh and placements of its weight."""
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
                info = param._module_info
                if getattr(info.module, info.param_name) is not param.sharded_param:
                    # what has loaded a model from meta has made it anew, and FSDP2 looks at its first forward
                    param.reset_sharded_param()
                params[id(param.sharded_param)] = param, group
    return params


@contextmanager
def resetting(model: nn.Module) -> Iterator[None]:
    """Behind an error, bring FSDP2 back to where it stands between two iterations: all is sharded then.

    The gradients of that iteration are lost.
    """
    try:
        yield
    except BaseException:
        fsdp = sys.modules.get("torch.distributed.fsdp")
        for module in model.modules() if fsdp is not None else ():
            # one that has not run yet has nothing to be reset
            if isinstance(module, fsdp.FSDPModule) and module._get_fsdp_state()._is_root:
                module.reset_iter_state()
        raise


def without_gradients(model: nn.Module) -> AbstractContextManager:
    """Inference mode; of a model that ranks share no_grad alone.

    What FSDP2 allocates in inference mode it could not write outside of it.
    """
    return torch.no_grad() if is_shared(model) else torch.inference_mode()


def is_shared(model: nn.Module) -> bool:
    """Tell whether a parameter is a DTensor, or FSDP2 gathers parameters, which may stand gathered in the model now."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return any(map(is_distributed, model.parameters())) or (
        fsdp is not None and any(isinstance(module, fsdp.FSDPModule) for module in model.modules())
    )


def gathers_within(model: nn.Module, blocks: Iterable[nn.Module]) -> bool:
    """Tell whether each block can run by itself: FSDP2 gathers nothing of it with modules outside of it."""
    params = resharded(model)
    for block in blocks:
        inside = set(block.modules())
        for parameter in block.parameters():
            if id(parameter) in params and not inside.issuperset(params[id(parameter)][1].modules):
                return False
    return True
