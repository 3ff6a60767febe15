"""MaskedLinear, a linear layer under a learned N:M mask, and functions over all such layers of a model."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from . import ops
from .fsdp import RowShard, attach, sharded_modules
from .functional.checks import (
    as_codes,
    check_cast,
    check_device,
    check_exactly_n,
    check_floats,
    check_gap,
    check_in_memory,
    check_int,
    check_scalar,
    check_shard,
    check_weight,
    describe,
    in_transform,
    matrix_of,
)
from .functional.linear import LogitsBackward, linear_under
from .functional.masks import expand_mask, mask_log_prob, top_n_mask
from .ops.counter import CachedMask, Counter, CounterState, KeptCodes, MaskSource, Place
from .ops.dispatch import in_onnx_export
from .ops.pattern import NMPattern
from .ops.philox import MAX_LAYERS, MAX_STEPS
from .shards import is_distributed, local

if TYPE_CHECKING:
    from .ranks import Ranks


@torch._disable_dynamo
def _outside_of_graphs(layer: MaskedLinear, input: Tensor) -> Tensor:
    # a compiled graph would keep the ``logits_backward`` of one step, with the tensors that it reads and writes
    return layer.forward(input)


def _warn_of_lost_slopes(grad: Tensor) -> None:
    warnings.warn(
        "MaskedLinear: this backward gives the logits no gradient, so the masks do not learn. Train them by "
        "MaskTrainer, MaskOptimizer, or the callback MaskCallback of transformers' Trainer. To keep the masks "
        "unchanged without this warning, call requires_grad_(False) on the logits",
        stacklevel=2,
    )


def initial_logits(codes: Tensor, pattern: str | NMPattern, gap: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """Logits [..., K] for group codes [..., K / M]: ``gap`` where kept, 0 where dropped."""
    return expand_mask(codes, pattern) * torch.tensor(gap, dtype=dtype, device=codes.device)


class MaskedLinear(nn.Module):
    """nn.Linear under an N:M mask with one logit a weight.

    In training mode the mask is drawn at the current step of ``counter_state``. In eval mode it keeps the N largest
    logits of each group. ``forward`` returns y alone and changes no state.

    Args:
        weight: float32, bfloat16 or float16 [out, K], K divisible by M. Kept as a frozen Parameter.
        bias: [out] or None.
        logits: float32, bfloat16 or float16 [out, K]. They may be on another device than the weight, such as the CPU.
            Then each use makes a temporary copy on the weight's device, and each update writes its result back.
        pattern: "N:M" or NMPattern.
        layer: id of the layer in the counter. Layers with the same id draw the same noise.
        counter_state: seed and step, shared by the layers of a model; default: a new one.
        group_offset: for a shard, the index of its first group in the whole layer; see ``shard_counter``.
        group_row_stride: groups in a row of the whole layer; default: of the given weight.

    A shard draws the same bits as the whole layer does at its place, and its logits get the same updates. Two values
    cover the shard alone: ``log_prob``, a sum over its groups, and the root mean square that ``StraightThrough``
    divides by.

    Attributes:
        logits_backward: function that computes the straight-through gradient of the logits, see
            ``straight_through_linear``. With ``straight_through_gradient`` the gradient arrives in ``logits.grad``.
            None, the default: the logits get a gradient through ``log_prob`` alone. A function that updates the logits
            itself needs an attribute ``moves_logits`` that is true, so that ``torch.compile`` leaves it out of graphs.
        cached_mask: the current draw, if all layers drew together, see ``ModelMasks``; None if each use draws again.
        kept_codes: group codes of the N largest logits, a byte a group (four for M = 16), from the last forward in eval
            mode. The next one takes them unless the logits have changed in place, which torch counts, or are another
            tensor, or elsewhere. ``train``, ``eval``, a move and a cast drop them. Torch does not count writes through
            ``logits.data``, by its fused optimizers, by collectives, or by replays of a CUDA graph: call ``eval`` again
            after those. A forward in a compiled, traced or captured graph, in a transform of torch.func, of inference
            tensors, or of a layer that fully_shard has split chooses again. So do ``masked_weight`` and all that
            writes masks.
        weight_changed: whether kept weights were refitted or trained since the layer was made, so that the dense weight
            is lost. Code that changes them sets it. The state_dict contains it.
        is_dense: whether ``forward`` multiplies with the whole weight, see ``dense``.
        shard: a ``RowShard``, the rows on this rank, if fully_shard of torch has split the layer; else None. ``weight``
            and ``logits`` are then DTensors, and codes are those of these rows.

    Raises:
        TypeError, ValueError: shapes or dtypes are not as above.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, logits: Tensor, pattern: str | NMPattern, *,
                 layer: int = 0, counter_state: CounterState | None = None, group_offset: int = 0,
                 group_row_stride: int | None = None):  # fmt: skip
        super().__init__()
        self.pattern = NMPattern(pattern)
        check_weight(weight, self.pattern, whole=False)
        check_floats("logits", logits)
        if logits.shape != weight.shape or logits.is_meta != weight.is_meta:
            raise ValueError(f"logits: expected those of a weight {describe(weight)}, got {describe(logits)}")
        if bias is not None and (getattr(bias, "shape", None) != weight.shape[:1] or bias.dtype != weight.dtype):
            raise ValueError(f"bias: expected [{weight.shape[0]}] of {weight.dtype}, got {describe(bias)}")
        check_int("layer", layer, MAX_LAYERS)
        group_row_stride = check_shard(weight.shape, self.pattern, group_offset, group_row_stride)
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self._add_logits(logits, layer, counter_state, group_offset, group_row_stride)

    def _add_logits(self, logits: Tensor, layer: int, counter_state: CounterState | None, group_offset: int,
                    group_row_stride: int) -> None:  # fmt: skip
        device = self.weight.device
        self.logits = nn.Parameter(logits.contiguous())
        self.register_buffer("layer_id", torch.empty((), dtype=torch.int64, device=device), persistent=False)
        self.layer = layer
        self.group_offset = group_offset
        self.group_row_stride = group_row_stride
        self.counter_state = CounterState(device=device) if counter_state is None else counter_state
        self.logits_backward: LogitsBackward | None = None
        self.cached_mask: CachedMask | None = None
        self.kept_codes: KeptCodes | None = None
        self.shard: RowShard | None = None
        self.weight_changed = self.is_dense = False

    @classmethod
    def from_linear(cls, linear: nn.Linear, pattern: str | NMPattern, init: str | Tensor = "magnitude",
                    gap: float = 10.0, *, logits_dtype: torch.dtype = torch.float32,
                    logits_device: torch.device | str | None = None, layer: int = 0,
                    counter_state: CounterState | None = None, group_offset: int = 0,
                    group_row_stride: int | None = None) -> MaskedLinear:  # fmt: skip
        """Make a MaskedLinear that shares the bias of ``linear``, and its weight if that is contiguous.

        Args:
            linear: float32, bfloat16 or float16, in_features divisible by M.
            pattern: "N:M" or NMPattern.
            init: "magnitude" to keep the N largest weights of each group, group codes [out, K / M], or a bool mask
                [out, K].
            gap: initial logit of a kept weight; that of a dropped one is 0.
            logits_dtype: float32, bfloat16 or float16; in 16 bits updates are rounded stochastically.
            logits_device: device of the logits; default: that of the weight.
            layer, counter_state, group_offset, group_row_stride: as for the class.

        Raises:
            TypeError, ValueError: an argument is not as above, or weights are not finite.
        """
        pattern = NMPattern(pattern)
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear: expected nn.Linear, got {type(linear).__name__}")
        check_gap(gap, logits_dtype)
        device = linear.weight.device if logits_device is None else check_device("logits_device", logits_device)
        check_in_memory("linear", linear)
        check_weight(linear.weight, pattern, "linear")
        if not torch.isfinite(linear.weight).all():
            raise ValueError("linear: expected finite weights, got NaN or infinity")
        if isinstance(init, Tensor):
            codes = as_codes("init", init, pattern, linear.weight)
            if codes is init:
                check_exactly_n("init", codes, pattern)
        elif isinstance(init, str) and init == "magnitude":
            codes = top_n_mask(linear.weight.detach().abs(), pattern)
        else:
            got = f"got {describe(init)}; convert takes others"
            raise ValueError(f'init: expected "magnitude", group codes or a bool mask, {got}')
        logits = initial_logits(codes.to(device), pattern, gap, logits_dtype)
        if linear.weight.is_cuda and device.type == "cpu":
            try:
                # a GPU copies from it while it computes; torch rounds the size up to a power of two
                logits = logits.pin_memory()
            except RuntimeError as error:
                reason = str(error).partition("\n")[0]
                warnings.warn(
                    f"logits_device: no page-locked memory, so copies of the logits block: {reason}", stacklevel=2
                )
        where = {"layer": layer, "group_offset": group_offset, "group_row_stride": group_row_stride}
        # a layer made of a transposed weight has a view of it
        weight = linear.weight.detach().contiguous()
        return cls(weight, linear.bias, logits, pattern, counter_state=counter_state, **where).train(linear.training)

    @classmethod
    def from_shards(cls, linear: nn.Linear, pattern: NMPattern, logits: Tensor, module: nn.Module, *,
                    layer: int, counter_state: CounterState) -> MaskedLinear:  # fmt: skip
        """Turn an nn.Linear that fully_shard has split into a MaskedLinear, in place: FSDP2 gathers into that module.

        Args:
            linear: with rows of its weight [out, K] on each rank.
            pattern: of the logits.
            logits: [rows, K] of this rank.
            module: the module given to ``fully_shard`` that gathers the weight.
            layer, counter_state: as for the class.
        """
        linear.__class__ = cls
        linear.pattern = pattern
        linear.requires_grad_(False)
        linear._add_logits(logits, layer, counter_state, 0, linear.in_features // pattern.m)
        linear.shard = RowShard(linear, module)
        return linear

    def as_linear_of_shards(self) -> nn.Linear:
        """Turn a layer that fully_shard has split into an nn.Linear with exact zeros, in place."""
        self.shard.bake()
        del self.pattern, self.logits, self.layer_id, self._layer, self.group_offset, self.group_row_stride
        del self.counter_state, self.logits_backward, self.cached_mask, self.kept_codes
        del self.shard, self.weight_changed, self.is_dense
        self.__class__ = nn.Linear
        return self

    def forward(self, input: Tensor) -> Tensor:
        """y [..., out] of input [..., K]."""
        if self.shard is not None:
            return self._forward_of_shards(input)
        weight = self.weight
        bias = self.bias
        backward = self.logits_backward if self.training else None
        if self.is_dense:
            return nn.functional.linear(input, weight, bias)
        if not self.training and in_onnx_export():
            return nn.functional.linear(input, _onnx_weight(weight, self.logits, self.pattern.n, self.pattern.m), bias)
        if getattr(backward, "moves_logits", False) and torch.compiler.is_compiling():
            return _outside_of_graphs(self, input)
        mask = self._mask(drawn=self.training, may_keep=True)
        y, _ = linear_under(input, weight, bias, mask, logits_backward=backward)
        return self._warning(y) if backward is None else y

    def _forward_of_shards(self, input: Tensor) -> Tensor:
        """``forward`` with the masked weight [out, K] that FSDP2 has gathered."""
        backward = self.logits_backward if self.training else None
        if backward is not None and not getattr(backward, "takes_shards", False):
            raise ValueError(
                "logits_backward: expected one of MaskTrainer in a layer that fully_shard has split, got "
                f"{type(backward).__name__}"
            )
        weight = self.shard.gathered_weight()
        if weight.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "weight: expected a frozen one in a layer that fully_shard has split, got one that requires a "
                "gradient; only whole weights can learn"
            )
        key = self.shard.mask_key()
        mask = MaskSource(None if backward is None else self.logits, "applied", self.pattern.n, self.pattern.m, 1.0)
        y, _ = linear_under(
            input, weight, self.bias, mask, logits_backward=backward, is_current=lambda: self.shard.gathered == key
        )
        return self._warning(y) if backward is None else y

    def _warning(self, y: Tensor) -> Tensor:
        """Return y; in training mode its backward warns that the logits get no gradient."""
        if self.training and self.logits.requires_grad and y.requires_grad and not torch.compiler.is_compiling():
            y.register_hook(_warn_of_lost_slopes)
        return y

    def _mask(self, drawn: bool, may_keep: bool = False) -> MaskSource:
        """Source of the mask: the draw of the current step if ``drawn``, else the N largest logits.

        Only a forward ``may_keep`` their codes: what is written to a file depends on no count of changes.
        """
        weight = self.own_weight
        n = self.pattern.n
        m = self.pattern.m
        check_weight(weight, self.pattern)
        cached = self.cached_codes if drawn else None
        logits = matrix_of("logits", self.own_logits, self.pattern)
        if logits.shape != weight.shape:
            raise ValueError(f"logits: expected those of a weight {list(weight.shape)}, got {describe(logits)}")
        if drawn:
            return MaskSource(logits, "drawn", n, m, 1.0, counter=self.counter(), codes=cached)
        return MaskSource(self._top_n_codes(logits.detach(), may_keep), "codes", n, m, 1.0)

    def _top_n_codes(self, logits: Tensor, may_keep: bool) -> Tensor:
        """Group codes of the N largest ``logits``, on the weight's device; see ``kept_codes``."""
        device = self.weight.device
        n = self.pattern.n
        m = self.pattern.m
        if not may_keep or self.shard is not None or not _has_count_of_changes(self.logits, device):
            return ops.top_n_mask(logits.to(device), n, m)
        kept = self.kept_codes
        if kept is not None and kept.are_of(self.logits, device):
            return kept.codes
        # codes of inference mode could not be saved for a backward later
        with torch.inference_mode(False):
            codes = ops.top_n_mask(logits.to(device), n, m)
        # of a fake tensor there is nothing to keep
        self.kept_codes = KeptCodes(codes, self.logits) if type(codes) is Tensor else None
        return codes

    def train(self, mode: bool = True) -> MaskedLinear:
        self.kept_codes = None
        return super().train(mode)

    def logits_on_device(self) -> Tensor:
        """Logits of this rank on the weight's device: a copy if they are on another device."""
        return self.own_logits.to(self.weight.device)

    @property
    def own_weight(self) -> Tensor:
        """The weight, or on this rank of a layer that is cut; ``own_logits`` likewise."""
        return self.weight if self.shard is None else self.shard.weight

    @property
    def own_logits(self) -> Tensor:
        return self.logits if self.shard is None else self.shard.logits

    @property
    def place(self) -> Place:
        """Place of ``own_logits`` in the whole layer."""
        return Place(self.group_offset, self.group_row_stride) if self.shard is None else self.shard.place

    def masked_weight(self, drawn: bool | None = None) -> Tensor:
        """The weight [out, K] under the drawn mask, or under the N largest logits; by default as the mode asks."""
        mask = self._mask(self.training if drawn is None else drawn)
        mask = mask.of(mask.tensor.detach(), self.weight.device).by_codes
        weight = ops.masked_weight(self.own_weight.contiguous(), mask)
        return weight if self.shard is None else self.shard.distributed(weight)

    def top_n_weight(self) -> Tensor:
        """The weight [out, K] with exact zeros where the logit is not among the N largest of its group."""
        return self.masked_weight(drawn=False)

    @property
    def cached_codes(self) -> Tensor | None:
        """Group codes [out, K / M] of the cached draw, or None; RuntimeError if it is no longer the current draw."""
        return None if self.cached_mask is None else self.cached_mask.codes_of(self.own_logits, self.counter_state)

    def drawn_codes(self) -> Tensor:
        """Group codes [out, K / M] of the draw at the current step."""
        mask = self._mask(drawn=True)
        return ops.codes_under(mask.of(mask.tensor.detach(), self.weight.device))

    @property
    def mask(self) -> Tensor:
        """Bool [out, K]: the mask of ``masked_weight()``; of a layer that is cut over ranks, the rows on this rank."""
        codes = self.drawn_codes() if self.training else top_n_mask(self.logits_on_device().detach(), self.pattern)
        return expand_mask(codes, self.pattern)

    def log_prob(self) -> Tensor:
        """log p of the mask drawn at the current step, summed over the layer: 0-dim float32, differentiable."""
        codes = self.drawn_codes()
        # ``to_local`` of a DTensor passes a gradient back, ``own_logits`` does not
        logits = local(self.logits)
        away = self.logits.device != self.weight.device
        # otherwise the graph keeps the copies of all layers on the device until backward
        with torch.autograd.graph.save_on_cpu() if away else nullcontext():
            total = mask_log_prob(logits.to(self.weight.device), codes, self.pattern).sum()
        return total if self.shard is None else self.shard.summed(total)

    @property
    def layer(self) -> int:
        """Id of the layer in the counter. Draws read the tensor ``layer_id``, so no compiled graph contains it."""
        return self._layer

    @layer.setter
    def layer(self, layer: int) -> None:
        self._layer = layer
        self.layer_id.fill_(layer)

    @property
    def is_shard(self) -> bool:
        """True if the weight is a part of a layer: its first group is another, or its rows are shorter."""
        return (self.group_offset, self.group_row_stride) != (0, self.in_features // self.pattern.m)

    def counter(self) -> Counter:
        """The counter of the current step and draw, on the device of the weight.

        Raises:
            ValueError: if seed and step are on meta, or the step is on the CPU and not in [0, 2**32).
        """
        state = self.counter_state
        device = self.weight.device
        key = state.seed, state.step, self.layer_id, state.draw
        check_scalar("step", state.step, 0, MAX_STEPS)
        if any(part.device != device for part in key):
            # a model's layers may have been moved to several devices since they were made
            if any(part.is_meta for part in key):
                raise ValueError("counter_state: expected seed and step in memory, got some on meta: load a state_dict")
            key = [part.to(device) for part in key]
        return Counter(*key, *self.place)

    def _apply(self, fn, recurse: bool = True) -> MaskedLinear:
        check_cast(fn, self.weight)
        # a parameter that moves remains the same tensor, with its version
        self.kept_codes = None
        super()._apply(fn, recurse)
        # ``to_empty`` makes new tensors without values
        self.layer_id.fill_(self._layer)
        if self.shard is not None:
            self.shard.update()
        return self

    def get_extra_state(self) -> Tensor:
        """int64 [8]: layer id, N, M, seed and step, group offset and row stride of a shard, ``weight_changed``."""
        state = self.counter_state
        if state.seed.is_meta:
            return torch.empty(8, dtype=torch.int64, device="meta")
        counter = (int(state.seed), int(state.step))
        place = (self.group_offset, self.group_row_stride)
        of_layer = self.layer, self.pattern.n, self.pattern.m
        return torch.tensor([*of_layer, *counter, *place, self.weight_changed], dtype=torch.int64)

    def set_extra_state(self, state: Tensor) -> None:
        layer, _, _, seed, step, _, _, weight_changed = state.tolist()
        # loading with assign=True moves only weights out of meta
        if self.layer_id.is_meta:
            self.layer_id = torch.empty_like(self.layer_id, device=self.weight.device)
        if self.counter_state.seed.is_meta:
            self.counter_state.to_empty(device=self.weight.device)
        self.layer = layer
        self.weight_changed = bool(weight_changed)
        self.counter_state.seed.fill_(seed)
        self.counter_state.step.fill_(step)
        self.counter_state.draw.fill_(0)

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        saved = state_dict.get(f"{prefix}_extra_state")
        if saved is not None:
            *_, errors = args
            layer_place = [self.group_offset, self.group_row_stride]
            _, n, m, _, step, *place, _ = saved.tolist() if saved.shape == (8,) else [0] * 8
            for fits, expected, got in (
                (
                    saved.shape == (8,),
                    "extra state of shape [8]",
                    f"{list(saved.shape)}, the format of another version",
                ),
                (0 <= step < MAX_STEPS, f"a step in [0, {MAX_STEPS})", step),
                ((n, m) == (self.pattern.n, self.pattern.m), f"logits of pattern {self.pattern}", f"{n}:{m}"),
                (
                    place == layer_place,
                    f"group_offset and group_row_stride {layer_place}",
                    f"those of another shard, {place}",
                ),
            ):
                if not fits:
                    errors.append(f"state_dict: expected {expected}, got {got} in {prefix!r}")
                    return
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self.shard is not None:
            self.shard.update()

    def extra_repr(self) -> str:
        shard = f", group_offset={self.group_offset}, group_row_stride={self.group_row_stride}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"pattern={self.pattern}, layer={self.layer}{shard if self.is_shard else ''}"
        )


