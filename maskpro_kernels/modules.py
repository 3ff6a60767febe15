"""MaskedLinear, whose weights stand under a learned N:M mask, and the counter state that a model's layers share."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from . import ops
from .fsdp import Place, RowShard, attach, check_in_memory, check_not_sharded
from .functional.checks import (
    check_codes,
    check_exactly_n,
    check_floats,
    check_gap,
    check_int,
    check_scalar,
    check_shard,
    check_weight,
    describe,
    device_of_logits,
    matrix_of,
)
from .functional.linear import LogitsBackward, linear_under
from .functional.masks import expand_mask, mask_log_prob, top_n_mask
from .ops.counter import CachedMask, Counter, CounterState, MaskSource
from .ops.dispatch import in_onnx_export
from .ops.pattern import NMPattern
from .ops.philox import MAX_LAYERS, MAX_STEPS


@torch._disable_dynamo
def _outside_of_graphs(layer: MaskedLinear, input: Tensor) -> Tensor:
    # a graph would hold the ``logits_backward`` of the step it was made in, and what else that reads and writes
    return layer.forward(input)


def _warn_of_lost_slopes(grad: Tensor) -> None:
    warnings.warn(
        "MaskedLinear: a backward came through masks that do not learn from it, only other parameters do. Take "
        "MaskTrainer, MaskOptimizer, or in transformers' Trainer the callback MaskCallback. If masks are to stay as "
        "they are, call requires_grad_(False) of their logits",
        stacklevel=2,
    )


def initial_logits(codes: Tensor, pattern: str | NMPattern, gap: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """Logits [..., K] of group codes [..., K / M]: ``gap`` where kept, 0 where dropped."""
    return expand_mask(codes, pattern) * torch.tensor(gap, dtype=dtype, device=codes.device)


class MaskedLinear(nn.Module):
    """nn.Linear under an N:M mask with one logit a weight.

    In training mode the mask is drawn anew at the current step of ``counter_state``; in eval mode it keeps
    the N largest logits of each group. ``forward`` returns y alone and changes no state.

    Args:
        weight: float32, bfloat16 or float16 [out, K], K divisible by M. Kept as a frozen Parameter.
        bias: [out] or None.
        logits: float32, bfloat16 or float16 [out, K]. They may live on another device than the weight, such as the CPU:
            each use copies them to the weight's device for as long as it lasts, and what moves them writes them back.
        pattern: "N:M" or NMPattern.
        layer: id of the layer in the counter; layers with the same id draw the same noise.
        counter_state: seed and step, shared by the layers of a model; default: one of its own.
        group_offset: index in the whole layer of the first group, where the weight is a shard; see ``shard_counter``.
        group_row_stride: groups in a row of the whole layer; default: of the given weight.

    A shard draws the bits of its part of the whole layer, and its logits move by the same bits. Two things are of the
    shard alone: ``log_prob``, the sum over its groups, and the root mean square by which ``StraightThrough`` divides.

    Attributes:
        logits_backward: what takes the gradient that passes straight through a draw to the logits, see
            ``straight_through_linear``; with ``straight_through_gradient`` it arrives in ``logits.grad``. None, as
            at first: a gradient comes to them by ``log_prob`` alone. One that moves the logits itself has an attribute
            ``moves_logits`` that is true: ``torch.compile`` leaves it out of its graphs.
        cached_mask: the current draw, where all layers have made it together, see ``ModelMasks``; None where each use
            draws by itself.
        weight_changed: whether kept weights were refitted or trained since the layer was made, so that the dense weight
            is gone. Who changes them sets it; a state_dict holds it.
        is_dense: whether ``forward`` multiplies with the whole weight, see ``dense``.
        shard: what this rank holds where fully_shard of torch has cut the layer over ranks, a ``RowShard``; else None.
            ``weight`` and ``logits`` are then DTensors, and codes those of these rows.

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
        if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != weight.dtype):
            raise ValueError(f"bias: expected [{weight.shape[0]}] of {weight.dtype}, got {describe(bias)}")
        check_int("layer", layer, MAX_LAYERS)
        group_row_stride = check_shard(weight.shape, self.pattern, group_offset, group_row_stride)
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.logits = nn.Parameter(logits.contiguous())
        self.register_buffer("layer_id", torch.empty((), dtype=torch.int64, device=weight.device), persistent=False)
        self.layer = layer
        self.group_offset, self.group_row_stride = group_offset, group_row_stride
        self.counter_state = CounterState(device=weight.device) if counter_state is None else counter_state
        self.logits_backward: LogitsBackward | None = None
        self.cached_mask: CachedMask | None = None
        self.shard: RowShard | None = None
        self.weight_changed = self.is_dense = False

    @classmethod
    def from_linear(cls, linear: nn.Linear, pattern: str | NMPattern, init: str | Tensor = "magnitude",
                    gap: float = 10.0, *, logits_dtype: torch.dtype = torch.float32,
                    logits_device: torch.device | str | None = None, layer: int = 0,
                    counter_state: CounterState | None = None, group_offset: int = 0,
                    group_row_stride: int | None = None) -> MaskedLinear:  # fmt: skip
        """A MaskedLinear that shares the weight, where that is contiguous, and bias of ``linear``.

        Args:
            linear: float32, bfloat16 or float16, in_features divisible by M.
            pattern: "N:M" or NMPattern.
            init: "magnitude" for the N largest weights of each group, or group codes [out, K / M].
            gap: logits are ``gap`` where the initial mask keeps and 0 where it drops.
            logits_dtype: float32, bfloat16 or float16; in 16 bits updates are rounded stochastically.
            logits_device: where the logits live; default: with the weight.
            layer, counter_state, group_offset, group_row_stride: as for the class.

        Raises:
            TypeError, ValueError: an argument is not as above, or a weight is not finite.
        """
        pattern = NMPattern(pattern)
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear: expected nn.Linear, got {type(linear).__name__}")
        check_gap(gap, logits_dtype)
        device = linear.weight.device if logits_device is None else device_of_logits(logits_device)
        check_in_memory("linear", linear)
        check_weight(linear.weight, pattern, "linear")
        if not torch.isfinite(linear.weight).all():
            raise ValueError("linear: expected finite weights, got NaN or infinity")
        if isinstance(init, Tensor):
            check_codes("init", init, pattern, linear.weight)
            check_exactly_n("init", init, pattern)
            codes = init
        elif init == "magnitude":
            codes = top_n_mask(linear.weight.detach().abs(), pattern)
        else:
            raise ValueError(f'init: expected "magnitude" or group codes, got {init!r}; Wanda masks come from convert')
        logits = initial_logits(codes.to(device), pattern, gap, logits_dtype)
        if linear.weight.is_cuda and device.type == "cpu":
            try:
                # from which a GPU copies while it computes; torch rounds its bytes up to a power of two
                logits = logits.pin_memory()
            except RuntimeError as error:
                reason = str(error).partition("\n")[0]
                warnings.warn(f"logits_device: no page-locked memory, logits are waited for: {reason}", stacklevel=2)
        where = {"layer": layer, "group_offset": group_offset, "group_row_stride": group_row_stride}
        # a layer that stands for one stored transposed has a view of it
        weight = linear.weight.detach().contiguous()
        return cls(weight, linear.bias, logits, pattern, counter_state=counter_state, **where).train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        """y [..., out] of input [..., K]."""
        if self.shard is not None:
            return self.shard.forward(input)
        weight, bias = self.weight, self.bias
        backward = self.logits_backward if self.training else None
        if self.is_dense:
            return nn.functional.linear(input, weight, bias)
        if not self.training and in_onnx_export():
            return nn.functional.linear(input, _onnx_weight(weight, self.logits, self.pattern.n, self.pattern.m), bias)
        if getattr(backward, "moves_logits", False) and torch.compiler.is_compiling():
            return _outside_of_graphs(self, input)
        y, _ = linear_under(input, weight, bias, self._mask(self.training), logits_backward=backward)
        return self._warning(y) if backward is None else y

    def gathered_product(self, input: Tensor, weight: Tensor, is_current: Callable[[], bool]) -> Tensor:
        """``forward`` by a masked weight [out, K] that ranks have gathered, while ``is_current()`` that of now."""
        if weight.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "weight: expected a frozen one in a layer that fully_shard has cut, got one that requires a gradient; "
                "weights learn as wholes alone"
            )
        backward = self.logits_backward if self.training else None
        mask = MaskSource(None if backward is None else self.logits, "applied", self.pattern.n, self.pattern.m)
        y, _ = linear_under(input, weight, self.bias, mask, logits_backward=backward, is_current=is_current)
        return self._warning(y) if backward is None else y

    def _warning(self, y: Tensor) -> Tensor:
        """The output; in training its backward warns that the logits get no gradient from it."""
        if self.training and self.logits.requires_grad and y.requires_grad and not torch.compiler.is_compiling():
            y.register_hook(_warn_of_lost_slopes)
        return y

    def _mask(self, drawn: bool) -> MaskSource:
        """The source of the mask that is drawn at the current step, or else of the N largest logits."""
        weight, n, m = self.own_weight, self.pattern.n, self.pattern.m
        check_weight(weight, self.pattern)
        cached = self.cached_codes if drawn else None
        logits = matrix_of("logits", self.own_logits, self.pattern)
        if logits.shape != weight.shape:
            raise ValueError(f"logits: expected those of a weight {list(weight.shape)}, got {describe(logits)}")
        if drawn:
            return MaskSource(logits, "drawn", n, m, counter=self.counter(), codes=cached)
        return MaskSource(ops.top_n_mask(logits.detach().to(weight.device), n, m), "codes", n, m)

    def logits_on_device(self) -> Tensor:
        """The logits that this rank holds on the weight's device: themselves, or where they live elsewhere a copy."""
        return self.own_logits.to(self.weight.device)

    @property
    def own_weight(self) -> Tensor:
        """The weight, or what this rank holds of it; and likewise the logits."""
        return self.weight if self.shard is None else self.shard.weight

    @property
    def own_logits(self) -> Tensor:
        return self.logits if self.shard is None else self.shard.logits

    @property
    def place(self) -> Place:
        """Where ``own_logits`` lie in the whole layer."""
        return Place(self.group_offset, self.group_row_stride) if self.shard is None else self.shard.place

    def masked_weight(self, drawn: bool | None = None) -> Tensor:
        """The weight [out, K] under the drawn mask or that of the N largest logits; default: of the current mode."""
        mask = self._mask(self.training if drawn is None else drawn)
        weight = ops.masked_weight(self.own_weight.contiguous(), mask.of(mask.tensor.detach(), self.weight.device))
        return weight if self.shard is None else self.shard.distributed(weight)

    def top_n_weight(self) -> Tensor:
        """The weight [out, K] where its logit is among the N largest of its group, exact zeros elsewhere."""
        return self.masked_weight(drawn=False)

    @property
    def cached_codes(self) -> Tensor | None:
        """Group codes [out, K / M] of the cached draw; RuntimeError where it is no longer the current one."""
        return None if self.cached_mask is None else self.cached_mask.codes_of(self.own_logits, self.counter_state)

    def drawn_codes(self) -> Tensor:
        """Group codes [out, K / M] of the draw at the current step."""
        mask = self._mask(drawn=True)
        return ops.codes_under(mask.of(mask.tensor.detach(), self.weight.device))

    def log_prob(self) -> Tensor:
        """log p of the mask drawn at the current step, summed over the layer: 0-dim float32, differentiable."""
        codes = self.drawn_codes()
        # of a DTensor a part by which a gradient goes back, which ``own_logits`` is not
        logits = self.logits if self.shard is None else self.logits.to_local()
        away = self.logits.device != self.weight.device
        # else the graph would keep the copies of all layers on the device until backward
        with torch.autograd.graph.save_on_cpu() if away else nullcontext():
            own = mask_log_prob(logits.to(self.weight.device), codes, self.pattern).sum()
        return own if self.shard is None else self.shard.summed(own)

    @property
    def layer(self) -> int:
        """Id of the layer in the counter. Draws read its tensor ``layer_id``, which no compiled graph holds."""
        return self._layer

    @layer.setter
    def layer(self, layer: int) -> None:
        self._layer = layer
        self.layer_id.fill_(layer)

    @property
    def is_shard(self) -> bool:
        """True where the layer starts behind the first group, or its rows end before those of the whole layer."""
        return (self.group_offset, self.group_row_stride) != (0, self.in_features // self.pattern.m)

    def counter(self) -> Counter:
        """The counter of the current step and draw, on the device of the weight.

        Raises:
            ValueError: if seed and step are on meta, where they have no value, or the step is on the CPU and not in
                [0, 2**32).
        """
        state, device = self.counter_state, self.weight.device
        key = state.seed, state.step, self.layer_id, state.draw
        check_scalar("step", state.step, 0, MAX_STEPS)
        if any(part.device != device for part in key):
            # the layers of a model may have been spread over devices since they were made
            if any(part.is_meta for part in key):
                raise ValueError("counter_state: expected seed and step in memory, got some on meta: load a state_dict")
            key = [part.to(device) for part in key]
        return Counter(*key, *self.place)

    def _apply(self, fn, recurse: bool = True) -> MaskedLinear:
        super()._apply(fn, recurse)
        # ``to_empty`` has made it anew, without its value
        self.layer_id.fill_(self._layer)
        return self

    def get_extra_state(self) -> Tensor:
        """int64 [8]: layer id, N, M, seed and step, group offset and row stride of a shard, ``weight_changed``."""
        state = self.counter_state
        if state.seed.is_meta:
            return torch.empty(8, dtype=torch.int64, device="meta")
        counter, place = (int(state.seed), int(state.step)), (self.group_offset, self.group_row_stride)
        of_layer = self.layer, self.pattern.n, self.pattern.m
        return torch.tensor([*of_layer, *counter, *place, self.weight_changed], dtype=torch.int64)

    def set_extra_state(self, state: Tensor) -> None:
        layer, _, _, seed, step, _, _, weight_changed = state.tolist()
        # a state_dict that is assigned brings weights alone out of meta
        if self.layer_id.is_meta:
            self.layer_id = torch.empty_like(self.layer_id, device=self.weight.device)
        if self.counter_state.seed.is_meta:
            self.counter_state.to_empty(device=self.weight.device)
        self.layer, self.weight_changed = layer, bool(weight_changed)
        self.counter_state.seed.fill_(seed)
        self.counter_state.step.fill_(step)
        self.counter_state.draw.fill_(0)

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        saved = state_dict.get(f"{prefix}_extra_state")
        if saved is not None:
            *_, errors = args
            own = [self.group_offset, self.group_row_stride]
            _, n, m, _, step, *place, _ = saved.tolist() if saved.shape == (8,) else [0] * 8
            for fits, expected, got in (
                (saved.shape == (8,), "extra state of shape [8]", f"{list(saved.shape)}, as another version saves it"),
                (0 <= step < MAX_STEPS, f"a step in [0, {MAX_STEPS})", step),
                ((n, m) == (self.pattern.n, self.pattern.m), f"logits of pattern {self.pattern}", f"{n}:{m}"),
                (place == own, f"group_offset and group_row_stride {own}", f"those of another shard, {place}"),
            ):
                if not fits:
                    errors.append(f"state_dict: expected {expected}, got {got} in {prefix!r}")
                    return
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        shard = f", group_offset={self.group_offset}, group_row_stride={self.group_row_stride}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"pattern={self.pattern}, layer={self.layer}{shard if self.is_shard else ''}"
        )


