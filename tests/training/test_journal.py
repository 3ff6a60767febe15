"""Journal and snapshots: every damage is found, and a run that was killed goes on to the bits of one that was not."""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.children import environment
from helpers.routes import route_to_the_eager_reference
from helpers.small_trainer import a_model, assert_equal_logits, logits_of, some_batches

import maskpro_kernels as mk
from maskpro_kernels.training import journal, reinforce, run_folder, score_updates, snapshots
from maskpro_kernels.training import trainer as training
from maskpro_kernels.training.batches import digest
from maskpro_kernels.training.journal import Draw, Entry, Journal
from maskpro_kernels.training.snapshots import newest_snapshot, save_snapshot

pytestmark = pytest.mark.usefixtures("eager_reference")

ESTIMATORS = {
    "reinforce": lambda: mk.Reinforce(lr=2.0, alpha=0.75),
    "normalized": lambda: mk.Reinforce(lr=2.0, alpha=0.75, normalize=True),
    "refreshed": lambda: mk.Reinforce(lr=10.0, alpha=0.75, refresh=True),
    "several draws": lambda: mk.Reinforce(lr=2.0, draws=3),
    "straight-through": lambda: mk.StraightThrough(lr=0.3),
}


def entry(step: int, draws: int = 1) -> Entry:
    return Entry(step, 640, 1.5 + step, tuple(Draw(i, 0.1 * step + i, -0.5 * i) for i in range(draws)), step == 3)


def a_journal(path: Path, steps: int = 40, draws: int = 1) -> list[Entry]:
    entries = [entry(step, draws) for step in range(steps)]
    writer = Journal.create(path, {"seed": 3, "name": "ünï"}, draws)
    for one in entries:
        writer.append(one)
    writer.close()
    return entries


@pytest.mark.parametrize("draws", [1, 4])
def test_what_is_written_is_read(tmp_path, draws):
    entries = a_journal(tmp_path / "journal", 7, draws)
    assert journal.read(tmp_path / "journal") == ({"seed": 3, "name": "ünï"}, entries, 0)
    writer, read, torn = Journal.resume(tmp_path / "journal")
    assert read == entries and torn == 0 and writer.steps == 7
    writer.append(entry(7, draws))
    assert journal.read(tmp_path / "journal")[1] == [*entries, entry(7, draws)]
    for wrong in (entry(7, draws), entry(8, draws + 1)):
        with pytest.raises(ValueError, match=f"entry: expected step 8 with {draws} draws"):
            writer.append(wrong)


def test_ten_thousand_records_take_less_than_a_mebibyte(tmp_path):
    Journal.create(tmp_path / "journal", {}).close()
    record = len(entry(0).packed())
    assert (tmp_path / "journal").stat().st_size + 10_000 * record < 1 << 20


def test_every_byte_flipped_is_found(tmp_path):
    path = tmp_path / "journal"
    entries = a_journal(path)
    whole = path.read_bytes()
    record = len(entries[0].packed())
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
        if at >= len(whole) - record:
            # as one that was cut short
            assert journal.read(path)[1:] == (entries[:-1], record)
        else:
            with pytest.raises(ValueError, match="journal: expected"):
                journal.read(path)


def test_a_record_cut_short_is_cut_off(tmp_path):
    path = tmp_path / "journal"
    entries = a_journal(path, 5)
    whole = path.read_bytes()
    record = len(entries[0].packed())
    for cut in range(1, record):
        path.write_bytes(whole[:-cut])
        writer, read, torn = Journal.resume(path)
        assert read == entries[:-1] and torn == record - cut
        writer.append(entries[-1])
        writer.close()
        assert path.read_bytes() == whole


def test_journals_of_others_are_refused(tmp_path):
    path = tmp_path / "journal"
    a_journal(path, 3)
    with pytest.raises(ValueError, match="path: expected a new file"):
        Journal.create(path, {})
    whole = path.read_bytes()
    record = len(entry(0).packed())
    path.write_bytes(whole[: -2 * record] + whole[-record:])
    with pytest.raises(ValueError, match="journal: expected step 1 at byte .*, got 2"):
        journal.read(path)
    path.write_text("nothing")
    with pytest.raises(ValueError, match="journal: expected a journal of maskpro_kernels"):
        journal.read(path)


