"""Backward passes of a straight-through step, which move the logits of each layer and the weights that learn.

A layer that is used once moves within its own backward, by one kernel that writes no slope to memory. So uses are
counted in the forward. With ``register_post_accumulate_grad_hook`` on the logits, autograd would count them, but the
slope is then a gradient in memory: on one core of a CPU, for a LLaMA of 8 layers with hidden size 576, a step with
1,024 tokens took 5% longer in float32 and 9% in bfloat16, and one with 128 tokens 33%, with the same bits. Logits of 16
bits would get other bits, since autograd rounds gradients to their dtype. Slopes would also have no place to wait for
those of other ranks, and no shape in layers that are cut into rows.
"""

from __future__ import annotations

import collections
import hashlib
import math
import threading
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from .. import ops
from ..functional.checks import FLOAT32_MAX
from ..functional.masks import top_n_mask
from ..modules import MaskedLinear
from ..ops.counter import CachedMask, KeptCodes, MaskSource
from ..ops.dispatch import uses_triton, without_autocast
from ..ranks import Ranks
from .estimator import Estimator, check_float
from .offload import OffloadedLogits
from .weight_learner import WeightLearner


class BackwardPass:
    """The forward and backward passes of a step, in turn; after the last backward all logits, or weights, have moved.

    With several ranks the slopes of a layer are summed before it moves. If each rank makes one pass, with the same
    layers in the same order, they are summed inside backward, in this order, and a slope that is early waits. All other
    slopes wait until backward has ended. So ranks never add the slopes of different layers, even if their backwards
    differ.
    """

    # true: slopes are summed in every pass
    every_pass = False

    def __init__(self, updaters: Mapping[str, LayerUpdater], ranks: Ranks, batches: int):
        self.updaters = updaters
        self.ranks = ranks
        self.batches = batches
        self.remaining_passes = batches
        self.hooks: list = []
        # true while every finished layer was used at most once, on each rank
        self.used_once = True
        self.queue: collections.deque[LayerUpdater] = collections.deque()
        # backward begins at the last layers
        moving = [updater.layer for updater in reversed(updaters.values()) if updater.reads_logits]
        self.offloaded = OffloadedLogits(moving)
        # autograd has a thread for each device
        self.lock = threading.Lock()

    def watch(self) -> None:
        """Count uses of each layer by a forward."""
        for updater in self.updaters.values():
            updater.uses = 0
            self.hooks.append(updater.layer.register_forward_hook(updater.count))

    def unwatch(self) -> None:
        for hook in self.hooks:
            hook.remove()
        self.hooks.clear()

    def order(self, loss: Tensor) -> float:
        """Return a digest of the order of layers in a backward of ``loss``, as a number."""
        reached = _reached(loss, self.updaters) if self.sums_within() else []
        times = collections.Counter(reached)
        names = [name for name in reached if times[name] == 1 and self.updaters[name].uses <= 1]
        self.queue = collections.deque(self.updaters[name] for name in names)
        # 48 bits: exact in float64
        return float(int.from_bytes(hashlib.blake2b(repr(names).encode(), digest_size=6).digest(), "big"))

    def sums_within(self) -> bool:
        """Return whether slopes may be summed inside backward."""
        return self.every_pass or self.ranks.world_size > 1 and self.batches == 1

    def has_equal_order(self, loss: Tensor) -> bool:
        """Return whether the order of layers is the same on all ranks, in a pass before the last."""
        if not self.every_pass:
            return True
        order = self.order(loss)
        return all(rank_order == order for (rank_order,) in self.ranks.all_gather_numbers([order]))

    def backward(self, loss: Tensor, weight=1.0, equal_order=True, tokens: Tensor | None = None) -> None:
        """Backpropagate the loss of the last forward to the logits; its slopes have the factor ``weight``.

        ``equal_order`` is true if ``order`` is equal on all ranks, and ``tokens`` is T of the loss, see
        ``ops.curvature_factors``. If a slope is not finite, the logits of such weights and the running mean square do
        not change, see ``bad_layers``. On one rank nothing is read from the device, and if ``tokens`` and logits are
        there already, a CUDA graph can hold a pass and its forward; it reads the learning rate of the logits
        from ``RunningSquares.lr``, and repeats that of the weights.
        """
        # forwards that compute activations again do not count
        self.unwatch()
        self.remaining_passes -= 1
        self.used_once = True
        if not equal_order:
            self.queue.clear()
        if not self.remaining_passes:
            for squares in {updater.squares for updater in self.updaters.values()}:
                squares.set_rates()
        tokens_on: dict[torch.device, Tensor | None] = {}
        for updater in self.updaters.values():
            device = updater.layer.weight.device
            if device not in tokens_on:
                # once a pass, not in each layer
                tokens_on[device] = None if tokens is None else tokens.to(device, non_blocking=device.type != "cpu")
            updater.weight = weight
            updater.tokens = tokens_on[device]
            updater.at_once = self.ranks.world_size == 1 and self.batches == 1 and updater.uses <= 1
        torch.autograd.backward(loss, inputs=[updater.layer.logits for updater in self.updaters.values()])
        self._end_pass()
        if self.remaining_passes:
            self.watch()
            return
        if all(updater.latest is None for updater in self.updaters.values()):
            raise ValueError(
                "loss_fn: expected a loss with a gradient in a masked layer, got none; checkpointed activations need "
                "use_reentrant=False"
            )
        for squares in {updater.squares for updater in self.updaters.values()}:
            squares.update()
        with_gradient = [name for name, updater in self.updaters.items() if updater.layer.logits.grad is not None]
        if with_gradient:
            raise ValueError(f"loss_fn: expected a loss that depends on logits only by masks, not so {with_gradient}")

    def bad_layers(self) -> list[str]:
        """Read the names of layers with a slope that is not finite, after the last pass, from their devices."""
        latest = {name: updater.latest for name, updater in self.updaters.items() if updater.latest is not None}
        values = values_of(latest)
        for name, square in values.items():
            self.updaters[name].note(square)
        return [name for name, square in values.items() if not math.isfinite(square)]

    def move_next(self) -> None:
        """Move the next layers in the order, as far as their slopes are there."""
        with self.lock:
            while self.queue and self.queue[0].slopes is not None:
                self.queue.popleft().finish()

    def _end_pass(self) -> None:
        """Finish the remaining layers that have slopes on any rank."""
        if self.remaining_passes and not self.every_pass:
            return
        while self.queue:
            # other ranks may wait for it, even if it has no slopes on this one
            self.queue.popleft().finish()
        self.used_once = False
        has_slopes = self.ranks.all_gather_numbers([updater.slopes is not None for updater in self.updaters.values()])
        by_layer = list(zip(self.updaters.values(), *has_slopes, strict=True))
        # the last ones first, in the order in which backward and copies of logits go
        for updater, *on_ranks in reversed(by_layer):
            if any(on_ranks):
                updater.finish()


