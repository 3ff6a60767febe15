"""Masks as small files: what they hold, what they take, and what they refuse."""

from __future__ import annotations

import os
import zlib

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from maskpro_kernels import NMPattern, top_n_mask
from maskpro_kernels.checkpoints.mask_file import MAGNITUDE, MaskFile, save_masks
from maskpro_kernels.digests import digest_of_named
from maskpro_kernels.stored_digests import without_digests


def some_layers(pattern: str, change: float = 0.0, dtype: torch.dtype = torch.bfloat16):
    """(name, codes, weight) of layers; the codes leave the mask by magnitude where noise of that size changes it."""
    generator = torch.Generator().manual_seed(0)
    layers = []
    for name, shape in {"up": (24, 64), "down.0": (16, 32)}.items():
        weight = torch.randn(shape, generator=generator).to(dtype)
        scores = weight.float().abs() + change * torch.rand(shape, generator=generator)
        layers.append((name, top_n_mask(scores, pattern), weight))
    return layers


@pytest.mark.parametrize("pattern", ["1:2", "2:4", "4:8", "8:16"])
@pytest.mark.parametrize("against", [None, MAGNITUDE, "another file"])
def test_codes_come_back(tmp_path, pattern, against):
    other = against
    if against == "another file":
        other = save_masks(tmp_path / "other", some_layers(pattern, 0.02), pattern, model="tiny")
    layers = some_layers(pattern, 0.05)
    saved = save_masks(tmp_path / "mask", layers, pattern, model="tiny", against=other, provenance={"seed": 3})
    mask = MaskFile(tmp_path / "mask", other if isinstance(other, MaskFile) else None)
    assert mask.digest == saved.digest and mask.model == "tiny" and mask.provenance == {"seed": 3}
    assert mask.pattern == NMPattern(pattern) and mask.dtype == torch.bfloat16
    assert mask.needs == (other.digest if isinstance(other, MaskFile) else against)
    for name, codes, weight in layers:
        assert mask.layers[name].shape == tuple(weight.shape)
        assert torch.equal(mask.codes(name, weight), codes)


def test_an_initial_mask_that_makes_no_smaller_file_is_left_out(tmp_path):
    """Group by group another one: the changes are no shorter than the mask itself."""
    layers = some_layers("2:4", 100.0)
    assert save_masks(tmp_path / "mask", layers, "2:4", model="tiny", against=MAGNITUDE).needs is None
    size = os.path.getsize(tmp_path / "mask")
    assert save_masks(tmp_path / "same", some_layers("2:4"), "2:4", model="tiny", against=MAGNITUDE).needs == MAGNITUDE
    assert os.path.getsize(tmp_path / "same") < size - 100


def test_layers_may_be_made_one_at_a_time(tmp_path):
    made = []

    def layers():
        for layer in some_layers("2:4"):
            made.append(layer[0])
            yield layer

    assert list(save_masks(tmp_path / "mask", layers(), "2:4", model="tiny").layers) == made == ["up", "down.0"]


def test_every_flipped_bit_is_found(tmp_path):
    path = tmp_path / "mask"
    save_masks(path, some_layers("2:4"), "2:4", model="tiny").close()
    content = path.read_bytes()
    for bit in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match="^mask: expected"):
            MaskFile(path)
    path.write_bytes(content[:-1])
    with pytest.raises(ValueError, match="^mask: expected"):
        MaskFile(path)


def test_where_digests_are_not_checked_the_mask_is(tmp_path):
    path = tmp_path / "mask"
    save_masks(path, some_layers("2:4"), "2:4", model="tiny").close()
    content = bytearray(path.read_bytes())
    content[-1] = 255
    path.write_bytes(content)
    with without_digests(), pytest.raises(ValueError, match="^packed: expected words of 3 ranks, got larger ones"):
        mask = MaskFile(path)
        [mask.codes(name) for name in mask.layers]


