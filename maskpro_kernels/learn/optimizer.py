"""Straight-through learning as an optimizer of torch, for training loops that call backward themselves."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..fsdp import check_in_memory, is_distributed
from ..functional.linear import straight_through_gradient
from ..functional.masks import top_n_mask
from ..modules import MaskedLinear, advance, masked_layers
from ..ops.counter import MaskSource
from .backward import check_slope_settings, descend_by_rms, descent, running_mean_square, values_of
from .estimator import check_float
from .offload import OffloadedLogits


class MaskOptimizer(torch.optim.Optimizer):
    """Moves the logits of a converted model as ``StraightThrough`` does, by slopes that backward leaves in their grad.

    A step moves each logit by -lr * slope / rms(slope), by at most ``max_update``, where rms is the running root mean
    square over the layer; then all layers draw anew, see ``advance``. Slopes are gradients like any other before that:
    they are summed over several backward passes, averaged by DistributedDataParallel, unscaled by a gradient scaler.
    They take as much memory as the logits.

    ``state_dict`` holds what is needed to go on: of each layer the running mean square of the slopes, and the mask of
    the first step.

    Args:
        model: with MaskedLinear layers. Their ``logits_backward`` is set, until ``detach``; all else stays as it is.
        lr: how far a logit moves whose slope is the root mean square. Schedulers of torch change it.
        curvature, max_update, decay: as for ``StraightThrough``.
        loss_scale: what the mean loss of a batch is multiplied by before its backward: 1/k where k batches make a step.
            With a gradient scaler a function that gives it, such as ``lambda: scaler.get_scale() / k``. The first
            derivative of the loss grows by it, the second by its square, and the slope has both.

    Raises:
        TypeError, ValueError: an argument is not as above, or logits are no plain tensors in memory.
    """

    def __init__(self, model: nn.Module, lr: float = 0.3, *, curvature: float = 1.0,
                 max_update: float = 2.0, decay: float = 0.9,
                 loss_scale: float | Callable[[], float] = 1.0):  # fmt: skip
        check_float("lr", lr, 0.0)
        check_slope_settings(curvature, max_update, decay)
        if not callable(loss_scale):
            check_float("loss_scale", loss_scale, 0.0, strict=True)
        self.layers = masked_layers(model)
        for name, layer in self.layers.items():
            check_in_memory("model", layer, name)
            if is_distributed(layer.logits):
                raise ValueError(f"model: expected plain tensors as logits, got a DTensor in {name}")
        self._model = model
        logits = [layer.logits.requires_grad_() for layer in self.layers.values()]
        super().__init__(logits, {"lr": float(lr), "max_update": float(max_update), "decay": float(decay)})
        self.slopes = ScaledSlopes(float(curvature), loss_scale)
        for layer in self.layers.values():
            layer.logits_backward = self.slopes

    def detach(self) -> None:
        """Let the logits be: no gradient passes straight through a draw to them any more."""
        for layer in self.layers.values():
            if layer.logits_backward is self.slopes:
                layer.logits_backward = None

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Move the logits that have a gradient, and draw new masks from here on.

        Args:
            closure: computes the loss and calls its backward, as for any optimizer.

        Warns:
            UserWarning: of layers whose slopes are not finite: logits of these stay as they are.

        Raises:
            ValueError: if no logits have a gradient. Nothing has changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.move(self.param_groups[0]["lr"])
        return loss

    @torch.no_grad()
    def move(self, lr: float) -> None:
        """``step`` at a learning rate."""
        reached = {name: layer for name, layer in self.layers.items() if layer.logits.grad is not None}
        if not reached:
            raise ValueError(
                "model: expected logits with a gradient, got none; a step comes behind the backward of a loss under "
                "drawn masks, with the model in training mode, and checkpointed activations need use_reentrant=False"
            )
        group = self.param_groups[0]
        latest = {}
        with OffloadedLogits(list(reached.values())) as offloaded:
            for name, layer in reached.items():
                state = self._state_of(layer)
                if not state:
                    state.update(first_mask=_codes(layer), mean_square=None)
                slopes = layer.logits.grad.to(layer.weight.device, torch.float32).contiguous()
                with offloaded.moving(layer) as logits:
                    descend = descent(layer, logits, slopes, group["max_update"])
                    latest[name] = descend_by_rms(descend, float(lr), state["mean_square"], layer.weight.device)
        squares = values_of(latest)
        for name, square in squares.items():
            state = self._state_of(self.layers[name])
            state["mean_square"] = running_mean_square(state["mean_square"], square, group["decay"])
        advance(self._model)
        bad = [name for name, square in squares.items() if not math.isfinite(square)]
        if bad:
            warnings.warn(f"slopes are not finite in {', '.join(bad)}: logits of these stay as they are", stacklevel=3)

    def _state_of(self, layer: MaskedLinear) -> dict:
        # not by parameter, where another optimizer that holds this one's state would look for its own, and cast it
        return self.state.setdefault("masks", {}).setdefault(layer.layer, {})

    @torch.no_grad()
    def moved(self) -> float:
        """Share of the groups whose N largest logits are no longer those of the first step."""
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
        """Share of the groups whose draw at the current step leaves the N largest logits."""
        flips = total = 0
        for layer in self.layers.values():
            codes = _codes(layer)
            flips += int((codes != layer.drawn_codes()).sum())
            total += codes.numel()
        return flips / total


class ScaledSlopes:
    """The ``logits_backward`` of the layers: ``straight_through_gradient`` of a loss that was scaled."""

    def __init__(self, curvature: float, loss_scale: float | Callable[[], float]):
        self.curvature, self.loss_scale = curvature, loss_scale

    def __call__(self, grad: Tensor, x: Tensor, weight: Tensor, mask: MaskSource) -> Tensor:
        scale = self.loss_scale() if callable(self.loss_scale) else self.loss_scale
        return straight_through_gradient(grad, x, weight, mask, self.curvature / scale)


def _codes(layer: MaskedLinear) -> Tensor:
    return top_n_mask(layer.logits_on_device().detach(), layer.pattern)
