"""The flow of `maskpro learn`: load, choose masks, train, save."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

from filelock import FileLock

from ...learn.estimator import LossFn
from ...learn.trainer import MaskTrainer
from ...ranks import Ranks
from ...text.losses import TeacherCache, distillation_loss
from ..config import Learn
from ..inputs import PROGRESS
from .data import Data, Dense, Windows, choose_batches, cut_windows, load_dense, load_texts
from .folder import RUN_LOCK, TEACHER, claim, hint_at_resume, options_to_store, read_start, write_settings
from .options import complete, estimator_of
from .result import write_result
from .start import choose_masks, codes_of_init, restore_masks
from .steps import Run, take_steps

# Most steps in a row whose loss or gradient is not finite
MAX_SKIPPED = 9


def learn(options: Learn) -> None:
    """Learn a mask and write the files of a run; with ``resume`` continue one.

    With several ranks, rank 0 alone evaluates, writes and reports, and an error on one rank ends all.
    """
    ranks = Ranks()
    ranks.connect()
    # those of rank 0 are taken
    ranks.agree(dataclasses.asdict(options))
    resuming = options.resume is not None
    stored = ranks.run_on_main(options_to_store, options)
    options = ranks.run_on_all(complete, stored, ranks.world_size, resuming)
    output = Path(options.output)
    # of rank 0, from the first write to the last; a killed process frees it
    lock = FileLock(output / PROGRESS / RUN_LOCK, blocking=False)
    try:
        ranks.run_on_main(claim, output, lock, resuming)
        with hint_at_resume(output, "before the next step"):
            start = ranks.run_on_main(read_start, options)
            has_begun = start is not None
            dense, windows = _load(options, ranks, start)
            if not has_begun:
                init = ranks.run_on_main(codes_of_init, options, dense)
                # once all arguments are checked
                ranks.run_on_main(write_settings, stored, output, lock)
            data = choose_batches(options, ranks, dense, windows, start)
            loss_fn = _loss_of(options)
            if has_begun:
                restore_masks(options, ranks, dense, start)
            else:
                start = choose_masks(options, ranks, dense, data, init, loss_fn)
            trainer = _trainer_of(options, dense, data, loss_fn)
        with closing(trainer):
            run = Run(options, ranks, trainer, data, start)
            with hint_at_resume(output, "before the next step"):
                if has_begun:
                    run.resume()
                else:
                    run.begin()
            if take_steps(run):
                with hint_at_resume(output, "before the result was written"):
                    write_result(run, dense.tokenizer)
    finally:
        lock.release()
    ranks.close()


def _load(options: Learn, ranks: Ranks, start: Mapping | None) -> tuple[Dense, Windows]:
    # before the model, which takes longer
    texts = ranks.run_on_all(load_texts, options)
    dense = load_dense(options, ranks, start)
    return dense, ranks.run_on_all(cut_windows, options, texts, dense)


def _loss_of(options: Learn) -> LossFn:
    """Loss of the steps, with a cache of the dense model's predictions if weights change."""
    weights_change = options.refit != "none" or options.train_weights is not None
    cache = None
    if weights_change and options.loss != "ce":
        cache = TeacherCache(folder=Path(options.output) / PROGRESS / TEACHER)
    return distillation_loss(options.loss, cache=cache)


def _trainer_of(options: Learn, dense: Dense, data: Data, loss_fn: LossFn) -> MaskTrainer:
    return MaskTrainer(
        dense.model,
        loss_fn,
        data.calibration,
        estimator_of(options),
        seed=options.seed,
        output_dir=Path(options.output) / PROGRESS,
        max_skipped=MAX_SKIPPED,
        accumulate=options.accumulate,
    )
