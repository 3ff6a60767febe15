"""ONNX graphs of every kind of pattern, and of a whole language model, against onnx's own evaluation."""

from __future__ import annotations

import pytest
import torch
from helpers.onnx_models import as_onnx, some_x, sparse_net
from helpers.tiny_llama import tiny_model
from torch import nn

import maskpro_kernels as mk

pytestmark = [pytest.mark.ecosystem, pytest.mark.usefixtures("eager_reference")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("pattern", ["1:2", "1:4", "4:8", "8:16"])
@pytest.mark.parametrize("kind", ["masked", "packed", "int8", "int4"])
def test_graphs_of_every_pattern(kind, pattern, dtype):
    model, x = sparse_net(kind, pattern, dtype), some_x(dtype)
    close = {} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-3}
    torch.testing.assert_close(as_onnx(model, x)[1], model(x).detach(), **close)


class NextTokens(nn.Module):
    """Without a cache, which is no tensor."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens):
        return self.model(input_ids=tokens, use_cache=False).logits


@pytest.mark.parametrize("kind", ["masked", "packed", "int8"])
def test_a_language_model(kind):
    model, tokens = tiny_model(), torch.arange(12).view(2, 6)
    mk.convert(model, "2:4")
    if kind != "masked":
        values = "int8" if kind == "int8" else "keep"
        mk.finalize(model, to="packed", values=values, output_layer=values)
    whole = NextTokens(model.eval())
    torch.testing.assert_close(as_onnx(whole, tokens)[1], whole(tokens).detach(), rtol=1e-4, atol=1e-5)
