"""The examples of the README run as they stand, one after another, and their masks get better."""

from __future__ import annotations

import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def test_examples_learn(eager_reference, capsys):
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 3
    names = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
        printed = dict(re.findall(r"^(Wanda's mask|learned mask): (.*)$", capsys.readouterr().out, re.MULTILINE))
        assert float(printed["learned mask"]) < 0.95 * float(printed["Wanda's mask"]), block
