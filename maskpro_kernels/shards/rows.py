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
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from .. import ops
from ..held_draw import version_of, versions
from ..pattern import NMPattern, bitmask_of
from .dtensors import is_distributed, local
from .layer_shard import LayerShard
from .planned_part import DeviceMesh, PlannedPart, check_part

# FSDP2's (parameter, group) by the id of a sharded parameter
Params = dict[int, tuple]


def _check_layout(argument: str, name: str, weight: Tensor, pattern: NMPattern, spec) -> None:
    """Raise ValueError unless a distributed weight [out, K] is one that FSDP2 has cut into rows.

    Args:
        spec: of the DTensor that FSDP2 has cut again, as a tensor-parallel plan has left it; None without a plan.
    """
    mesh, placements = weight.device_mesh, weight.placements
    told = f"{argument}: expected a weight that fully_shard has cut into rows"
    if spec is not None:
        check_part(argument, name, weight.shape, spec.mesh, spec.placements, pattern)
        if len(placements) != 2:
            raise ValueError(f"{told}, in a mesh (shard, tensor) under a plan, got {placements} in {name}")
        if spec.placements[0].dim == 0 and weight.shape[0] % mesh.size():
            raise ValueError(
                f"{told}, as many on each rank under a plan, got {weight.shape[0]} over {mesh.size()} ranks in {name}"
            )
        placements = placements[:1]
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
    if list(cuts.values()) != [0] or (spec is None and not placements[next(iter(cuts))].is_shard()):
        raise ValueError(
            f"{told} once, got {placements} in {name}; columns, or rows cut twice, have no code under fully_shard"
        )
    ranks = mesh.mesh.movedim(next(iter(cuts)), -1)
    if (ranks.diff() < 0).any():
        # FSDP2 gives out rows in the order of the ranks; by DTensor's offsets they would be others
        raise ValueError(f"{told}, over ranks in rising order, got a mesh of {mesh.mesh.tolist()} in {name}")
    if mesh.size() != torch.distributed.get_world_size():
        raise ValueError(
            f"{told}, over all ranks, got a mesh of {mesh.size()} of {torch.distributed.get_world_size()} in {name}"
        )


