"""A disk that is full: no half of a line or of a record is left, and the run continues once there is space."""

from __future__ import annotations

import pytest
from helpers.bits import assert_same_bits
from helpers.full_disk import files_of_at_most
from helpers.small_trainer import a_trainer_in, logits_of

from maskpro_kernels.files import append_whole
from maskpro_kernels.learn import run
from maskpro_kernels.learn.journal import read_journal
from maskpro_kernels.learn.snapshots import snapshots_in

pytestmark = pytest.mark.usefixtures("eager_reference")

WAYS = ("reinforce", "straight-through")


def whole_run(folder, how):
    trainer = a_trainer_in(folder, how)
    trainer.run(6, progress=False)
    trainer.close()
    return trainer


@pytest.mark.parametrize("how", WAYS)
def test_a_disk_that_is_full_leaves_no_half_of_a_line(tmp_path, how, monkeypatch):
    """The steps continue in the same process, once there is space: none is missing, and no line is broken."""
    whole = whole_run(tmp_path / "whole", how)
    trainer = a_trainer_in(tmp_path / "run", how)
    trainer.run(3, progress=False)
    path = tmp_path / "run" / "metrics.jsonl"
    before = path.read_bytes()
    for space in (0, 100):

        def on_a_full_disk(path, content, space=space):
            with files_of_at_most(len(before) + space):
                append_whole(path, content)

        with monkeypatch.context() as patched, pytest.raises(OSError, match="metrics.jsonl: the disk|File too large"):
            patched.setattr(run, "append_whole", on_a_full_disk)
            trainer.step()
        assert path.read_bytes() == before
    trainer.run(1, progress=False)
    trainer.close()
    assert path.read_bytes().startswith(before) and path.read_bytes().count(b"\n") == 6
    again = a_trainer_in(tmp_path / "run", how)
    assert again.resume() == 6
    assert [row["loss"] for row in again.metrics] == [row["loss"] for row in whole.metrics]
    assert_same_bits(logits_of(again.model), logits_of(whole.model))


def test_a_disk_that_is_full_leaves_no_half_of_a_record(tmp_path):
    trainer = a_trainer_in(tmp_path)
    trainer.run(3, progress=False)
    before = (tmp_path / "journal").read_bytes()
    for space in (0, 1, 58):
        with files_of_at_most(len(before) + space), pytest.raises(OSError, match="journal: the disk|File too large"):
            trainer.step()
        assert (tmp_path / "journal").read_bytes() == before
    trainer.run(3, progress=False)
    trainer.close()
    assert len(read_journal(tmp_path / "journal").entries) == 6
    assert len(snapshots_in(tmp_path)) == 3
    assert_same_bits(logits_of(trainer.model), logits_of(whole_run(tmp_path / "whole", "reinforce").model))