def _reached(loss: Tensor, updaters: Mapping[str, LayerUpdater]) -> list[str]:
    """Names of the layers in the order of backward, one for each use; none inside a reentrant checkpoint."""
    names = {id(updater.layer.logits): name for name, updater in updaters.items()}
    nodes = [loss.grad_fn]
    seen = {None}
    reached = []
    while nodes:
        node = nodes.pop()
        if node in seen:
            continue
        seen.add(node)
        for function, _ in node.next_functions:
            name = names.get(id(getattr(function, "variable", None)))
            if name is None:
                nodes.append(function)
            else:
                # autograd begins with the last operation of the forward
                reached.append((node._sequence_nr(), name))
    return [name for _, name in sorted(reached, reverse=True)]


class LayerUpdater:
    """Moves the logits of one layer, inside backward or after it, see ``BackwardPass``, with an estimator's settings.

    Attributes:
        squares, index: running mean square of the slopes, and the rate by it, of this layer among others.
        latest: mean square of this step's slopes, or with a fixed mask the norm of its gradient, on the device; None
            if there are none yet.
        uses: uses of the layer by the forward of a pass.
        fisher: squares of the layer, see ``FisherSquares``; None if the gradient itself gives the curvature.
        slopes, weight_grad: float32 sums of the step, or with ``at_once`` the gradient in its own dtype; None after the
            logits have moved.
        weight, tokens: factor of a pass's slopes, and T of its loss.
        at_once: whether one kernel computes the slopes and moves the logits.
    """

    # keeps the layer outside of compiled graphs
    moves_logits = True
    reads_logits = True

    def __init__(self, layer: MaskedLinear, estimator: Estimator, learner: WeightLearner | None):
        self.layer = layer
        self.estimator = estimator
        self.learner = learner
        self.squares: RunningSquares | None = None
        self.index = 0

    def begin(self, weight_lr: float, backward_pass: BackwardPass, fisher: Tensor | None) -> None:
        self.weight_lr = weight_lr
        self.backward_pass = backward_pass
        self.fisher = fisher
        self.uses = 0
        self.latest: Tensor | None = None
        self.slopes: Tensor | None = None
        self.weight_grad: Tensor | None = None

    def count(self, layer: MaskedLinear, *_) -> None:
        # a dense forward has no gradient in the logits
        if not layer.is_dense:
            self.uses += 1

    def __call__(self, grad: Tensor, x: Tensor, weight: Tensor, mask: MaskSource) -> None:
        self._check_not_moved()
        weight_grad = None
        if self.weights_learn:
            # without kernels the product is rounded to this dtype anyway; sums are float32
            rounded = self.at_once and not uses_triton(grad.device.type)
            weight_grad = torch.empty_like(weight, dtype=grad.dtype if rounded else torch.float32)
        curvature = self.estimator.curvature
        max_update = self.estimator.max_update
        tokens = self.tokens
        fisher = self.fisher
        if self.at_once:
            self.weight_grad = weight_grad
            # the parameter itself: autograd may have a copy
            with self.backward_pass.offloaded.moving(self.layer) as logits:
                mask_of_logits = mask._replace(tensor=logits)

                def descend(rate: Tensor) -> Tensor:
                    return ops.straight_through_update_(
                        grad, x, weight, curvature, rate, max_update, mask_of_logits, weight_grad, tokens, fisher
                    )

                self._descend(logits, mask.codes, descend)
            return
        slope = ops.straight_through_grad(grad, x, weight, curvature, mask, weight_grad, tokens, fisher)
        # scale the slope, not the loss, whose factor would be squared in the curvature
        self.slopes = self._added(self.slopes, slope)
        self.weight_grad = self._added(self.weight_grad, weight_grad)
        self.backward_pass.move_next()

    def _check_not_moved(self) -> None:
        if self.latest is not None:
            raise ValueError(
                "loss_fn: expected a backward with one gradient for each use of a layer in the forward, got another "
                "one after the layer has moved"
            )

    @property
    def weights_learn(self) -> bool:
        """True if weights move in this step."""
        return self.learner is not None and self.weight_lr > 0.0

    def _added(self, total: Tensor | None, of_pass: Tensor | None) -> Tensor | None:
        if of_pass is None:
            return total
        if self.weight != 1.0:
            of_pass.mul_(self.weight)
        return of_pass if total is None else total.add_(of_pass)

    def finish(self) -> None:
        """Move the logits by the sum of the slopes of all ranks; this one may have none."""
        if self.slopes is None:
            self.slopes = torch.zeros_like(self.layer.weight, dtype=torch.float32)
            self.weight_grad = torch.zeros_like(self.slopes) if self.weights_learn else None
        for total in (self.slopes, self.weight_grad):
            if total is not None:
                self.backward_pass.ranks.all_reduce(total)
        with self.backward_pass.offloaded.moving(self.layer) as logits:
            descend = descent(self.layer, logits, self.slopes, self.estimator.max_update)
            self._descend(logits, self.layer.cached_codes, descend)
        self.slopes = None

    def note(self, square: float) -> None:
        """Let the host know the mean square of a step."""
        self.squares.note(self.index, square)

    def end(self) -> None:
        """Free the tensors of a step, also of an interrupted one."""
        self.latest = None
        self.slopes = None
        self.weight_grad = None
        self.backward_pass = None
        self.fisher = None

    def _descend(self, logits: Tensor, codes: Tensor | None, descend: Callable[[Tensor], Tensor]) -> None:
        if self.weights_learn and codes is None:
            # before the logits move, from which the mask of the step is drawn
            codes = ops.sample_mask(logits, self.layer.pattern.n, self.layer.pattern.m, 1.0, self.layer.counter())
        # at a rate of 0 nothing moves
        rate = self.squares.rate(self.index, lambda: descend(torch.zeros_like(self.squares.rates[0])))
        self.latest = descend(rate)
        self.squares.latest[self.index] = self.latest
        # drawn from the logits before the move
        self.layer.cached_mask = None
        if self.weights_learn:
            # after the slope, which belongs to the weights of the forward
            norm = torch.linalg.vector_norm(self.weight_grad, dtype=torch.float32)
            self.learner.step(self.weight_grad, codes, self.weight_lr, self.latest + norm)
            self.weight_grad = None