def test_the_initial_mask_has_to_be_the_right_one(tmp_path):
    other = save_masks(tmp_path / "other", some_layers("2:4", 0.02), "2:4", model="tiny")
    third = save_masks(tmp_path / "third", some_layers("2:4", 0.03), "2:4", model="tiny")
    save_masks(tmp_path / "mask", some_layers("2:4", 0.05), "2:4", model="tiny", against=other)
    with pytest.raises(ValueError, match=f"^against: expected the initial mask .* {other.digest}, got no file"):
        MaskFile(tmp_path / "mask")
    with pytest.raises(ValueError, match=f"^against: expected .* {other.digest}, got .* of digest {third.digest}"):
        MaskFile(tmp_path / "mask", third)
    cast = save_masks(tmp_path / "cast", some_layers("2:4", 0.02, torch.float16), "2:4", model="tiny")
    with pytest.raises(ValueError, match="^against: expected a mask of the same base, got one of another up"):
        save_masks(tmp_path / "x", some_layers("2:4"), "2:4", model="tiny", against=cast)
    wider = save_masks(tmp_path / "wider", some_layers("4:8"), "4:8", model="tiny")
    with pytest.raises(ValueError, match="^against: expected a mask of 2:4, got one of 4:8"):
        save_masks(tmp_path / "x", some_layers("2:4"), "2:4", model="tiny", against=wider)
    assert not (tmp_path / "x").exists()


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
    ):
        with pytest.raises((ValueError, TypeError), match=f"^{error}"):
            save_masks(tmp_path / "mask", layers, "2:4", model="tiny")
    for layers, error in (
        ([(name, codes, weight), (name, codes, weight)], "layers"),
        ([(name, codes[0], weight[0])], "layers"),
        ([(name, codes, weight[:, :62])], "layers"),
    ):
        with pytest.raises(ValueError, match=f"^{error}: expected another name for each"):
            save_masks(tmp_path / "mask", layers, "2:4", model="tiny")
    with pytest.raises(TypeError, match="^model: expected the name"):
        save_masks(tmp_path / "mask", some_layers("2:4"), "2:4", model=3)
    with pytest.raises(TypeError, match="^provenance: expected what JSON can hold"):
        save_masks(tmp_path / "mask", some_layers("2:4"), "2:4", model="tiny", provenance={"a": object()})
    with pytest.raises(ValueError, match="^against: expected a MaskFile"):
        save_masks(tmp_path / "mask", some_layers("2:4"), "2:4", model="tiny", against="wanda")
    assert not (tmp_path / "mask").exists()
    (tmp_path / "text").write_text("nothing")
    with pytest.raises(ValueError, match="^mask: expected a mask file"):
        MaskFile(tmp_path / "text")
    with pytest.raises(ValueError, match="^mask: expected a mask file, got .* a folder"):
        MaskFile(tmp_path)
    with pytest.raises(FileNotFoundError, match="^mask: expected a mask file, got .* there is none"):
        MaskFile(tmp_path / "none")
    with pytest.raises(ValueError, match="^mask: expected a file that save_masks wrote"):
        save_file({"a": torch.zeros(1)}, tmp_path / "other")
        MaskFile(tmp_path / "other")


def test_the_file_of_the_initial_mask_is_kept(tmp_path):
    other = save_masks(tmp_path / "mask", some_layers("2:4", 0.02), "2:4", model="tiny")
    content = (tmp_path / "mask").read_bytes()
    with pytest.raises(ValueError, match="^path: expected another file than that of the initial mask"):
        save_masks(tmp_path / "mask", some_layers("2:4", 0.05), "2:4", model="tiny", against=other)
    assert (tmp_path / "mask").read_bytes() == content


def test_a_closed_file_gives_no_codes(tmp_path):
    mask = save_masks(tmp_path / "mask", some_layers("2:4"), "2:4", model="tiny")
    mask.close()
    with pytest.raises(ValueError, match="^mask: expected an open file"):
        mask.codes("up")


def test_changes_that_unfold_to_more_are_refused(tmp_path):
    path = tmp_path / "mask"
    save_masks(path, some_layers("2:4"), "2:4", model="tiny", against=MAGNITUDE).close()
    with safe_open(path, framework="pt") as file:
        metadata, tensors = dict(file.metadata()), {name: file.get_tensor(name) for name in file.keys()}
    tensors["up"] = torch.frombuffer(bytearray(zlib.compress(bytes(10_000_000))), dtype=torch.uint8)
    del metadata["digest"]
    save_file(tensors, path, {**metadata, "digest": digest_of_named(tensors, metadata)})
    with pytest.raises(ValueError, match="^mask: expected changes of 384 groups, got others"):
        MaskFile(path).codes("up", dict((name, weight) for name, _, weight in some_layers("2:4"))["up"])
