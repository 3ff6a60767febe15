"""Snapshots of sharded runs: each rank writes its own rows, and every damage is found."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.in_ranks import all_in_ranks, in_ranks
from helpers.rank_jobs import rank_trainer
from helpers.sharded_jobs import a_sharded_model, learn_sharded
from safetensors.torch import load_file
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor

from maskpro_kernels.learn.snapshots import (
    MANIFEST,
    digest_of_file,
    newest_snapshot,
    publish_snapshot,
    save_snapshot,
    snapshots_in,
)
from maskpro_kernels.modules import masked_layers
from maskpro_kernels.ranks import FailedRank, Ranks
from maskpro_kernels.shards import planned_parts

STEPS = 4


def folder_aside(folder: Path) -> Path:
    path = folder / f"{MANIFEST}.{1:016x}.tmp"
    path.mkdir()
    return path


def publish(folder: Path, step: int, tensors: dict[str, torch.Tensor]) -> Path:
    """A snapshot of one process, as ranks write it."""
    aside = folder_aside(folder)
    part = planned_parts(Ranks(), aside, tensors)()
    return publish_snapshot(aside, step, {part.name: digest_of_file(part)}, {"x": 1})


def test_every_byte_of_every_file_flipped_is_found(tmp_path):
    before = {"a": torch.zeros(2)}
    save_snapshot(tmp_path, 0, before, {"x": 1})
    tensors = {"a": torch.randn(4, 8), "b/count": torch.tensor(3)}
    path = publish(tmp_path, 3, tensors)
    step, read, state, passed = newest_snapshot(tmp_path)
    assert (step, state, passed) == (3, {"x": 1}, []) and read.kinds["a"] == ([4, 8], torch.float32)
    assert_same_bits(dict(read), tensors)
    files = list(path.iterdir())
    assert len(files) == 2
    for file in files:
        whole = file.read_bytes()
        for at in range(len(whole)):
            file.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
            assert newest_snapshot(tmp_path)[3] == [path]
        file.unlink()
        assert newest_snapshot(tmp_path)[3] == [path]
        file.write_bytes(whole)
    assert newest_snapshot(tmp_path)[0] == 3
    shutil.copy(next(path.glob("*.safetensors")), path / "another.safetensors")
    assert newest_snapshot(tmp_path)[3] == [path]


def test_the_first_and_the_two_newest_are_kept(tmp_path):
    for step in range(5):
        publish(tmp_path, step, {"a": torch.full((2,), step)})
    # as at the end of a run whose last step has left one
    publish(tmp_path, 4, {"a": torch.full((2,), 4)})
    assert [newest_snapshot(tmp_path, at_most)[0] for at_most in range(5)] == [0, 0, 0, 3, 4]
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("damaged", [False, True])
def test_one_that_is_there_bit_for_bit_stays_or_is_mended(damaged, tmp_path):
    path = publish(tmp_path, 4, {"a": torch.ones(2)})
    aside = folder_aside(tmp_path)
    (part,) = path.glob("*.safetensors")
    shutil.copy(part, aside)
    if damaged:
        part.write_bytes(a_flipped_byte(part.read_bytes()))
    digests = {part.name: digest_of_file(aside / part.name)}
    assert publish_snapshot(aside, 4, digests, {"x": 1}) == path
    assert newest_snapshot(tmp_path)[3] == [] and list(tmp_path.iterdir()) == [path]


def write_own_rows(rank: int, folder: Path) -> int:
    """Bytes of logits of this rank; nothing of them is gathered."""
    trainer = rank_trainer(model=a_sharded_model([2]), accumulate=2, output_dir=folder)
    trainer.run(1, progress=False)
    DTensor.full_tensor = DTensor.redistribute = None
    trainer._save_snapshot()
    trainer.close()
    return sum(layer.own_logits.nbytes for layer in masked_layers(trainer.model).values())


def test_each_rank_writes_its_own_rows(tmp_path):
    own = all_in_ranks(2, write_own_rows, folder=tmp_path)
    first, newest = snapshots_in(tmp_path)
    for path in (first, newest):
        files = sorted(path.glob("*.safetensors"))
        assert [sum(t.nbytes for t in load_file(file).values()) for file in files] == own
        assert json.loads((path / MANIFEST).read_bytes())["files"].keys() == {file.name for file in files}


def fail_to_write(rank: int, folder: Path) -> str:
    """Error if the disk of one rank is full; the run continues."""
    trainer = rank_trainer(model=a_sharded_model([2]), accumulate=2, output_dir=folder)
    trainer.run(1, progress=False)
    real = HuggingFaceStorageWriter.write_data

    def full(*_):
        raise OSError("no space left")

    if rank == 1:
        HuggingFaceStorageWriter.write_data = full
    with pytest.raises((OSError, FailedRank)) as error:
        trainer._save_snapshot()
    HuggingFaceStorageWriter.write_data = real
    trainer.step()
    trainer._save_snapshot()
    trainer.close()
    return str(error.value)


@pytest.mark.slow
def test_a_disk_that_is_full_for_one_rank_leaves_nothing_in_part(tmp_path, eager_reference):
    reported = all_in_ranks(2, fail_to_write, folder=tmp_path)
    assert reported == ["rank 1: OSError: no space left", "no space left"]
    *_, newest = snapshots_in(tmp_path)
    assert len(snapshots_in(tmp_path)) == 3 and not list(tmp_path.glob("*.tmp"))
    part = max(newest.glob("*.safetensors"))
    part.write_bytes(a_flipped_byte(part.read_bytes()))
    with pytest.warns(UserWarning, match="is damaged or of steps that are taken again: it is set aside$"):
        resumed, _ = learn_sharded(0, None, how="reinforce", steps=3, accumulate=2, output_dir=tmp_path)
    assert newest.with_suffix(".aside").is_dir() and not newest.exists()
    assert_same_bits(resumed, learn_sharded(0, None, how="reinforce", steps=3, accumulate=2)[0])


def write_apart(rank: int, folder: Path, begun: bool) -> None:
    """Each rank in a folder of its own, under the same name; rank 0's may hold a run."""
    (folder / str(rank)).mkdir(exist_ok=True)
    os.chdir(folder / str(rank))
    trainer = rank_trainer(model=a_sharded_model([2]), accumulate=2, output_dir="run")
    trainer.resume() if begun else trainer.begin()


