"""Base of learners with a relaxed mask: their tensors, weights for forwards, AdamW, and the final mask.

A forward uses a weight that is a differentiable function of the learned tensors, computed for each layer's product
and again in backward, so that no relaxed mask stays in memory. Before the first step and after each one the layers'
logits are set to the most likely mask, for evaluation, ``finalize`` and snapshots.
"""

from __future__ import annotations

import hashlib
import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from maskpro_kernels.learn.estimator import Estimator, Step, StepResult, check_float, check_whole
from maskpro_kernels.modules import MaskedLinear, initial_logits

# Of a kept logit over a dropped one, where the mask is written down: no draw crosses it
WRITTEN_GAP = 30.0


class RelaxedMask(Estimator):
    """Learns a tensor a layer by the gradient of the loss under relaxed masks.

    Args:
        steps: how many there will be, and no more; schedules end there.
        lr: learning rate of AdamW at its highest.

    Attributes:
        learned: by layer, float32, what AdamW moves.
        betas, eps, weight_decay: of AdamW.
        clip: most that the norm of the gradient of all layers may be; None: any.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """

    name = "relaxed"
    needs_gradients = True
    # Defaults of the settings beside the steps
    options: ClassVar[dict[str, float]] = {}
    betas = (0.9, 0.999)
    eps = 1e-8
    weight_decay = 0.0
    clip: float | None = None

    def __init__(self, steps: int, lr: float):
        check_whole("steps", steps, 1)
        check_float("lr", lr, 0.0, strict=True)
        self.steps = steps
        self.lr = float(lr)
        self.learned: dict[str, Tensor] = {}

    @abstractmethod
    def start(self, layer: MaskedLinear) -> Tensor:
        """Learned tensor of a layer, float32, at its start from the top-N mask of the logits."""

    @abstractmethod
    def weight(self, layer: MaskedLinear, learned: Tensor, step: int, noise: torch.Generator) -> Tensor:
        """The weight [out, K] that a forward sees, float32, a differentiable function of ``learned``."""

    @abstractmethod
    def codes(self, layer: MaskedLinear, learned: Tensor) -> Tensor:
        """Group codes [out, K / M] of the mask that has been learned."""

    def penalty(self, layer: MaskedLinear, learned: Tensor, weight: Tensor, step: int) -> Tensor | None:
        """Penalty added to the loss of the text, 0-dim; None: no penalty."""

    def descend(self, name: str, layer: MaskedLinear, grad: Tensor, step: int) -> None:
        """Move the learned tensor of a layer by its gradient, and its moments."""
        moments = self._means[name], self._squares[name]
        lr = self.lr_at(step)
        adamw_(self.learned[name], grad, *moments, step + 1, lr, self.betas, self.eps, self.weight_decay)

    def after_update(self, layer: MaskedLinear, learned: Tensor) -> None:  # noqa: B027
        """Change after the step of AdamW, in place."""

    def lr_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        return self.lr

    def progress(self, step: int) -> float:
        """Position of a step between the first, 0, and the last, 1."""
        return step / max(self.steps - 1, 1)

    def settings(self) -> dict:
        return {"steps": self.steps} | {name: getattr(self, name) for name in self.options}

    def begin(self, layers: Mapping[str, MaskedLinear]) -> None:
        with torch.no_grad():
            self.learned = {name: self.start(layer).requires_grad_() for name, layer in layers.items()}
            self._means = {name: torch.zeros_like(value) for name, value in self.learned.items()}
            self._squares = {name: torch.zeros_like(value) for name, value in self.learned.items()}
            self._write_down(layers, self.learned)

    def tensors(self) -> dict[str, Tensor]:
        kinds = {"learned": self.learned, "mean": self._means, "square": self._squares}
        return {f"{name}/{kind}": tensors[name].detach() for kind, tensors in kinds.items() for name in tensors}

    def step(self, step: Step) -> StepResult:
        """One step of AdamW, then the likeliest masks into the logits.

        A loss that is not finite moves nothing; a gradient that is not leaves its layer unchanged.
        """
        try:
            with step.drawing(), self._relaxed(step) as penalties:
                for _, position in step.own:
                    penalties.clear()
                    loss = step.forward(position)
                    total = torch.stack(
                        [term.float().reshape(()).to(loss.device) for term in (loss, *penalties.values())]
                    )
                    # embeddings and norms learn nothing, and theirs would cost as much as any layer's
                    inputs = list(self.learned.values())
                    torch.autograd.backward(total.sum() * float(step.weights[position]), inputs=inputs)
            (value,), _ = step.exchange()
            if not math.isfinite(value):
                return StepResult(value)
            for learned in self.learned.values():
                # a layer that no loss has reached has none
                learned.grad = torch.zeros_like(learned) if learned.grad is None else learned.grad
                step.ranks.all_reduce(learned.grad)
            norms = torch.stack([learned.grad.norm().cpu() for learned in self.learned.values()]).tolist()
            step.begin_update()
            return StepResult(value, bad_layers=self._update(step, dict(zip(self.learned, norms, strict=True))))
        finally:
            for learned in self.learned.values():
                learned.grad = None

    @torch.no_grad()
    def _update(self, step: Step, norms: Mapping[str, float]) -> tuple[str, ...]:
        """Move the learned tensors and store the masks; return names of layers with a gradient that is not finite."""
        good = {name: norm for name, norm in norms.items() if math.isfinite(norm)}
        norm = math.hypot(*good.values())
        scale = 1.0 if self.clip is None or norm <= self.clip else self.clip / norm
        for name in good:
            layer = step.layers[name]
            learned = self.learned[name]
            self.descend(name, layer, learned.grad.mul_(scale), step.index)
            self.after_update(layer, learned)
        self._write_down(step.layers, good)
        return tuple(name for name in norms if name not in good)

    def _write_down(self, layers: Mapping[str, MaskedLinear], names: Iterable[str]) -> None:
        for name in names:
            layer = layers[name]
            codes = self.codes(layer, self.learned[name])
            layer.logits.detach().copy_(initial_logits(codes, layer.pattern, WRITTEN_GAP))

    @contextmanager
    def _relaxed(self, step: Step) -> Iterator[dict[str, Tensor]]:
        """Let layers multiply by their relaxed weights; yields the penalties of the last forward."""
        penalties: dict[str, Tensor] = {}

        def forward(name: str, layer: MaskedLinear) -> Callable[[Tensor], Tensor]:
            learned = self.learned[name]

            def product(x: Tensor) -> tuple[Tensor, Tensor | None]:
                weight = self.weight(layer, learned, step.index, generator(layer, step.seed, step.index))
                y = F.linear(x, weight.to(layer.weight.dtype), layer.bias)
                return y, self.penalty(layer, learned, weight, step.index)

            def multiply(input: Tensor) -> Tensor:
                # instead of a forward to which a hook might have brought its input
                input = input.to(layer.weight.device)
                y, penalty = checkpoint(product, input, use_reentrant=False, preserve_rng_state=False)
                if penalty is not None:
                    penalties[name] = penalty
                return y

            return multiply

        forwards = {layer: layer.__dict__.get("forward") for layer in step.layers.values()}
        try:
            for name, layer in step.layers.items():
                layer.forward = forward(name, layer)
            yield penalties
        finally:
            for layer, original in forwards.items():
                del layer.forward
                if original is not None:
                    layer.forward = original


