"""Fixtures of tests of checkpoints."""

from __future__ import annotations

import pytest
from helpers.tiny_llama import tiny_model, tiny_tokenizer

from maskpro_kernels import hf


@pytest.fixture
def folder(tmp_path):
    hf.save_model(tiny_model(), tiny_tokenizer(), tmp_path / "model")
    return tmp_path
