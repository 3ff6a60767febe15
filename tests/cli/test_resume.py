"""`maskpro learn --resume` and `maskpro replay`."""

from __future__ import annotations

import functools
import itertools
import os
import shutil
import signal

import pytest
from helpers.bits import assert_same_bits
from helpers.cases import cases, slow
from helpers.command import broken_off, learn, refuses, report
from safetensors.torch import load_file

from maskpro_kernels.checkpoints.logits import load_logits
from maskpro_kernels.cli import main
from maskpro_kernels.digests import digest

pytestmark = pytest.mark.usefixtures("eager_reference")


WAYS = {
    "reinforce": [],
    "several draws": ["--draws", "2"],
    "straight-through": ["--estimator", "straight-through", "--lr", "1"],
}


# before the first step, between two of them, and before the last one
ORDINARY_KILLS = [("reinforce", 0), ("reinforce", 2), ("straight-through", 5)]


@pytest.fixture(scope="module")
def whole_run(inputs, tmp_path_factory):
    """Gives the folder of a run that nothing has broken off; one with the same options serves several tests."""

    @functools.cache
    def whole(*options):
        folder = tmp_path_factory.mktemp("whole") / "run"
        assert main.main(learn(inputs, folder, *options)) == 0
        return folder

    return whole


def learned_logits(folder):
    logits, _ = load_logits(folder / "logits.safetensors")
    return logits


@pytest.mark.parametrize(
    ("number", "how"),
    [
        (signal.SIGINT, "reinforce"),
        (signal.SIGTERM, "straight-through"),
        slow(signal.SIGINT, "several draws"),
        slow(signal.SIGINT, "straight-through"),
    ],
)
def test_a_signal_ends_the_step_and_the_run_goes_on(inputs, whole_run, tmp_path, capsys, monkeypatch, number, how):
    options = [*WAYS[how], "--steps", "6", "--eval-every", "2"]
    uninterrupted = whole_run(*options)
    capsys.readouterr()
    run = tmp_path / "run"
    assert broken_off(inputs, run, monkeypatch, 3, options, lambda: os.kill(os.getpid(), number)) == 0
    assert f"stopped after 4 steps; continue with: maskpro learn --resume {run}" in capsys.readouterr().err
    assert not (run / "report.json").exists()
    assert main.main(["learn", "--resume", str(run), "--device", "cpu"]) == 0
    assert "4 steps were taken before" in capsys.readouterr().err
    whole, resumed = report(uninterrupted), report(run)
    for name in ("validation", "flipped_groups", "settings", "gap", "converted"):
        different = {"output"} if name == "settings" else set()
        one, other = ({k: v for k, v in x.items() if k not in different} if isinstance(x, dict) else x
                      for x in (whole[name], resumed[name]))  # fmt: skip
        assert one == other, name
    assert [row["loss"] for row in whole["steps"]] == [row["loss"] for row in resumed["steps"]]
    assert_same_bits(learned_logits(run), learned_logits(uninterrupted))
    assert [row["perplexity"] for row in whole["table"]] == [row["perplexity"] for row in resumed["table"]]


@pytest.mark.parametrize(
    ("how", "step"),
    cases(itertools.product(WAYS, [0, 2, 5]), slow=lambda *case: case not in ORDINARY_KILLS),
)
def test_a_run_that_was_killed_goes_on(inputs, whole_run, tmp_path, monkeypatch, how, step):
    class Killed(BaseException):
        pass

    def kill():
        raise Killed

    options = [*WAYS[how], "--steps", "6", "--eval-every", "3"]
    whole = whole_run(*options)
    with pytest.raises(Killed):
        broken_off(inputs, tmp_path / "run", monkeypatch, step, options, kill)
    assert main.main(["learn", "--resume", str(tmp_path / "run")]) == 0
    assert_same_bits(learned_logits(tmp_path / "run"), learned_logits(whole))
    assert report(tmp_path / "run")["validation"] == report(whole)["validation"]


