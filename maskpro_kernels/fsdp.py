"""Masked layers whose rows FSDP2 (``torch.distributed.fsdp.fully_shard``) has cut over ranks.

Each rank holds its own rows of weight and logits. FSDP2 gathers a layer's rows ahead of each use. What it then sends of
a masked layer are the values that its mask keeps and their bitmask: each rank draws the masks of its own rows, which
needs no other rank. Logits stay where they are, on the ranks of their weight's rows. Checkpoints are read by rows as
well, and snapshots written and read: no rank holds a whole.

The hooks are FSDP2's own: it calls ``fsdp_pre_all_gather`` and ``fsdp_post_all_gather`` of a shard that has them.
Which parameter has them, and that logits are none of its parameters, is set in its parameter groups, for which torch
has no public names.
"""

from __future__ import annotations

import math
import sys
import warnings
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
# Of a tensor: where it begins in each dimension, and its sizes
Part = tuple[torch.Size, torch.Size]
# Names that one message holds
NAMED = 3
# Dtypes of which one may be stored and another loaded: no scale lies beside them
PLAIN = {torch.float64, torch.float32, torch.bfloat16, torch.float16}


class Place(NamedTuple):
    """Where the groups of some rows lie in their layer, as a ``Counter`` has it."""

    group_offset: int
    group_row_stride: int