def test_a_full_disk_leaves_the_journal_whole(tmp_path, monkeypatch):
    entries = a_journal(tmp_path / "journal", 3)
    writer, _, _ = Journal.resume(tmp_path / "journal")

    class Full:
        """Takes a part of a record, then no more."""

        def fileno(self):
            return file.fileno()

        def write(self, content):
            file.write(content[:10])
            raise OSError(28, "No space left on device")

    file, writer._file = writer._file, Full()
    with pytest.raises(OSError, match="No space left"):
        writer.append(entry(3))
    assert journal.read(tmp_path / "journal") == ({"seed": 3, "name": "ünï"}, entries, 0)
    writer._file = file
    writer.append(entry(3))
    assert journal.read(tmp_path / "journal")[1] == [*entries, entry(3)]


def test_snapshots(tmp_path):
    tensors = [{"a": torch.randn(4, 8), "b": torch.randn(3).bfloat16()} for _ in range(5)]
    for step, one in enumerate(tensors):
        save_snapshot(tmp_path, step, one, {"step": step, "square": 0.1 + step})
    step, read, state, damaged = newest_snapshot(tmp_path)
    assert (step, state, damaged) == (4, {"step": 4, "square": 4.1}, [])
    assert all(torch.equal(read[name], tensors[4][name]) for name in ("a", "b"))
    # the first and the last two are kept
    assert [newest_snapshot(tmp_path, at_most)[0] for at_most in range(5)] == [0, 0, 0, 3, 4]
    assert len(list(tmp_path.iterdir())) == 3


def test_every_byte_of_a_snapshot_flipped_is_found(tmp_path):
    save_snapshot(tmp_path, 0, {"a": torch.zeros(2)}, {"x": 1})
    path = save_snapshot(tmp_path, 3, {"a": torch.randn(4, 8)}, {"x": 1})
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
        step, _, _, damaged = newest_snapshot(tmp_path)
        assert step == 0 and damaged == [path]
    path.write_bytes(whole[:-1])
    assert newest_snapshot(tmp_path)[0] == 0
    path.rename(path.with_name(path.name.replace("0000000003", "0000000004")))
    assert newest_snapshot(tmp_path)[0] == 0
    (tmp_path / sorted(os.listdir(tmp_path))[0]).write_bytes(b"")
    with pytest.raises(
        ValueError, match="snapshot: expected a sound one in .*, got none, 2 are damaged or of another run"
    ):
        newest_snapshot(tmp_path)


def a_trainer(folder, how="reinforce", model=None, **arguments):
    arguments = {"seed": 11, "output_dir": folder, "estimator": ESTIMATORS[how]()} | arguments
    estimator, batches = arguments.pop("estimator"), arguments.pop("batches", some_batches())

    def loss_fn(model, batch):
        return model(batch).square().mean()

    return mk.MaskTrainer(model or a_model(), loss_fn, batches, estimator, **arguments)


@pytest.mark.parametrize("how", ESTIMATORS)
def test_a_resumed_run_has_the_bits_of_a_whole_one(tmp_path, how):
    whole = a_trainer(tmp_path / "whole", how, snapshot_minutes=0.0)
    records = whole.run(9, progress=False)
    first = a_trainer(tmp_path / "run", how)
    first.run(4, progress=False)
    if how != "straight-through":
        # behind the last snapshot, in the journal alone
        for _ in range(2):
            first.step()
    first.close()
    second = a_trainer(tmp_path / "run", how)
    steps = second.resume()
    assert steps == (4 if how == "straight-through" else 6)
    assert_equal_logits(logits_of(second.model), logits_of(first.model))
    rest = second.run(9 - steps, progress=False)
    assert_equal_logits(logits_of(second.model), logits_of(whole.model))
    assert [r.loss for r in rest] == [r.loss for r in records[steps:]]
    assert [r.advantage for r in rest] == [r.advantage for r in records[steps:]]
    lines = [(tmp_path / name / "metrics.jsonl").read_text().count("\n") for name in ("run", "whole")]
    assert lines == [9, 9]


@pytest.mark.parametrize("how", ESTIMATORS)
def test_a_damaged_snapshot_is_passed_over(tmp_path, how):
    whole = a_trainer(tmp_path / "whole", how)
    whole.run(6, progress=False)
    trainer = a_trainer(tmp_path / "run", how)
    trainer.run(3, progress=False)
    trainer.run(3, progress=False)
    trainer.close()
    newest = sorted(tmp_path.glob("run/snapshot-*"))[-1]
    newest.write_bytes(newest.read_bytes()[:-1])
    again = a_trainer(tmp_path / "run", how)
    with pytest.warns(UserWarning, match="is damaged or of steps that are taken again: it is set aside"):
        assert again.resume() == (3 if how == "straight-through" else 6)
    assert newest.with_suffix(".aside").exists() and not newest.exists()
    if again.steps_done < 6:
        again.run(3, progress=False)
    assert_equal_logits(logits_of(again.model), logits_of(whole.model))


