"""Ablations of REINFORCE on a character model."""

from __future__ import annotations

import ablations
from helpers.routes import take_route


def test_the_command_prints_a_row_for_each_value(monkeypatch, capsys):
    # many small draws: not through the interpreter, whose bits are the same
    take_route(monkeypatch, "compiled")
    short = "--width 8 --train-steps 20 --forwards 70 --seeds 1 --lrs 6".split()
    ablations.main([*short, "--only", "draws a step"])
    dense, _, head, _, *rows = capsys.readouterr().out.splitlines()
    assert dense.startswith("test loss of the dense model: ")
    values = [str(value) for value in ablations.ABLATIONS["draws a step"][1]]
    assert head.startswith("| choice | value") and [row.split(" | ")[1] for row in rows] == values