def is_distributed(tensor: object) -> bool:
    """Say whether a tensor is a DTensor."""
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
    """Say whether all elements of a tensor, or of the whole of a DTensor, are finite."""
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
    """Raise ValueError unless a layer's weight lies on its device as a whole, or with ``sharded`` as a DTensor."""
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
    """Raise ValueError if a parameter is a DTensor that fully_shard has not made, such as of a tensor-parallel plan."""
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
    """Raise ValueError unless a weight is whole, or cut by fully_shard into rows over all ranks."""
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

    Weight and logits are DTensors of one layout, and ``shape`` is that of the whole weight. ``param`` and ``group`` are
    FSDP2's of the weight. The rows of this rank begin at ``offset``, (row, 0) of the whole layer.
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
        learns = layer.training and layer.logits_backward is not None
        if learns and not getattr(layer.logits_backward, "takes_shards", False):
            raise ValueError(
                "logits_backward: expected one of MaskTrainer in a layer that fully_shard has cut, got "
                f"{type(layer.logits_backward).__name__}"
            )
        weight, key = self.gathered_weight(), self._gathered_key()
        return layer.gathered_product(input, weight, lambda: self._gathered == key)

    def gathered_weight(self) -> Tensor:
        """The masked weight [out, K], as FSDP2 has gathered it for the module that runs; RuntimeError if it has not."""
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
        bits = torch.arange(m, device=codes.device, dtype=codes.dtype)
        kept = (codes.unsqueeze(-1) >> bits & 1).flatten()
        rows, k = self.weight.shape
        # how many there are is known, and needs no wait for the device
        places = kept.nonzero_static(size=rows * k // m * n).squeeze(-1)
        values = self.weight.flatten()[places].view(rows, k // m * n).to(param.param_dtype or param.orig_dtype)
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


def attach(layers: Mapping[str, nn.Module], model: nn.Module) -> None:
    """Give layers of a model that fully_shard has cut a ``RowShard``, and FSDP2 what it is to gather of them.

    ValueError if one is cut in a way that is not supported. Nothing has changed then.
    """
    others = {name: layer for name, layer in layers.items() if layer.shard is None}
    params = resharded(model) if others else {}
    cut = {name: x for name, x in others.items() if is_distributed(x.weight) or is_distributed(x.logits)}
    if cut:
        check_cut_by_fsdp(model, params)
    for name, layer in cut.items():
        pair = layer.weight, layer.logits
        own, other = [(x.device_mesh, x.placements) if is_distributed(x) else "none" for x in pair]
        if own != other:
            raise ValueError(
                f"model: expected logits with the mesh and placements of their weight, {own}, got {other} in {name}"
            )
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


def _lead_to(layer: nn.Module, param, group) -> None:
    """Have FSDP2 put what it gathers into this layer, which may stand in the place of another one, and hook to it."""
    info = param._module_info
    before, info.module, info.shared_modules = info.module, layer, [layer] * len(info.shared_modules)
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
    """FSDP2's (parameter, group) by the id of each parameter that it has sharded: the model has its shards now.

    FSDP2 may have kept gathered what it has gathered last. ValueError if torch is too old.
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
    """After an error, bring FSDP2 back to its state between two iterations: all is sharded, without gradients."""
    try:
        yield
    except BaseException:
        fsdp = sys.modules.get("torch.distributed.fsdp")
        for module in model.modules() if fsdp is not None else ():
            # one that has not run yet has nothing to be reset
            if isinstance(module, fsdp.FSDPModule) and module._get_fsdp_state()._is_root:
                # the error that came first is the one to raise
                with suppress(RuntimeError):
                    module.reset_iter_state()
        raise


def without_gradients(model: nn.Module) -> AbstractContextManager:
    """Inference mode; of a model that ranks share no_grad alone.

    What FSDP2 allocates in inference mode it could not write outside of it.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    # parameters may stand gathered in the model now
    gathers = fsdp is not None and any(isinstance(module, fsdp.FSDPModule) for module in model.modules())
    return torch.no_grad() if gathers or any(map(is_distributed, model.parameters())) else torch.inference_mode()


def gathers_within(model: nn.Module, blocks: Iterable[nn.Module]) -> bool:
    """Say whether each block can run by itself: FSDP2 gathers nothing of it with modules outside of it."""
    params = resharded(model)
    for block in blocks:
        inside = set(block.modules())
        for parameter in block.parameters():
            if id(parameter) in params and not inside.issuperset(params[id(parameter)][1].modules):
                return False
    return True


def is_sharded(layers: Mapping[str, nn.Module]) -> bool:
    """Say whether ranks share layers: all of them, see ``check_sharding``."""
    return any(layer.shard is not None for layer in layers.values())


def check_sharding(layers: Mapping[str, nn.Module]) -> None:
    """Raise ValueError unless all layers are whole, or fully_shard has cut all of them over one mesh."""
    meshes = {name: None if layer.shard is None else layer.shard.mesh for name, layer in layers.items()}
    cut = next((name for name, mesh in meshes.items() if mesh is not None), None)
    for name, mesh in meshes.items():
        if cut is not None and mesh != meshes[cut]:
            raise ValueError(
                f"model: expected fully_shard to cut all masked layers over one mesh or none, got {meshes[cut]} in "
                f"{cut} and {mesh} in {name}"
            )


def check_finite(layers: Mapping[str, nn.Module]) -> None:
    """Raise ValueError unless the logits that this rank has are finite."""
    for name, layer in layers.items():
        if not torch.isfinite(layer.own_logits).all():
            raise ValueError(f"model: expected finite logits, got NaN or infinity in {name}")


def agree_on_shards(ranks: Ranks, layers: Mapping[str, nn.Module]) -> None:
    """Raise ValueError on all ranks unless they have the same layers on meshes that fit, with finite logits.

    All weights are shards then.
    """
    if not is_sharded(layers):
        return
    shards = {name: layer.shard for name, layer in layers.items()}
    ranks.agree({name: shard.layout for name, shard in shards.items()})
    ranks.all_of(lambda: check_finite(layers))
    for shard in shards.values():
        shard.reshard()


def planned_parts(ranks: Ranks, folder: Path, tensors: Mapping[str, Tensor]) -> Callable[[], Path | None]:
    """A function that writes this rank's part of tensors into a file of its own, and gives its path, None without one.

    All ranks have to call this. Of what several of them have, one writes it. The function raises OSError where this
    rank cannot write; it waits for no other rank. Plans come from torch.distributed.checkpoint, and are exchanged by
    ``ranks``, since its own collectives give up a rank that writes for long. The files are safetensors, no pickles.
    Tensors are DTensors, or alike on all ranks, which all see the folder.
    """
    from torch.distributed.checkpoint import DefaultSavePlanner, HuggingFaceStorageWriter

    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)

    def own_plan():
        first = ranks.rank == 0
        planner.set_up_planner(dict(tensors), writer.storage_meta(), first)
        writer.set_up_storage_writer(first)
        own = planner.create_local_plan()
        # without what has no elements, as of a rank that has no rows
        own.items[:] = [item for item in own.items if item.tensor_data.chunk.sizes.numel()]
        return writer.prepare_local_plan(own)

    plans, _ = planner.create_global_plan(ranks.gather_objects(ranks.all_of(own_plan)))
    plan = planner.finish_plan(writer.prepare_global_plan(plans)[ranks.rank])

    def write() -> Path | None:
        written = writer.write_data(plan, planner).wait()
        return folder / written[0].storage_data.relative_path if written else None

    return write


def kinds_of_parts(files: Sequence[Path], argument: str = "snapshot") -> dict[str, tuple[list[int], torch.dtype]]:
    """(shape, dtype) of the tensors of which files hold parts or wholes, by name.

    Where files lack the end of a tensor, nothing shows it: the shape is smaller then. ValueError, which begins
    with ``argument``, if they do not hold each element of a tensor once, or hold what torch does not read; OSError or
    SafetensorError if a file cannot be read.
    """
    try:
        stored = _reader_of(files).read_metadata().state_dict_metadata
    except (KeyError, TypeError, ValueError) as error:
        # a dtype that it does not know, or places of parts that are none
        raise ValueError(
            f"{argument}: expected safetensors that torch reads, got {error!r} in {str(files[0].parent)!r}"
        ) from error
    for name, of in stored.items():
        if not _fill([(part.offsets, part.sizes) for part in of.chunks], of.size):
            raise ValueError(
                f"{argument}: expected each element of {name} once, got parts that lack some or overlap in "
                f"{str(files[0].parent)!r}"
            )
    return {name: (list(of.size), of.properties.dtype) for name, of in stored.items()}


def _fill(parts: Iterable[Part], size: torch.Size) -> bool:
    """Say whether parts hold each element of a tensor once: as many as it has, and no two of them the same."""
    parts = sorted(parts)
    if sum(math.prod(sizes) for _, sizes in parts) != size.numel():
        return False
    near: list[Part] = []
    for begin, sizes in parts:
        # of rows only the last part is compared, so that many ranks do not take the square of their number
        near = [other for other in near if other[0][0] + other[1][0] > begin[0]]
        if any(_overlap((begin, sizes), other) for other in near):
            return False
        near.append((begin, sizes))
    return True


def _overlap(one: Part, other: Part) -> bool:
    return all(max(a, b) < min(a + size_a, b + size_b) for a, size_a, b, size_b in zip(*one, *other, strict=True))


@torch.no_grad()
def read_parts(files: Iterable[Path], tensors: Mapping[str, Tensor]) -> None:
    """Fill tensors in place with what files hold of them, of a DTensor this rank's part; other ranks need not come.

    Files are safetensors with wholes, or with the parts of ``planned_parts``; OSError or SafetensorError if one cannot
    be read.
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
    """torch's reader of the safetensors files in a folder, for these alone."""
    from torch.distributed.checkpoint import HuggingFaceStorageReader
    from torch.distributed.checkpoint.filesystem import FileSystem

    class Listed(FileSystem):
        def ls(self, path: str) -> Sequence[str]:
            return [str(file) for file in files]

    reader = HuggingFaceStorageReader(".")
    reader.fs = Listed()
    return reader


class _Held(NamedTuple):
    """A parameter or buffer, and all that hold it."""

    tensor: Tensor
    # (dict of a module that holds it, its name there)
    places: list[tuple[dict, str]]
    # in the model; of a buffer that no checkpoint holds none
    names: list[str]


def load_checkpoint_shards(
    model: nn.Module, checkpoint: str | Path, *, device: torch.device | str | None = None
) -> None:
    """Load a safetensors checkpoint into a model on the meta device, whose parameters ``fully_shard`` has cut.

    Each rank reads its own rows out of the files, by ``torch.distributed.checkpoint``: nothing is sent, and no rank
    holds more of a parameter than its shard. ``convert`` comes behind it. What is not on meta keeps its memory and gets
    the values of the checkpoint. Parameters that are one, such as tied embeddings or those of a shared module, stay
    one; the checkpoint may hold them under any of their names. The dtypes are those of the model: float64, float32,
    bfloat16 and float16 are converted to each other, any other has to be that of the checkpoint.

    Transformers' own models have a loader that does the same and knows the older names of their weights, see
    docs/large-models.md.

    Args:
        model: its parameters and buffers are on meta, or in memory; DTensors or plain ones, of which each rank gets
            the whole.
        checkpoint: folder with ``model.safetensors``, or with an index and the files that it names; else one with other
            safetensors files, wholes or the parts that torch's ``HuggingFaceStorageWriter`` writes; or such a file.
        device: of what is on meta. Default: the device of the meshes, of a model without any the CPU.

    Warns:
        UserWarning: if the checkpoint holds tensors that the model has not.

    Raises:
        ValueError: if there are no such files, they are damaged, some of them are missing, two hold the same, or they
            hold no values, or values of another shape or kind of dtype, for what the model would have in a checkpoint,
            or for what is on meta. The model is then as it was.
        OSError: if a file cannot be read. What is on meta is then there still.
    """
    # late: layers alone, as the hub of kernels has them, read no checkpoints
    from .files import named_files, weight_files

    files = named_files(Path(checkpoint)) or weight_files(checkpoint)
    held = list(_held_by(model))
    stored = _checked(held, files, checkpoint)
    if device is None:
        kind = next((of.tensor.device_mesh.device_type for of in held if is_distributed(of.tensor)), "cpu")
        device = kind if kind == "cpu" else torch.device(kind, torch.get_device_module(kind).current_device())
    new = {name: torch.empty_like(of.tensor, device=device) for name, of in stored.items() if of.tensor.is_meta}
    with torch.no_grad():
        old = {name: of.tensor.detach() for name, of in stored.items() if name not in new}
        read_parts(files, new | old)
    for name, tensor in new.items():
        of = stored[name]
        if isinstance(of.tensor, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=of.tensor.requires_grad)
        for place, key in of.places:
            place[key] = tensor
    # FSDP2 looks for its parameters where the old ones were
    resharded(model)


def _held_by(model: nn.Module) -> Iterator[_Held]:
    """The parameters and buffers of a model: each tensor once."""
    held: dict[int, _Held] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for place in (module._parameters, module._buffers):
            for key, tensor in place.items():
                if tensor is not None:
                    of = held.setdefault(id(tensor), _Held(tensor, [], []))
                    of.places.append((place, key))
                    if key not in module._non_persistent_buffers_set:
                        of.names.append(f"{prefix}.{key}" if prefix else key)
    return iter(held.values())


def _checked(held: list[_Held], files: list[Path], checkpoint: str | Path) -> Mapping[str, _Held]:
    """The tensors to read, by the names under which they are stored; ValueError if one does not fit."""
    from safetensors import SafetensorError

    try:
        kinds = kinds_of_parts(files, "checkpoint")
    except SafetensorError as error:
        raise ValueError(f"checkpoint: expected whole safetensors files, got {str(checkpoint)!r}: {error}") from error
    stored, lacking = {}, []
    for of in held:
        name = next((name for name in of.names if name in kinds), None)
        if name is not None:
            stored[name] = of
        elif of.names or of.tensor.is_meta:
            lacking.append(of.names[0] if of.names else f"{of.places[0][1]}, a buffer that checkpoints leave out")
    if lacking:
        raise ValueError(
            f"checkpoint: expected values for all of the model that is on meta or stored, got none for "
            f"{_listed(lacking)} in {str(checkpoint)!r}; make in memory what is computed, or load by transformers"
        )
    for name, of in stored.items():
        (shape, dtype), own = kinds[name], list(of.tensor.shape)
        if dtype != of.tensor.dtype and not {dtype, of.tensor.dtype} <= PLAIN:
            raise ValueError(
                f"checkpoint: expected {name} as {of.tensor.dtype}, got {dtype} in {str(checkpoint)!r}: what is "
                "quantized has to be dequantized first"
            )
        if shape != own:
            raise ValueError(f"checkpoint: expected {name} of shape {own}, got {shape} in {str(checkpoint)!r}")
    others = sorted(kinds.keys() - {name for of in held for name in of.names})
    if others:
        warnings.warn(f"{checkpoint}: left out, as the model has none of the name: {_listed(others)}", stacklevel=3)
    return stored


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
