"""Which entries of the launch tables a GPU takes, by faked capabilities, and the warning of an unknown one."""

from __future__ import annotations

import re
import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import triton

from maskpro_kernels.ops.triton import tiles

NVIDIA = {
    (8, 0): "sm_80",
    (8, 6): "sm_80",
    (8, 7): "sm_80",
    (8, 9): "sm_80",
    (9, 0): "sm_90",
    (10, 0): "sm_100",
    (10, 3): "sm_100",
    (12, 0): "sm_80",
    (12, 1): "sm_80",
}


@pytest.fixture
def device(monkeypatch):
    """device(what, index): a GPU of that capability, or of that name of AMD's."""
    known = {}

    def clear():
        tiles.architecture.cache_clear()
        tiles._target_of.cache_clear()

    def make(what, index=0):
        known[torch.device("cuda", index)] = what
        monkeypatch.setattr(torch.version, "hip", "7.0" if isinstance(what, str) else None)
        return torch.device("cuda", index)

    monkeypatch.setattr(tiles, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: known[device])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(gcnArchName=known[device]))
    clear()
    yield make
    clear()


@pytest.mark.parametrize(("capability", "target"), NVIDIA.items(), ids=str)
def test_known_cards_of_nvidia_take_their_target_without_a_word(device, capability, target):
    with warnings.catch_warnings(action="error"):
        assert tiles.architecture(device(capability)) == target


@pytest.mark.parametrize("name", ["gfx942", "gfx942:sramecc+:xnack-"])
def test_known_cards_of_amd_take_their_target_without_a_word(device, name):
    with warnings.catch_warnings(action="error"):
        assert tiles.architecture(device(name)) == "gfx942"


@pytest.mark.parametrize(
    ("what", "name", "target"),
    [
        ((9, 9), "sm_99", "sm_80"),
        ((10, 1), "sm_101", "sm_80"),
        ((11, 0), "sm_110", "sm_80"),
        ((13, 0), "sm_130", "sm_80"),
        ("gfx90a:sramecc+:xnack-", "gfx90a", "gfx942"),
        ("gfx950", "gfx950", "gfx942"),
        ("gfx1201", "gfx1201", "gfx942"),
    ],
    ids=str,
)
def test_an_unknown_card_is_a_warning_once_that_names_what_is_used(device, what, name, target):
    with pytest.warns(UserWarning) as reported:
        assert tiles.architecture(device(what)) == target
    (warning,) = reported
    message = str(warning.message)
    assert message.startswith(f"GPU architecture {name}: expected one of sm_80, ")
    assert f"use the tiles of {target}," in message and "CONTRIBUTING.md explains how to add it" in message
    with warnings.catch_warnings(action="error"):
        assert tiles.architecture(device(what)) == target
        # another card of the same kind
        assert tiles.architecture(device(what, index=1)) == target


@pytest.mark.parametrize("capability", [(7, 5), (6, 1)], ids=str)
def test_a_card_below_the_least_capability_is_refused_each_time(device, capability):
    card = device(capability, index=1)
    for _ in range(2):
        with pytest.raises(
            ValueError,
            match=r"^device: expected a GPU of compute capability 8\.0 or higher, [^\n]*, got cuda:1 of "
            + re.escape(".".join(map(str, capability)))
            + "; choose the CPU$",
        ):
            tiles.architecture(card)


def test_each_unknown_architecture_has_a_warning_of_its_own(device):
    with pytest.warns(UserWarning) as reported:
        tiles.architecture(device((11, 0)))
        tiles.architecture(device((13, 0), index=1))
    assert [str(warning.message).split(":")[0] for warning in reported] == [
        "GPU architecture sm_110",
        "GPU architecture sm_130",
    ]


def test_every_target_that_an_architecture_takes_is_in_every_table():
    assert tiles.TARGETS.keys() == {*tiles.TARGET_OF.values(), tiles.NVIDIA_TARGET, tiles.AMD_TARGET}


def test_each_lane_has_a_group_to_draw(monkeypatch):
    """A wave of AMD's has 64 lanes, a warp 32."""
    monkeypatch.setattr(tiles, "INTERPRETED", False)
    blocks = {target: tiles.configuration("sample_mask", 8, 0, target).block for target in tiles.TARGETS}
    assert blocks == dict.fromkeys(blocks, 32) | {"gfx942": 64}


def test_a_target_takes_tiles_of_its_own_in_place_of_those_of_all(monkeypatch):
    monkeypatch.setattr(tiles, "multiplies_by_warps", lambda target: False)
    own = (tiles.Tiles(out=128, tokens=16, k=64),)
    row = replace(tiles.TARGETS["sm_90"], tiles={("masked_linear", 2): own})
    monkeypatch.setitem(tiles.TARGETS, "sm_90", row)
    assert tiles.tiles_of("masked_linear", "sm_90", 2) == own
    assert tiles.tiles_of("masked_linear", "sm_90", 4) == tiles.TILES["masked_linear", 4]


@pytest.mark.parametrize(
    ("version", "by_warps"),
    [
        ("3.6.0", ["sm_90", "sm_100"]),
        ("3.7.0", ["sm_90", "sm_100"]),
        ("3.7.1", ["sm_90"]),
        ("3.8.0+git1234567", ["sm_90"]),
        ("3.9.0", []),
        ("3.10.0", []),
    ],
)
def test_releases_whose_wgmma_or_tcgen05_is_wrong_multiply_by_warps(version, by_warps, monkeypatch):
    monkeypatch.setattr(triton, "__version__", version)
    for target in tiles.TARGETS:
        for (product, itemsize), replacement in tiles.BY_WARPS.items():
            replaced = tiles.tiles_of(product, target, itemsize) == replacement
            assert replaced == (target in by_warps), (product, target)


def test_tiles_by_warps_have_fewer_results_than_wgmma_takes():
    for (product, _), replacement in tiles.BY_WARPS.items():
        side = "k" if product in tiles.ACROSS_COLUMNS else "out"
        assert all(getattr(tile, side) < 64 for tile in replacement), product
    by_dot = {key for key in tiles.TILES if key[1] == 2} - {("sparse_mma", 2), ("straight_through_step", 2)}
    assert tiles.BY_WARPS.keys() == by_dot
