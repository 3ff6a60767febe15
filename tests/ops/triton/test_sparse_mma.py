"""Metadata of 2:4 in place of the bitmask: the ISA's order, round trips, and which products read it."""

from __future__ import annotations

import copy
import io
import pickle
import sys

import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.packed_codes import CODES
from helpers.products import normal
from helpers.routes import take_route

import maskpro_kernels as mk
from gpu_emulators.ptx.matrix import sparsity
from maskpro_kernels import ops
from maskpro_kernels.ops.pattern import as_bitmask, bitmask_of, metadata_of
from maskpro_kernels.ops.triton import packed_gemm, sparse_mma

SHAPES = [(32, 64), (64, 192), (1, 16), (33, 80), (100, 144)]


def codes(rows, k):
    return CODES[torch.randint(6, (rows, k // 4), generator=torch.Generator().manual_seed(rows + k))]


@pytest.mark.parametrize(("rows", "k"), SHAPES)
def test_each_thread_finds_its_word_of_metadata_by_its_number(rows, k):
    """Words of the ISA's table, by the emulator's own function, for selectors 0 and 1 of each block."""
    own = codes(rows, k)
    words = metadata_of(bitmask_of(own, 4)).view(torch.int32).view(-1, -(-rows // 32), 32)
    assert len(words) == -(-k // 32)
    # where nothing is kept any valid places do: those that padding takes
    whole = torch.full((len(words[0]) * 32, len(words) * 8), 0b0011, dtype=torch.uint8)
    whole[:rows, : k // 4] = own
    places = torch.stack([torch.arange(4)[code >> torch.arange(4) & 1 != 0] for code in range(16) if code in CODES])
    order = sorted(CODES.tolist())
    kept = places[torch.tensor([[order.index(code) for code in row] for row in whole.tolist()])].numpy()
    for column, of_column in enumerate(words):
        for block, found in enumerate(of_column):
            tile = kept[32 * block : 32 * block + 32, 8 * column : 8 * column + 8]
            upper, lower = (sparsity.metadata_of(tile[None, 16 * i : 16 * i + 16], i) for i in (0, 1))
            assert found.tolist() == (upper + lower).view("int32").tolist()


@pytest.mark.parametrize(("rows", "k"), SHAPES)
def test_a_bitmask_becomes_metadata_and_back(rows, k):
    bitmask = bitmask_of(codes(rows, k), 4)
    metadata = metadata_of(bitmask)
    assert metadata.dtype == torch.int16 and metadata.is_contiguous()
    assert list(metadata.shape) == [-(-rows // 32) * 32, -(-k // 32) * 2]
    assert_same_bits(as_bitmask(metadata, k, rows), bitmask)
    assert as_bitmask(bitmask, k, rows) is bitmask


@pytest.fixture
def holding(monkeypatch):
    """A CPU that takes 2:4 weights for those of a card with sparse tensor cores."""
    monkeypatch.setattr(mk.packed, "holds_metadata", lambda device: device.type == "cpu")


def weight(rows=40, k=48, dtype=torch.bfloat16):
    return torch.where(mk.expand_mask(codes(rows, k), "2:4"), normal(rows, k), 0).to(dtype)


def test_a_weight_holds_metadata_in_place_of_its_bitmask(holding):
    dense = weight()
    stored = mk.pack_24(dense)
    assert stored.bitmask.dtype == torch.int16 and stored.bitmask.shape == (64, 4)
    assert stored.check() is stored
    assert_same_bits([stored.unpack(), ops.unpack_nm(stored.values, stored.bitmask, 2, 4)], [dense, dense])
    for again in (stored.to(torch.float16), mk.PackedNM(stored.values, stored.bitmask, "2:4")):
        assert_same_bits(again.bitmask, stored.bitmask)
    for other in (
        stored.to(torch.float32),
        stored.stored_as("int8"),
        mk.pack_24(weight(40, 20)),
        mk.pack_nm(dense, "4:8"),
    ):
        assert other.bitmask.dtype == torch.uint8


@pytest.fixture
def layer():
    return mk.Sparse24Linear(mk.pack_24(weight()), torch.ones(40, dtype=torch.bfloat16))


def test_a_layer_is_saved_with_its_bitmask(layer, monkeypatch):
    plain, state = copy.deepcopy(layer), layer.state_dict()
    monkeypatch.setattr(mk.packed, "holds_metadata", lambda device: True)
    held = copy.deepcopy(layer)
    assert held.bitmask.dtype == torch.int16
    assert_same_bits([held.weight, *held.state_dict().values()], [plain.weight, *state.values()])
    for assign in (False, True):
        held.load_state_dict(
            mk.Sparse24Linear(mk.pack_24(weight(40, 48).flip(0)), plain.bias).state_dict(), assign=assign
        )
        assert held.bitmask.dtype == torch.int16
        assert_same_bits(held.weight, plain.weight.flip(0))
    damaged = state | {"bitmask": state["bitmask"] ^ 1}
    with pytest.raises(RuntimeError, match="bitmask: expected exactly 2 of every 4"):
        held.load_state_dict(damaged)
    assert_same_bits(held.weight, plain.weight.flip(0))
    file = io.BytesIO(pickle.dumps(held.load_state_dict(state) and held))
    monkeypatch.setattr(mk.packed, "holds_metadata", lambda device: False)
    for elsewhere in (pickle.load(file), held.to("cpu")):
        assert_same_bits([elsewhere.bitmask, elsewhere.weight], [plain.bitmask, plain.weight])


def test_a_bitmask_that_is_wrong_is_refused_before_it_becomes_metadata(holding):
    values = torch.zeros(4, 8, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="bitmask: expected exactly 2 of every 4"):
        mk.PackedNM(values, torch.full((4, 2), 7, dtype=torch.uint8), "2:4")
    with pytest.raises(ValueError, match=r"bitmask: expected \[32, 2\]"):
        mk.PackedNM(values, torch.zeros(4, 2, dtype=torch.int16), "2:4")
    for wrong in (torch.zeros(32, 2, dtype=torch.int16), torch.zeros(32, 2, dtype=torch.int32)):
        with pytest.raises(TypeError, match="bitmask: expected a tensor of torch.uint8"):
            mk.PackedNM(values, wrong, "2:4" if wrong.dtype == torch.int32 else "1:4")
    with pytest.raises(ValueError, match="bitmask: expected exactly 2 of every 4"):
        mk.PackedNM(values, torch.zeros(32, 2, dtype=torch.int16), "2:4").check()


@pytest.mark.parametrize(("route", "tokens"), [("kernels", 70), ("compiled", 5), ("eager", 1)])
def test_products_and_gradients_of_metadata_are_those_of_the_bitmask(route, tokens, layer, monkeypatch):

    take_route(monkeypatch, route)
    x = normal(tokens, 48, seed=1).bfloat16().requires_grad_()
    layer.values.requires_grad_()

    def results():
        return [y := layer(x), *torch.autograd.grad(y.float().square().sum(), [x, layer.values])]

    expected = results()
    layer._buffers["bitmask"] = metadata_of(layer.bitmask)
    for found, other in zip(results(), expected, strict=True):
        torch.testing.assert_close(found, other)


@pytest.mark.parametrize(
    ("target", "tokens", "on_8", "k", "expected"),
    [
        ("sm_80", 1, True, 128, "sparse_mma"),
        ("sm_80", 1024, True, 128, "sparse_mma"),
        ("sm_80", 1025, True, 128, "sparse"),
        ("sm_80", 1025, True, 144, "sparse_mma"),
        ("sm_80", 1025, False, 128, "sparse_mma"),
        ("sm_90", 512, False, 128, "sparse_mma"),
        ("sm_90", 513, False, 128, "unpack"),
        ("sm_100", 129, False, 128, "unpack"),
        ("gfx942", 1, False, 128, "unpack"),
    ],
)
def test_which_products_read_metadata(target, tokens, on_8, k, expected, monkeypatch):
    monkeypatch.setattr(packed_gemm, "INTERPRETED", False)
    monkeypatch.setattr(packed_gemm, "sparse_available", lambda device: on_8)
    monkeypatch.setattr(packed_gemm, "architecture", lambda device: target)
    values, bitmask = torch.zeros(64, k // 2, dtype=torch.bfloat16), bitmask_of(codes(64, k), 4)
    x = torch.zeros(tokens, k, dtype=torch.bfloat16)
    assert packed_gemm.route(x, values, metadata_of(bitmask), 2, 4) == expected
    # what a bitmask has is never made at a call
    assert packed_gemm.route(x, values, bitmask, 2, 4) in ("vector", "tiles", "unpack")


def test_where_gluon_is_missing_bitmasks_stay(monkeypatch):
    from maskpro_kernels.ops import dispatch

    device = torch.device("cuda", 7)
    monkeypatch.setattr(torch.version, "hip", None)
    for capability, gluon, expected in [
        ((8, 0), True, True),
        ((12, 0), True, True),
        ((7, 5), True, False),
        ((9, 0), False, False),
    ]:
        # an import of None raises
        monkeypatch.setitem(sys.modules, "maskpro_kernels.ops.triton.sparse_mma", sparse_mma if gluon else None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        assert dispatch.holds_metadata.__wrapped__(device) == expected
    assert not dispatch.holds_metadata(torch.device("cpu"))
