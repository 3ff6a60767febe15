"""Where the time of a run's steps went, as it is told."""

from __future__ import annotations

import pytest

from maskpro_kernels.report.step_parts import mean_parts, told_parts, typical_steps


def test_parts_are_means_over_the_steps_that_have_them_but_the_first():
    steps = [
        {"parts": {"forward": 100.0, "checks": 1.0}},
        {"parts": {"forward": 1.0, "update": 0.5}},
        {"parts": {}},
        {},
        {"parts": {"forward": 3.0, "backward": 6.0}},
    ]
    assert list(mean_parts(steps).items()) == [("backward", 3.0), ("forward", 2.0), ("update", 0.25)]
    assert mean_parts(steps[2:4]) == {}
    # of one alone there is no other
    assert mean_parts(steps[:1]) == steps[0]["parts"]
    assert typical_steps(steps) == [steps[1], steps[4]]


@pytest.mark.parametrize(
    ("parts", "line"),
    [
        (
            {"forward": 0.3, "backward": 0.1, "data": 0.0001, "other": 0.0},
            "a step took 0.4 seconds on average: forward 75%, backward 25%, under 0.5% each data, other",
        ),
        (
            {"forward": 0.3, "backward": 0.1, "data": 0.0001},
            "a step took 0.4 seconds on average: forward 75%, backward 25%, data under 0.5%",
        ),
        ({"forward": 2.0}, "a step took 2 seconds on average: forward 100%"),
    ],
)
def test_one_line_tells_the_shares(parts, line):
    assert told_parts(parts) == line