class RowShard(LayerShard):
    """The rows of a MaskedLinear that this rank holds, and what FSDP2 gathers of them.

    Args:
        layer: a MaskedLinear, whose weight and logits are DTensors of one layout.
        param, group: of FSDP2, that of the weight.
    """

    cut_by = "fully_shard"

    def __init__(self, layer: nn.Module, param, group):
        super().__init__(layer)
        self._param, self._group = param, group
        spec = param._unsharded_dtensor_spec
        self.part = None if spec is None else PlannedPart(self.shape, spec.mesh, spec.placements[0])
        param.reset_sharded_param = self._reset
        self._hook()

    @property
    def weight(self) -> Tensor:
        """[rows, K], that of this rank. FSDP2 looks for its hooks on this very object."""
        return self._param.sharded_param._local_tensor

    @property
    def bias(self) -> Tensor | None:
        """The whole one [out], as FSDP2 has gathered it; under a plan what this rank adds to its outputs."""
        return self._layer.bias if self.part is None else self.part.bias_of(self._layer.bias)

    @property
    def layout(self) -> list:
        """What all ranks have alike."""
        return [str(self.mesh), self.mesh.mesh.tolist(), str(self.placements), *self.shape]

    def forward(self, input: Tensor) -> Tensor:
        """y [..., out] of an input [..., K], by the weight that is gathered."""
        layer = self._layer
        if layer.training and layer.logits_backward is not None:
            check_takes_shards(layer.logits_backward)

        return self.through(input, lambda x: layer.gathered_product(x, self.gathered_weight(), self.stays_gathered()))

    def _hook(self) -> None:
        self.weight.fsdp_pre_all_gather, self.weight.fsdp_post_all_gather = self._pre, self._post
        self._gathered: tuple | None = None
        self._forget()

    def _reset(self) -> None:
        """FSDP2's own, for a weight that was moved, cast or loaded: it may be another object then."""
        type(self._param).reset_sharded_param(self._param)
        self._hook()

    def reshard(self) -> None:
        self._group._to_sharded()

    def bake_into(self, linear: nn.Linear) -> None:
        layer, own = self._layer, self.weight
        super().bake_into(linear)
        del own.fsdp_pre_all_gather, own.fsdp_post_all_gather, self._param.reset_sharded_param
        self._forget()
        for param in self._group.fsdp_params:
            if param._module_info.module is layer:
                _lead_to(linear, param, self._group)

    def _forget(self) -> None:
        """What FSDP2 has allocated for another kind of gather."""
        self._param._init_extensions()
        self._param.all_gather_outputs = []
        vars(self._param).pop("_unsharded_param", None)

    @property
    def mesh_dim(self) -> int:
        """That of ``rows_mesh`` over which rows are cut."""
        return next(at for at, placement in enumerate(self.placements) if hasattr(placement, "dim"))

    @property
    def rows_mesh(self) -> DeviceMesh:
        """Of the ranks that FSDP2 has shared the rows out over."""
        return self._param.mesh_info.mesh

    @property
    def gathered_shape(self) -> torch.Size:
        """Of what FSDP2 gathers: [out, K], or under a plan its part."""
        return self._param._orig_size

    @property
    def rows_each(self) -> int:
        """Rows of a rank, of which the last ranks may have fewer."""
        return -(-self.gathered_shape[0] // self.rows_mesh.size(self.mesh_dim))

    def rows_of(self, tensor: Tensor) -> Tensor:
        """Those of what is gathered [out, ...] that this rank has."""
        first = self.offset[0] - (0 if self.part is None else self.part.rows[0])
        return tensor[first : first + len(self.weight)]

    def gathered_weight(self) -> Tensor:
        """The masked weight [out, K], as FSDP2 has gathered it for the module that runs; under a plan its part.

        Raises:
            RuntimeError: if it has not.
        """
        layer = self._layer
        if is_distributed(layer.weight) and layer.weight.device_mesh == self.mesh:
            raise RuntimeError(
                "weight: expected one that is gathered, got its shards; call the module that was given to fully_shard, "
                "which gathers the weights in it"
            )
        if self._gathered != self.mask_key():
            # FSDP2 keeps what it gathers of the outermost module, and knows of no masks
            self.reshard()
            self._group.unshard()
            self._group.wait_for_unshard()
        return local(layer.weight)

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
        (rows, k), n, m = self.gathered_shape, self._layer.pattern.n, self._layer.pattern.m
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
        with torch.autograd._unsafe_preserve_version_counter(local(out)):
            local(out).copy_(weight)
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


def attach_rows(layers: Iterable[nn.Module], params: Params) -> None:
    """Tell FSDP2, and MaskedLinear layers that it has sharded, what is to be gathered of them.

    Args:
        params: of ``resharded``, with the weight of each layer.
    """
    for layer in layers:
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
                info = param._module_info
                if getattr(info.module, info.param_name) is not param.sharded_param:
                    # what has loaded a model from meta has made it anew, and FSDP2 looks at its first forward
                    param.reset_sharded_param()
                params[id(param.sharded_param)] = param, group
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


@contextmanager
def resetting(model: nn.Module) -> Iterator[None]:
    """With ``reset_iteration`` behind an error."""
    try:
        yield
    except BaseException:
        reset_iteration(model)
        raise


def without_gradients(model: nn.Module) -> AbstractContextManager:
    """Inference mode; of a model that ranks share no_grad alone.

    What FSDP2 allocates in inference mode it could not write outside of it.
    """
    return torch.no_grad() if is_shared(model) else torch.inference_mode()


def is_shared(model: nn.Module) -> bool:
    """Whether a parameter is a DTensor, or FSDP2 gathers parameters of it, which may stand gathered in it now."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return any(map(is_distributed, model.parameters())) or (
        fsdp is not None and any(isinstance(module, fsdp.FSDPModule) for module in model.modules())
    )


def gathers_within(model: nn.Module, blocks: Iterable[nn.Module]) -> bool:
    """Whether each block can run by itself: FSDP2 gathers nothing of it with modules outside of it."""
    params = resharded(model)
    for block in blocks:
        inside = set(block.modules())
        for parameter in block.parameters():
            if id(parameter) in params and not inside.issuperset(params[id(parameter)][1].modules):
                return False
    return True


def check_row_shard(argument: str, name: str, weight: Tensor, pattern: NMPattern, params: Params) -> None:
    """Raise ValueError unless the shards of a weight are such as a RowShard takes.

    Args:
        params: of ``resharded``, with the weight.
    """
    param, group = params[id(weight)]
    _check_layout(argument, name, weight, pattern, param._unsharded_dtensor_spec)
    if param.offload_to_cpu:
        raise ValueError(f"{argument}: expected shards that stay on their device, got a CPUOffloadPolicy in {name}")
    if group._use_post_forward_mesh:
        raise ValueError(f"{argument}: expected reshard_after_forward to be a bool, got a number of ranks in {name}")


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
    hook_state_dicts(group)


def hook_state_dicts(group) -> None:
    """Have FSDP2's hooks of state_dicts on the modules whose parameters a group has now."""
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