OTHERS = {
    "seed": {"seed": 12},
    "estimator": {"estimator": mk.StraightThrough()},
    "settings": {"estimator": mk.Reinforce(lr=3.0, alpha=0.75)},
    "batches": {"batches": some_batches(2)},
    "layers": {"model": lambda: a_model().append(mk.MaskedLinear.from_linear(torch.nn.Linear(4, 4), "2:4", layer=7))},
    "weights": {"model": lambda: _other_weights()},
}


def _other_weights():
    model = a_model()
    model[0].weight.data[0, 0] += 1.0
    return model


@pytest.mark.parametrize("name", OTHERS)
def test_the_run_of_another_is_refused(tmp_path, name):
    trainer = a_trainer(tmp_path)
    trainer.run(2, progress=False)
    trainer.close()
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    arguments = {key: value() if key == "model" else value for key, value in OTHERS[name].items()}
    other = a_trainer(tmp_path, **arguments)
    before = logits_of(other.model)
    with pytest.raises(ValueError, match=f"output_dir: expected a run with {name} "):
        other.resume()
    assert_equal_logits(logits_of(other.model), before)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files


# Batches without a tensor, and others that differ in one thing
PLAIN = {
    "a number": ([[0, 1], [2, 3]], [[0, 1], [2, 4]]),
    "a string": (["cat", "dog"], ["cat", "cow"]),
    "a key": ([{"x": 0, "y": 1}], [{"x": 0, "z": 1}]),
    "an array": ([np.arange(4)], [np.arange(1, 5)]),
    "a dtype": ([np.zeros(2, np.int32)], [np.zeros(2, np.float32)]),
    "where a list begins": ([[1, [2]]], [[[1], 2]]),
    "a tensor's key": ([{"x": torch.ones(2)}], [{"y": torch.ones(2)}]),
    "a tensor beside an object": ([(torch.ones(2), object())], [(torch.zeros(2), object())]),
}


@pytest.mark.parametrize("name", PLAIN)
def test_the_run_of_other_batches_is_refused(tmp_path, name):
    def of(batches):
        trainer = a_trainer(tmp_path, batches=batches)
        trainer.loss_fn = lambda model, _: model(torch.ones(5, 16)).square().mean()
        return trainer

    batches, others = PLAIN[name]
    trainer = of(batches)
    trainer.run(2, progress=False)
    trainer.close()
    with pytest.raises(ValueError, match="^output_dir: expected a run with batch(es|_contents) of this trainer"):
        of(others).resume()
    assert of(copy.deepcopy(batches)).resume() == 2


def test_what_cannot_be_resumed(tmp_path):
    with pytest.raises(ValueError, match="output_dir: expected the folder of a run, got none"):
        a_trainer(None).resume()
    with pytest.raises(ValueError, match="output_dir: expected a folder with a journal"):
        a_trainer(tmp_path / "none").resume()
    with pytest.raises(ValueError, match="output_dir: expected a folder with snapshots"):
        a_trainer(tmp_path / "none", "straight-through").resume()
    assert not (tmp_path / "none").exists()
    trainer = a_trainer(tmp_path / "run")
    trainer.step()
    with pytest.raises(ValueError, match="resume: expected a trainer that has taken no step"):
        trainer.resume()
    for name, value in {"snapshot_minutes": -1, "max_skipped": -1}.items():
        with pytest.raises(ValueError, match=f"{name}: expected"):
            a_trainer(tmp_path / "other", **{name: value})


@pytest.mark.parametrize("failing", ["journal", "snapshot"])
def test_a_full_disk_stops_the_run_and_loses_nothing(tmp_path, monkeypatch, failing):
    trainer = a_trainer(tmp_path, snapshot_minutes=0.0)
    trainer.run(3, progress=False)
    before = logits_of(trainer.model)

    def full(*_):
        raise OSError(28, "No space left on device")

    if failing == "journal":
        monkeypatch.setattr(Journal, "append", full)
    else:
        monkeypatch.setattr(snapshots, "write_whole", full)
    with pytest.raises(OSError, match="No space left"):
        trainer.step()
    trainer.close()
    if failing == "journal":
        assert_equal_logits(logits_of(trainer.model), before)
    monkeypatch.undo()
    ops_are_eager = pytest.MonkeyPatch()

    route_to_the_eager_reference(ops_are_eager)
    try:
        again = a_trainer(tmp_path)
        assert again.resume() == (3 if failing == "journal" else 4)
        again.run(7 - again.steps_done, progress=False)
        whole = a_trainer(tmp_path / "whole")
        whole.run(7, progress=False)
        assert_equal_logits(logits_of(again.model), logits_of(whole.model))
    finally:
        ops_are_eager.undo()


