"""What another program removes, replaces or fills up under a trainer that runs: put back and told, or refused."""

from __future__ import annotations

import shutil
import warnings

import pytest
from helpers.bits import assert_same_bits
from helpers.full_disk import files_of_at_most
from helpers.small_trainer import a_trainer_in, logits_of

from maskpro_kernels.files import append_whole
from maskpro_kernels.learn import journal, metrics
from maskpro_kernels.learn.snapshots import snapshots_in, step_of

pytestmark = pytest.mark.usefixtures("eager_reference")

WAYS = ("reinforce", "straight-through")


def whole_run(folder, how):
    trainer = a_trainer_in(folder, how)
    trainer.run(6, progress=False)
    trainer.close()
    return trainer


@pytest.mark.parametrize(
    ("name", "how"), [("journal", "reinforce"), *((name, how) for name in (".lock", "metrics.jsonl") for how in WAYS)]
)
def test_a_file_that_was_removed_is_put_back(tmp_path, name, how):
    whole = whole_run(tmp_path / "whole", how)
    trainer = a_trainer_in(tmp_path / "run", how)
    trainer.run(3, progress=False)
    (tmp_path / "run" / name).unlink()
    with pytest.warns(UserWarning, match=f"{name} was .*removed while the run went on: it is (put back|written again)"):
        trainer.step()
    with pytest.raises(ValueError, match="^output_dir: expected a folder that no other trainer holds"):
        a_trainer_in(tmp_path / "run", how).resume()
    trainer.run(2, progress=False)
    trainer.close()
    assert_same_bits(logits_of(trainer.model), logits_of(whole.model))
    again = a_trainer_in(tmp_path / "run", how)
    assert again.resume() == 6
    assert_same_bits(logits_of(again.model), logits_of(whole.model))
    assert [row["loss"] for row in again.metrics] == [row["loss"] for row in whole.metrics]


@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize("how", WAYS)
def test_a_run_whose_snapshots_were_removed_can_still_be_resumed(tmp_path, how, resumed):
    whole = whole_run(tmp_path / "whole", how)
    trainer = a_trainer_in(tmp_path / "run", how)
    trainer.run(3, progress=False)
    if resumed:
        trainer.close()
        trainer = a_trainer_in(tmp_path / "run", how)
        trainer.resume()
    for path in snapshots_in(tmp_path / "run"):
        path.unlink()
    with pytest.warns(UserWarning, match="snapshot-0000000003-.* was removed while the run went on: a snapshot of"):
        trainer.step()
    (new,) = snapshots_in(tmp_path / "run")
    assert step_of(new) == 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.step()
    # as a process leaves it that is killed
    trainer.close()
    again = a_trainer_in(tmp_path / "run", how)
    done = again.resume()
    assert done == (5 if how == "reinforce" else 4)
    again.run(6 - done, progress=False)
    assert_same_bits(logits_of(again.model), logits_of(whole.model))


@pytest.mark.parametrize("how", WAYS)
def test_a_folder_that_another_trainer_has_taken_meanwhile(tmp_path, how):
    """Only where its lock was removed: the first one leaves nothing more in it."""
    first = a_trainer_in(tmp_path, how)
    first.run(3, progress=False)
    (tmp_path / ".lock").unlink()
    second = a_trainer_in(tmp_path, how)
    assert second.resume() == 3
    with pytest.raises(ValueError, match="^output_dir: expected a folder that no other trainer holds"):
        first.run(1, progress=False)
    with pytest.raises(RuntimeError, match="^step: expected a trainer .* that is not closed"):
        first.step()
    second.run(3, progress=False)
    second.close()
    assert_same_bits(logits_of(second.model), logits_of(whole_run(tmp_path / "whole", how).model))


@pytest.mark.parametrize("how", WAYS)
def test_a_folder_that_another_trainer_has_had_meanwhile(tmp_path, how):
    first = a_trainer_in(tmp_path, how)
    first.run(3, progress=False)
    (tmp_path / ".lock").unlink()
    second = a_trainer_in(tmp_path, how)
    second.resume()
    second.run(1, progress=False)
    second.close()
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="^output_dir: expected what this trainer has left .*another trainer may"):
        first.run(1, progress=False)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_journal_in_the_place_of_another_is_refused(tmp_path):
    trainer = a_trainer_in(tmp_path)
    trainer.run(3, progress=False)
    shutil.copy(tmp_path / "journal", tmp_path / "copy")
    (tmp_path / "copy").rename(tmp_path / "journal")
    with pytest.raises(ValueError, match="^journal: expected the one that this trainer writes, got another"):
        trainer.step()
    assert a_trainer_in(tmp_path).resume() == 3


def test_a_folder_that_was_removed_ends_the_run(tmp_path):
    trainer = a_trainer_in(tmp_path / "run")
    trainer.run(3, progress=False)
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(OSError, match=r"No such file or directory: .*run"):
        trainer.step()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("how", WAYS)
def test_a_disk_that_is_full_leaves_no_half_of_a_line(tmp_path, how, monkeypatch):
    """The steps go on in the same process, once there is room: none is missing, and no line is broken."""
    whole = whole_run(tmp_path / "whole", how)
    trainer = a_trainer_in(tmp_path / "run", how)
    trainer.run(3, progress=False)
    path = tmp_path / "run" / "metrics.jsonl"
    before = path.read_bytes()
    for room in (0, 100):

        def on_a_full_disk(path, content, room=room):
            with files_of_at_most(len(before) + room):
                append_whole(path, content)

        with monkeypatch.context() as patched, pytest.raises(OSError, match="metrics.jsonl: the disk|File too large"):
            patched.setattr(metrics, "append_whole", on_a_full_disk)
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
    for room in (0, 1, 58):
        with files_of_at_most(len(before) + room), pytest.raises(OSError, match="journal: the disk|File too large"):
            trainer.step()
        assert (tmp_path / "journal").read_bytes() == before
    trainer.run(3, progress=False)
    trainer.close()
    assert len(journal.read(tmp_path / "journal").entries) == 6
    assert len(snapshots_in(tmp_path)) == 3
    assert_same_bits(logits_of(trainer.model), logits_of(whole_run(tmp_path / "whole", "reinforce").model))