def _onnx_weight(weight: Tensor, logits: Tensor, n: int, m: int) -> Tensor:
    """The weight [out, K] under the N largest logits [out, K] of every group, in operations that ONNX has."""
    # ties go to the lower index in ONNX's TopK
    largest = logits.unflatten(-1, (-1, m)).topk(n, dim=-1).indices
    kept = largest.unsqueeze(-2) == torch.arange(m, device=weight.device).unsqueeze(-1)
    return torch.where(kept.any(-1).flatten(-2), weight, 0.0)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """All modules in eval mode; each one's own mode is restored afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def masked_layers(model: nn.Module) -> dict[str, MaskedLinear]:
    """The MaskedLinear modules of a model by name, those that FSDP2 has cut with a ``shard``; ValueError if none."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, MaskedLinear)}
    if not layers:
        raise ValueError("model: expected a model with MaskedLinear layers, got none; call convert first")
    attach(layers, model)
    return layers


@contextmanager
def dense(model: nn.Module) -> Iterator[None]:
    """All masked layers multiply with their whole weights, in train and in eval mode: the model is its own teacher.

    There is no second copy of a weight, and no memory is needed beyond activations. Other modules keep their modes. The
    backward of a forward whose activations are computed anew has to come within it as well.

    Args:
        model: with MaskedLinear layers.

    Raises:
        ValueError: if the model has no MaskedLinear, fully_shard has cut layers, or kept weights have changed: what it
            was converted from is no longer there.
    """
    layers = masked_layers(model)
    check_not_sharded(layers, "ranks are sent kept values alone; take a dense model of its own")
    changed = [name for name, layer in layers.items() if layer.weight_changed]
    if changed:
        raise ValueError(
            f"model: expected the weights that it was converted with, got kept ones that were refitted or trained in "
            f"{changed}: what the dense model gives has to be computed before"
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
    """The distinct counter_states of a model: one, or one a device where layers are spread over several."""
    return list({id(layer.counter_state): layer.counter_state for layer in masked_layers(model).values()}.values())


def advance(model: nn.Module) -> None:
    """Step += 1 on the device: every layer draws a new mask from here on.

    All forwards between two calls see the same masks. A backward through the weights of a forward comes
    before the next call, since it draws the mask again.

    Raises:
        ValueError: if the model has no MaskedLinear; or if the step is on the CPU and the next one is not below 2**32:
            it then stays. On a device that is not checked, and the masks of the last step are drawn again from there.
    """
    states = counter_states(model)
    for counter_state in states:
        check_scalar("step", counter_state.step, 0, MAX_STEPS - 1)
    for counter_state in states:
        counter_state.step.add_(1)


def log_prob(model: nn.Module) -> Tensor:
    """log-probability of the masks of the current step, summed over all layers: 0-dim float32, differentiable.

    Raises:
        ValueError: if the model has no MaskedLinear.
    """
    terms = [layer.log_prob() for layer in masked_layers(model).values()]
    return torch.stack([term.to(terms[0].device) for term in terms]).sum()