def test_one_trainer_at_a_time(tmp_path):
    first = a_trainer(tmp_path)
    first.step()
    for other in (a_trainer(tmp_path), a_trainer(tmp_path)):
        with pytest.raises(ValueError, match="output_dir: expected a folder that no other trainer holds"):
            other.resume()
    first.close()
    with pytest.raises(RuntimeError, match="step: expected a trainer whose last step has ended and that is not closed"):
        first.step()
    assert other.resume() == 1


def test_what_a_start_left_that_was_broken_off_is_removed(tmp_path):
    """A snapshot of other logits must not be taken for that of the run."""

    def killed(*_):
        raise KeyboardInterrupt

    for gap in (3.0, 4.0, 5.0):
        other = a_trainer(tmp_path, model=a_model(gap))
        other._losses_of_initial_masks = killed
        with pytest.raises(KeyboardInterrupt):
            other.step()
        other.close()
    (tmp_path / "snapshot-x.safetensors.tmp").touch()
    trainer = a_trainer(tmp_path)
    trainer.step()
    assert len(snapshots.snapshots_in(tmp_path)) == 1 and not list(tmp_path.glob("*.tmp"))
    trainer.close()
    save_snapshot(tmp_path, 1, dict(zip("02", logits_of(a_model(9.0)), strict=True)), {"run": {"seed": 11}})
    again = a_trainer(tmp_path)
    with pytest.warns(UserWarning, match="set aside"):
        assert again.resume() == 1
    assert_equal_logits(logits_of(again.model), logits_of(trainer.model))


@pytest.mark.parametrize("how", ["reinforce", "straight-through"])
def test_what_was_learned_is_not_what_a_start_left(tmp_path, how):
    """Snapshots of steps are of a run, also where all its other files are lost."""
    trainer = a_trainer(tmp_path, how)
    trainer.run(3, progress=False)
    trainer.close()
    for name in ("journal", "metrics.jsonl"):
        (tmp_path / name).unlink(missing_ok=True)
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="^output_dir: expected a folder without a run, or resume"):
        a_trainer(tmp_path, how).step()
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files
    if how == "straight-through":
        again = a_trainer(tmp_path, how)
        assert again.resume() == 3
        assert_equal_logits(logits_of(again.model), logits_of(trainer.model))


def test_a_run_that_another_trainer_has_had_meanwhile_is_not_removed(tmp_path, monkeypatch):
    lock, folder = run_folder.RunFolder._acquire, tmp_path / "run"
    a_trainer(tmp_path / "other", "straight-through").run(2, progress=False)

    def late(own):
        shutil.copytree(tmp_path / "other", folder, dirs_exist_ok=True)
        lock(own)

    with monkeypatch.context() as patched:
        patched.setattr(run_folder.RunFolder, "_acquire", late)
        with pytest.raises(ValueError, match="^output_dir: expected a folder without a run, or resume"):
            a_trainer(folder, "straight-through").begin()
    assert a_trainer(folder, "straight-through").resume() == 2


def test_what_a_killed_process_had_half_written_is_removed(tmp_path):
    trainer = a_trainer(tmp_path, "refreshed")
    trainer.run(10, progress=False)
    trainer.close()
    left = [tmp_path / "snapshot-0000000011-x.safetensors.tmp", tmp_path / "initial-losses" / "snapshot-x.tmp"]
    for path in left:
        path.write_bytes(b"half")
    with pytest.raises(ValueError, match="^output_dir: expected a run with seed 12"):
        a_trainer(tmp_path, "refreshed", seed=12).resume()
    assert all(path.exists() for path in left)
    assert a_trainer(tmp_path, "refreshed").resume() == 10
    assert not any(path.exists() for path in left)


def test_the_names_of_new_folders_are_on_disk(tmp_path, monkeypatch):
    sync, done = os.fsync, []

    def synced(descriptor):
        done.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", synced)
    a_trainer(tmp_path / "deep" / "run").begin()
    assert done[:2] == [tmp_path, tmp_path / "deep"]