def _has_count_of_changes(logits: Tensor, device: torch.device) -> bool:
    """Return whether torch counts the changes of a layer's logits, and no graph or transform sees the call."""
    if torch.compiler.is_compiling() or type(logits) is not nn.Parameter or logits.is_inference() or logits.is_meta:
        return False
    if torch.jit.is_tracing() or in_transform() or _get_current_dispatch_mode() is not None:
        return False
    return device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


def _onnx_weight(weight: Tensor, logits: Tensor, n: int, m: int) -> Tensor:
    """The weight [out, K] under the N largest logits [out, K] of each group, by operations that ONNX has."""
    # ONNX's TopK takes the lower index of a tie
    largest = logits.unflatten(-1, (-1, m)).topk(n, dim=-1).indices
    kept = largest.unsqueeze(-2) == torch.arange(m, device=weight.device).unsqueeze(-1)
    return torch.where(kept.any(-1).flatten(-2), weight, 0.0)


def without_gradients(model: nn.Module) -> AbstractContextManager:
    """Inference mode, or no_grad for a sharded model.

    FSDP2 could not write memory of inference mode outside of it.
    """
    # parameters may be gathered now
    is_sharded = bool(sharded_modules(model)) or any(map(is_distributed, model.parameters()))
    return torch.no_grad() if is_sharded else torch.inference_mode()


