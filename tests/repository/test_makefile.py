"""What `make` alone prints."""

from __future__ import annotations

import re
import subprocess

from helpers.children import ROOT

MAIN_TARGETS = ("demo", "test", "lint", "test-vllm", "verdict", "bench")


def test_make_alone_lists_the_main_targets():
    result = subprocess.run(["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True, check=True)
    *lines, last = result.stdout.splitlines()
    listed = [line.split()[1] for line in lines]
    assert all(line.startswith("make ") for line in lines) and "CONTRIBUTING.md" in last
    assert set(MAIN_TARGETS) <= set(listed)
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(listed) <= set(targets)