class WeightUpdater(LayerUpdater):
    """Moves only the weights of one layer, whose mask is fixed, see ``BackwardPass``.

    Attributes:
        kept: group codes of the N largest logits, while these do not change.
        slopes: float32 sum of the step's gradients of the masked weight.
    """

    reads_logits = False

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.kept: KeptCodes | None = None

    def begin(self, *arguments) -> None:
        super().begin(*arguments)
        layer = self.layer
        if self.kept is None or not self.kept.are_of(layer.logits, layer.weight.device):
            codes = top_n_mask(layer.logits_on_device().detach(), layer.pattern)
            self.kept = KeptCodes(codes, layer.logits)
        layer.cached_mask = CachedMask(self.kept.codes, layer.logits, layer.counter_state)

    def end(self) -> None:
        super().end()
        self.layer.cached_mask = None

    def note(self, square: float) -> None:
        """Keep nothing: the host needs only the mean squares of slopes."""

    def __call__(self, grad: Tensor, x: Tensor, weight: Tensor, mask: MaskSource) -> None:
        self._check_not_moved()
        if self.at_once and not uses_triton(grad.device.type):
            # a float32 copy would have the same values
            with without_autocast(grad.device.type):
                self._move(grad.t() @ x)
            return
        gradient = ops.weight_gradient(grad, x)
        if self.at_once:
            self._move(gradient)
            return
        self.slopes = self._added(self.slopes, gradient)
        self.backward_pass.move_next()

    def finish(self) -> None:
        """Move the weights by the sum of the gradients of all ranks; this one may have none."""
        if self.slopes is None:
            self.slopes = torch.zeros_like(self.layer.weight, dtype=torch.float32)
        self.backward_pass.ranks.all_reduce(self.slopes)
        self._move(self.slopes)
        self.slopes = None

    def _move(self, gradient: Tensor) -> None:
        self.latest = torch.linalg.vector_norm(gradient, dtype=torch.float32)
        self.learner.step(gradient, self.kept.codes, self.weight_lr, self.latest)