def test_what_lies_beyond_a_resumed_step_does_not_push_out_new_snapshots(tmp_path):
    trainer = a_trainer(tmp_path, "straight-through", snapshot_minutes=0.0)
    trainer.run(9, progress=False)
    trainer.close()
    for path in snapshots.snapshots_in(tmp_path)[1:]:
        path.write_bytes(path.read_bytes()[:-1])
    again = a_trainer(tmp_path, "straight-through")
    with pytest.warns(UserWarning, match="set aside"):
        assert again.resume() == 0
    again.run(5, progress=False)
    again.close()
    last = a_trainer(tmp_path, "straight-through")
    assert last.resume() == 5
    assert_equal_logits(logits_of(last.model), logits_of(again.model))


@pytest.mark.parametrize("damage", ["torn", "missing", "not utf-8", "gone"])
def test_metrics_are_mended_from_the_journal(tmp_path, damage):
    trainer = a_trainer(tmp_path)
    records = trainer.run(4, progress=False)
    trainer.close()
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    content = {
        "torn": b"".join(lines[:3]) + lines[3][:9],
        "missing": b"".join(lines[:1] + lines[2:]),
        "not utf-8": b"".join(lines[:2]) + b"\xff\xfe\n" + lines[3],
        "gone": b"",
    }[damage]
    path.write_bytes(content)
    again = a_trainer(tmp_path)
    assert again.resume() == 4
    again.step()
    mended = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["step"] for row in mended] == [0, 1, 2, 3, 4]
    for row, record in zip(mended, records, strict=False):
        for name in ("loss", "residual", "advantage", "tracker", "tokens"):
            assert row[name] == getattr(record, name)


def test_a_step_that_was_interrupted_in_its_update_is_the_last(tmp_path, monkeypatch):
    whole = a_trainer(tmp_path / "whole")
    whole.run(6, progress=False)
    trainer = a_trainer(tmp_path / "run")
    trainer.run(3, progress=False)
    real, moved = score_updates.score_update_, []

    def interrupted(*args, **kwargs):
        if moved:
            raise KeyboardInterrupt
        moved.append(real(*args, **kwargs))

    with monkeypatch.context() as patched:
        patched.setattr(score_updates, "score_update_", interrupted)
        with pytest.raises(KeyboardInterrupt):
            trainer.step()
    with pytest.raises(RuntimeError, match="step: expected a trainer whose last step has ended"):
        trainer.step()
    trainer.close()
    again = a_trainer(tmp_path / "run")
    assert again.resume() == 4
    again.run(2, progress=False)
    assert_equal_logits(logits_of(again.model), logits_of(whole.model))


def spoiled(folder, how, bad, max_skipped=0):
    """A trainer with losses that are not finite in these steps."""
    trainer = a_trainer(folder, how, max_skipped=max_skipped)
    finite = trainer.loss_fn

    def loss_fn(model, batch):
        drawing = any(layer.training for layer in trainer.layers.values())
        return finite(model, batch) * (torch.nan if drawing and trainer.steps_done in bad else 1.0)

    trainer.loss_fn = loss_fn
    return trainer


def test_losses_that_are_not_finite_are_skipped_and_counted(tmp_path):
    trainer = spoiled(tmp_path, "reinforce", (2, 3), 2)
    records = trainer.run(6, progress=False)
    assert [math.isnan(record.loss) for record in records] == [False, False, True, True, False, False]
    assert [one.skipped for one in journal.read(tmp_path / "journal")[1]] == [False, False, True, True, False, False]
    trainer.close()
    again = a_trainer(tmp_path)
    assert again.resume() == 6 and again.estimator.delta == trainer.estimator.delta
    assert_equal_logits(logits_of(again.model), logits_of(trainer.model))

    other = spoiled(tmp_path / "other", "reinforce", (1, 2, 3), 1)
    with pytest.raises(FloatingPointError, match="loss of step 2: expected a finite number, got nan, after 1 others"):
        other.run(6, progress=False)
    assert other.steps_done == 3


@pytest.mark.parametrize("how", ["reinforce", "straight-through"])
def test_a_run_goes_on_behind_a_loss_that_is_not_finite(tmp_path, how):
    """Whether the run bears it or ends there and is resumed: the step moves nothing and is not taken again."""
    borne = spoiled(tmp_path / "borne", how, {2}, 1)
    borne.run(2, progress=False)
    before = logits_of(borne.model)
    assert math.isnan(borne.step().loss)
    assert_equal_logits(logits_of(borne.model), before)
    records = borne.run(3, progress=False)

    ended = spoiled(tmp_path / "ended", how, {2})
    with pytest.raises(FloatingPointError, match="loss of step 2: expected a finite number, got nan$"):
        ended.run(6, progress=False)
    assert ended.steps_done == 3 and not ended.broken
    ended.close()
    again = spoiled(tmp_path / "ended", how, {2})
    assert again.resume() == 3
    assert [one.loss for one in again.run(3, progress=False)] == [one.loss for one in records]
    assert_equal_logits(logits_of(again.model), logits_of(borne.model))


