"""Processes beside a run: forked ones, workers that load batches, another writer; and signals in other threads."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.in_ranks import LONGEST, forking
from helpers.small_trainer import a_model, a_trainer, a_trainer_in, logits_of, loss_fn, some_batches
from torch.utils.data import DataLoader, Dataset

import maskpro_kernels as mk

pytestmark = pytest.mark.usefixtures("eager_reference")


def in_a_fork(call: Callable[[], object]) -> str:
    """Result of a forked process, as text, or its error."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            reported = str(call())
        except BaseException as error:
            reported = f"{type(error).__name__}: {error}"
        os.write(write, reported.encode())
        # as multiprocessing ends a child
        os._exit(0)
    os.close(write)
    with open(read) as pipe:
        reported = pipe.read()
    os.waitpid(child, 0)
    return reported


def whole_run(how: str, steps: int) -> list[torch.Tensor]:
    trainer = a_trainer(how=how)
    trainer.run(steps, progress=False)
    return logits_of(trainer.model)


@pytest.mark.parametrize("how", ["reinforce", "straight-through"])
def test_a_forked_process_takes_no_step_of_its_parents_run(how, tmp_path):
    trainer = a_trainer_in(tmp_path, how)
    trainer.run(2, progress=False)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for call in (trainer.step, lambda: trainer.run(2, progress=False)):
        reported = in_a_fork(call)
        assert reported.startswith(f"RuntimeError: output_dir: expected process {os.getpid()}, whose run is in"), (
            reported
        )
    assert in_a_fork(trainer.close) == "None"
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    # it has not let go of what its parent holds
    with pytest.raises(ValueError, match="a folder that no open trainer uses"):
        a_trainer_in(tmp_path, how).resume()
    trainer.run(2, progress=False)
    trainer.close()
    resumed = a_trainer_in(tmp_path, how)
    assert resumed.resume() == 4
    resumed.run(1, progress=False)
    assert_same_bits(logits_of(resumed.model), whole_run(how, 5))


def test_a_journal_that_something_else_writes_to_is_not_written_on(tmp_path):
    trainer = a_trainer_in(tmp_path)
    trainer.run(2, progress=False)
    with open(tmp_path / "journal", "ab") as file:
        file.write(b"half")
    before, logits = (tmp_path / "journal").read_bytes(), logits_of(trainer.model)
    with pytest.raises(
        ValueError, match=rf"journal: expected .* to end at byte {len(before) - 4}, .* got {len(before)}"
    ):
        trainer.step()
    assert (tmp_path / "journal").read_bytes() == before
    assert_same_bits(logits_of(trainer.model), logits)


@pytest.mark.parametrize("replaced", [False, True])
@pytest.mark.parametrize(
    ("how", "name"), [("straight-through", ".lock"), ("reinforce", ".lock"), ("reinforce", "journal")]
)
def test_a_folder_that_others_have_taken_is_not_written_to(tmp_path, how, name, replaced):
    trainer = a_trainer_in(tmp_path, how)
    trainer.run(2, progress=False)
    logits, content = logits_of(trainer.model), (tmp_path / name).read_bytes()
    (tmp_path / name).rename(tmp_path / "mine")
    if replaced:
        (tmp_path / name).write_bytes(content)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for call in (trainer.step, lambda: trainer.run(2, progress=False)):
        with pytest.raises(ValueError, match=f"^output_dir: expected .*{name}' of this process, got another"):
            call()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert_same_bits(logits_of(trainer.model), logits)
    # the way out that the message names
    trainer.close()
    (tmp_path / "mine").replace(tmp_path / name)
    resumed = a_trainer_in(tmp_path, how)
    assert resumed.resume() == 2
    assert_same_bits(logits_of(resumed.model), logits)


def test_a_trainer_that_has_not_begun_may_go_to_a_forked_process(tmp_path):
    trainer = a_trainer_in(tmp_path)
    assert in_a_fork(lambda: len(trainer.run(2, progress=False))) == "2"
    resumed = a_trainer_in(tmp_path)
    assert resumed.resume() == 2
    assert_same_bits(logits_of(resumed.model), whole_run("reinforce", 2))


class Batches(Dataset):
    """Some batches, by their index."""

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> torch.Tensor:
        return some_batches(5)[index]


def loaded(**how) -> DataLoader:
    return DataLoader(Batches(), batch_size=None, **how)


def learn_with_workers_until_killed(folder: Path) -> None:
    """The process is killed while a worker that it has forked lives on for some seconds."""

    def killed_at_the_end(model, batch):
        if trainer.steps_done == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return loss_fn(model, batch)

    torch.set_num_threads(1)
    loader = loaded(num_workers=1, multiprocessing_context="fork", persistent_workers=True)
    estimator = mk.StraightThrough(lr=0.3)
    # a snapshot after each step
    how = {"output_dir": folder, "snapshot_minutes": 0.0}
    trainer = mk.MaskTrainer(a_model(), killed_at_the_end, loader, estimator, seed=11, **how)
    trainer.begin()
    next(iter(loader))
    trainer.run(5, progress=False)


def test_workers_of_a_process_that_was_killed_do_not_hold_its_folder(tmp_path):
    with forking() as context:
        process = context.Process(target=learn_with_workers_until_killed, args=(tmp_path,))
        process.start()
        process.join(LONGEST)
    assert process.exitcode == -signal.SIGKILL
    began, resumed = time.monotonic(), a_trainer_in(tmp_path, "straight-through", batches=loaded())
    assert resumed.resume() == 3
    assert time.monotonic() - began < LONGEST / 4
    resumed.close()