def check_slope_settings(curvature: float, max_update: float, decay: float) -> None:
    check_float("curvature", curvature, 0.0)
    check_float("max_update", max_update, 0.0, strict=True)
    check_float("decay", decay, 0.0, math.nextafter(1.0, 0.0))


def descent(layer: MaskedLinear, logits: Tensor, slopes: Tensor, max_update: float) -> Callable[[Tensor], Tensor]:
    """Return a function that moves logits by -rate * slope, and returns the mean square of the slopes."""
    m = layer.pattern.m
    counter = layer.counter()
    return lambda rate: ops.descend_(logits, slopes, rate, max_update, m, counter)


class RunningSquares:
    """Running mean squares of the slopes of layers on one device, and the rates of a step by them.

    All stay on the device, at the same addresses until a state is loaded or the model moves. So a step's backward
    passes can be captured in a CUDA graph, after steps in which the host has seen a square above 0 of each layer. What
    a graph holds of ``begin`` has the learning rate of the capture.

    Args:
        squares: of each layer; 0 before the first one above 0.
        device: of the layers' weights.

    Attributes:
        squares: float64 [layers].
        lr: learning rate of the step, 0-dim float64.
        rates: lr / rms, float32 [layers]; 0 where the square is 0.
        latest: of each layer the mean square of the step's slopes, 0-dim float32; None without slopes.
    """

    def __init__(self, squares: Sequence[float], device: torch.device):
        self.squares = torch.tensor(squares, dtype=torch.float64, device=device)
        self.rates = torch.zeros(len(squares), dtype=torch.float32, device=device)
        self.latest: list[Tensor | None] = [None] * len(squares)
        self.lr = torch.zeros((), dtype=torch.float64, device=device)
        self._decay = 0.0
        # whether the host has seen a square above 0
        self._seen = [square > 0.0 for square in squares]

    def begin(self, lr: float, decay: float) -> None:
        """Begin a step."""
        self.lr.fill_(lr)
        self._decay = decay
        self.latest = [None] * len(self.latest)

    def set_rates(self) -> None:
        """Compute the rates of a step, before its last backward."""
        self.rates.copy_(rates_of(self.lr, self.squares))

    def rate(self, index: int, square: Callable[[], Tensor]) -> Tensor:
        """Rate of a layer, 0-dim float32; before its first square above 0 by ``square()``, that of the step."""
        if self._seen[index]:
            return self.rates[index]
        of_step = rates_of(self.lr, square().to(self.lr))
        return torch.where(self.squares[index] > 0.0, self.rates[index], of_step)

    def update(self) -> None:
        """Take the mean squares of the step."""
        none = torch.zeros_like(self.rates[0])
        latest = torch.stack([none if square is None else square.to(none.device) for square in self.latest])
        self.squares.copy_(running_mean_squares(self.squares, latest.to(self.squares.dtype), self._decay))

    def note(self, index: int, square: float) -> None:
        """Let the host know the mean square of a step."""
        self._seen[index] |= math.isfinite(square) and square > 0.0