def generator(layer: MaskedLinear, seed: int, step: int) -> torch.Generator:
    """The noise of a layer at a step, -1 before the first: the same in a forward and where backward runs it again."""
    digest = hashlib.blake2b(f"{seed} {step} {layer.layer} {layer.group_offset}".encode(), digest_size=8).digest()
    return torch.Generator(layer.weight.device).manual_seed(int.from_bytes(digest, "little") >> 1)


def gumbel(shape: tuple[int, ...], noise: torch.Generator) -> Tensor:
    """Standard Gumbel noise, float32: -ln(-ln(u)) of uniform u."""
    # a CPU draws uniform numbers many at a time, and exponential ones one by one
    uniform = torch.rand(shape, device=noise.device, generator=noise)
    return uniform.clamp_min_(torch.finfo(torch.float32).tiny).log_().neg_().log_().neg_()


def adamw_(
    value: Tensor,
    grad: Tensor,
    mean: Tensor,
    square: Tensor,
    count: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """Step number ``count``, from 1, of AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101), in place."""
    first, second = betas
    value.mul_(1.0 - lr * weight_decay)
    mean.lerp_(grad, 1.0 - first)
    square.mul_(second).addcmul_(grad, grad, value=1.0 - second)
    root = square.sqrt().div_(math.sqrt(1.0 - second**count)).add_(eps)
    value.addcdiv_(mean, root, value=-lr / (1.0 - first**count))
