"""`maskpro learn` on several ranks: the bits of one process, and the end of a rank by itself or by a signal."""

from __future__ import annotations

import contextlib
import io
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.children import environment
from helpers.command import contents, refuses, report
from helpers.in_ranks import LONGEST, all_in_ranks
from helpers.tiny_llama import tiny_model, tiny_tokenizer

from maskpro_kernels.checkpoints.logits import load_logits
from maskpro_kernels.cli import main
from maskpro_kernels.cli.config import Learn
from maskpro_kernels.cli.learn.options import complete
from maskpro_kernels.ranks import FailedRank

pytestmark = pytest.mark.usefixtures("eager_reference")

SIZES = "--batch-size 4 --seq-len 16 --calibration-batches 3 --eval-windows 2"
SETTINGS = f"--estimator reinforce {SIZES} --steps 4 --eval-every 2 --density 0.6 --dtype float32 --device cpu".split()

# The command; before one step the ranks named send themselves a signal
INTERRUPTED = """
import os, sys
from maskpro_kernels.cli import main
from maskpro_kernels.learn.trainer import MaskTrainer
take, number, ranks, at = MaskTrainer.step, int(sys.argv[1]), sys.argv[2].split(","), int(sys.argv[3])
def step(trainer):
    if trainer.steps_done == at and str(trainer.ranks.rank) in ranks:
        os.kill(os.getpid(), number)
    return take(trainer)
MaskTrainer.step = step
sys.exit(main.main(sys.argv[4:]))
"""


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As under torchrun: with more, sums of losses have another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def learn(inputs, output, *more):
    sources = ["--model", str(inputs / "model"), "--data", f"{inputs / 'text.txt'},self"]
    return ["learn", *sources, *SETTINGS, "--output", str(output), *more]


class OnRanks:
    """A command that torchrun has run on two ranks.

    Args:
        folder: where torchrun writes what the ranks print.
        arguments: of the command.
        interrupted: (signal, ranks, step) to send it to themselves before.

    Attributes:
        code: of torchrun's end.
        out, err: what each rank wrote.
    """

    def __init__(self, folder: Path, arguments, interrupted=None):
        code = ["-m", "maskpro_kernels"]
        if interrupted is not None:
            number, ranks, step = interrupted
            code = ["--no-python", sys.executable, "-c", INTERRUPTED, str(int(number)), ranks, str(step)]
        options = ["--standalone", "--nproc-per-node", "2", "--redirects", "3", "--log-dir", str(folder)]
        ended = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", *options, *code, *arguments],
            env=environment() | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=LONGEST,
        )
        self.code = ended.returncode
        self.out, self.err = (
            [path.read_text(encoding="utf-8") for path in sorted(folder.glob(f"*/attempt_0/*/{name}.log"))]
            for name in ("stdout", "stderr")
        )
        assert len(self.out) == len(self.err) == 2


def without_seconds(table: str) -> list[list[str]]:
    return [line.split()[:2] for line in table.splitlines()[:5]]


def test_two_ranks_do_what_one_process_does(inputs, tmp_path, capsys):
    """Rank 0 refits the weights, the other takes its."""
    options = ["--accumulate", "2", "--refit", "weights"]
    assert main.main(learn(inputs, tmp_path / "one", *options)) == 0
    table = capsys.readouterr().out
    two = OnRanks(tmp_path / "logs", learn(inputs, tmp_path / "two", *options))
    assert (two.code, two.out[1], two.err[1]) == (0, "", ""), two.err
    assert without_seconds(two.out[0]) == without_seconds(table)
    expected, found = report(tmp_path / "one"), report(tmp_path / "two")
    assert found["logits"] == expected["logits"] and found["weights"] == expected["weights"] == "weights refitted"
    learned = [load_logits(tmp_path / name / "learned/logits.safetensors") for name in ("one", "two")]
    assert_same_bits(learned[1].weights, learned[0].weights)
    assert found["settings"] | {"output": ""} == expected["settings"] | {"output": ""}
    assert found["settings"]["accumulate"] == 2
    for name in ("validation", "flipped_groups", "converted", "skipped"):
        assert found[name] == expected[name], name
    assert [step["loss"] for step in found["steps"]] == [step["loss"] for step in expected["steps"]]
    assert found["validation"][-1]["tokens"] == 4 * 2 * 4 * 16
    # a snapshot's name ends in the digest of its bytes, whose header has no order of its own
    files = [
        sorted(re.sub("-[0-9a-f]{32}", "", path.name) for path in (tmp_path / name).rglob("*"))
        for name in ("one", "two")
    ]
    assert files[0] == files[1]


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["1", "0"])
def test_a_run_that_is_stopped_and_then_loses_a_rank_ends_as_a_whole_one(inputs, tmp_path, capsys, victim):
    """On two ranks each time; in one process at the end."""
    run, options = tmp_path / "run", ["--accumulate", "2", "--steps", "6", "--refit", "scales"]
    assert main.main(learn(inputs, tmp_path / "whole", *options)) == 0
    how = f"continue with: maskpro learn --resume {run}"
    stopped = OnRanks(tmp_path / "stopped", learn(inputs, run, *options), (signal.SIGTERM, "0,1", 1))
    assert (stopped.code, stopped.out[1], stopped.err[1]) == (0, "", ""), stopped.err
    reported = stopped.err[0].splitlines()
    assert "SIGTERM: the run stops after this step" in reported and reported[-1] == f"stopped after 2 steps; {how}"
    assert not (run / "report.json").exists()

    broken = OnRanks(tmp_path / "broken", ["learn", "--resume", str(run)], (signal.SIGKILL, victim, 4))
    assert broken.code != 0

    capsys.readouterr()
    assert main.main(["learn", "--resume", str(run)]) == 0
    assert "4 steps are done" in capsys.readouterr().err
    assert report(run)["logits"] == report(tmp_path / "whole")["logits"]
    assert report(run)["validation"] == report(tmp_path / "whole")["validation"]


