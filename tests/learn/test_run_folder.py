"""The folder of a run: it belongs to one trainer and one run, and holds nothing of a start that was interrupted."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.small_trainer import a_model, a_trainer_in, logits_of, some_batches

import maskpro_kernels as mk
from maskpro_kernels.learn import journal, run
from maskpro_kernels.learn.snapshots import save_snapshot, snapshots_in

pytestmark = pytest.mark.usefixtures("eager_reference")


OTHERS = {
    "seed": {"seed": 12},
    "estimator": {"estimator": mk.StraightThrough()},
    "settings": {"estimator": mk.Reinforce(lr=3.0, alpha=0.75)},
    "batches": {"batches": some_batches(2)},
    "layers": {"model": lambda: a_model().append(mk.MaskedLinear.from_linear(torch.nn.Linear(4, 4), "2:4", layer=7))},
    "weights": {"model": lambda: _other_weights()},
}


def name_of_snapshot(step):
    return f"snapshot-{step:010}-{0:032x}.safetensors"


def _other_weights():
    model = a_model()
    model[0].weight.data[0, 0] += 1.0
    return model


@pytest.mark.parametrize("name", OTHERS)
def test_the_run_of_another_is_refused(tmp_path, name):
    trainer = a_trainer_in(tmp_path)
    trainer.run(2, progress=False)
    trainer.close()
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    arguments = {key: value() if key == "model" else value for key, value in OTHERS[name].items()}
    other = a_trainer_in(tmp_path, **arguments)
    before = logits_of(other.model)
    with pytest.raises(ValueError, match=f"output_dir: expected a run with {name} "):
        other.resume()
    assert_same_bits(logits_of(other.model), before)
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
        trainer = a_trainer_in(tmp_path, batches=batches)
        trainer.loss_fn = lambda model, _: model(torch.ones(5, 16)).square().mean()
        return trainer

    batches, others = PLAIN[name]
    trainer = of(batches)
    trainer.run(2, progress=False)
    trainer.close()
    with pytest.raises(ValueError, match="^output_dir: expected a run with batches of this trainer"):
        of(others).resume()
    assert of(copy.deepcopy(batches)).resume() == 2


def test_one_trainer_at_a_time(tmp_path):
    first = a_trainer_in(tmp_path)
    first.step()
    for other in (a_trainer_in(tmp_path), a_trainer_in(tmp_path)):
        with pytest.raises(ValueError, match="output_dir: expected a folder that no open trainer uses"):
            other.resume()
    first.close()
    with pytest.raises(RuntimeError, match="step: expected an open trainer whose last step was complete"):
        first.step()
    assert other.resume() == 1


def test_files_of_an_interrupted_start_are_removed(tmp_path):
    """A snapshot of other logits must not pass as one of the run."""

    def killed(*_):
        raise KeyboardInterrupt

    for gap in (3.0, 4.0, 5.0):
        other = a_trainer_in(tmp_path, model=a_model(gap))
        other._losses_of_initial_masks = killed
        with pytest.raises(KeyboardInterrupt):
            other.step()
        other.close()
    half = tmp_path / f"{name_of_snapshot(0)}.{1:016x}.tmp"
    half.touch()
    trainer = a_trainer_in(tmp_path)
    trainer.step()
    assert len(snapshots_in(tmp_path)) == 1 and not half.exists()
    trainer.close()
    save_snapshot(tmp_path, 1, dict(zip("02", logits_of(a_model(9.0)), strict=True)), {"run": {"seed": 11}})
    again = a_trainer_in(tmp_path)
    with pytest.warns(UserWarning, match="set aside"):
        assert again.resume() == 1
    assert_same_bits(logits_of(again.model), logits_of(trainer.model))


@pytest.mark.parametrize("how", ["reinforce", "straight-through"])
def test_what_was_learned_is_not_what_a_start_left(tmp_path, how):
    """Snapshots of steps are of a run, also where all its other files are lost."""
    trainer = a_trainer_in(tmp_path, how)
    trainer.run(3, progress=False)
    trainer.close()
    for name in ("journal", "metrics.jsonl"):
        (tmp_path / name).unlink(missing_ok=True)
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="^output_dir: expected a folder without a run, got .*resume"):
        a_trainer_in(tmp_path, how).step()
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files
    if how == "straight-through":
        again = a_trainer_in(tmp_path, how)
        assert again.resume() == 3
        assert_same_bits(logits_of(again.model), logits_of(trainer.model))


def test_what_a_killed_process_had_half_written_is_removed(tmp_path):
    trainer = a_trainer_in(tmp_path, "refreshed")
    trainer.run(10, progress=False)
    trainer.close()
    snapshot, part = name_of_snapshot(11), f".{1:016x}.tmp"
    left = [tmp_path / f"{name}{part}" for name in (snapshot, "journal", "metrics.jsonl")]
    for path in left:
        path.write_bytes(b"half")
    with pytest.raises(ValueError, match="^output_dir: expected a run with seed 12"):
        a_trainer_in(tmp_path, "refreshed", seed=12).resume()
    assert all(path.exists() for path in left)
    assert a_trainer_in(tmp_path, "refreshed").resume() == 10
    assert not any(path.exists() for path in left)


@pytest.mark.parametrize("how", ["reinforce", "straight-through"])
def test_files_of_a_user_stay(tmp_path, how):
    own = [tmp_path / name for name in (".tmpnotes", ".tmpthesis", "mine.tmp", f"mine.{1:016x}.tmp")]
    for path in own:
        path.write_text("mine")
    trainer = a_trainer_in(tmp_path, how)
    trainer.run(2, progress=False)
    trainer.close()
    assert a_trainer_in(tmp_path, how).resume() == 2
    assert all(path.read_text() == "mine" for path in own)


def test_a_run_like_another_is_another(tmp_path):
    """Each has its own id: neither snapshots nor records of one are used for the other."""
    for name in ("one", "two"):
        trainer = a_trainer_in(tmp_path / name)
        trainer.run(4, progress=False)
        trainer.close()
    for path in snapshots_in(tmp_path / "one")[1:]:
        path.unlink()
    (foreign,) = snapshots_in(tmp_path / "two")[1:]
    shutil.copy(foreign, tmp_path / "one")
    again = a_trainer_in(tmp_path / "one")
    with pytest.warns(UserWarning, match=f"{foreign.name} is damaged or of steps .*: it is set aside"):
        assert again.resume() == 4
    again.close()
    shutil.copy(tmp_path / "two" / "journal", tmp_path / "one")
    with pytest.raises(ValueError, match="^snapshot: expected an intact one in .*, 1 are damaged or of another run"):
        a_trainer_in(tmp_path / "one").resume()


def test_a_snapshot_of_another_straight_through_run_is_refused(tmp_path):
    """The two have the same settings: without a journal the first snapshot alone says which run it is."""
    for name, steps in (("one", 2), ("two", 3)):
        trainer = a_trainer_in(tmp_path / name, "straight-through")
        trainer.run(steps, progress=False)
        trainer.close()
    foreign = Path(shutil.copy(snapshots_in(tmp_path / "two")[-1], tmp_path / "one"))
    files = {path: path.read_bytes() for path in (tmp_path / "one").iterdir()}
    with pytest.raises(ValueError, match="^output_dir: expected snapshots of one run .* one of another run"):
        a_trainer_in(tmp_path / "one", "straight-through").resume()
    assert {path: path.read_bytes() for path in (tmp_path / "one").iterdir()} == files
    # the way out that the message names
    foreign.unlink()
    assert a_trainer_in(tmp_path / "one", "straight-through").resume() == 2


def test_a_snapshot_beside_other_records_is_refused(tmp_path):
    """A copy of the folder may have gone on otherwise."""
    trainer = a_trainer_in(tmp_path / "one")
    trainer.run(2, progress=False)
    trainer.close()
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    for name, factor in (("one", 1.0), ("two", 1.5)):
        trainer = a_trainer_in(tmp_path / name)
        trainer.resume()
        trainer.loss_fn = lambda model, batch, factor=factor: factor * model(batch).square().mean()
        trainer.run(2, progress=False)
        trainer.close()
    shutil.copy(tmp_path / "two" / "journal", tmp_path / "one")
    files = {path: path.read_bytes() for path in (tmp_path / "one").iterdir()}
    with pytest.raises(ValueError, match="^output_dir: expected snapshots and a journal of one run .* step 4 "):
        a_trainer_in(tmp_path / "one").resume()
    assert {path: path.read_bytes() for path in (tmp_path / "one").iterdir()} == files
    # the way out that the message names
    snapshots_in(tmp_path / "one")[-1].unlink()
    again, other = a_trainer_in(tmp_path / "one"), a_trainer_in(tmp_path / "two")
    assert again.resume() == other.resume() == 4
    assert_same_bits(logits_of(again.model), logits_of(other.model))


@pytest.mark.parametrize("how", ["reinforce", "straight-through"])
def test_a_folder_of_another_format_is_refused_in_a_line(tmp_path, how, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(run, "FORMAT", 3)
        patched.setattr(journal, "FORMAT", 3)
        trainer = a_trainer_in(tmp_path, how)
        trainer.run(2, progress=False)
        trainer.close()
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(
        ValueError, match="^(journal: expected format 6|output_dir: expected a run with format 6), got 3"
    ):
        a_trainer_in(tmp_path, how).resume()
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files
