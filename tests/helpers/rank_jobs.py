"""A trainer as each of several ranks makes it, and the run that they take together."""

from __future__ import annotations

import maskpro_kernels as mk
from helpers.small_trainer import a_trainer, logits_of, uneven_batches


def rank_trainer(how: str = "reinforce", **arguments) -> mk.MaskTrainer:
    return a_trainer(how=how, **{"batches": uneven_batches()} | arguments)


def records_until(trainer: mk.MaskTrainer, steps: int) -> list[dict]:
    """Take the steps that are left, and close the trainer; the records without their times."""
    records = trainer.run(steps - trainer.steps_done, progress=False)
    trainer.close()
    return [vars(record) | {"seconds": 0.0} for record in records]


def records_of_run(trainer: mk.MaskTrainer, steps: int) -> list[dict]:
    """``records_until`` of a run, resumed if ``output_dir`` has one."""
    folder = trainer.output_dir
    if folder is not None and any(folder.glob("snapshot-*")):
        trainer.resume()
    return records_until(trainer, steps)


def learn_on_rank(rank: int, how: str, steps: int, folder=None, resume=False, **arguments):
    """(logits, records without their seconds) of a run."""
    trainer = rank_trainer(how, output_dir=folder, **arguments)
    if resume:
        trainer.resume()
    records = records_until(trainer, steps)
    return logits_of(trainer.model), records
