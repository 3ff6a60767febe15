"""REINFORCE with loss residual and tracker, which turns the losses of a step into factors of its scores."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from ..functional.checks import FLOAT32_MAX, check_one_of, in_a_line
from ..ops.philox import MAX_DRAWS
from .estimator import Draw, Entry, Estimator, Step, StepResult, check_float, check_whole, replay

# A normalized advantage beyond this bound is an outlier
LARGEST_ADVANTAGE = 3.0


class Reinforce(Estimator):
    """REINFORCE with loss residual and tracker (MaskPro, arXiv 2506.12876, section 4).

    residual r = f(m_t, batch) - f(m_0, batch); advantage = r - tracker; logits -= lr * advantage * score(m_t); tracker
    = alpha * tracker + (1 - alpha) * r.

    Args:
        lr: learning rate; the paper's is 50.
        alpha: decay of the tracker in [0, 1]; the paper's is 0.99. At 1 the tracker stays 0.
        tracker: "after" updates the tracker after its use, as the paper does; "before" updates it before its use, as
            the paper's published code does.
        normalize: divide the advantage by its running root mean square, with decay alpha, and clamp it to +-3. Then lr
            does not depend on the scale of the loss, and one outlier does not move the logits far. Not in the paper.
        draws: masks a step. With several, the advantage of each is its loss less the mean loss of the others, without
            residual and tracker.
        refresh: take new initial masks m_0, the top-N masks of the logits, after a step whose loss is at most half of
            the loss under m_0. Each refresh costs a forward for each batch. Only with draws=1.
        steps: number of steps allowed; None: any. Required if batches are not a sequence: all are loaded before the
            first step.

    Attributes:
        delta: the tracker, a running mean of the residual.
        mean_square: the running mean of the squared advantage, None before the first step.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """

    name = "reinforce"
    needs_flips = True
    journaled = True

    def __init__(self, lr: float = 50.0, alpha: float = 0.99, tracker: str = "after",
                 normalize: bool = False, draws: int = 1, refresh: bool = False,
                 steps: int | None = None):  # fmt: skip
        check_float("lr", lr, 0.0, strict=True)
        check_float("alpha", alpha, 0.0, 1.0)
        check_one_of("tracker", tracker, ("after", "before"))
        for name, value in (("normalize", normalize), ("refresh", refresh)):
            if not isinstance(value, bool):
                raise TypeError(f"{name}: expected a bool, got {in_a_line(value)}")
        check_whole("draws", draws, 1, MAX_DRAWS)
        if refresh and draws > 1:
            raise ValueError(f"refresh: expected False with several draws, which need no initial losses, got {refresh}")
        if tracker != "after" and draws > 1:
            raise ValueError(f'tracker: expected "after" with several draws, which have no tracker, got {tracker!r}')
        if steps is not None:
            check_whole("steps", steps, 1)
        self.draws = draws
        self.steps = steps
        self.needs_initial_losses = draws == 1
        self.lr = float(lr)
        self.alpha = float(alpha)
        self.tracker = tracker
        self.normalize = normalize
        self.refresh = refresh
        self.delta = 0.0
        self.mean_square: float | None = None

    def settings(self) -> dict:
        return {name: getattr(self, name) for name in ("lr", "alpha", "tracker", "normalize", "draws", "refresh")}

    def state(self) -> dict:
        return {"delta": self.delta, "mean_square": self.mean_square}

    def load_state(self, state: Mapping) -> None:
        self.delta = state["delta"]
        self.mean_square = state["mean_square"]

    def step(self, step: Step) -> StepResult:
        """Move the logits by the scores of the drawn masks; if it raises, logits and tracker are unchanged."""
        initial_loss = step.initial_loss() if self.needs_initial_losses else 0.0
        losses = step.losses()
        skipped = not all(map(math.isfinite, losses))
        before = self.state()
        advantages = [0.0] * len(losses) if skipped else self.advantages(losses, initial_loss)
        coefs = [self.lr * advantage / self.draws for advantage in advantages]
        try:
            if not all(abs(coef) <= FLOAT32_MAX for coef in coefs):
                raise FloatingPointError(
                    f"lr * advantage of step {step.index}: expected a float32, got {max(coefs, key=abs)}"
                )
            draws = tuple(Draw(*draw) for draw in zip(range(self.draws), losses, coefs, strict=True))
            entry = Entry(step.index, step.tokens, initial_loss, draws, skipped)
            step.begin_update(entry)
        except BaseException:
            self.load_state(before)
            raise
        replay(step.masks, step.seed, entry)
        return self._result(entry, advantages)

    def recall(self, entry: Entry) -> StepResult:
        losses = [draw.loss for draw in entry.draws]
        return self._result(entry, [] if entry.skipped else self.advantages(losses, entry.initial_loss))

    def _result(self, entry: Entry, advantages: Sequence[float]) -> StepResult:
        tracker = self.delta if self.draws == 1 else None
        if entry.skipped:
            return StepResult(math.nan, tracker=tracker)
        loss = math.fsum(draw.loss for draw in entry.draws) / self.draws
        if self.draws > 1:
            return StepResult(loss)
        refreshes = self.refreshes(loss, entry.initial_loss)
        return StepResult(loss, loss - entry.initial_loss, advantages[0], tracker, refreshes=refreshes)

    def advantage(self, residual: float) -> float:
        """Compute the advantage of a residual and update the tracker."""
        before = self.delta
        self.delta = self.alpha * self.delta + (1.0 - self.alpha) * residual
        return self._normalized([residual - (before if self.tracker == "after" else self.delta)])[0]

    def advantages(self, losses: Sequence[float], initial_loss: float = 0.0) -> list[float]:
        """Compute the advantage of each draw of a step from the losses; with a single draw also update the tracker."""
        count = len(losses)
        total = math.fsum(losses)
        if count == 1:
            return [self.advantage(losses[0] - initial_loss)]
        return self._normalized([loss - (total - loss) / (count - 1) for loss in losses])

    def refreshes(self, loss: float, initial_loss: float) -> bool:
        """Return whether the steps after one with these losses use new initial masks."""
        # not the step itself: a baseline that depends on the draw would bias its update. And half of a loss of at most
        # 0 is not smaller
        return self.refresh and initial_loss > 0.0 and -math.inf < loss <= initial_loss / 2

    def _normalized(self, advantages: list[float]) -> list[float]:
        if not self.normalize:
            return advantages
        square = math.fsum(advantage * advantage for advantage in advantages) / len(advantages)
        old = square if self.mean_square is None else self.mean_square
        self.mean_square = self.alpha * old + (1.0 - self.alpha) * square
        scale = math.sqrt(self.mean_square)
        if scale == 0.0:
            return [0.0] * len(advantages)
        return [min(max(advantage / scale, -LARGEST_ADVANTAGE), LARGEST_ADVANTAGE) for advantage in advantages]
