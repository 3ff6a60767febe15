"""Attention with a layer for each projection gives what torch's gives."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from maskpro_kernels.unfuse import SplitAttention, as_built, as_linears

EMBED, HEADS, BATCH, QUERIES, KEYS = 8, 2, 3, 5, 4


def attention(**options) -> nn.Sequential:
    torch.manual_seed(0)
    built = nn.MultiheadAttention(EMBED, HEADS, **options)
    for bias in (built.in_proj_bias, built.out_proj.bias):
        if bias is not None:
            nn.init.normal_(bias)
    return nn.Sequential(built)


def both(model: nn.Sequential, *inputs, **call):
    """What torch's attention gives, and what its layers give."""
    expected = model[0](*inputs, **call)
    as_linears(model)
    assert isinstance(model[0], SplitAttention)
    return expected, model[0](*inputs, **call)


def hidden(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.3


MASKS = {
    "none": {},
    "padded": {"key_padding_mask": torch.tensor([[False, False, False, True]] * BATCH)},
    "added to padding": {"key_padding_mask": torch.randn(BATCH, KEYS), "attn_mask": torch.randn(QUERIES, KEYS)},
    "hidden": {"attn_mask": hidden(QUERIES, KEYS)},
    "by head": {"attn_mask": hidden(BATCH * HEADS, QUERIES, KEYS)},
    "of two kinds": {"attn_mask": hidden(QUERIES, KEYS), "key_padding_mask": hidden(BATCH, KEYS)},
}


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.filterwarnings("ignore:Support for mismatched")
def test_masks_and_layouts(masks, need_weights, batch_first):
    model = attention(batch_first=batch_first)
    query, key, value = torch.randn(BATCH, QUERIES, EMBED), *torch.randn(2, BATCH, KEYS, EMBED)
    if not batch_first:
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    expected, found = both(model, query, key, value, need_weights=need_weights, **MASKS[masks])
    torch.testing.assert_close(found, expected, equal_nan=True)


def test_every_head_has_its_weights():
    x = torch.randn(QUERIES, BATCH, EMBED)
    expected, found = both(attention(bias=False), x, x, x, average_attn_weights=False)
    assert found[1].shape == (BATCH, HEADS, QUERIES, QUERIES)
    torch.testing.assert_close(found, expected)


def test_keys_and_values_of_other_widths_and_no_batch():
    model = attention(kdim=6, vdim=10)
    expected, found = both(model, torch.randn(QUERIES, EMBED), torch.randn(KEYS, 6), torch.randn(KEYS, 10))
    assert found[0].shape == (QUERIES, EMBED) and found[1].shape == (QUERIES, KEYS)
    torch.testing.assert_close(found, expected)


def test_causal_attention_needs_its_mask():
    model, x = attention(batch_first=True), torch.randn(BATCH, QUERIES, EMBED)
    causal = nn.Transformer.generate_square_subsequent_mask(QUERIES)
    expected, found = both(model, x, x, x, attn_mask=causal, is_causal=True, need_weights=False)
    torch.testing.assert_close(found, expected)
    with pytest.raises(ValueError, match="attn_mask"):
        model[0](x, x, x, is_causal=True)


@pytest.mark.parametrize("need_weights", [True, False])
def test_dropout_is_of_training_alone(need_weights):
    model, x = attention(dropout=0.5), torch.randn(QUERIES, BATCH, EMBED)
    as_linears(model)
    outputs = [model[0](x, x, x, need_weights=need_weights)[0] for _ in range(2)]
    assert not torch.equal(*outputs)
    model.eval()
    outputs = [model[0](x, x, x, need_weights=need_weights)[0] for _ in range(2)]
    assert torch.equal(*outputs)


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"kdim": 6, "vdim": 10, "batch_first": True, "dropout": 0.1}])
def test_it_is_put_together_as_it_was(options):
    model = attention(**options).eval()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model[0].out_proj.weight.requires_grad_(False)
    built = model[0]
    as_linears(model)
    as_built(model)
    assert type(model[0]) is nn.MultiheadAttention and repr(model) == repr(nn.Sequential(built))
    assert model[0].__dict__.keys() == built.__dict__.keys()
    plain = ("dropout", "batch_first", "embed_dim", "kdim", "vdim", "_qkv_same_embed_dim", "training")
    assert all(getattr(model[0], name) == getattr(built, name) for name in plain)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == {
        name: name != "0.out_proj.weight" for name in before
    }
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_its_weights_are_not_read_past_its_layers():
    model = attention()
    as_linears(model)
    with pytest.raises(TypeError, match="in_proj_weight: expected a use of the layers q_proj"):
        torch.cat([model[0].in_proj_weight, torch.zeros(2)])
