"""Masks and checkpoints by an id on the hub: from its cache, and from a hub whose downloads are local ones."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.checkpoints import compressed_folder, masked, random_masks, store
from helpers.command import refuses
from helpers.tiny_llama import tiny_model
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import EntryNotFoundError
from transformers import AutoModelForCausalLM

from maskpro_kernels import hf
from maskpro_kernels.cli import main
from maskpro_kernels.hf import hub

pytestmark = pytest.mark.usefixtures("eager_reference")

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """Gives what puts a folder into the cache of the hub, which is offline."""
    cache = tmp_path / "cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def put(repo_id, folder):
        place = cache / f"models--{repo_id.replace('/', '--')}"
        shutil.copytree(folder, place / "snapshots" / COMMIT)
        (place / "refs").mkdir()
        (place / "refs" / "main").write_text(COMMIT)

    return put


@pytest.fixture
def online(tmp_path, monkeypatch):
    """A folder that is the hub's repository; a download of a file that it lacks is told as the hub does."""
    repository = tmp_path / "repository"
    repository.mkdir()

    def download(repo_id, filename):
        if not (repository / filename).exists():
            raise EntryNotFoundError(f"404: {filename}")
        return str(repository / filename)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    monkeypatch.setattr(hub, "snapshot_download", lambda repo_id, allow_patterns: str(repository))
    monkeypatch.setattr(HfApi, "list_repo_files", lambda _, repo_id: sorted(path.name for path in repository.iterdir()))
    return repository


def imported(folder, masks):
    loaded, tokens = AutoModelForCausalLM.from_pretrained(folder / "out"), torch.arange(12).view(1, 12)
    assert_same_bits(loaded(tokens).logits, masked(tiny_model(), masks)(tokens).logits)


def test_masks_that_were_fetched_before_are_read_offline(folder, cached):
    masks = random_masks(tiny_model())
    (folder / "repository").mkdir()
    store(masks, folder / "repository" / "mask_compressed.npz", "maskllm")
    cached("owner/masks", folder / "repository")
    arguments = ["import", "owner/masks", "--output", str(folder / "out"), "--model", str(folder / "model")]
    assert main.main([*arguments, "--dtype", "float32"]) == 0
    imported(folder, masks)


def test_a_checkpoint_that_was_fetched_before_is_read_offline(folder, cached):
    masks = random_masks(tiny_model())
    compressed_folder(folder / "repository", masked(tiny_model(), masks))
    cached("owner/sparse", folder / "repository")
    assert main.main(["import", "owner/sparse", "--output", str(folder / "out"), "--dtype", "float32"]) == 0
    imported(folder, masks)
    card = (folder / "out" / "README.md").read_text()
    assert "base_model: owner/sparse" in card and "https://huggingface.co/owner/sparse" in card


def test_a_model_that_was_fetched_before_is_loaded_offline(folder, cached):
    cached("owner/dense", folder / "model")
    model, _ = hf.load_model("owner/dense", torch.float32)
    assert_same_bits(list(model.parameters()), list(tiny_model().parameters()))
    with pytest.raises(FileNotFoundError, match="no folder of that name, and the hub cannot be reached .*offline mode"):
        hf.load_model("owner/another", torch.float32)


@pytest.mark.parametrize(("how", "file"), [("maskllm", "other.npz"), ("dict", "masks.pt"), ("folder", None)])
def test_masks_under_other_names(folder, online, how, file):
    masks = random_masks(tiny_model())
    (online / "README.md").touch()
    if file is None:
        store(masks, folder / "files", how)
        for path in (folder / "files").iterdir():
            path.rename(online / path.name)
    else:
        store(masks, online / file, how)
    arguments = ["import", "owner/masks", "--output", str(folder / "out"), "--model", str(folder / "model")]
    assert main.main([*arguments, "--dtype", "float32"]) == 0
    imported(folder, masks)


def test_what_no_masks_can_be_chosen_of(folder, online, capsys, monkeypatch):
    arguments = ["import", "owner/masks", "--output", str(folder / "out"), "--model", str(folder / "model")]
    refuses(capsys, folder, arguments, "source: expected masks, .npz or .pt files, in 'owner/masks', got none")
    for name in "ab":
        np.savez(online / f"{name}.npz")
    refuses(
        capsys, folder, arguments, "source: expected one .npz file in 'owner/masks', got a.npz, b.npz", "hf download"
    )

    def none(*_):
        raise OSError("404 Client Error.\n\nRepository Not Found for url")

    monkeypatch.setattr(hub, "hf_hub_download", none)
    told = "source: expected an id on the hub that can be reached, got 'owner/masks': 404 Client Error."
    refuses(capsys, folder, arguments, told, "check the name and the login")


def test_a_path_goes_before_an_id(folder, online, monkeypatch):
    monkeypatch.chdir(folder)
    masks = random_masks(tiny_model())
    (folder / "owner").mkdir()
    store(masks, folder / "owner" / "masks", "folder")
    arguments = ["import", "owner/masks", "--output", "out", "--model", "model", "--dtype", "float32"]
    assert main.main(arguments) == 0
    imported(folder, masks)
