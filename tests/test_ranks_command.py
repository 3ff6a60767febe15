"""`maskpro learn` on several ranks: the bits of one process, and what it tells where a rank ends or is told to."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_ranks import LONGEST, environment
from tiny_llama import tiny_model, tiny_text, tiny_tokenizer

from maskpro_kernels import cli

pytestmark = pytest.mark.usefixtures("eager_reference")

SIZES = "--batch-size 4 --seq-len 16 --init-batches 2 --calibration-batches 3 --eval-windows 2 --eval-length 24"
SETTINGS = f"{SIZES} --steps 4 --eval-every 2 --dtype float32 --device cpu".split()

# The command; before step 2 the ranks named send themselves a signal
BROKEN_OFF = """
import os, sys
from maskpro_kernels import cli
from maskpro_kernels.trainer import MaskTrainer
take, number, ranks = MaskTrainer.step, int(sys.argv[1]), sys.argv[2].split(",")
def step(trainer):
    if trainer.steps_done == 2 and str(trainer.ranks.rank) in ranks:
        os.kill(os.getpid(), number)
    return take(trainer)
MaskTrainer.step = step
sys.exit(cli.main(sys.argv[3:]))
"""


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As torchrun has it: with more, sums of losses have another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Folder with a tiny model, `model`, and a text, `text.txt`."""
    folder = tmp_path_factory.mktemp("inputs")
    tiny_model().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "text.txt").write_text(tiny_text(), encoding="utf-8")
    return folder


def learn(inputs, output, *more):
    sources = ["--model", str(inputs / "model"), "--data", str(inputs / "text.txt")]
    return ["learn", *sources, *SETTINGS, "--output", str(output), *more]


class OnRanks:
    """A command that torchrun has run on two ranks.

    Attributes:
        code: of torchrun's end.
        told: what torchrun itself wrote.
        out, err: what each rank wrote.
    """

    def __init__(self, folder: Path, arguments, broken_off=None):
        code = ["-m", "maskpro_kernels.cli"]
        if broken_off is not None:
            number, ranks = broken_off
            code = ["--no-python", sys.executable, "-c", BROKEN_OFF, str(int(number)), ranks]
        options = ["--standalone", "--nproc-per-node", "2", "--redirects", "3", "--log-dir", str(folder)]
        ended = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", *options, *code, *arguments],
            env=environment() | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=LONGEST,
        )
        self.code, self.told = ended.returncode, ended.stderr
        self.out, self.err = (
            [path.read_text(encoding="utf-8") for path in sorted(folder.glob(f"*/attempt_0/*/{name}.log"))]
            for name in ("stdout", "stderr")
        )
        assert len(self.out) == len(self.err) == 2


def report(folder):
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def without_seconds(table: str) -> list[list[str]]:
    return [line.split()[:2] for line in table.splitlines()[:5]]


def test_two_ranks_do_what_one_process_does(inputs, tmp_path, capsys):
    assert cli.main(learn(inputs, tmp_path / "one", "--accumulate", "2")) == 0
    table = capsys.readouterr().out
    two = OnRanks(tmp_path / "logs", learn(inputs, tmp_path / "two", "--accumulate", "2"))
    assert (two.code, two.out[1], two.err[1]) == (0, "", ""), two.err
    assert without_seconds(two.out[0]) == without_seconds(table) and len(table.splitlines()) == 6
    expected, found = report(tmp_path / "one"), report(tmp_path / "two")
    assert found["logits"] == expected["logits"]
    assert found["settings"] | {"output": ""} == expected["settings"] | {"output": ""}
    assert found["settings"]["accumulate"] == 2 and "masks" not in found["settings"]
    for name in ("validation", "flipped_groups", "converted", "skipped"):
        assert found[name] == expected[name], name
    assert [step["loss"] for step in found["steps"]] == [step["loss"] for step in expected["steps"]]
    assert found["validation"][-1]["tokens"] == 4 * 2 * 4 * 16
    files = [sorted(path.name for path in (tmp_path / name).rglob("*")) for name in ("one", "two")]
    assert files[0] == files[1]
