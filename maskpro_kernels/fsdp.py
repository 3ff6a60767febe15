"""Masked layers whose rows FSDP2 (``torch.distributed.fsdp.fully_shard``) has split over ranks.

Each rank has its own rows of weight and logits, and FSDP2 gathers the rows of a weight before each use. It calls
``fsdp_pre_all_gather`` and ``fsdp_post_all_gather`` of a shard whose class has these methods. Those of ``MaskedRows``
send only kept values and their bitmask: each rank draws the masks of its rows without the others.

Logits are never sent. Either a model is converted first, and ``fully_shard`` ignores its logits by ``ignored_params``.
Or its layers are converted afterwards, in place: FSDP2 gathers into the same modules, and does not know their logits.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from . import ops
from .ops.counter import Place, version_of, versions
from .ops.pattern import bitmask_of
from .shards import first_row, is_distributed, like_shards, part_of, rows_dim, sum_over_shards

aten = torch.ops.aten
# Operations on MaskedRows that give MaskedRows: those by which torch makes, moves and casts a parameter
KEEP_CLASS = (
    aten.alias.default,
    aten.detach.default,
    aten.empty_like.default,
    aten.view.default,
    aten._to_copy.default,
)


class MaskedRows(Tensor):
    """Rows [rows, K] of a masked weight on this rank, of which FSDP2 gathers kept values and bitmask.

    Attributes:
        rows: a plain tensor of the same memory.
    """

    # operations come to ``__torch_dispatch__`` alone
    __torch_function__ = torch._C._disabled_torch_function_impl
    rows: Tensor

    @classmethod
    def from_plain(cls, rows: Tensor) -> MaskedRows:
        masked_rows = rows.as_subclass(cls)
        masked_rows.rows = rows
        return masked_rows

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        plain_args, plain_kwargs = tree_map_only(cls, lambda tensor: tensor.rows, (args, kwargs or {}))
        result = func(*plain_args, **plain_kwargs)
        return cls.from_plain(result) if func in KEEP_CLASS else result

    def fsdp_pre_all_gather(self, mesh, outer_size, outer_stride, module: nn.Module, mp_policy):
        """Return the tensors of this rank that FSDP2 gathers, and what ``fsdp_post_all_gather`` needs beside them."""
        n = module.pattern.n
        m = module.pattern.m
        dtype = mp_policy.param_dtype or self.dtype
        codes = module.drawn_codes() if module.training else ops.top_n_mask(module.shard.logits, n, m)
        bits = torch.arange(m, device=codes.device, dtype=codes.dtype)
        kept = (codes.unsqueeze(-1) >> bits & 1).flatten()
        rows, k = self.shape
        # the size needs no wait for the device
        places = kept.nonzero_static(size=rows * k // m * n).squeeze(-1)
        values = self.rows.flatten()[places].view(rows, k // m * n).to(dtype)
        # one tensor: of several FSDP2 uses only the first if a mesh has one rank
        sent = torch.cat([values.view(torch.uint8), bitmask_of(codes, m)], 1)
        return (sent,), (module, module.shard.mask_key(), dtype)

    def fsdp_post_all_gather(self, all_gather_outputs, metadata, param_dtype, *, out: Tensor | None = None):
        """Return the masked weight [out, K] and the memory that FSDP2 frees; or write it to ``out``."""
        (sent,) = all_gather_outputs
        module, key, dtype = metadata
        n = module.pattern.n
        m = module.pattern.m
        size = module.in_features // m * n * dtype.itemsize
        # a single row is contiguous already, but must be copied too
        values = sent[:, :size].clone(memory_format=torch.contiguous_format)
        bitmask = sent[:, size:].clone(memory_format=torch.contiguous_format)
        # FSDP2 allocates it again for the next gather
        sent.untyped_storage().resize_(0)
        weight = ops.unpacked(values.view(dtype), bitmask, None, n, m)
        module.shard.gathered = key
        if out is None:
            return weight, (weight,)
        # ``data`` keeps the version: autograd may refer to the weight of the forward, which had the same values
        out.data.copy_(weight)
        return None


class RowShard:
    """The rows of a MaskedLinear on this rank.

    Weight and logits of the layer are DTensors of one layout.

    Attributes:
        weight, logits: plain tensors [rows, K], the memory of these DTensors on this rank.
        shape: of the whole weight.
        mesh: of the ranks; ``mesh_dim`` is the dimension that splits rows, another one copies them.
        place: of the rows' groups in the whole layer.
        gathered: ``mask_key`` of the weight that FSDP2 has gathered last.
    """

    def __init__(self, layer: nn.Module, module: nn.Module):
        """Let FSDP2 gather the weight of a layer by ``MaskedRows``.

        Args:
            layer: with a weight [out, K] that ``fully_shard`` has split, and logits [rows, K] of this rank.
            module: the module given to ``fully_shard`` that gathers the weight.
        """
        self._layer = layer
        self._module = module
        self.shape = layer.weight.shape
        self.mesh = layer.weight.device_mesh
        self.mesh_dim = rows_dim(layer.weight)
        groups = self.shape[1] // layer.pattern.m
        self.place = Place(first_row(layer.weight) * groups, groups)
        self.gathered: tuple | None = None
        logits = like_shards(layer.logits.detach(), layer.weight)
        layer.logits = nn.Parameter(logits, requires_grad=layer.logits.requires_grad)
        # a weight gathered for one mask is of no use for the next
        module.set_reshard_after_forward(True, recurse=False)
        self.update()

    @torch.no_grad()
    def update(self) -> None:
        """Adopt weight and logits of the layer after they were moved, cast or loaded."""
        layer = self._layer
        self.logits = layer.logits.detach().to_local()
        self.weight = _plain(layer.weight)
        self._gather(MaskedRows.from_plain(self.weight))

    def _gather(self, rows: Tensor) -> None:
        layer = self._layer
        weight = like_shards(rows, layer.weight)
        layer.weight = nn.Parameter(weight, requires_grad=layer.weight.requires_grad)
        _gather_anew(layer, self._module)

    @property
    def layout(self) -> list:
        """Mesh, its ranks, placements and shape, which are equal on all ranks."""
        return [str(self.mesh), self.mesh.mesh.tolist(), str(self._layer.logits.placements), *self.shape]

    def distributed(self, part: Tensor) -> Tensor:
        """Return the DTensor [out, K] of this rank's part."""
        return like_shards(part, self._layer.logits)

    def part_of(self, tensor: Tensor) -> Tensor:
        """Return this rank's rows of a whole [out, ...]."""
        return part_of(tensor, self._layer.logits)

    def summed(self, part: Tensor) -> Tensor:
        """Return the sum of the parts of all shards, on all ranks; differentiable."""
        return sum_over_shards(part, self._layer.logits)

    def mask_key(self) -> tuple:
        """Return a value that changes with the mask of the layer."""
        layer = self._layer
        drawn = versions(self.logits, layer.counter_state) if layer.training else [version_of(self.logits)]
        return layer.training, id(self.logits), *drawn

    def gathered_weight(self) -> Tensor:
        """Return the masked weight [out, K] that FSDP2 has gathered; RuntimeError if it is not there or stale."""
        layer = self._layer
        if is_distributed(layer.weight):
            raise RuntimeError(
                "weight: expected a gathered one, got its shards; call the module that was given to fully_shard, "
                "which gathers its weights"
            )
        if self.gathered != self.mask_key():
            raise RuntimeError(
                "weight: expected one gathered under the current mask, got one under another mask; call reshard of "
                "the module that was given to fully_shard, or reset_iter_state of the outermost one after an error"
            )
        return layer.weight

    def reshard(self) -> None:
        """Free the gathered weight, so that the layer has its shards."""
        self._module.reshard()

    @torch.no_grad()
    def bake(self) -> None:
        """Write zeros where the mask of the N largest logits drops weights; FSDP2 then gathers the dense weight."""
        self.reshard()
        self.weight.copy_(self._layer.top_n_weight().to_local())
        self._gather(self.weight)


