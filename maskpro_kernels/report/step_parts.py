"""Where the time of a run's steps went, by part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

# Shares below it are told together
SMALL = 0.005


def mean_parts(steps: Sequence[Mapping]) -> dict[str, float]:
    """Mean seconds of a step by part, the longest first, over the steps whose parts are known; empty without any.

    Args:
        steps: the fields of ``StepRecord`` of each. A step that was rebuilt from a journal has no parts, nor has one of
            a version that took none.
    """
    known = [step["parts"] for step in steps if step.get("parts")]
    names = {name: None for parts in known for name in parts}
    means = {name: sum(parts.get(name, 0.0) for parts in known) / len(known) for name in names}
    return dict(sorted(means.items(), key=lambda item: -item[1]))


def told_parts(parts: Mapping[str, float]) -> str:
    """Of ``mean_parts``, which are some, in one line."""
    whole = sum(parts.values()) or 1.0
    large = {name: seconds for name, seconds in parts.items() if seconds >= SMALL * whole}
    told = [f"{name} {seconds / whole:.0%}" for name, seconds in large.items()]
    small = [name for name in parts if name not in large]
    if small:
        told.append(f"under {SMALL:.1%} each {', '.join(small)}")
    return f"a step took {whole:.3g} seconds on average: {', '.join(told)}"
