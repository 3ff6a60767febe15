"""Loops that are compiled and kept."""

from __future__ import annotations

import pytest
from helpers.loops import NOTHING

from maskpro_kernels.ops.cpu import cache
from maskpro_kernels.ops.cpu.loops import CompiledLoop


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "folder", lambda: tmp_path)
    return tmp_path


@pytest.fixture
def builds(monkeypatch):
    """How often something was compiled; nothing falls back to eager."""
    count = []
    build = CompiledLoop._build

    def counted(loop):
        count.append(loop)
        return build(loop)

    monkeypatch.setattr(CompiledLoop, "_build", counted)
    monkeypatch.setattr(CompiledLoop, "_compiled_or_eager", CompiledLoop._compiled)
    return count


@pytest.fixture
def nothing(monkeypatch):
    monkeypatch.setattr(CompiledLoop, "_build", lambda loop: NOTHING)
    monkeypatch.setattr(CompiledLoop, "_loaded", lambda loop, code, results: loop._eager)
