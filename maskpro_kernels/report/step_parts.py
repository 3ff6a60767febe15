"""Where the time of a run's steps went, by part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

# Shares below it are told together
SMALL = 0.005


def typical_steps(steps: Sequence[Mapping]) -> list[Mapping]:
    """The steps whose parts are known; where there are several, without the first, which compiles and warms up.

    Args:
        steps: the fields of ``StepRecord`` of each. A step that was rebuilt from a journal has no parts, nor has one of
            a version that took none.
    """
    known = [step for step in steps if step.get("parts")]
    return known[1:] or known


def mean_parts(steps: Sequence[Mapping]) -> dict[str, float]:
    """Mean seconds of a step by part, the longest first, over ``typical_steps``; empty without any."""
    return means([step["parts"] for step in typical_steps(steps)])


def means(known: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean seconds by part of several steps or runs, the longest first; a part that one lacks took no time there."""
    names = {name: None for parts in known for name in parts}
    means = {name: sum(parts.get(name, 0.0) for parts in known) / len(known) for name in names}
    return dict(sorted(means.items(), key=lambda item: -item[1]))


def told_parts(parts: Mapping[str, float]) -> str:
    """Of ``mean_parts``, which are some, in one line."""
    whole = sum(parts.values()) or 1.0
    large = {name: seconds for name, seconds in parts.items() if seconds >= SMALL * whole}
    told = [f"{name} {seconds / whole:.0%}" for name, seconds in large.items()]
    small = [name for name in parts if name not in large]
    if len(small) == 1:
        told.append(f"{small[0]} under {SMALL:.1%}")
    elif small:
        told.append(f"under {SMALL:.1%} each {', '.join(small)}")
    return f"a step took {whole:.3g} seconds on average: {', '.join(told)}"