@torch.no_grad()
def _plain(weight: Tensor) -> Tensor:
    """This rank's rows of a DTensor as a plain tensor."""
    rows = weight.detach().to_local()
    return rows.rows if isinstance(rows, MaskedRows) else rows


def _gather_anew(layer: nn.Module, module: nn.Module) -> None:
    """Let FSDP2 take a layer's weight from the layer again, and allocate memory for the next gather of it.

    By itself FSDP2 does so only before the first forward. But a model runs before ``convert`` if its masks are
    calibrated, and before ``finalize``. torch has no public name for it; this function uses the private names
    ``_get_fsdp_state``, ``_fsdp_param_groups``, ``fsdp_params``, and of a parameter of FSDP2 ``_module_info``,
    ``reset_sharded_param``, ``_init_extensions``, ``all_gather_outputs`` and ``_unsharded_param``.
    """
    state = module._get_fsdp_state()
    # torch 2.11 has one group
    groups = state._fsdp_param_groups if hasattr(state, "_fsdp_param_groups") else [state._fsdp_param_group]
    for group in groups:
        for param in group.fsdp_params:
            if param._module_info.module is layer and param._module_info.param_name == "weight":
                param.reset_sharded_param()
                param._init_extensions()
                param.all_gather_outputs = []
                vars(param).pop("_unsharded_param", None)


def attach(layers: Mapping[str, nn.Module], model: nn.Module) -> None:
    """Give each layer whose weight fully_shard has split a ``RowShard``, with this rank's rows of its logits.

    ValueError, before any change, if one is split in a way that is not supported.
    """
    layers = {name: layer for name, layer in layers.items() if layer.shard is None}
    if layers:
        reshard(model)
    if not any(is_distributed(layer.weight) or is_distributed(layer.logits) for layer in layers.values()):
        return
    modules = gathering_modules(model, {name: layer.weight for name, layer in layers.items()})
    for name, layer in layers.items():
        if is_distributed(layer.logits):
            raise ValueError(
                f"model: expected whole logits, which fully_shard ignores, got split ones in {name}; call it with "
                "ignored_params={layer.logits for layer in masked_layers(model).values()}"
            )
    for name, module in modules.items():
        layer = layers[name]
        logits = part_of(layer.logits.detach(), layer.weight).to(_plain(layer.weight).device, copy=True)
        layer.logits = nn.Parameter(logits, requires_grad=layer.logits.requires_grad)
        layer.shard = RowShard(layer, module)


