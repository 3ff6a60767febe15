"""What the threads of a warp do together, on the PTX emulator."""

from __future__ import annotations

import numpy as np
import pytest
from hand_written.ptx import Run, compute, kinds

from gpu_emulators.ptx import Refused

LANES = np.arange(32)
VALUES = np.random.default_rng(1).integers(0, 1 << 32, 96, np.uint64).astype(np.uint32)
DIVERGENT = {"divergent warp at a warp-wide instruction"}


def source(way, lane, by, clamp):
    """(lane that is read, whether it is in range), after the pseudocode of PTX ISA 9.7.9.6."""
    by, limit, segment = by & 31, clamp & 31, clamp >> 8 & 31
    highest, lowest = lane & segment | limit & ~segment, lane & segment
    at = {"up": lane - by, "down": lane + by, "bfly": lane ^ by, "idx": lowest | by & ~segment}[way]
    inside = at >= highest if way == "up" else at <= highest
    return (at, True) if inside else (lane, False)


@pytest.mark.parametrize("way", ["up", "down", "bfly", "idx"])
@pytest.mark.parametrize("clamp", [0, 31, 0x1F1F, 0x1807, 0x181F, 0x1C03])
def test_shuffles(way, clamp):
    by = np.random.default_rng(2).integers(0, 40, VALUES.size).astype(np.uint32)
    found = [source(way, k % 32, int(by[k]), clamp) for k in range(VALUES.size)]
    from_lanes = np.array([at for at, _ in found]) + np.arange(VALUES.size) // 32 * 32
    values = compute(f"shfl.sync.{way}.b32 $d, $a, $b, {clamp}, -1;", VALUES, by, out=np.uint32)
    assert np.array_equal(values, VALUES[from_lanes])
    inside = compute(f"shfl.sync.{way}.b32 %r1|$d, $a, $b, {clamp}, 0xffffffff;", VALUES, by, out=bool)
    assert np.array_equal(inside, [valid for _, valid in found])


def test_a_shuffle_by_a_distance_that_is_given():
    values = compute("shfl.sync.bfly.b32 $d, $a, 16, 31, -1;", VALUES, out=np.uint32)
    assert np.array_equal(values.reshape(-1, 32), VALUES.reshape(-1, 32)[:, LANES ^ 16])


ARITHMETIC = {"min": np.min, "max": np.max, "add": np.sum}
LOGIC = {"and": np.bitwise_and.reduce, "or": np.bitwise_or.reduce, "xor": np.bitwise_xor.reduce}


@pytest.mark.parametrize(
    ("name", "kind"),
    [*((name, kind) for name in ARITHMETIC for kind in ("s32", "u32")), *((name, "b32") for name in LOGIC)],
)
def test_reductions(name, kind):
    function = (ARITHMETIC | LOGIC)[name]
    typed = VALUES.view(np.int32 if kind == "s32" else np.uint32)
    wanted = np.repeat(function(typed.reshape(-1, 32).astype(np.int64), axis=1), 32)
    found = compute(f"redux.sync.{name}.{kind} $d, $a, -1;", typed, out=np.uint32)
    assert np.array_equal(found, wanted.astype(np.uint32))
    everyone = np.full(VALUES.size, 0xFFFFFFFF, np.uint32)
    assert np.array_equal(compute(f"redux.sync.{name}.{kind} $d, $a, $b;", typed, everyone, out=np.uint32), found)


@pytest.mark.parametrize(("name", "expected"), [("max", np.fmax), ("min", np.fmin)])
@pytest.mark.parametrize("nan", ["", ".NaN"])
def test_extremes_of_floats(name, expected, nan):
    values = np.random.default_rng(0).standard_normal(96).astype(np.float32)
    values[40] = np.nan
    found = compute(f"redux.sync.{name}{nan}.f32 $d, $a, -1;", values, out=np.float32)
    wanted = expected.reduce(values.reshape(-1, 32), 1)
    if nan:
        wanted[1] = np.nan
    assert np.array_equal(found, np.repeat(wanted, 32), equal_nan=True)


def test_votes():
    votes = np.concatenate([np.ones(32, bool), np.zeros(32, bool), LANES == 5, LANES != 5])
    by_warp = votes.reshape(-1, 32)
    for way, wanted in (("all", by_warp.all(1)), ("any", by_warp.any(1)), ("uni", by_warp.all(1) | ~by_warp.any(1))):
        found = compute(f"vote.sync.{way}.pred $d, $a, -1;", votes, out=bool)
        assert np.array_equal(found, np.repeat(wanted, 32))
    found = compute("vote.sync.ballot.b32 $d, $a, -1;", votes, out=np.uint32)
    assert np.array_equal(found, np.repeat(by_warp.astype(np.uint64) @ (1 << LANES.astype(np.uint64)), 32))
    assert np.array_equal(compute("vote.sync.ballot.b32 $d, !$a, -1;", votes, out=np.uint32), ~found)


def test_one_thread_of_a_warp_is_elected():
    elected = compute("elect.sync %r1|$d, -1;", VALUES, out=bool)
    assert np.array_equal(elected.reshape(-1, 32).sum(1), [1, 1, 1])
    lane = compute("elect.sync $d|%p1, -1;", VALUES, out=np.uint32)
    assert elected[np.arange(3) * 32 + lane[::32]].all()


@pytest.mark.parametrize(
    "text",
    [
        "shfl.sync.bfly.b32 %r1, %r70, 1, 31, -1;",
        "redux.sync.add.s32 %r1, %r70, -1;",
        "vote.sync.any.pred %p3, %p1, -1;",
        "elect.sync %r1|%p3, -1;",
        "bar.warp.sync -1;",
    ],
)
def test_a_warp_that_has_parted_is_found(text):
    body = "setp.lt.u32 %p1, %r70, {};\n @%p1 {}\n ret;"
    array = np.zeros(1, np.uint32)
    assert kinds(body.format(17, text), array, threads=64) == DIVERGENT
    assert kinds(body.format(32, text), array, threads=64) == set()


def test_members_that_are_not_all_are_refused_when_it_runs():
    with pytest.raises(Refused, match="all threads of the warp"):
        Run("redux.sync.min.s32 %r1, %r70, %r70;\n ret;", np.zeros(1, np.uint32))