@pytest.mark.parametrize("how", ["reinforce", "straight-through"])
def test_a_resumed_run_counts_on_with_the_losses_that_were_not_finite(tmp_path, how):
    first = spoiled(tmp_path, how, {1, 2, 3, 4}, 2)
    first.run(3, progress=False)
    first.close()
    for step, others in ((3, 2), (4, 3)):
        again = spoiled(tmp_path, how, {1, 2, 3, 4}, 2)
        assert again.resume() == step
        with pytest.raises(FloatingPointError, match=f"loss of step {step}: .*, after {others} others in a row"):
            again.run(2, progress=False)
        again.close()
    last = spoiled(tmp_path, how, {6, 7}, 2)
    assert last.resume() == 5
    # a finite one begins a new row
    assert [math.isnan(one.loss) for one in last.run(3, progress=False)] == [False, True, True]


def test_an_error_between_two_updates_loses_no_step(tmp_path):
    whole = a_trainer(tmp_path / "whole", "straight-through")
    whole.run(6, progress=False)
    trainer = a_trainer(tmp_path / "run", "straight-through")
    finite = trainer.loss_fn

    def interrupted(model, batch):
        if trainer.steps_done == 3:
            raise KeyboardInterrupt
        return finite(model, batch)

    trainer.loss_fn = interrupted
    with pytest.raises(KeyboardInterrupt):
        trainer.run(6, progress=False)
    assert not trainer.broken
    trainer.close()
    again = a_trainer(tmp_path / "run", "straight-through")
    assert again.resume() == 3
    again.run(3, progress=False)
    assert_equal_logits(logits_of(again.model), logits_of(whole.model))


def test_a_disk_that_is_full_as_well_hides_no_error(tmp_path, monkeypatch):
    trainer = spoiled(tmp_path, "straight-through", {2})
    trainer.begin()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(snapshots, "write_whole", full)
    with pytest.raises(FloatingPointError, match="loss of step 2"):
        trainer.run(6, progress=False)


@pytest.mark.parametrize("how", ["reinforce", "straight-through"])
@pytest.mark.parametrize("where", ["in its update", "behind its update"])
def test_logits_that_are_not_those_of_the_count_are_told(tmp_path, monkeypatch, how, where):
    whole = a_trainer(tmp_path / "whole", how)
    whole.run(5, progress=False)
    trainer = a_trainer(tmp_path / "run", how)
    trainer.run(2, progress=False)
    files = sorted(tmp_path.glob("run/snapshot-*"))
    move, moved = mk.MaskedLinear.moving_logits, []

    def interrupted(*args, **_):
        if where == "in its update" and not moved:
            moved.append(args)
            return move(*args)
        raise KeyboardInterrupt

    before = logits_of(trainer.model)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        if where == "in its update":
            patched.setattr(mk.MaskedLinear, "moving_logits", interrupted)
        else:
            patched.setattr(training, "StepRecord", interrupted)
        trainer.run(3, progress=False)
    assert any(not torch.equal(*pair) for pair in zip(before, logits_of(trainer.model), strict=True))
    assert trainer.broken and trainer.steps_done == 2
    assert sorted(tmp_path.glob("run/snapshot-*")) == files
    with pytest.raises(RuntimeError, match="step: expected a trainer whose last step has ended"):
        trainer.step()
    trainer.close()
    again = a_trainer(tmp_path / "run", how)
    assert again.resume() == (2 if how == "straight-through" else 3)
    assert not again.broken
    again.run(5 - again.steps_done, progress=False)
    assert_equal_logits(logits_of(again.model), logits_of(whole.model))


# Steps of the run "refreshed" whose losses are half of those under the initial masks
HALVED = [4, 16]