def rates_of(lr: float | Tensor, mean_squares: Tensor) -> Tensor:
    """lr / rms as float32, at most its largest number, of mean squares in float64; 0 of one that is 0 or not finite."""
    usable = mean_squares.isfinite() & (mean_squares > 0.0)
    rates = (lr / mean_squares.sqrt()).clamp(max=FLOAT32_MAX)
    return rates.masked_fill(~usable, 0.0).to(torch.float32)


def running_mean_squares(before: Tensor, latest: Tensor, decay: float) -> Tensor:
    """Running mean squares after a step, float64; unchanged where that of the step is 0 or not finite.

    ``before`` are 0 before the first step above 0.
    """
    first = torch.where(before > 0.0, before, latest)
    after = decay * first + (1.0 - decay) * latest
    return torch.where(latest.isfinite() & (latest != 0.0), after, before)


def values_of(scalars: Mapping[str, Tensor]) -> dict[str, float]:
    """Values of 0-dim tensors by name, with one transfer from each device."""
    values = {}
    for device in {scalar.device for scalar in scalars.values()}:
        names = [name for name, scalar in scalars.items() if scalar.device == device]
        values |= zip(names, torch.stack([scalars[name] for name in names]).tolist(), strict=True)
    return {name: values[name] for name in scalars}