@contextmanager
def evaluating(model: nn.Module, checkpointing: bool = False) -> Iterator[None]:
    """Put all modules in eval mode, and restore the mode of each afterwards.

    With ``checkpointing``, modules whose ``gradient_checkpointing`` is true are in training mode themselves: otherwise
    they would not compute their activations again in backward.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        for module in modes:
            if checkpointing and getattr(module, "gradient_checkpointing", False):
                module.training = True
        yield
    finally:
        for module, training in modes.items():
            module.training = training
            if isinstance(module, MaskedLinear):
                # not memory of a training
                module.kept_codes = None


def tensors_of_base(model: nn.Module) -> list[Tensor]:
    """List the parameters and stored buffers of a model without logits, by name, for a digest of its base.

    A tensor that several modules share comes several times, so that ``convert`` changes nothing. Buffers that are not
    stored are computed, by each device with other bits. Tensors that accelerate offloads are read where it keeps them.
    """
    tensors = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        offloaded = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
        for name, tensor in {**module._parameters, **module._buffers}.items():
            is_logits = isinstance(module, MaskedLinear) and name == "logits"
            if tensor is None or is_logits or name in module._non_persistent_buffers_set:
                continue
            if tensor.is_meta:
                tensor = None if offloaded is None else offloaded[name]
            if tensor is not None:
                tensors[f"{prefix}.{name}"] = tensor if tensor.layout == torch.strided else tensor.to_dense()
    return [tensors[name] for name in sorted(tensors)]


def masked_layers(model: nn.Module) -> dict[str, MaskedLinear]:
    """MaskedLinear modules of a model by name, those that FSDP2 has split with a ``shard``; an error if none."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected nn.Module, got {describe(model)}")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, MaskedLinear)}
    if not layers:
        raise ValueError("model: expected a model with MaskedLinear layers, got none; call convert first")
    attach(layers, model)
    return layers