def gathering_modules(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, nn.Module]:
    """Modules given to ``fully_shard`` that gather weights, by name of the layer; none if all weights are whole.

    Raises:
        ValueError: if a parameter is a DTensor not of fully_shard, such as of a tensor-parallel plan; or unless all
            weights are whole, or split into equal rows over all ranks.
    """
    # an inner module comes after the outer ones
    around = {inner: module for module in sharded_modules(model) for inner in module.modules()}
    modules: dict[int, nn.Module] = {}
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            # logits have the layout of their weight
            if not is_distributed(parameter) or key == "logits":
                continue
            if module not in around or not _is_split_once(parameter):
                raise ValueError(
                    "model: tensor parallel and other DTensors than those of fully_shard are not supported; use FSDP2 "
                    f"(fully_shard); got {parameter.placements} in {name or 'the model itself'}"
                )
            modules[id(parameter)] = around[module]
    meshes = {name: weight.device_mesh if is_distributed(weight) else None for name, weight in weights.items()}
    split = next((name for name, mesh in meshes.items() if mesh is not None), None)
    if split is None:
        return {}
    names: dict[int, str] = {}
    for name, weight in weights.items():
        if meshes[name] != meshes[split]:
            raise ValueError(
                f"model: expected fully_shard to split all masked layers over one mesh or none, got {meshes[split]} in "
                f"{split} and {meshes[name]} in {name}"
            )
        _check_rows(name, weight)
        if names.setdefault(id(weight), name) != name:
            raise ValueError(
                "model: expected another weight in each layer that fully_shard has split, got one in "
                f"{names[id(weight)]} and {name}"
            )
    return {name: modules[id(weight)] for name, weight in weights.items()}


def _is_split_once(tensor: Tensor) -> bool:
    """Return whether the last dimension of a mesh splits a DTensor, and others copy it, as with fully_shard."""
    *outer, inner = tensor.placements
    return inner.is_shard() and all(placement.is_replicate() for placement in outer)


def _check_rows(name: str, weight: Tensor) -> None:
    """Raise ValueError unless a weight is split into equal rows over all ranks."""
    expected = "model: expected a weight that fully_shard has split into rows"
    mesh = weight.device_mesh
    world = torch.distributed.get_world_size()
    if not weight.placements[-1].is_shard(0):
        raise ValueError(f"{expected}, got {weight.placements} in {name}")
    if (mesh.mesh.diff() < 0).any():
        # FSDP2 assigns rows in the order of the ranks, which DTensor's offsets would contradict
        raise ValueError(f"{expected}, over ranks in rising order, got a mesh of {mesh.mesh.tolist()} in {name}")
    if mesh.size() != world:
        raise ValueError(f"{expected}, over all ranks, got a mesh of {mesh.size()} of {world} in {name}")
    shards = mesh.size(mesh.ndim - 1)
    if len(weight) % shards:
        raise ValueError(f"{expected}, the same number for each rank, got {len(weight)} over {shards} ranks in {name}")
    place = _plain(weight).device.type
    if place not in (mesh.device_type, "meta"):
        raise ValueError(f"model: expected shards that stay on their device, got some offloaded to {place} in {name}")


def sharded_modules(model: nn.Module) -> list[nn.Module]:
    """Modules of a model on which fully_shard was called, outer ones first."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    # nobody has used it if it is not there, and its import takes long
    return [] if fsdp is None else [module for module in model.modules() if isinstance(module, fsdp.FSDPModule)]


def reshard(model: nn.Module) -> None:
    """Return a model to its shards: FSDP2 may keep the weights that it gathered last."""
    for module in sharded_modules(model):
        module.reshard()


@contextmanager
def resetting(model: nn.Module) -> Iterator[None]:
    """Return a model to its shards at the end; after an error also without gradients, as between two iterations.

    An error that this raises in turn, such as that another rank has ended, becomes a note of the first error.
    """
    try:
        yield
    except BaseException as error:
        modules = sharded_modules(model)
        # torch before 2.13 has no reset_iter_state
        for module in filter(lambda root: hasattr(root, "reset_iter_state"), _outermost(modules)):
            _call_after(error, module.reset_iter_state)
        for module in modules:
            _call_after(error, module.reshard)
        raise
    reshard(model)


def _outermost(modules: Sequence[nn.Module]) -> list[nn.Module]:
    """Modules that are in none of the others: torch resets a model from these alone."""
    inner = {child for module in modules for child in module.modules() if child is not module}
    return [module for module in modules if module not in inner]


def _call_after(error: BaseException, function: Callable[[], None]) -> None:
    """Call a function after an error; its own error becomes a note of the first one."""
    try:
        function()
    except Exception as later:
        error.add_note(f"afterwards {function.__name__} of FSDP2: {type(later).__name__}: {later}")