class ShardedPass(BackwardPass):
    """``BackwardPass`` of layers that fully_shard has split into rows.

    A slope needs the dense weight, and no rank has a whole one. So ranks sum the loss's derivative in the masked
    weight, and each gets its own rows. The second derivative is an outer product of two vectors, which ranks exchange.
    Slopes are summed in every pass, so that no rank has those of two whole layers. Logits move after the last one.
    """

    every_pass = True

    def _end_pass(self) -> None:
        super()._end_pass()
        if self.remaining_passes:
            return
        moved = [updater for updater in self.updaters.values() if updater.own_slopes is not None]
        # at a rate of 0 nothing moves
        squares = [(float(updater.descend_own(updater.no_rate())), updater.own_slopes.numel()) for updater in moved]
        numbers = [number for pair in squares for number in pair]
        rows = self.ranks.all_gather_numbers(numbers)
        for index, updater in enumerate(moved):
            pairs = [row[2 * index : 2 * index + 2] for row in rows]
            total = sum(square * count for square, count in pairs if count)
            updater.move(total / sum(count for _, count in pairs))


class ShardUpdater(LayerUpdater):
    """``LayerUpdater`` of a layer that fully_shard has split into rows: its logits move after the last backward.

    Attributes:
        slopes: the loss's derivative in the gathered masked weight, in the current pass.
        factors: factors [out] and [K] of the loss's second derivative, for each use of the layer in the pass.
        own_slopes: float32 [rows, K] of this rank, summed over the passes of all ranks.
    """

    takes_shards = True

    def begin(self, *arguments) -> None:
        super().begin(*arguments)
        self.factors: list[tuple[Tensor, Tensor]] = []
        self.own_slopes: Tensor | None = None

    def __call__(self, grad: Tensor, x: Tensor, weight: Tensor, mask: MaskSource) -> None:
        self.slopes = self._added(self.slopes, ops.weight_gradient(grad, x))
        curvature = self.weight * self.estimator.curvature
        self.factors.append(ops.curvature_factors(grad, x, curvature, self.tokens, self.fisher))
        self.backward_pass.move_next()

    def finish(self) -> None:
        """Add the slopes of one pass on all ranks."""
        shard = self.layer.shard
        ranks = self.backward_pass.ranks
        device = shard.weight.device
        if self.slopes is None:
            self.slopes = torch.zeros(shard.shape, dtype=torch.float32, device=device)
        first = ranks.reduce_scatter_rows(self.slopes, shard.mesh, shard.mesh_dim, len(shard.weight))
        # free them before the next layer
        self.slopes = None
        factors = self.factors
        self.factors = []
        second = torch.zeros_like(first)
        uses = 1
        if not self.backward_pass.used_once:
            uses = max(int(count) for (count,) in ranks.all_gather_numbers([len(factors)]))
        for use in range(uses):
            rank_factors = torch.zeros(sum(shard.shape), dtype=torch.float32, device=device)
            if use < len(factors):
                rank_factors.copy_(torch.cat(factors[use]))
            vectors = ranks.all_gather(rank_factors)[shard.mesh.mesh.flatten().to(device)]
            outputs, inputs = vectors.split([*shard.shape], 1)
            second.addmm_(shard.part_of(outputs.t()), inputs)
        slope = ops.mask_slope(shard.weight, first, second, self.layer.drawn_codes(), self.layer.pattern.m)
        self.own_slopes = slope if self.own_slopes is None else self.own_slopes.add_(slope)

    def no_rate(self) -> Tensor:
        return torch.zeros((), dtype=torch.float32, device=self.layer.own_logits.device)

    def descend_own(self, rate: Tensor) -> Tensor:
        """Move the logits of this rank's rows, and return the mean square of their slopes."""
        return descent(self.layer, self.layer.own_logits, self.own_slopes, self.estimator.max_update)(rate)

    def move(self, square: float) -> None:
        """Move the logits; ``square`` is the mean square of the slopes of all rows."""
        rate = self.squares.rate(self.index, lambda: torch.tensor(square, dtype=torch.float64))
        self.descend_own(rate.to(self.layer.own_logits.device))
        self.latest = torch.tensor(square, dtype=torch.float32)
        self.squares.latest[self.index] = self.latest
        self.layer.cached_mask = None

    def end(self) -> None:
        super().end()
        self.own_slopes = None
        self.factors = []