def is_sharded(layers: Mapping[str, MaskedLinear]) -> bool:
    """Return whether fully_shard has split the layers of a model: all of them, if any."""
    return any(layer.shard is not None for layer in layers.values())


def check_not_sharded(layers: Mapping[str, MaskedLinear], reason: str) -> None:
    """Raise ValueError if fully_shard has split a layer."""
    for name, layer in layers.items():
        if layer.shard is not None:
            raise ValueError(f"model: expected whole layers, got {name}, which fully_shard has split: {reason}")


def check_finite(layers: Mapping[str, MaskedLinear]) -> None:
    """Raise ValueError unless the logits of this rank are finite."""
    for name, layer in layers.items():
        if not torch.isfinite(layer.own_logits).all():
            raise ValueError(f"model: expected finite logits, got NaN or infinity in {name}")


def agree_on_shards(ranks: Ranks, layers: Mapping[str, MaskedLinear]) -> None:
    """Raise ValueError on all ranks unless they have the same layers on the same meshes, with finite logits.

    Afterwards all weights are shards.
    """
    shards = {name: layer.shard for name, layer in layers.items() if layer.shard is not None}
    if not shards:
        return
    ranks.agree({name: shard.layout for name, shard in shards.items()})
    ranks.run_on_all(check_finite, layers)
    for shard in shards.values():
        shard.reshard()


