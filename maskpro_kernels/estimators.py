"""Estimators: from losses to the one scalar a step that the masks learn from."""

from __future__ import annotations

import math


class Reinforce:
    """REINFORCE with loss residual and tracker (MaskPro, arXiv 2506.12876, section 4).

    residual r = f(m_t, batch) - f(m_0, batch); advantage = r - tracker; the logits move by
    -lr * advantage * score(m_t); tracker <- alpha * tracker + (1 - alpha) * r.

    Args:
        lr: learning rate; the paper's is 50.
        alpha: decay of the tracker in [0, 1]; the paper's is 0.99. At 1 the tracker stays 0.
        tracker: "after" updates the tracker after its use, as the paper does; "before" ahead of it, as
            the paper's published code does.

    Attributes:
        delta: the tracker, a running mean of the residual.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """

    def __init__(self, lr: float = 50.0, alpha: float = 0.99, tracker: str = "after"):
        for name, value in (("lr", lr), ("alpha", alpha)):
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name}: expected a float, got {type(value).__name__} {value!r}")
        if not math.isfinite(lr) or lr <= 0:
            raise ValueError(f"lr: expected a positive finite float, got {lr}")
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha: expected a float in [0, 1], got {alpha}")
        if tracker not in ("after", "before"):
            raise ValueError(f'tracker: expected "after" or "before", got {tracker!r}')
        self.lr = float(lr)
        self.alpha = float(alpha)
        self.tracker = tracker
        self.delta = 0.0

    def advantage(self, residual: float) -> float:
        """The advantage of a residual; moves the tracker."""
        before = self.delta
        self.delta = self.alpha * self.delta + (1.0 - self.alpha) * residual
        return residual - (before if self.tracker == "after" else self.delta)
