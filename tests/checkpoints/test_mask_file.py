"""Masks as small files: what they hold, what they take, and what they refuse."""

from __future__ import annotations

import math
import os
from itertools import combinations

import pytest
import torch
from helpers.checkpoints import forge
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from maskpro_kernels import NMPattern, top_n_mask
from maskpro_kernels.checkpoints.mask_file import (
    _tables,
    is_mask_file,
    load_masks,
    pack_ranks,
    save_masks,
    unpack_ranks,
    word_size,
)
from maskpro_kernels.ops.pattern import GROUP_SIZES

PATTERNS = [NMPattern(f"{n}:{m}") for m in GROUP_SIZES for n in range(1, m)]


def some_layers(pattern: str, dtype: torch.dtype = torch.bfloat16):
    """(name, codes, weight) of layers."""
    generator = torch.Generator().manual_seed(0)
    layers = []
    for name, shape in {"up": (24, 64), "down.0": (16, 32)}.items():
        weight, scores = (torch.randn(shape, generator=generator) for _ in range(2))
        layers.append((name, top_n_mask(scores, pattern), weight.to(dtype)))
    return layers


@pytest.mark.parametrize("pattern", ["1:2", "2:4", "4:8", "8:16"])
def test_codes_come_back(tmp_path, pattern):
    layers = some_layers(pattern)
    saved = save_masks(tmp_path / "mask", layers, pattern, model="tiny", provenance={"seed": 3})
    mask = load_masks(tmp_path / "mask")
    assert mask.checksum == saved.checksum and mask.model == "tiny" and mask.provenance == {"seed": 3}
    assert mask.pattern == NMPattern(pattern) and mask.dtype == torch.bfloat16
    assert mask.layers == saved.layers == {name: tuple(weight.shape) for name, _, weight in layers}
    for name, codes, _ in layers:
        assert torch.equal(mask.codes(name), codes) and torch.equal(saved.codes(name), codes)
    mask.check_base({name: weight for name, _, weight in layers})


def test_masks_on_another_base_are_refused(tmp_path):
    mask = save_masks(tmp_path / "mask", some_layers("2:4"), "2:4", model="tiny")
    weights = {name: weight for name, _, weight in some_layers("2:4")}
    # of more digits the same in the dtype of the masks
    mask.check_base({name: weight.float() for name, weight in weights.items()})
    changed = weights["up"].clone()
    changed.view(torch.int16)[3, 5] ^= 1
    other = save_masks(tmp_path / "other", [("up", *some_layers("2:4")[0][1:])], "2:4", model="tiny")
    assert other.base != mask.base
    for base, message in (
        (
            weights | {"up": changed},
            f"model: expected the masks' base model, tiny, with fingerprint {mask.base} in bfloat16, got bfloat16",
        ),
        ({"up": weights["up"]}, "got down.0 of shape none, but in the masks .16, 32."),
        (weights | {"x": changed}, "got x of shape .24, 64., but in the masks none"),
        (weights | {"up": changed[:-1]}, "got up of shape .23, 64., but in the masks .24, 64."),
    ):
        with pytest.raises(ValueError, match=message):
            mask.check_base(base)


def test_layers_may_be_made_one_at_a_time(tmp_path):
    made = []

    def layers():
        for layer in some_layers("2:4"):
            made.append(layer[0])
            yield layer

    assert list(save_masks(tmp_path / "mask", layers(), "2:4", model="tiny").layers) == made == ["up", "down.0"]


def test_a_file_takes_few_bits_a_group(tmp_path):
    layers = [("a", torch.full((256, 1024), 0b0101, dtype=torch.uint8), torch.zeros(256, 4096))]
    save_masks(tmp_path / "mask", layers, "2:4", model="tiny")
    assert 8 * os.path.getsize(tmp_path / "mask") / (256 * 1024) == pytest.approx(8 / 3, abs=0.03)


def test_flipped_bits_are_found(tmp_path):
    """Every third bit: each byte has two or three of them."""
    path = tmp_path / "mask"
    save_masks(path, some_layers("2:4"), "2:4", model="tiny")
    content = path.read_bytes()
    for bit in range(0, 8 * len(content), 3):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match="^mask: expected"):
            load_masks(path)
    path.write_bytes(content[:-1])
    with pytest.raises(ValueError, match="^mask: expected"):
        load_masks(path)


def test_what_is_no_mask_is_refused(tmp_path):
    ((name, codes, weight), *others) = some_layers("2:4")
    bad = codes.clone()
    bad[0, 0] = 0b0111
    for layers, error in (
        ([(name, bad, weight)], "codes"),
        ([(name, codes[:-1], weight)], "codes"),
        ([(name, codes, weight.double())], "layers"),
        ([(name, codes, weight), (others[0][0], others[0][1], others[0][2].float())], "layers"),
        ([], "layers"),
        ([(name, codes, weight), (name, codes, weight)], "layers: expected distinct names"),
        ([(name, codes, weight[:, :62])], "layers: expected distinct names"),
    ):
        with pytest.raises((ValueError, TypeError), match=f"^{error}"):
            save_masks(tmp_path / "mask", layers, "2:4", model="tiny")
    assert not (tmp_path / "mask").exists()
    (tmp_path / "text").write_text("nothing")
    save_file({"a": torch.zeros(1)}, tmp_path / "other")
    for path in ("text", "other", "none", "."):
        with pytest.raises((ValueError, OSError), match="^mask: expected a mask file"):
            load_masks(tmp_path / path)
        assert not is_mask_file(tmp_path / path)
    save_file({"a": torch.zeros(1)}, tmp_path / "old", {"format": "maskpro-mask 1"})
    with pytest.raises(ValueError, match="^mask: expected maskpro-mask 2, got 'maskpro-mask 1'"):
        load_masks(tmp_path / "old")
    assert is_mask_file(tmp_path / "old")