@contextmanager
def dense(model: nn.Module) -> Iterator[None]:
    """Make all masked layers multiply with their whole weights: the model becomes its own teacher.

    This holds in train and in eval mode, and the modes of other modules stay. It copies no weight and needs no memory
    beyond activations. With activation checkpointing, call backward inside the context as well.

    Args:
        model: with MaskedLinear layers.

    Raises:
        ValueError: if the model has no MaskedLinear, fully_shard has split layers, or kept weights have changed, so
            that the dense weights are lost.
    """
    layers = masked_layers(model)
    check_not_sharded(layers, "ranks exchange kept values alone; load the dense model as well")
    changed = [name for name, layer in layers.items() if layer.weight_changed]
    if changed:
        raise ValueError(
            f"model: expected the weights that it was converted with, got refitted or trained ones in {changed}; "
            "compute the dense model's outputs before weights change"
        )
    before = {layer: layer.is_dense for layer in layers.values()}
    try:
        for layer in before:
            layer.is_dense = True
        yield
    finally:
        for layer, is_dense in before.items():
            layer.is_dense = is_dense


def counter_states(model: nn.Module) -> list[CounterState]:
    """Distinct counter_states of a model: one for each device that has layers."""
    return list({id(layer.counter_state): layer.counter_state for layer in masked_layers(model).values()}.values())


def advance(model: nn.Module) -> None:
    """Add 1 to the step on the device, so that every layer draws a new mask.

    All forwards between two calls use the same masks. Call backward before the next ``advance``: it draws the masks of
    its forward again.

    Raises:
        ValueError: if the model has no MaskedLinear, or the step is on the CPU and the next one is not below 2**32. The
            step then stays. A step on a GPU is not checked: beyond the last one, its masks repeat.
    """
    states = counter_states(model)
    for counter_state in states:
        check_scalar("step", counter_state.step, 0, MAX_STEPS - 1)
    for counter_state in states:
        counter_state.step.add_(1)


def log_prob(model: nn.Module) -> Tensor:
    """Log-probability of the masks of the current step, summed over all layers: 0-dim float32, differentiable.

    Raises:
        ValueError: if the model has no MaskedLinear.
    """
    terms = [layer.log_prob() for layer in masked_layers(model).values()]
    return torch.stack([term.to(terms[0].device) for term in terms]).sum()
