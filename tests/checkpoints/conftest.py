"""Fixtures of tests of checkpoints. They import late: xdist's first process loads all these files, and runs no test."""

from __future__ import annotations

import pytest


@pytest.fixture
def folder(tmp_path):
    from helpers.tiny_llama import tiny_model, tiny_tokenizer

    from maskpro_kernels import hf

    hf.save_model(tiny_model(), tiny_tokenizer(), tmp_path / "model")
    return tmp_path
