"""REINFORCE on character models."""

from __future__ import annotations

import characters
from helpers.routes import take_route


def test_the_command_prints_a_table_and_draws_it(tmp_path, monkeypatch, capsys):
    # many small draws: not through the interpreter, whose bits are the same
    take_route(monkeypatch, "compiled")
    picture = tmp_path / "curves.svg"
    short = ["--widths", "8", "16", "--forwards", "66", "70", "--lrs", "6", "--flip-rates", "0.02"]
    characters.main([*short, "--train-steps", "5", "--picture", str(picture)])
    lines = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [len(line) for line in lines] == [8] * 4
    # (16 * 16 + width) * width / 4
    assert [line[0].strip() for line in lines[2:]] == ["528", "1,088"]
    assert "% of what" in picture.read_text() and "1,088 groups" in picture.read_text()
