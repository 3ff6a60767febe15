"""Packed values at their places, and operands of torch's semi-structured matmul, which runs on 8.x alone."""

from __future__ import annotations

import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.cases import slow
from helpers.packed_codes import assert_every_code_is_placed, every_code
from helpers.products import normal
from torch import nn
from torch.sparse import SparseSemiStructuredTensorCUTLASS
from torch.sparse import _semi_structured_conversions as conversions

import maskpro_kernels as mk
from maskpro_kernels.ops.pattern import metadata_of
from maskpro_kernels.ops.triton import packed_gemm


@pytest.mark.parametrize("dtype", [torch.bfloat16, slow(torch.float16)], ids=str)
@pytest.mark.parametrize(("tokens", "kernel"), [(1, "packed_vector"), (4, "packed_linear")])
def test_values_of_every_code_are_at_their_places(tokens, kernel, dtype, launched):
    assert_every_code_is_placed(tokens, dtype)
    assert launched[kernel] == 4 // tokens


def sparse(rows, k, dtype=torch.bfloat16):
    dense = normal(rows, k).to(dtype)
    return torch.where(mk.expand_mask(mk.top_n_mask(dense.float().abs(), "2:4"), "2:4"), dense, 0)


@pytest.mark.parametrize("rows", [32, 96])
@pytest.mark.parametrize("k", [64, 192, 576])
def test_metadata_is_that_of_torchs_own_conversion(rows, k):
    weight = sparse(rows, k)
    stored = mk.pack_24(weight)
    values, expected = conversions.sparse_semi_structured_from_dense_cutlass(weight)
    assert_same_bits([stored.values, metadata_of(stored.bitmask)], [values, expected])


def test_every_code_becomes_the_places_that_it_keeps():
    # in each of the four groups of a word
    groups = every_code().repeat(6, 4)[:32].contiguous()
    weight = mk.expand_mask(groups, "2:4").bfloat16()
    _, expected = conversions.sparse_semi_structured_from_dense_cutlass(weight)
    assert_same_bits(metadata_of(mk.pack_24(weight).bitmask), expected)


def asserted_product(values, metadata, x, bias=None):
    """As torch's kernel: SparseSemiStructuredOps.cu lists what it asks of its operands."""
    assert values.dtype == x.dtype and metadata.dtype == torch.int16
    assert values.dim() == metadata.dim() == x.dim() == 2 and 1 in x.stride() and values.is_contiguous()
    assert 2 * values.shape[1] == len(x) == 16 * metadata.shape[1] and len(values) == len(metadata)
    smallest = SparseSemiStructuredTensorCUTLASS._DTYPE_SHAPE_CONSTRAINTS[x.dtype]
    assert len(values) % smallest.sparse_min_rows == 0 and len(x) % smallest.sparse_min_cols == 0
    assert x.shape[1] % smallest.dense_min_cols == 0 and len(x) % smallest.dense_min_rows == 0
    assert all(part.data_ptr() % 16 == 0 for part in (values, x, metadata))
    assert bias is None or (bias.shape == values.shape[:1] and bias.dtype == x.dtype)
    product = conversions.sparse_semi_structured_to_dense_cutlass(values, metadata) @ x
    return product if bias is None else product + bias[:, None]


@pytest.fixture
def on_8(monkeypatch):
    """Capability 8.x, whose product the CPU computes."""
    monkeypatch.setattr(packed_gemm, "sparse_available", lambda device: True)
    monkeypatch.setattr(packed_gemm, "LIBRARY_TOKENS", 64)
    monkeypatch.setattr(mk.packed, "holds_metadata", lambda device: True)
    monkeypatch.setattr(packed_gemm.torch, "_sparse_semi_structured_mm", asserted_product)
    monkeypatch.setattr(
        packed_gemm.torch, "_sparse_semi_structured_addmm", lambda bias, *operands: asserted_product(*operands, bias)
    )


@pytest.mark.parametrize(("tokens", "biased"), [(72, True), (65, False)])
def test_prefill_is_torchs_semi_structured_product(tokens, biased, on_8, launched):
    weight, x = sparse(64, 192), normal(tokens, 192, seed=1).bfloat16()
    bias = normal(64, seed=2).bfloat16() if biased else None
    stored = mk.pack_24(weight)
    launched.clear()
    y = mk.nm_linear(x, stored, bias)
    assert not launched
    torch.testing.assert_close(y, nn.functional.linear(x, stored.unpack(), bias), rtol=0.02, atol=0.1)
    assert y.is_contiguous()


def test_activations_that_start_anywhere_are_moved(on_8):
    weight = sparse(32, 64)
    x = normal(72 * 64 + 1, seed=1).bfloat16()[1:].view(72, 64)
    torch.testing.assert_close(
        mk.nm_linear(x, mk.pack_24(weight)), nn.functional.linear(x, weight), rtol=0.02, atol=0.1
    )


@pytest.mark.parametrize(
    ("shape", "dtype", "pattern", "tokens", "expected"),
    [
        ((64, 128), torch.float16, "2:4", 65, "sparse"),
        ((64, 128), torch.float16, "2:4", 64, "unpack"),
        ((48, 128), torch.float16, "2:4", 65, "unpack"),
        ((64, 96), torch.float16, "2:4", 65, "unpack"),
        ((64, 128), torch.float16, "4:8", 65, "unpack"),
        ((64, 128), torch.float32, "2:4", 65, "unpack"),
    ],
)
def test_what_torch_multiplies(shape, dtype, pattern, tokens, expected, on_8):
    stored = mk.pack_nm(torch.zeros(shape, dtype=dtype), pattern)
    x, n = torch.zeros(tokens, shape[1], dtype=dtype), mk.NMPattern(pattern)
    assert packed_gemm.route(x, stored.values, stored.bitmask, n.n, n.m) == expected


def test_other_devices_have_no_such_product():
    assert not packed_gemm.sparse_available(torch.device("cpu"))
