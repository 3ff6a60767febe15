"""Tests of compiled kernels, on the emulators that execute them."""

from __future__ import annotations

import pytest


@pytest.fixture
def compiled_for(emulator, monkeypatch):
    """compiled_for(target): kernels are compiled for that GPU, and launched with its entries of the launch tables."""
    from maskpro_kernels.ops.triton import tiles

    def aim(target):
        emulator.aim(target)
        monkeypatch.setattr(tiles, "ON_CPU", tiles.TARGET_OF[target])
        tiles.architecture.cache_clear()

    yield aim
    tiles.architecture.cache_clear()
