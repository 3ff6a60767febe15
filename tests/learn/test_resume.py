"""A run that was interrupted ends with the bits of one that was not."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.cases import slow
from helpers.in_ranks import LONGEST, forking
from helpers.small_trainer import a_trainer_in, logits_of, loss_fn

import maskpro_kernels as mk
from maskpro_kernels.files import digest
from maskpro_kernels.learn import model_masks
from maskpro_kernels.learn.estimator import StepResult
from maskpro_kernels.learn.offload import OffloadedLogits
from maskpro_kernels.learn.snapshots import newest_snapshot, snapshots_in
from maskpro_kernels.ops import dispatch
from maskpro_kernels.ops.layer_groups import LayerGroup, update_layers_

pytestmark = pytest.mark.usefixtures("eager_reference")

# One that keeps each kind of state
WAYS = ["reinforce", "normalized", "refreshed", "three draws", "straight-through"]


@pytest.mark.parametrize("how", WAYS)
def test_a_resumed_run_has_the_bits_of_a_whole_one(tmp_path, how):
    whole = a_trainer_in(tmp_path / "whole", how, snapshot_minutes=0.0)
    records = whole.run(9, progress=False)
    first = a_trainer_in(tmp_path / "run", how)
    first.run(4, progress=False)
    if how != "straight-through":
        # after the last snapshot, in the journal alone
        for _ in range(2):
            first.step()
    first.close()
    second = a_trainer_in(tmp_path / "run", how)
    steps = second.resume()
    assert steps == (4 if how == "straight-through" else 6)
    assert_same_bits(logits_of(second.model), logits_of(first.model))
    rest = second.run(9 - steps, progress=False)
    assert_same_bits(logits_of(second.model), logits_of(whole.model))
    assert [r.loss for r in rest] == [r.loss for r in records[steps:]]
    assert [r.advantage for r in rest] == [r.advantage for r in records[steps:]]
    lines = [(tmp_path / name / "metrics.jsonl").read_text().count("\n") for name in ("run", "whole")]
    assert lines == [9, 9]


def learn_in_a_process(folder: Path, minutes: float, killed_in: int | None) -> None:
    """Take the remaining of 9 steps; add a line to a file for each forward, and be killed in that of a step."""

    def loss(model, batch):
        drawing = model[0].training
        with open(folder.with_suffix(".forwards"), "a", encoding="utf-8") as file:
            file.write("drawn\n" if drawing else "initial\n")
        if drawing and trainer.steps_done == killed_in:
            os.kill(os.getpid(), signal.SIGKILL)
        return loss_fn(model, batch)

    torch.set_num_threads(1)
    trainer = a_trainer_in(folder, loss_fn=loss, snapshot_minutes=minutes)
    if folder.exists():
        trainer.resume()
    trainer.run(9 - trainer.steps_done, progress=False)


# of the journal, and of the last snapshot
@pytest.mark.parametrize("minutes", [10.0, slow(0.0)])
def test_a_killed_run_keeps_the_losses_under_its_initial_masks(tmp_path, minutes):
    run = tmp_path / "run"
    whole = tmp_path / "whole"
    forwards = []
    with forking() as context:
        for folder, killed_in in ((whole, None), (run, 5), (run, None)):
            process = context.Process(target=learn_in_a_process, args=(folder, minutes, killed_in))
            process.start()
            process.join(LONGEST)
            assert process.exitcode == (0 if killed_in is None else -signal.SIGKILL)
            forwards.append(folder.with_suffix(".forwards").read_text(encoding="utf-8").split())
    # three batches; the sixth step ended within its forward
    initial = ["initial"] * 3
    assert forwards == [initial + ["drawn"] * 9, initial + ["drawn"] * 6, initial + ["drawn"] * 10]
    resumed = a_trainer_in(run)
    unbroken = a_trainer_in(whole)
    assert resumed.resume() == unbroken.resume() == 9
    assert_same_bits(logits_of(resumed.model), logits_of(unbroken.model))
    for name in ("loss", "residual", "tracker"):
        assert [row[name] for row in resumed.metrics] == [row[name] for row in unbroken.metrics]


@pytest.mark.parametrize("how", ["reinforce", "straight-through", *map(slow, WAYS[1:-1])])
def test_a_damaged_snapshot_is_passed_over(tmp_path, how):
    whole = a_trainer_in(tmp_path / "whole", how)
    whole.run(6, progress=False)
    trainer = a_trainer_in(tmp_path / "run", how)
    trainer.run(3, progress=False)
    trainer.run(3, progress=False)
    trainer.close()
    newest = sorted(tmp_path.glob("run/snapshot-*"))[-1]
    newest.write_bytes(newest.read_bytes()[:-1])
    again = a_trainer_in(tmp_path / "run", how)
    with pytest.warns(UserWarning, match="is damaged or of steps that are taken again: it is set aside"):
        assert again.resume() == (3 if how == "straight-through" else 6)
    assert newest.with_suffix(".aside").exists() and not newest.exists()
    if again.steps_done < 6:
        again.run(3, progress=False)
    assert_same_bits(logits_of(again.model), logits_of(whole.model))


def test_what_cannot_be_resumed(tmp_path):
    with pytest.raises(ValueError, match="output_dir: expected the folder of a run, got none"):
        a_trainer_in(None).resume()
    with pytest.raises(ValueError, match="output_dir: expected a folder with a journal"):
        a_trainer_in(tmp_path / "none").resume()
    with pytest.raises(ValueError, match="output_dir: expected a folder with snapshots"):
        a_trainer_in(tmp_path / "none", "straight-through").resume()
    assert not (tmp_path / "none").exists()
    trainer = a_trainer_in(tmp_path / "run")
    trainer.step()
    with pytest.raises(ValueError, match="resume: expected a trainer that has taken no step"):
        trainer.resume()
    for name, value in {"snapshot_minutes": -1, "max_skipped": -1}.items():
        with pytest.raises(ValueError, match=f"{name}: expected"):
            a_trainer_in(tmp_path / "other", **{name: value})


def test_what_lies_beyond_a_resumed_step_does_not_push_out_new_snapshots(tmp_path):
    trainer = a_trainer_in(tmp_path, "straight-through", snapshot_minutes=0.0)
    trainer.run(9, progress=False)
    trainer.close()
    for path in snapshots_in(tmp_path)[1:]:
        path.write_bytes(path.read_bytes()[:-1])
    again = a_trainer_in(tmp_path, "straight-through")
    with pytest.warns(UserWarning, match="set aside"):
        assert again.resume() == 0
    again.run(5, progress=False)
    again.close()
    last = a_trainer_in(tmp_path, "straight-through")
    assert last.resume() == 5
    assert_same_bits(logits_of(last.model), logits_of(again.model))


@pytest.mark.parametrize("how", ["reinforce", "normalized"])
@pytest.mark.parametrize("damage", ["torn", "missing", "not utf-8", "gone", "gone, and the first snapshot"])
def test_lost_lines_of_metrics_come_from_the_journal(tmp_path, damage, how):
    trainer = a_trainer_in(tmp_path, how)
    records = trainer.run(1, progress=False)
    records += [trainer.step() for _ in range(3)]
    trainer.close()
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    content = {
        "torn": b"".join(lines[:3]) + lines[3][:9],
        "missing": b"".join(lines[:1] + lines[2:]),
        "not utf-8": b"".join(lines[:2]) + b"\xff\xfe\n" + lines[3],
    }.get(damage, b"")
    path.write_bytes(content)
    without_first = damage.endswith("the first snapshot")
    if without_first:
        first = snapshots_in(tmp_path)[0]
        first.write_bytes(first.read_bytes()[:-1])
    again = a_trainer_in(tmp_path, how)
    unknown = "figures" if without_first else "flip rates and seconds"
    with pytest.warns(UserWarning, match=f"no intact lines of . of 4 steps, .*: their {unknown} are unknown, nan"):
        assert again.resume() == 4
    again.step()
    mended = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["step"] for row in mended] == [0, 1, 2, 3, 4]
    for row, record in zip(mended, records, strict=False):
        assert row["tokens"] == record.tokens
        if without_first and row["step"] == 0:
            # before the newest snapshot
            assert math.isnan(row["loss"])
            continue
        for name in ("loss", "residual", "advantage", "tracker"):
            assert row[name] == getattr(record, name)
    sound = {"torn": 3, "missing": 3, "not utf-8": 3}.get(damage, 0)
    assert sum(not math.isnan(row["flip_rate"]) for row in mended[:4]) == sound


def test_steps_that_a_journal_has_lost_are_taken_again(tmp_path):
    """Cut between two records it looks whole."""
    trainer = a_trainer_in(tmp_path)
    trainer.run(2, progress=False)
    length = (tmp_path / "journal").stat().st_size
    for _ in range(3):
        trainer.step()
    trainer.close()
    with open(tmp_path / "journal", "r+b") as file:
        file.truncate(length)
    again = a_trainer_in(tmp_path)
    assert again.resume() == 2
    again.run(3, progress=False)
    assert_same_bits(logits_of(again.model), logits_of(trainer.model))


def interrupted_update(group, *args):
    """Of the logits of all layers, once the first one has moved."""
    *how, _ = args
    update_layers_(LayerGroup(group.layers[:1], group.n, group.m), *how)
    raise KeyboardInterrupt


def test_an_error_between_two_updates_loses_no_step(tmp_path):
    whole = a_trainer_in(tmp_path / "whole", "straight-through")
    whole.run(6, progress=False)
    trainer = a_trainer_in(tmp_path / "run", "straight-through")
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
    again = a_trainer_in(tmp_path / "run", "straight-through")
    assert again.resume() == 3
    again.run(3, progress=False)
    assert_same_bits(logits_of(again.model), logits_of(whole.model))


@pytest.mark.parametrize("how", ["reinforce", "straight-through"])
@pytest.mark.parametrize("where", ["in its update", "after its update"])
def test_logits_that_are_not_those_of_the_count_are_reported(tmp_path, monkeypatch, how, where):
    whole = a_trainer_in(tmp_path / "whole", how)
    whole.run(5, progress=False)
    trainer = a_trainer_in(tmp_path / "run", how)
    trainer.run(2, progress=False)
    files = sorted(tmp_path.glob("run/snapshot-*"))
    move, moved = OffloadedLogits.moving, []

    def interrupted(*args, **_):
        if where == "in its update" and not moved:
            moved.append(args)
            return move(*args)
        raise KeyboardInterrupt

    before = logits_of(trainer.model)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        if where == "in its update":
            patched.setattr(OffloadedLogits, "moving", interrupted)
            patched.setattr(model_masks, "update_layers_", interrupted_update)
        else:
            patched.setattr(StepResult, "record", interrupted)
        trainer.run(3, progress=False)
    assert any(not torch.equal(*pair) for pair in zip(before, logits_of(trainer.model), strict=True))
    assert trainer.broken and trainer.steps_done == 2
    assert sorted(tmp_path.glob("run/snapshot-*")) == files
    with pytest.raises(RuntimeError, match="step: expected an open trainer whose last step was complete"):
        trainer.step()
    trainer.close()
    again = a_trainer_in(tmp_path / "run", how)
    assert again.resume() == (2 if how == "straight-through" else 3)
    assert not again.broken
    again.run(5 - again.steps_done, progress=False)
    assert_same_bits(logits_of(again.model), logits_of(whole.model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, slow(torch.float16)])
@pytest.mark.parametrize("how", [slow("reinforce"), "three draws"])
def test_logits_of_16_bits_are_rounded_alike_in_a_replay(tmp_path, how, dtype):
    def model():
        torch.manual_seed(0)
        plain = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
        mk.convert(plain, "4:8", gap=2.0, logits_dtype=dtype)
        return plain

    trainer = a_trainer_in(tmp_path, how, model())
    for _ in range(6):
        trainer.step()
    trainer.close()
    again = a_trainer_in(tmp_path, how, model())
    assert again.resume() == 6
    assert_same_bits(logits_of(again.model), logits_of(trainer.model))


def take_steps(pipe, folder: Path, how: str, steps: int) -> None:
    """In a process of its own, on the routes that users get."""
    torch.set_num_threads(1)
    dispatch.interpreting = lambda: False
    trainer = a_trainer_in(folder, how, snapshot_minutes=0.0)
    if (folder / "journal").exists() if how == "reinforce" else list(folder.glob("snapshot-*.safetensors")):
        trainer.resume()
    pipe.send("ready")
    while trainer.steps_done < steps:
        trainer.step()
    pipe.send("done")


def killed_until_done(folder: Path, how: str, kills: int, steps: int) -> int:
    """Run a trainer in processes that are killed at random moments, as often as asked for; gives how often it was."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(kills)
    killed = 0
    with forking() as context:
        while True:
            ours, theirs = context.Pipe()
            child = context.Process(target=take_steps, args=(theirs, folder, how, steps), daemon=True)
            child.start()
            theirs.close()
            assert ours.poll(LONGEST) and ours.recv() == "ready"
            if killed < kills:
                time.sleep(float(torch.rand((), generator=generator)) * 0.05)
                child.kill()
                child.join()
                killed += 1
            else:
                assert ours.poll(LONGEST) and ours.recv() == "done"
                child.join()
                assert child.exitcode == 0
                return killed


@pytest.mark.parametrize(
    ("how", "kills"),
    [
        ("reinforce", 1),
        ("straight-through", 1),
        pytest.param("trained weights", 1, marks=pytest.mark.slow),
        *(
            pytest.param(how, 50, marks=pytest.mark.slow)
            for how in ("reinforce", "straight-through", "trained weights")
        ),
    ],
)
def test_a_run_killed_again_and_again_has_the_bits_of_a_whole_one(tmp_path, how, kills):
    steps = 40 * kills
    assert killed_until_done(tmp_path / "killed", how, kills, steps) == kills
    assert killed_until_done(tmp_path / "whole", how, 0, steps) == 0
    tensors = [newest_snapshot(tmp_path / name)[:2] for name in ("killed", "whole")]
    assert tensors[0][0] == tensors[1][0] == steps
    killed, whole = (digest(of[1][name] for name in sorted(of[1])) for of in tensors)
    assert killed == whole