def refused(rank: int, cases: list) -> list[tuple[int, str, str]]:
    """(code, output, errors) of commands of this rank, as under torchrun."""
    os.environ.update(TORCHELASTIC_RUN_ID="tests", RANK=str(rank), WORLD_SIZE="2")
    # the ranks have met
    main.under_torchrun = contextlib.nullcontext
    results = []
    for case in cases:
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
            try:
                code = main.main(case[rank])
            except SystemExit as end:
                code = end.code
        results.append((code, out.getvalue(), err.getvalue()))
    return results


@pytest.mark.slow
def test_what_is_wrong_on_any_rank_is_reported_by_the_first_and_ends_all(inputs, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    bad = inputs / "bad"
    model = tiny_model()
    model.lm_head.weight.data.fill_(torch.nan)
    model.save_pretrained(bad)
    tiny_tokenizer().save_pretrained(bad)

    def of_both(*options):
        return [learn(inputs, tmp_path / "new", "--accumulate", "2", *options)] * 2

    sound, _ = of_both()
    nothing = [*sound, "--data", str(inputs / "none.txt")]
    cases = {
        "accumulate: expected a multiple of the 2 ranks": of_both("--accumulate", "3"),
        "accumulate: expected at least 1, got 0": of_both("--accumulate", "0"),
        "--seq-len: expected windows of at most 64 tokens": of_both("--seq-len", "9999"),
        "output: expected a new or empty folder": of_both("--output", str(tmp_path / "full")),
        "resume: expected the folder of `maskpro learn`": [["learn", "--resume", str(tmp_path / "full")]] * 2,
        "model: expected finite logits, got NaN": of_both("--model", str(bad)),
        "data: expected": [nothing] * 2,
        "ranks: expected the settings of rank 0 on all of them, got other data on rank 1": [sound, nothing],
        "ranks: expected the settings of rank 0 on all of them, got other lr on rank 1": [sound, [*sound, "--lr", "1"]],
        "torchrun: expected `learn`": [["export", str(bad), "new"]] * 2,
    }
    before = contents(tmp_path)
    one, other = all_in_ranks(2, refused, cases=list(cases.values()))
    assert other == [(2, "", "")] * len(cases)
    for message, (code, out, err) in zip(cases, one, strict=True):
        last = err.splitlines()[-1]
        assert (code, out) == (2, "") and last.startswith(f"maskpro: error: {message}"), err
        assert err.count("error") == 1, err
    # the model with NaN in its logits is evaluated in a run that has begun, which another command continues
    left = {path.name for path in contents(tmp_path).keys() - before.keys() if path.is_file()}
    assert left == {"settings.json", ".run.lock"}
    assert before.items() <= contents(tmp_path).items()


def test_each_rank_needs_a_gpu_of_its_own(inputs, tmp_path, capsys, monkeypatch):
    names = {"TORCHELASTIC_RUN_ID": "tests", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    refuses(
        capsys,
        tmp_path,
        learn(inputs, tmp_path / "new"),
        "nproc-per-node: expected at most 1, the GPUs of this machine",
    )


def test_each_rank_has_a_device_of_its_own(inputs):
    options = Learn(model=str(inputs / "model"), output="out", accumulate=2)
    assert complete(options, 2).device is None
    for device in ("cuda:1", "auto"):
        options.device = device
        with pytest.raises(ValueError, match=f"device: expected cpu or cuda, since each .*, got '{device}'"):
            complete(options, 2)


@pytest.mark.parametrize(
    ("rank", "error", "reported"),
    [
        (1, torch.OutOfMemoryError("CUDA out of memory"), "rank 1: CUDA out of memory; use smaller windows"),
        (1, FloatingPointError("loss"), None),
        (0, FailedRank("rank 1: OSError: full"), "rank 1: OSError: full"),
    ],
)
def test_who_reports_an_error(tmp_path, capsys, monkeypatch, rank, error, reported):
    """Rank 0 of one that all have, this rank of one that it alone has."""

    def fail(options):
        raise error

    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "tests")
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setitem(main.FUNCTIONS, "learn", fail)
    monkeypatch.setattr(main, "under_torchrun", contextlib.nullcontext)
    assert main.main(["learn", "--output", str(tmp_path / "none")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == (reported is not None) and all(reported in line for line in lines)