@pytest.mark.parametrize("pattern", [p for p in PATTERNS if p.m <= 8], ids=str)
def test_every_code_has_a_rank_of_its_own(pattern):
    # in colexicographic order, as combinations are numbered
    codes = [sum(1 << i for i in kept) for kept in combinations(range(pattern.m), pattern.n)]
    by_rank, ranks = _tables(pattern)
    assert by_rank.tolist() == sorted(codes) and by_rank.dtype == pattern.code_dtype
    assert ranks[by_rank.to(torch.int64)].tolist() == list(range(math.comb(pattern.m, pattern.n)))


@given(st.sampled_from(PATTERNS), st.integers(1, 50), st.integers(0, 2**31))
def test_ranks_come_back_from_words(pattern, groups, seed):
    generator = torch.Generator().manual_seed(seed)
    ranks = torch.randint(0, math.comb(pattern.m, pattern.n), (groups,), generator=generator)
    packed = pack_ranks(ranks, pattern)
    assert packed.dtype == torch.uint8
    assert torch.equal(unpack_ranks(packed, groups, pattern), ranks)


def test_words_take_little_more_than_the_entropy():
    for pattern in PATTERNS:
        (digits, size), count = word_size(pattern), math.comb(pattern.m, pattern.n)
        assert count**digits <= 1 << 8 * size
        assert math.log2(count) <= 8 * size / digits < math.log2(count) + 8 / digits
    bits = [8 * size / digits for digits, size in map(word_size, map(NMPattern, ("1:4", "2:4", "4:8", "8:16")))]
    assert bits == pytest.approx([2.0, 8 / 3, 56 / 9, 14.0])


def test_bytes_of_no_ranks_are_refused():
    pattern = NMPattern("2:4")
    with pytest.raises(ValueError, match=r"^packed: expected uint8 \[2\], got torch.uint8 \[3\]"):
        unpack_ranks(torch.zeros(3, dtype=torch.uint8), 4, pattern)
    with pytest.raises(ValueError, match="^packed: expected words of 3 ranks, got larger ones"):
        unpack_ranks(torch.tensor([216], dtype=torch.uint8), 3, pattern)


# Codes, and the bytes of their ranks: by Python's integers, words of 3 digits to the base 6 in a byte, of 9 to the base
# 70 and of 4 to the base 12870 in 7 bytes, the lowest byte first
GOLDEN = {
    "2:4": ([3, 5, 6, 9, 10, 12, 3, 12], "4ecf1e"),
    "4:8": ([15, 240, 85, 170, 60, 195, 102, 153, 23, 232], "4680dcc4dc490344000000000000"),
    "8:16": ([0x00FF, 0xFF00, 0x5555, 0xAAAA, 0x0FF0, 0xF00F], "a2640839e68e42b8377e09000000"),
}


@pytest.mark.parametrize("pattern", GOLDEN)
def test_the_bytes_of_masks_stay(tmp_path, pattern):
    """Files travel: a writer and a reader that both change would read the files of before as other masks."""
    codes, expected = torch.tensor([GOLDEN[pattern][0]], dtype=NMPattern(pattern).code_dtype), GOLDEN[pattern][1]
    save_masks(
        tmp_path / "mask", [("a", codes, torch.zeros(1, codes.numel() * NMPattern(pattern).m))], pattern, model="m"
    )
    assert load_file(tmp_path / "mask")["a"].numpy().tobytes().hex() == expected
    assert torch.equal(load_masks(tmp_path / "mask").codes("a"), codes)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"layers": '{"up": [24, 64], "down.0": [16, 32], "gate": [8, 8]}'}, "a layer without a tensor.* 'gate'"),
        ({"layers": '{"up": [24, 64]}'}, "a tensor without a layer, 'down.0'"),
        ({"layers": '{"up": [24, 64], "down.0": ["16", 32]}'}, '"16"'),
        ({"layers": '{"up": [24, 64], "down.0": [-16, -32]}'}, "-16"),
        ({"layers": '{"up": [24, 64], "down.0": [16]}'}, "unpack"),
        ({"layers": '["up", "down.0"]'}, "items"),
        ({"layers": "{"}, "line 1"),
        ({"layers": "[" * 100_000}, "recursion"),
        ({"dtype": "int8"}, "int8"),
        ({"pattern": "4:2"}, "4:2"),
        ({"provenance": "?"}, "line 1"),
    ],
)
def test_a_forged_file_is_refused_in_a_line(tmp_path, changed, named):
    save_masks(tmp_path / "mask", some_layers("2:4"), "2:4", model="tiny")
    forge(tmp_path / "mask", **changed)
    with pytest.raises(ValueError, match=rf"^mask: expected metadata of a mask file, got [^\n]*{named}[^\n]*$"):
        load_masks(tmp_path / "mask")


def test_a_layer_that_is_larger_than_its_ranks_is_refused(tmp_path):
    save_masks(tmp_path / "mask", some_layers("2:4"), "2:4", model="tiny")
    forge(tmp_path / "mask", layers='{"up": [4000000000, 4000000000], "down.0": [16, 32]}')
    with pytest.raises(ValueError, match="^packed: expected uint8 "):
        load_masks(tmp_path / "mask").codes("up")