def broken_off(trainer: mk.MaskTrainer, where: str, patched: pytest.MonkeyPatch) -> None:
    """Let a run end at some moment between a step of half the loss and the record of the next."""

    def broken(*_, **__):
        raise KeyboardInterrupt

    def behind(real):
        def called(*args):
            real(*args)
            raise KeyboardInterrupt

        return called

    def only(real, when, instead):
        return lambda *args: instead(*args) if when(*args) else real(*args)

    append, save, loss = Journal.append, run_folder.save_snapshot, trainer.loss_fn
    layer = trainer.layers["0"]
    if where == "before its record":
        patched.setattr(Journal, "append", only(append, lambda _, one: one.step == HALVED[0], broken))
    elif where == "before its update":
        patched.setattr(Journal, "append", only(append, lambda _, one: one.step == HALVED[0], behind(append)))
    elif where == "in its update":
        patched.setattr(
            reinforce, "replay", only(score_updates.replay, lambda *args: args[2].step == HALVED[0], broken)
        )
    elif where == "in a forward of the new masks":
        last = trainer.batches[-1]
        trainer.loss_fn = only(loss, lambda _, b: trainer.steps_done and not layer.training and b is last, broken)
    elif where == "before the losses are on disk":
        patched.setattr(run_folder, "save_snapshot", only(save, lambda folder, *_: "losses" in folder.name, broken))
    elif where == "behind them":
        losses_alone = only(save, lambda folder, *_: "losses" in folder.name, behind(save))
        patched.setattr(run_folder, "save_snapshot", losses_alone)
    elif where == "in the forward of the next step":
        trainer.loss_fn = only(loss, lambda *_: layer.training and trainer.steps_done == HALVED[0] + 1, broken)
    elif where == "before the next record":
        patched.setattr(Journal, "append", only(append, lambda _, one: one.step == HALVED[0] + 1, broken))


@pytest.mark.parametrize(
    ("where", "steps"),
    [
        ("before its record", 4),
        ("before its update", 5),
        ("in its update", 5),
        ("in a forward of the new masks", 5),
        ("before the losses are on disk", 5),
        ("behind them", 5),
        ("in the forward of the next step", 5),
        ("before the next record", 5),
    ],
)
def test_a_run_broken_off_while_its_initial_masks_are_refreshed(tmp_path, where, steps):
    whole = a_trainer(tmp_path / "whole", "refreshed")
    records = whole.run(20, progress=False)
    assert [one.step for one in records if one.loss <= (one.loss - one.residual) / 2] == HALVED
    trainer = a_trainer(tmp_path / "run", "refreshed")
    with pytest.MonkeyPatch.context() as patched:
        broken_off(trainer, where, patched)
        with pytest.raises(KeyboardInterrupt):
            trainer.run(20, progress=False)
    trainer.close()
    again = a_trainer(tmp_path / "run", "refreshed")
    assert again.resume() == steps
    rest = again.run(20 - steps, progress=False)
    assert [(r.loss, r.residual, r.tracker) for r in rest] == [(r.loss, r.residual, r.tracker) for r in records[steps:]]
    assert_equal_logits(logits_of(again.model), logits_of(whole.model))
    # the journal alone tells the logits
    header, entries, _ = journal.read(tmp_path / "run" / "journal")
    replayed = a_trainer(None, "refreshed")
    for one in entries:
        score_updates.replay(replayed.layers, header["run"]["seed"], one)
    assert_equal_logits(logits_of(replayed.model), logits_of(whole.model))


def test_losses_under_refreshed_masks_are_read_not_computed(tmp_path):
    trainer = a_trainer(tmp_path, "refreshed")
    trainer.run(10, progress=False)
    expected = trainer._initial_losses.losses
    trainer.close()
    again = a_trainer(tmp_path, "refreshed")
    assert again.resume() == 10
    again.loss_fn = None
    assert again._losses_of_initial_masks(progress=False) == expected
    again.close()
    (path,) = snapshots.snapshots_in(tmp_path / "initial-losses")
    path.write_bytes(path.read_bytes()[:-1])
    damaged = a_trainer(tmp_path, "refreshed")
    before = logits_of(damaged.model)
    with pytest.raises(ValueError, match="^output_dir: expected the initial losses from step 5 on in .*, got none or"):
        damaged.resume()
    assert_equal_logits(logits_of(damaged.model), before)


@pytest.mark.parametrize("damage", ["record", "losses"])
def test_what_a_refresh_left_is_not_trusted(tmp_path, damage):
    """The last record may be damaged where the losses that it asked for are there already, and they themselves."""
    whole = a_trainer(tmp_path / "whole", "refreshed")
    whole.run(20, progress=False)
    trainer = a_trainer(tmp_path / "run", "refreshed")
    trainer.run(HALVED[1] + 1, progress=False)
    trainer._losses_of_initial_masks(progress=False)
    trainer.close()
    first, second = snapshots.snapshots_in(tmp_path / "run" / "initial-losses")
    assert [snapshots.step_of(path) for path in (first, second)] == [step + 1 for step in HALVED]
    if damage == "record":
        path = tmp_path / "run" / "journal"
        path.write_bytes(path.read_bytes()[:-1] + b"\x00")
    else:
        second.write_bytes(b"")
    again = a_trainer(tmp_path / "run", "refreshed")
    if damage == "record":
        with pytest.warns(UserWarning, match="taken again"):
            assert again.resume() == HALVED[1]
    else:
        assert again.resume() == HALVED[1] + 1
    again.run(20 - again.steps_done, progress=False)
    assert_equal_logits(logits_of(again.model), logits_of(whole.model))