@pytest.mark.slow
def test_disks_that_ranks_do_not_share_are_refused(tmp_path):
    for begun in (False, True):
        if begun:
            learn_sharded(0, None, how="reinforce", steps=1, accumulate=2, output_dir=tmp_path / "0" / "run")
        for error in in_ranks(2, write_apart, folder=tmp_path, begun=begun):
            reported = str(error).removeprefix("rank 1: ")
            assert isinstance(error, ValueError), error
            assert reported.startswith("output_dir: expected a folder that all ranks have access to, got 'run'"), (
                reported
            )
        shutil.rmtree(tmp_path / "0" / "run")


def a_flipped_byte(content: bytes) -> bytes:
    return content[:-60] + bytes([content[-60] ^ 1]) + content[-59:]


def continue_run(rank: int, mesh: list[int] | None, how: str, steps: int, folder: Path) -> list[torch.Tensor]:
    return learn_sharded(rank, mesh, how=how, steps=steps, accumulate=12, output_dir=folder)[0]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["reinforce", "straight-through"])
def test_runs_continue_from_mesh_to_mesh(how, tmp_path, eager_reference):
    """From four ranks that hold each row twice to four, two, one, and two again."""
    alone = learn_sharded(0, None, how=how, steps=5, accumulate=12)[0]
    of = {"how": how, "folder": tmp_path}
    for steps, (world, mesh) in enumerate([(4, [2, 2]), (4, [4]), (2, [2])], 1):
        all_in_ranks(world, continue_run, mesh=mesh, steps=steps, **of)
    continue_run(0, None, steps=4, **of)
    for theirs in all_in_ranks(2, continue_run, mesh=[2], steps=5, **of):
        if how == "reinforce":
            assert_same_bits(theirs, alone)
        else:
            assert max((one - other).abs().max() for one, other in zip(theirs, alone, strict=True)) < 1e-4
