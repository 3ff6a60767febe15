"""A disk that fails at any sync or rename of a run: the run ends, and continues to the bits of a whole one."""

from __future__ import annotations

import os
from itertools import count

import pytest
from helpers.bits import assert_same_bits
from helpers.disks import FailingDisk
from helpers.small_trainer import a_trainer_in, logits_of

pytestmark = pytest.mark.usefixtures("compiled_reference")

STEPS = 4


def take_steps(trainer, reported: list[int]) -> None:
    """Take the remaining steps, and note the number of steps after each."""
    while trainer.steps_done < STEPS:
        trainer.step()
        reported.append(trainer.steps_done)
    trainer.close()


@pytest.mark.parametrize("operation", ["fsync", "replace"])
@pytest.mark.parametrize("how", ["reinforce", "refreshed", "straight-through"])
def test_an_error_of_the_disk_ends_a_run_and_loses_no_reported_step(tmp_path, monkeypatch, how, operation):
    monkeypatch.setattr(os, "fsync", lambda _: None)
    whole = a_trainer_in(tmp_path / "whole", how, snapshot_minutes=0.0)
    take_steps(whole, [])
    for number in count():
        folder = tmp_path / str(number)
        trainer = a_trainer_in(folder, how, snapshot_minutes=0.0)
        reported = [0]
        with monkeypatch.context() as patched:
            disk = FailingDisk(patched, operation, number)
            try:
                take_steps(trainer, reported)
            except OSError as error:
                assert disk.has_failed and "Input/output error" in str(error)
            else:
                assert not disk.has_failed, f"nobody was told of error {number}"
                break
            trainer.close()
        again = a_trainer_in(folder, how, snapshot_minutes=0.0)
        try:
            assert again.resume() >= reported[-1]
        except ValueError as error:
            # of a run that had not begun
            assert reported == [0] and ": expected " in str(error)
            again = a_trainer_in(folder, how, snapshot_minutes=0.0)
        take_steps(again, [])
        assert_same_bits(logits_of(again.model), logits_of(whole.model))
    assert number > STEPS
