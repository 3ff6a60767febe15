"""Journal and snapshots: every damage is found, and a run that was killed goes on to the bits of one that was not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_trainer import a_model, assert_equal_logits, logits_of, some_batches

import maskpro_kernels as mk
from maskpro_kernels import journal, snapshots
from maskpro_kernels.journal import Draw, Entry, Journal
from maskpro_kernels.snapshots import newest_snapshot, save_snapshot
from maskpro_kernels.trainer import digest

pytestmark = pytest.mark.usefixtures("eager_reference")

ESTIMATORS = {
    "reinforce": lambda: mk.Reinforce(lr=2.0, alpha=0.75),
    "normalized": lambda: mk.Reinforce(lr=2.0, alpha=0.75, normalize=True),
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
        save_snapshot(tmp_path, step, one, {"step": step, "square": 0.1 + step}, keep=2)
    step, read, state, damaged = newest_snapshot(tmp_path)
    assert (step, state, damaged) == (4, {"step": 4, "square": 4.1}, [])
    assert all(torch.equal(read[name], tensors[4][name]) for name in ("a", "b"))
    # the first and the last two are kept
    assert [newest_snapshot(tmp_path, at_most)[0] for at_most in range(5)] == [0, 0, 0, 3, 4]
    assert len(list(tmp_path.iterdir())) == 3


def test_every_byte_of_a_snapshot_flipped_is_found(tmp_path):
    save_snapshot(tmp_path, 0, {"a": torch.zeros(2)}, {"x": 1}, keep=2)
    path = save_snapshot(tmp_path, 3, {"a": torch.randn(4, 8)}, {"x": 1}, keep=2)
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
    with pytest.raises(ValueError, match="snapshot: expected a sound one in .*, got none, 2 are damaged"):
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
    newest = sorted(tmp_path.glob("run/snapshot-*"))[-1]
    newest.write_bytes(newest.read_bytes()[:-1])
    again = a_trainer(tmp_path / "run", how)
    assert again.resume() == (3 if how == "straight-through" else 6)
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
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    arguments = {key: value() if key == "model" else value for key, value in OTHERS[name].items()}
    other = a_trainer(tmp_path, **arguments)
    before = logits_of(other.model)
    with pytest.raises(ValueError, match=f"output_dir: expected a run with {name} "):
        other.resume()
    assert_equal_logits(logits_of(other.model), before)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files


def test_what_cannot_be_resumed(tmp_path):
    with pytest.raises(ValueError, match="output_dir: expected the folder of a run, got none"):
        a_trainer(None).resume()
    with pytest.raises(ValueError, match="output_dir: expected a folder with a journal"):
        a_trainer(tmp_path / "none").resume()
    with pytest.raises(ValueError, match="snapshot: expected a sound one"):
        a_trainer(tmp_path / "none", "straight-through").resume()
    trainer = a_trainer(tmp_path / "run")
    trainer.step()
    with pytest.raises(ValueError, match="resume: expected a trainer that has taken no step"):
        trainer.resume()
    for name, value in {"snapshot_minutes": -1, "snapshots": 0}.items():
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
    if failing == "journal":
        assert_equal_logits(logits_of(trainer.model), before)
    monkeypatch.undo()
    ops_are_eager = pytest.MonkeyPatch()
    from conftest import route_to_the_eager_reference

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


CHILD = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from test_journal import a_trainer
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
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TORCH_COMPILE_DISABLE": "1"}
    code = CHILD.format(tests=str(Path(__file__).parent), steps=steps)
    killed = 0
    while True:
        child = subprocess.Popen(
            [sys.executable, "-c", code, str(folder), how], stdout=subprocess.PIPE, text=True, env=environment
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
@pytest.mark.parametrize("kills", [10, pytest.param(50, marks=pytest.mark.slow)])
def test_a_run_killed_again_and_again_has_the_bits_of_a_whole_one(tmp_path, how, kills):
    steps = 40 * kills
    assert killed_until_done(tmp_path / "killed", how, kills, steps) == kills
    assert killed_until_done(tmp_path / "whole", how, 0, steps) == 0
    tensors = [newest_snapshot(tmp_path / name)[:2] for name in ("killed", "whole")]
    assert tensors[0][0] == tensors[1][0] == steps
    killed, whole = (digest(of[1][name] for name in sorted(of[1])) for of in tensors)
    assert killed == whole
