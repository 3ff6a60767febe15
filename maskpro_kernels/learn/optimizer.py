"""Straight-through learning as a torch optimizer, for training loops that call backward themselves."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from numbers import Real

import torch
from torch import Tensor, nn

from ..functional.checks import check_in_memory, on_device
from ..functional.linear import check_tokens, straight_through_gradient
from ..functional.masks import top_n_mask
from ..modules import MaskedLinear, advance, masked_layers
from ..ops.counter import MaskSource
from ..shards import is_distributed
from .backward import check_slope_settings, descent, rates_of, running_mean_squares, values_of
from .estimator import check_float
from .offload import OffloadedLogits


class MaskOptimizer(torch.optim.Optimizer):
    """Optimizer that moves logits as ``StraightThrough`` does, by slopes that backward adds to their ``grad``.

    A step moves each logit by -lr * slope / rms(slope), at most by ``max_update``. Here rms is the running root mean
    square over the layer. Then all layers draw new masks, see ``advance``. Slopes are gradients like any other: several
    backward passes add up, DistributedDataParallel averages them, and a gradient scaler unscales them. They take as
    much memory as the logits.

    ``state_dict`` contains for each layer the running mean square of the slopes and the mask of the first step.

    Args:
        model: with MaskedLinear layers. It sets their ``logits_backward``, until ``detach``, and changes nothing else.
        lr: the distance that a logit moves if its slope is the root mean square. Schedulers of torch change it.
        curvature, max_update, decay: as for ``StraightThrough``.
        loss_scale: factor of a batch's mean loss before backward: 1/k if k batches make a step. With a gradient scaler
            a function that returns it, such as ``lambda: scaler.get_scale() / k``. The first derivative of the loss
            grows by this factor, the second by its square, and the slope uses both.
        tokens: number of tokens in a batch's mean loss, as for ``straight_through_gradient``: a number, a tensor that
            you fill in place before each forward, or a function that returns either. backward calls the function for
            each layer, and ``torch.compile`` leaves the layers out of graphs then.

    Raises:
        TypeError, ValueError: an argument is not as above, or logits are not plain tensors in memory.
    """

    def __init__(self, model: nn.Module, lr: float = 0.3, *, curvature: float = 1.0,
                 max_update: float = 2.0, decay: float = 0.9,
                 loss_scale: float | Callable[[], float] = 1.0,
                 tokens: float | Tensor | Callable[[], float | Tensor] | None = None):  # fmt: skip
        check_float("lr", lr, 0.0)
        check_slope_settings(curvature, max_update, decay)
        if not callable(loss_scale):
            check_float("loss_scale", loss_scale, 0.0, strict=True)
        if tokens is not None and not callable(tokens):
            check_tokens(tokens)
        self.layers = masked_layers(model)
        for name, layer in self.layers.items():
            check_in_memory("model", layer, name)
            if is_distributed(layer.logits):
                raise ValueError(f"model: expected plain tensors as logits, got a DTensor in {name}")
        self._model = model
        logits = [layer.logits.requires_grad_() for layer in self.layers.values()]
        super().__init__(logits, {"lr": float(lr), "max_update": float(max_update), "decay": float(decay)})
        if isinstance(tokens, Real):
            tokens = on_device(tokens, torch.float32, next(iter(self.layers.values())).weight.device)
        self.slopes = ScaledSlopes(float(curvature), loss_scale, tokens)
        for layer in self.layers.values():
            layer.logits_backward = self.slopes

    def detach(self) -> None:
        """Stop computing straight-through gradients of the logits."""
        for layer in self.layers.values():
            if layer.logits_backward is self.slopes:
                layer.logits_backward = None

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Move the logits that have a gradient, and advance to new masks.

        Args:
            closure: computes the loss and calls its backward, as for any optimizer.

        Warns:
            UserWarning: names layers whose slopes are not finite; their logits stay unchanged.

        Raises:
            ValueError: if no logits have a gradient. Nothing changes then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.move(self.param_groups[0]["lr"])
        return loss

    @torch.no_grad()
    def move(self, lr: float) -> None:
        """Take a step at a learning rate."""
        reached = {name: layer for name, layer in self.layers.items() if layer.logits.grad is not None}
        if not reached:
            raise ValueError(
                "model: expected logits with a gradient, got none; call backward of a loss under drawn masks before, "
                "with the model in training mode; checkpointed activations need use_reentrant=False"
            )
        group = self.param_groups[0]
        latest = {}
        with OffloadedLogits(list(reached.values())) as offloaded:
            for name, layer in reached.items():
                state = self._state_of(layer)
                if not state:
                    state.update(first_mask=_codes(layer), mean_square=0.0)
                device = layer.weight.device
                slopes = layer.logits.grad.to(device, torch.float32).contiguous()
                with offloaded.moving(layer) as logits:
                    descend = descent(layer, logits, slopes, group["max_update"])
                    square = torch.full((), state["mean_square"], dtype=torch.float64, device=device)
                    if not state["mean_square"]:
                        # at a rate of 0 nothing moves
                        square = descend(torch.zeros((), dtype=torch.float32, device=device)).double()
                    latest[name] = descend(rates_of(float(lr), square))
        squares = values_of(latest)
        states = [self._state_of(self.layers[name]) for name in squares]
        before = torch.tensor([state["mean_square"] for state in states], dtype=torch.float64)
        after = running_mean_squares(before, torch.tensor([*squares.values()], dtype=torch.float64), group["decay"])
        for state, square in zip(states, after.tolist(), strict=True):
            state["mean_square"] = square
        advance(self._model)
        bad = [name for name, square in squares.items() if not math.isfinite(square)]
        if bad:
            warnings.warn(f"slopes are not finite in {', '.join(bad)}: their logits stay unchanged", stacklevel=3)

    def _state_of(self, layer: MaskedLinear) -> dict:
        # not by parameter: an optimizer that wraps this one would take it for its own state and cast it
        return self.state.setdefault("masks", {}).setdefault(layer.layer, {})

    @torch.no_grad()
    def moved(self) -> float:
        """Share of the groups whose N largest logits differ from those of the first step."""
        moved = total = 0
        for layer in self.layers.values():
            codes = _codes(layer)
            total += codes.numel()
            first = self._state_of(layer).get("first_mask")
            if first is not None:
                moved += int((codes != first.to(codes.device)).sum())
        return moved / total

    @torch.no_grad()
    def flip_rate(self) -> float:
        """Share of the groups whose draw at the current step differs from the top-N mask."""
        flips = total = 0
        for layer in self.layers.values():
            codes = _codes(layer)
            flips += int((codes != layer.drawn_codes()).sum())
            total += codes.numel()
        return flips / total


class ScaledSlopes:
    """``logits_backward`` of the layers: ``straight_through_gradient`` of a scaled loss."""

    def __init__(self, curvature: float, loss_scale: float | Callable, tokens: Tensor | Callable | None):
        # as text: torch.compile(dynamic=True) takes a float for an input of its graph, and fails where layers share it
        self.curvature = repr(curvature)
        self.set_scale(loss_scale)
        self.tokens = tokens
        # a graph would keep what the function returned when it was made, but reads a tensor in each step
        self.moves_logits = callable(tokens)

    def set_scale(self, loss_scale: float | Callable[[], float]) -> None:
        self.loss_scale = loss_scale if callable(loss_scale) else repr(loss_scale)

    def __call__(self, grad: Tensor, x: Tensor, weight: Tensor, mask: MaskSource) -> Tensor:
        scale = self.loss_scale() if callable(self.loss_scale) else float(self.loss_scale)
        tokens = self.tokens() if callable(self.tokens) else self.tokens
        return straight_through_gradient(grad, x, weight, mask, float(self.curvature) / scale, tokens)


def _codes(layer: MaskedLinear) -> Tensor:
    return top_n_mask(layer.logits_on_device().detach(), layer.pattern)
