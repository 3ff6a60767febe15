"""The command on a tiny model: its arguments, reports and refusals."""

from __future__ import annotations

import json
import signal

from maskpro_kernels.cli import main
from maskpro_kernels.learn.trainer import MaskTrainer

SIZES = "--steps 3 --batch-size 4 --seq-len 16 --calibration-batches 2 --eval-windows 5"
SETTINGS = f"--estimator reinforce --init wanda {SIZES} --device cpu --dtype float32".split()


def learn(inputs, output, *more):
    sources = ["--model", str(inputs / "model"), "--data", str(inputs / "text.txt")]
    return ["learn", *sources, *SETTINGS, "--output", str(output), *more]


def report(folder):
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def contents(folder):
    """The bytes of each file below a folder, None for a folder, by path."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def refuses(capsys, folder, arguments, *messages):
    """Assert that the command ends with 2 and a line with the messages, and does not change the folder.

    Before this line may be others, such as the device.
    """
    before = contents(folder)
    capsys.readouterr()
    assert main.main(arguments) == 2
    captured = capsys.readouterr()
    *lines_before, line = captured.err.splitlines()
    assert line.startswith("maskpro: error: ")
    assert not any("maskpro: error" in line_before for line_before in lines_before)
    for message in messages:
        assert message in line, line
    assert captured.out == ""
    assert contents(folder) == before


def nonzeros(model, name, m=4):
    """Nonzeros of each group of a layer."""
    return (model.get_submodule(name).weight.view(-1, m) != 0).sum(1)


def interrupted(inputs, folder, monkeypatch, step, options, interrupt):
    """A run that is interrupted before a step."""
    take = MaskTrainer.step

    def broken(trainer):
        if trainer.steps_done == step:
            interrupt()
        return take(trainer)

    # a job in the background is started with SIGINT ignored
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with monkeypatch.context() as patched:
            patched.setattr(MaskTrainer, "step", broken)
            return main.main(learn(inputs, folder, *options))
    finally:
        signal.signal(signal.SIGINT, before)
