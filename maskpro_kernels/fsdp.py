"""Masked layers whose rows FSDP2 (``torch.distributed.fsdp.fully_shard``) has split over ranks.

Each rank has its own rows of weight and logits, and FSDP2 gathers the rows of a layer before each use. For a masked
layer it sends only kept values and their bitmask: each rank draws the masks of its rows without the others. Logits are
never sent. Checkpoints and snapshots are read and written by rows too, so no rank needs a whole layer.

FSDP2 calls ``fsdp_pre_all_gather`` and ``fsdp_post_all_gather`` of a shard that has these hooks. Hooks are set, and
logits removed, in FSDP2's parameter groups, for which torch has no public names.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from . import ops
from .ops.counter import version_of, versions
from .ops.pattern import bitmask_of

if TYPE_CHECKING:
    from .ranks import Ranks

# FSDP2's (parameter, group) by the id of a sharded parameter
Params = dict[int, tuple]
# Part of a tensor: its begin in each dimension, and its sizes
Part = tuple[torch.Size, torch.Size]


class Place(NamedTuple):
    """Place of some rows' groups in their layer: fields of a ``Counter``."""

    group_offset: int
    group_row_stride: int


def is_distributed(tensor: object) -> bool:
    """Return whether a tensor is a DTensor."""
    return hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """Return the tensor itself, or this rank's part of a DTensor."""
    return tensor.to_local() if is_distributed(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Return the tensor itself, or the whole of a DTensor; all ranks of its mesh must call this."""
    return tensor.detach().full_tensor() if is_distributed(tensor) else tensor


def part_of(tensor: Tensor, like: Tensor, each: int = 1) -> Tensor:
    """Return the part of a whole [out, K / each] for this rank's part of a DTensor ``like`` [out, K]; else all."""
    if not is_distributed(like):
        return tensor
    row, column = _offset_of(like)
    rows, columns = local(like).shape
    return tensor[row : row + rows, column // each : (column + columns) // each]


def like_shards(part: Tensor, like: Tensor, each: int = 1) -> Tensor:
    """Return a DTensor [out, K / each] from this rank's part, in the layout of another one, [out, K]."""
    from torch.distributed.tensor import DTensor

    shape = torch.Size((like.shape[0], like.shape[1] // each))
    stride = (shape[1], 1)
    return DTensor.from_local(part, like.device_mesh, like.placements, shape=shape, stride=stride, run_check=False)


def is_finite(tensor: Tensor) -> bool:
    """Return whether all elements of a tensor, or of the whole of a DTensor, are finite."""
    if not is_distributed(tensor):
        return bool(torch.isfinite(tensor).all())
    bad = (~torch.isfinite(tensor.detach().to_local())).sum()
    return not _sum_over_shards(bad, tensor.device_mesh, tensor.placements)


def _sum_over_shards(part: Tensor, mesh, placements: Sequence) -> Tensor:
    """Return the sum of the parts of all shards, on all ranks; differentiable."""
    from torch.distributed.tensor import DTensor, Partial, Replicate

    of_sum = [Partial() if hasattr(placement, "dim") else Replicate() for placement in placements]
    return DTensor.from_local(part, mesh, of_sum, run_check=False).full_tensor()


def _offset_of(tensor: Tensor) -> tuple[int, ...]:
    """Offset of this rank's part of a DTensor in each dimension."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return offset


def check_in_memory(
    argument: str, layer: nn.Module, name: str = "weight", weight: Tensor | None = None, sharded: bool = False
) -> None:
    """Raise ValueError unless a layer's weight is a whole tensor in memory, or with ``sharded`` a DTensor."""
    weight = layer.weight if weight is None else weight
    if weight.is_meta:
        offloads = getattr(getattr(layer, "_hf_hook", None), "offload", False)
        cure = "accelerate offloads it, give it a device in device_map" if offloads else "load it first"
        raise ValueError(f"{argument}: expected weights in memory, got {name} on meta: {cure}")
    if is_distributed(weight) and not sharded:
        raise ValueError(
            f"{argument}: expected plain tensors as weights, got a DTensor in {name}; for a sharded model use "
            "the refit of convert, and MaskTrainer"
        )


def check_no_flat_parameters(argument: str, model: nn.Module) -> None:
    """Raise ValueError if FSDP1 has flattened the parameters of a module."""
    for name, module in model.named_modules():
        if any(kind.__name__ == "FullyShardedDataParallel" for kind in type(module).__mro__):
            raise ValueError(
                f"{argument}: expected plain parameters or those of fully_shard, got the flat ones of "
                f"FullyShardedDataParallel (FSDP1) in {name or 'the model itself'}"
            )


def check_not_wrapped(layers: Mapping[str, nn.Module]) -> None:
    """Raise ValueError if fully_shard wraps a layer itself: FSDP2 would not gather its replacement."""
    for name, layer in layers.items():
        if hasattr(layer, "reshard"):
            raise ValueError(
                f"model: expected fully_shard around a module that contains masked layers, got one around "
                f"{name or 'the only one'} itself"
            )


def check_not_sharded(layers: Mapping[str, nn.Module], reason: str) -> None:
    """Raise ValueError if a MaskedLinear is split over ranks."""
    for name, layer in layers.items():
        if layer.shard is not None:
            raise ValueError(f"model: expected whole layers, got {name}, which fully_shard has split: {reason}")


def check_cut_by_fsdp(model: nn.Module, params: Params) -> None:
    """Raise ValueError if a parameter is a DTensor not of fully_shard, such as of a tensor-parallel plan."""
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
    """Raise ValueError unless a weight is whole, or split by fully_shard into rows over all ranks."""
    if id(weight) not in params:
        return
    param, group = params[id(weight)]
    mesh = weight.device_mesh
    placements = weight.placements
    world = torch.distributed.get_world_size()
    expected = "model: expected a weight that fully_shard has split into rows"
    cuts = {mesh_dim: placement.dim for mesh_dim, placement in enumerate(placements) if hasattr(placement, "dim")}
    if list(cuts.values()) != [0] or not placements[next(iter(cuts))].is_shard():
        raise ValueError(f"{expected} once, got {placements} in {name}")
    if (mesh.mesh.movedim(next(iter(cuts)), -1).diff() < 0).any():
        # FSDP2 assigns rows in the order of the ranks, which DTensor's offsets would contradict
        raise ValueError(f"{expected}, over ranks in rising order, got a mesh of {mesh.mesh.tolist()} in {name}")
    if mesh.size() != world:
        raise ValueError(f"{expected}, over all ranks, got a mesh of {mesh.size()} of {world} in {name}")
    if param.offload_to_cpu:
        raise ValueError(f"model: expected shards that stay on their device, got a CPUOffloadPolicy in {name}")
    if group._use_post_forward_mesh:
        raise ValueError(f"model: expected reshard_after_forward to be a bool, got a number of ranks in {name}")


class RowShard:
    """The rows of a MaskedLinear on this rank, with hooks for FSDP2.

    Weight and logits are DTensors of one layout, and ``shape`` is that of the whole weight. ``param`` and ``group`` are
    FSDP2's objects of the weight. The rows of this rank begin at ``offset``, (row, 0), in the whole layer.
    """

    def __init__(self, layer: nn.Module, param, group):
        self._layer = layer
        self._param = param
        self._group = group
        self.shape = layer.weight.shape
        self.mesh = layer.weight.device_mesh
        self.placements = layer.weight.placements
        self.offset = _offset_of(layer.weight)
        param.reset_sharded_param = self._reset
        self._hook()

    @property
    def weight(self) -> Tensor:
        """[rows, K] of this rank. FSDP2 looks for hooks on this very object."""
        return self._param.sharded_param._local_tensor

    @property
    def logits(self) -> Tensor:
        """[rows, K] of this rank."""
        return self._layer.logits._local_tensor

    @property
    def place(self) -> Place:
        groups = self.shape[1] // self._layer.pattern.m
        return Place(self.offset[0] * groups, groups)

    @property
    def layout(self) -> list:
        """Mesh, its ranks, placements and shape, which are equal on all ranks."""
        return [str(self.mesh), self.mesh.mesh.tolist(), str(self.placements), *self.shape]

    @property
    def mesh_dim(self) -> int:
        """Dimension of ``mesh`` that splits rows; the other one copies them."""
        return next(dim for dim, placement in enumerate(self.placements) if hasattr(placement, "dim"))

    def distributed(self, part: Tensor) -> Tensor:
        """Return the DTensor [out, K] of this rank's part."""
        return like_shards(part, self._layer.logits)

    def part_of(self, tensor: Tensor) -> Tensor:
        """Return this rank's rows of a whole [out, ...]."""
        return tensor[self.offset[0] : self.offset[0] + len(self.weight)]

    def summed(self, part: Tensor) -> Tensor:
        """Return the sum of the parts of all shards, on all ranks; differentiable."""
        return _sum_over_shards(part, self.mesh, self.placements)

    def forward(self, input: Tensor) -> Tensor:
        """Return y [..., out] for an input [..., K], with the gathered weight."""
        layer = self._layer
        learns = layer.training and layer.logits_backward is not None
        if learns and not getattr(layer.logits_backward, "takes_shards", False):
            raise ValueError(
                "logits_backward: expected one of MaskTrainer in a layer that fully_shard has split, got "
                f"{type(layer.logits_backward).__name__}"
            )
        weight = self.gathered_weight()
        key = self._gathered_key()
        return layer.gathered_product(input, weight, lambda: self._gathered == key)

    def gathered_weight(self) -> Tensor:
        """Return the masked weight [out, K] that FSDP2 has gathered; RuntimeError if it has not."""
        layer = self._layer
        if is_distributed(layer.weight):
            raise RuntimeError(
                "weight: expected a gathered one, got its shards; call the module that was given to fully_shard, "
                "which gathers its weights"
            )
        if self._gathered != self._gathered_key():
            # FSDP2 keeps the gathered weights of the outermost module, and does not notice new masks
            self.reshard()
            self._group.unshard()
            self._group.wait_for_unshard()
        return layer.weight

    def reshard(self) -> None:
        """Free gathered weights, so that the layer has its shards."""
        self._group._to_sharded()

    @torch.no_grad()
    def bake_into(self, linear: nn.Linear) -> None:
        """Move weight and bias into a dense layer, with zeros where the mask of the N largest logits drops weights."""
        layer = self._layer
        local_weight = self.weight
        self.reshard()
        local_weight.copy_(layer.top_n_weight().to_local())
        linear.weight = layer.weight
        linear.bias = layer.bias
        # layer and shard refer to each other, and would keep these
        layer.weight = layer.bias = None
        del local_weight.fsdp_pre_all_gather, local_weight.fsdp_post_all_gather, self._param.reset_sharded_param
        self._forget()
        for param in self._group.fsdp_params:
            if param._module_info.module is layer:
                _gather_into(linear, param, self._group)

    def _gathered_key(self) -> tuple:
        """Return a value that changes with the masked weight."""
        layer = self._layer
        drawn = versions(self.logits, layer.counter_state) if layer.training else [version_of(self.logits)]
        return layer.training, id(self.logits), version_of(self.weight), *drawn

    def _hook(self) -> None:
        self.weight.fsdp_pre_all_gather = self._pre
        self.weight.fsdp_post_all_gather = self._post
        self._gathered: tuple | None = None
        self._forget()

    def _reset(self) -> None:
        """Replace FSDP2's method after a weight was moved, cast or loaded: it may be another object then."""
        type(self._param).reset_sharded_param(self._param)
        self._hook()

    def _forget(self) -> None:
        """Drop FSDP2's memory for another kind of gather."""
        self._param._init_extensions()
        self._param.all_gather_outputs = []
        vars(self._param).pop("_unsharded_param", None)

    def _pre(self, mesh) -> tuple[tuple[Tensor], tuple]:
        layer = self._layer
        param = self._param
        n = layer.pattern.n
        m = layer.pattern.m
        codes = layer.drawn_codes() if layer.training else ops.top_n_mask(self.logits, n, m)
        bits = torch.arange(m, device=codes.device, dtype=codes.dtype)
        kept = (codes.unsqueeze(-1) >> bits & 1).flatten()
        rows, k = self.weight.shape
        # the size needs no wait for the device
        places = kept.nonzero_static(size=rows * k // m * n).squeeze(-1)
        values = self.weight.flatten()[places].view(rows, k // m * n).to(param.param_dtype or param.orig_dtype)
        # one tensor: of several FSDP2 uses only the first if a mesh has one rank
        sent = torch.cat([values.view(torch.uint8), bitmask_of(codes, m)], 1)
        # the last ranks may have fewer rows
        short = -(-self.shape[0] // self.mesh.size(self.mesh_dim)) - len(sent)
        return (nn.functional.pad(sent, (0, 0, 0, short)) if short else sent,), self._gathered_key()

    def _post(self, gathered: Sequence[Tensor], key: tuple, dtype: torch.dtype, *, out: Tensor | None = None):
        (sent,) = gathered
        rows, k = self.shape
        n = self._layer.pattern.n
        m = self._layer.pattern.m
        size = k // m * n * dtype.itemsize
        # a single row is contiguous already, but must be copied too
        pieces = sent[:rows].split([size, sent.shape[1] - size], 1)
        values, bitmask = (piece.clone(memory_format=torch.contiguous_format) for piece in pieces)
        # FSDP2 allocates it again for the next gather
        sent.untyped_storage().resize_(0)
        weight = ops.unpacked(values.view(dtype), bitmask, None, n, m)
        self._gathered = key
        if out is None:
            return weight, (weight,)
        # equal to the values of the forward, to which autograd may have a reference
        with torch.autograd._unsafe_preserve_version_counter(out):
            out.copy_(weight)
        return None


def attach(layers: Mapping[str, nn.Module], model: nn.Module) -> None:
    """Give each layer that fully_shard has split a ``RowShard``, with hooks for FSDP2.

    ValueError, before any change, if one is split in a way that is not supported.
    """
    unattached = {name: layer for name, layer in layers.items() if layer.shard is None}
    params = resharded(model) if unattached else {}
    cut = {name: x for name, x in unattached.items() if is_distributed(x.weight) or is_distributed(x.logits)}
    if cut:
        check_cut_by_fsdp(model, params)
    for name, layer in cut.items():
        weight_layout, logits_layout = [
            (x.device_mesh, x.placements) if is_distributed(x) else "none" for x in (layer.weight, layer.logits)
        ]
        if weight_layout != logits_layout:
            raise ValueError(
                f"model: expected logits with the mesh and placements of their weight, {weight_layout}, got "
                f"{logits_layout} in {name}"
            )
        check_row_shard(name, layer.weight, params)
    for layer in cut.values():
        if id(layer.logits) in params:
            # FSDP2 must not gather logits
            param, group = params[id(layer.logits)]
            group.fsdp_params.remove(param)
            param._post_load_hook_handle.remove()
        for parameter in (layer.weight, layer.bias):
            if id(parameter) in params:
                _gather_into(layer, *params[id(parameter)])
        layer.shard = RowShard(layer, *params[id(layer.weight)])


def _gather_into(layer: nn.Module, param, group) -> None:
    """Let FSDP2 gather into this layer, which may replace another one, and move its hooks there."""
    info = param._module_info
    before = info.module
    info.module = layer
    info.shared_modules = [layer] * len(info.shared_modules)
    if before is layer:
        return
    param._post_load_hook_handle.remove()
    param._post_load_hook_handle = layer.register_load_state_dict_post_hook(lambda *_: param.reset_sharded_param())
    of_state_dicts = group._module_to_pre_save_state_dict_hook_handle, group._module_to_pre_load_state_dict_hook_handle
    if any(of_state_dicts):
        # else FSDP2 registers them at its first forward
        for handles in of_state_dicts:
            for handle in handles.values():
                handle.remove()
            handles.clear()
        group._register_state_dict_hooks()


def resharded(model: nn.Module) -> Params:
    """Return the model to its shards, and give FSDP2's (parameter, group) by the id of each sharded parameter.

    FSDP2 may keep the weights that it gathered last. ValueError if torch is too old.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    params = {}
    if fsdp is None:
        # nobody has used it, and its import takes long
        return params
    sharded = (module._get_fsdp_state() for module in model.modules() if isinstance(module, fsdp.FSDPModule))
    for state in {id(state): state for state in sharded}.values():
        if not hasattr(state, "_fsdp_param_groups"):
            raise ValueError(f"torch: expected 2.13 or newer for fully_shard, got {torch.__version__}")
        for group in state._fsdp_param_groups:
            group._to_sharded()
            for param in group.fsdp_params:
                info = param._module_info
                if getattr(info.module, info.param_name) is not param.sharded_param:
                    # a loader of a model on meta has made a new one, which FSDP2 would notice at its first forward
                    param.reset_sharded_param()
                params[id(param.sharded_param)] = param, group
    return params


@contextmanager
def resetting(model: nn.Module) -> Iterator[None]:
    """After an error, reset FSDP2 to its state between two iterations: all is sharded, without gradients."""
    try:
        yield
    except BaseException:
        fsdp = sys.modules.get("torch.distributed.fsdp")
        for module in model.modules() if fsdp is not None else ():
            # a module that has not run yet needs no reset
            if isinstance(module, fsdp.FSDPModule) and module._get_fsdp_state()._is_root:
                # raise the first error
                with suppress(RuntimeError):
                    module.reset_iter_state()
        raise


def without_gradients(model: nn.Module) -> AbstractContextManager:
    """Inference mode, or no_grad for a sharded model.

    FSDP2 could not write memory of inference mode outside of it.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    # parameters may be gathered now
    gathers = fsdp is not None and any(isinstance(module, fsdp.FSDPModule) for module in model.modules())
    return torch.no_grad() if gathers or any(map(is_distributed, model.parameters())) else torch.inference_mode()


def gathers_within(model: nn.Module, blocks: Iterable[nn.Module]) -> bool:
    """Return whether each block can run alone: FSDP2 gathers no parameter of it together with others outside."""
    params = resharded(model)
    for block in blocks:
        inside = set(block.modules())
        for parameter in block.parameters():
            if id(parameter) in params and not inside.issuperset(params[id(parameter)][1].modules):
                return False
    return True


def is_sharded(layers: Mapping[str, nn.Module]) -> bool:
    """Return whether layers are sharded: all of them, see ``check_sharding``."""
    return any(layer.shard is not None for layer in layers.values())


def check_sharding(layers: Mapping[str, nn.Module]) -> None:
    """Raise ValueError unless all layers are whole, or fully_shard has split all of them over one mesh."""
    meshes = {name: None if layer.shard is None else layer.shard.mesh for name, layer in layers.items()}
    cut = next((name for name, mesh in meshes.items() if mesh is not None), None)
    for name, mesh in meshes.items():
        if cut is not None and mesh != meshes[cut]:
            raise ValueError(
                f"model: expected fully_shard to split all masked layers over one mesh or none, got {meshes[cut]} in "
                f"{cut} and {mesh} in {name}"
            )


def check_finite(layers: Mapping[str, nn.Module]) -> None:
    """Raise ValueError unless the logits of this rank are finite."""
    for name, layer in layers.items():
        if not torch.isfinite(layer.own_logits).all():
            raise ValueError(f"model: expected finite logits, got NaN or infinity in {name}")


def agree_on_shards(ranks: Ranks, layers: Mapping[str, nn.Module]) -> None:
    """Raise ValueError on all ranks unless they have the same layers on the same meshes, with finite logits.

    Afterwards all weights are shards.
    """
    if not is_sharded(layers):
        return
    shards = {name: layer.shard for name, layer in layers.items()}
    ranks.agree({name: shard.layout for name, shard in shards.items()})
    ranks.run_on_all(lambda: check_finite(layers))
    for shard in shards.values():
        shard.reshard()


def planned_parts(ranks: Ranks, folder: Path, tensors: Mapping[str, Tensor]) -> Callable[[], Path | None]:
    """Return a function that writes this rank's part of tensors to a file, and returns its path, None without a part.

    All ranks must call this, with access to the same folder. Tensors are DTensors, or equal on all ranks; parts that
    several ranks have are written by one. The function raises OSError if this rank cannot write, and waits for no other
    rank. torch.distributed.checkpoint plans the files, which are safetensors, no pickles. ``ranks`` exchanges the
    plans, since torch's own collectives have a timeout for a rank that writes for long.
    """
    from torch.distributed.checkpoint import DefaultSavePlanner, HuggingFaceStorageWriter

    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)

    def own_plan():
        first = ranks.is_main_process
        planner.set_up_planner(dict(tensors), writer.storage_meta(), first)
        writer.set_up_storage_writer(first)
        local_plan = planner.create_local_plan()
        # without empty tensors, such as those of a rank without rows
        local_plan.items[:] = [item for item in local_plan.items if item.tensor_data.chunk.sizes.numel()]
        return writer.prepare_local_plan(local_plan)

    plans, _ = planner.create_global_plan(ranks.all_gather_object(ranks.run_on_all(own_plan)))
    plan = planner.finish_plan(writer.prepare_global_plan(plans)[ranks.rank])

    def write() -> Path | None:
        written = writer.write_data(plan, planner).wait()
        return folder / written[0].storage_data.relative_path if written else None

    return write


def kinds_of_parts(files: Sequence[Path]) -> dict[str, tuple[list[int], torch.dtype]]:
    """(shape, dtype) of tensors by name, from files with parts of them or with whole ones.

    A missing end of a tensor cannot be noticed: the shape is then smaller. ValueError unless the files have each
    element of a tensor once, in a format that torch reads; OSError or SafetensorError if a file cannot be read.
    """
    try:
        stored = _reader_of(files).read_metadata().state_dict_metadata
    except (KeyError, TypeError, ValueError) as error:
        # an unknown dtype, or wrong offsets of parts
        raise ValueError(
            f"snapshot: expected safetensors that torch reads, got {error!r} in {str(files[0].parent)!r}"
        ) from error
    for name, of in stored.items():
        if not _fill([(part.offsets, part.sizes) for part in of.chunks], of.size):
            raise ValueError(
                f"snapshot: expected each element of {name} once, got parts that lack some or overlap in "
                f"{str(files[0].parent)!r}"
            )
    return {name: (list(of.size), of.properties.dtype) for name, of in stored.items()}


def _fill(parts: Iterable[Part], size: torch.Size) -> bool:
    """Return whether parts cover each element of a tensor once: their sizes add up, and no two of them overlap."""
    parts = sorted(parts)
    if sum(math.prod(sizes) for _, sizes in parts) != size.numel():
        return False
    near: list[Part] = []
    for begin, sizes in parts:
        # compare rows only with the last part, so that time does not grow with the square of the number of ranks
        near = [other for other in near if other[0][0] + other[1][0] > begin[0]]
        if any(_overlap((begin, sizes), other) for other in near):
            return False
        near.append((begin, sizes))
    return True


def _overlap(first: Part, second: Part) -> bool:
    return all(max(a, b) < min(a + size_a, b + size_b) for a, size_a, b, size_b in zip(*first, *second, strict=True))


@torch.no_grad()
def read_parts(files: Iterable[Path], tensors: Mapping[str, Tensor]) -> None:
    """Fill tensors in place from files, a DTensor only with this rank's part; other ranks need not call this.

    Files are safetensors with whole tensors, or with the parts of ``planned_parts``; OSError or SafetensorError if one
    cannot be read.
    """
    from torch.distributed.checkpoint import DefaultLoadPlanner

    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    reader = _reader_of(files)
    metadata = reader.read_metadata()
    planner.set_up_planner(dict(tensors), metadata, is_coordinator=True)
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    plans = planner.create_global_plan([reader.prepare_local_plan(planner.create_local_plan())])
    (plan,) = reader.prepare_global_plan(plans)
    reader.read_data(planner.finish_plan(plan), planner).wait()


def _reader_of(files: Iterable[Path]):
    """torch's reader of safetensors files, for these alone."""
    from torch.distributed.checkpoint import HuggingFaceStorageReader
    from torch.distributed.checkpoint.filesystem import FileSystem

    class Listed(FileSystem):
        def ls(self, path: str) -> Sequence[str]:
            return [str(file) for file in files]

    reader = HuggingFaceStorageReader(".")
    reader.fs = Listed()
    return reader