def test_the_losses_before_the_last_refresh_are_kept(tmp_path):
    def a_run(folder):
        trainer = a_trainer(folder, "refreshed")
        real = trainer.loss_fn
        # less than half of what it was at the step before: every other step has a refresh behind it
        trainer.loss_fn = lambda model, batch: real(model, batch) * 0.1**trainer.steps_done
        return trainer

    whole = a_run(tmp_path / "whole")
    whole.run(9, progress=False)
    trainer = a_run(tmp_path / "run")
    trainer.run(6, progress=False)
    trainer._losses_of_initial_masks(progress=False)
    trainer.close()
    path = tmp_path / "run" / "journal"
    path.write_bytes(path.read_bytes()[:-1])
    again = a_run(tmp_path / "run")
    with pytest.warns(UserWarning, match="taken again"):
        assert again.resume() == 5
    again.run(4, progress=False)
    kept = snapshots.snapshots_in(tmp_path / "whole" / "initial-losses")
    assert [snapshots.step_of(one) for one in kept] == [2, 6, 8]
    assert_equal_logits(logits_of(again.model), logits_of(whole.model))


def test_what_a_start_left_of_refreshed_masks_is_removed(tmp_path):
    trainer = a_trainer(tmp_path, "refreshed")
    trainer.run(10, progress=False)
    trainer.close()
    for left in (*snapshots.snapshots_in(tmp_path)[1:], tmp_path / "journal", tmp_path / "metrics.jsonl"):
        left.unlink()
    a_trainer(tmp_path, "refreshed").step()
    assert not snapshots.snapshots_in(tmp_path / "initial-losses")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", ["reinforce", "several draws"])
def test_logits_of_16_bits_are_rounded_alike_in_a_replay(tmp_path, how, dtype):
    def model():
        torch.manual_seed(0)
        plain = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
        mk.convert(plain, "4:8", gap=2.0, logits_dtype=dtype)
        return plain

    trainer = a_trainer(tmp_path, how, model())
    for _ in range(6):
        trainer.step()
    trainer.close()
    again = a_trainer(tmp_path, how, model())
    assert again.resume() == 6
    assert_equal_logits(logits_of(again.model), logits_of(trainer.model))


CHILD = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from tests.training.test_journal import a_trainer
folder = Path(sys.argv[1])
trainer = a_trainer(folder, sys.argv[2], snapshot_minutes=0.0)
if (folder / "journal").exists() if sys.argv[2] == "reinforce" else list(folder.glob("snapshot-*.safetensors")):
    trainer.resume()
print("ready", flush=True)
while trainer.steps_done < {steps}:
    trainer.step()
print("done", flush=True)
"""


def killed_until_done(folder: Path, how: str, kills: int, steps: int) -> int:
    """Run a trainer in processes that are killed at random moments, as often as asked for; gives how often it was."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(kills)
    code = CHILD.format(steps=steps)
    killed = 0
    while True:
        child = subprocess.Popen(
            [sys.executable, "-c", code, str(folder), how], stdout=subprocess.PIPE, text=True, env=environment()
        )
        assert child.stdout.readline() == "ready\n"
        if killed < kills:
            time.sleep(float(torch.rand((), generator=generator)) * 0.05)
            child.send_signal(signal.SIGKILL)
            child.wait()
            killed += 1
        else:
            assert child.stdout.readline() == "done\n" and child.wait() == 0
            return killed


@pytest.mark.parametrize("how", ["reinforce", "straight-through"])
@pytest.mark.parametrize("kills", [3, pytest.param(50, marks=pytest.mark.slow)])
def test_a_run_killed_again_and_again_has_the_bits_of_a_whole_one(tmp_path, how, kills):
    steps = 40 * kills
    assert killed_until_done(tmp_path / "killed", how, kills, steps) == kills
    assert killed_until_done(tmp_path / "whole", how, 0, steps) == 0
    tensors = [newest_snapshot(tmp_path / name)[:2] for name in ("killed", "whole")]
    assert tensors[0][0] == tensors[1][0] == steps
    killed, whole = (digest(of[1][name] for name in sorted(of[1])) for of in tensors)
    assert killed == whole