def test_replay_rebuilds_the_logits(run, inputs, tmp_path, capsys):
    file = tmp_path / "logits.safetensors"
    assert main.main(["replay", str(run), "--output", str(file), "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    replayed, learned = load_file(file), learned_logits(run)
    assert_same_bits(replayed, learned)
    assert out == f"3 steps of 3, logits {digest(learned[name] for name in sorted(learned))}\n"
    assert report(run)["logits"] in out
    assert main.main(["replay", str(run), "--steps", "0", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.startswith("0 steps of 3, logits ")


def test_a_count_that_is_not_known_is_told_as_such(inputs, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    assert broken_off(inputs, run, monkeypatch, 1, [], lambda: os.kill(os.getpid(), signal.SIGTERM)) == 0
    first = sorted(run.glob("progress/snapshot-*"))[0]
    first.write_bytes(first.read_bytes()[:-1])
    capsys.readouterr()
    assert main.main(["learn", "--resume", str(run)]) == 0
    written = report(run)
    assert written["flipped_groups"] is None and written["flipped_groups_by_layer"] == {}
    told = f"how many of {written['groups']} groups differ from the wanda mask is not known; weights frozen; written to"
    assert told in capsys.readouterr().out
    assert "groups differ from the initial mask is not known" in (run / "report.html").read_text()


@pytest.mark.slow
def test_a_damaged_first_snapshot_does_not_keep_a_run_from_its_end(inputs, tmp_path, capsys, monkeypatch):
    options = ["--steps", "6", "--eval-every", "3"]
    assert main.main(learn(inputs, tmp_path / "whole", *options)) == 0
    run = tmp_path / "run"
    assert broken_off(inputs, run, monkeypatch, 3, options, lambda: os.kill(os.getpid(), signal.SIGTERM)) == 0
    first = sorted(run.glob("progress/snapshot-*"))[0]
    first.write_bytes(first.read_bytes()[:-1])
    assert main.main(["learn", "--resume", str(run)]) == 0
    assert "how many groups differ from the initial mask is not known" in capsys.readouterr().err
    expected = learned_logits(tmp_path / "whole")
    assert_same_bits(learned_logits(run), expected)
    assert (
        report(run)["flipped_groups_by_layer"] == {} and report(run)["logits"] == report(tmp_path / "whole")["logits"]
    )


def test_a_run_without_its_progress_is_not_begun_anew(inputs, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    assert broken_off(inputs, run, monkeypatch, 1, [], lambda: os.kill(os.getpid(), signal.SIGTERM)) == 0
    shutil.rmtree(run / "progress")
    capsys.readouterr()
    assert main.main(["learn", "--resume", str(run)]) == 2
    assert "output_dir: expected a folder with a journal" in capsys.readouterr().err


def test_what_cannot_be_resumed_or_replayed(run, inputs, tmp_path, capsys):
    refuses(capsys, tmp_path, ["learn", "--resume", str(tmp_path)], "resume: expected a folder in which")
    refuses(capsys, tmp_path, ["learn", "--resume", str(run)], "resume: expected a run that has not ended")
    refuses(
        capsys,
        tmp_path,
        ["learn", "--resume", str(run), "--steps", "9"],
        "but --device, --device-map, --logits-device",
    )
    refuses(capsys, tmp_path, ["learn", "--data", "pydoc"], "model: expected --model, or --resume alone, got none")
    refuses(capsys, tmp_path, ["replay", str(tmp_path)], "run: expected the folder of a run with a journal")
    refuses(
        capsys, tmp_path, ["replay", str(run), "--steps", "4"], "steps: expected 0 to 3, those of the journal, got 4"
    )
    refuses(capsys, tmp_path, ["replay", str(run), "--output", str(run)], "output: expected a new file")
    shutil.copytree(run, tmp_path / "copy")
    journal = tmp_path / "copy" / "progress" / "journal"
    content = journal.read_bytes()
    journal.write_bytes(content[:-70] + b"?" + content[-69:])
    refuses(capsys, tmp_path, ["replay", str(tmp_path / "copy")], "journal: expected the record of step 1 of this run")
    journal.write_bytes(content[:-1])
    assert main.main(["replay", str(tmp_path / "copy")]) == 0
    captured = capsys.readouterr()
    assert "the last record is cut short by a crash: 58 bytes are left out" in captured.err
    assert captured.out.startswith("2 steps of 2")
    nowhere = str(tmp_path / "none" / "file")
    refuses(capsys, tmp_path, ["replay", str(run), "--output", nowhere], "output: expected a new file in a folder that")
    both = learn(inputs, tmp_path / "new", "--draws", "2", "--alpha", "0.5")
    refuses(capsys, tmp_path, both, "alpha: expected none beside several draws")
    (snapshot,) = journal.parent.glob("snapshot-*")
    snapshot.write_bytes(snapshot.read_bytes()[:-1])
    refuses(capsys, tmp_path, ["replay", str(tmp_path / "copy")], "snapshot: expected a sound one")
