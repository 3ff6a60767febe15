"""`maskpro learn`: learn a mask, or continue an interrupted run."""

from __future__ import annotations

import argparse
import warnings
from contextlib import suppress
from pathlib import Path

import torch

from ..files import check_output
from ..learn.estimator import Estimator
from ..prune.convert import convert
from ..ranks import Ranks
from .arguments import DTYPES, telling
from .baselines import initial_masks
from .changed_weights import put_back_start_weights
from .config_file import given_beside_resume
from .inputs import read_inputs
from .learning_run import LearningRun
from .losses import fill_teacher, loss_of
from .progress import tell, tell_as
from .run_files import PROGRESS, SETTINGS, check_free, goes_on, how_to_go_on, read_start
from .run_settings import check_process, complete, logits_of
from .start_mask import StartMask


def learn(args: argparse.Namespace) -> None:
    """Learn a mask and write what a run leaves; ``--resume`` goes on with one.

    Several ranks do so together: rank 0 alone evaluates, writes and tells, and what is wrong on one ends all.
    """
    # the trainer's own are there only behind the evaluation of the initial masks, for which these wait
    ranks = Ranks()
    ranks.connect()
    run = _resumed_run(args, ranks) if hasattr(args, "resume") else _new_run(args, ranks)
    try:
        if run.take_steps():
            run.end()
    except BaseException:
        # the error that ended the run is the one told
        with suppress(OSError, RuntimeError):
            run.close()
        raise
    run.close()
    ranks.close()


def _new_run(args: argparse.Namespace, ranks: Ranks) -> LearningRun:
    """A run that has taken all that stands before its first step."""

    def check() -> Estimator:
        estimator = complete(args)
        check_process(args, ranks)
        return estimator

    estimator = ranks.all_of(check)
    _tell_ahead(args, estimator)
    mask = ranks.all_of(lambda: StartMask(args))
    ranks.first(lambda: _check_output(Path(args.output)))
    inputs = read_inputs(args, ranks, estimator, mask.read)
    loss_fn = loss_of(args)
    fill_teacher(args, inputs, loss_fn, ranks)
    start = initial_masks(args, inputs, mask, ranks)
    with warnings.catch_warnings():
        # told ahead
        warnings.filterwarnings("ignore", "no mask will change")
        run = LearningRun(args, ranks, inputs, estimator, loss_fn, start)
    run.begin()
    return run


def _tell_ahead(args: argparse.Namespace, estimator: Estimator) -> None:
    """Tell, before anything takes long, what the options leave out."""
    # as the logits hold it
    gap = float(torch.tensor(args.gap, dtype=DTYPES[args.logits_dtype]))
    if gap > estimator.max_logit_travel:
        names = {option.name for option in estimator.options}
        other = " or a greater --max-update" if "max_update" in names else ""
        tell_as(
            "warning",
            f"no mask will change: kept and dropped logits begin {gap:g} apart, and all steps together bring them "
            f"at most {estimator.max_logit_travel:g} nearer; give more --steps, a smaller --gap{other}",
        )
    if not hasattr(args, "other_data"):
        tell("no text of another kind will be looked at: name one by --other-data")


def _check_output(output: Path) -> None:
    if goes_on(output):
        raise ValueError(
            f"output: expected a new or empty folder, got {str(output)!r}, which holds a run that has not ended; "
            f"{how_to_go_on(output)}"
        )
    check_output(output)


def _resumed_run(args: argparse.Namespace, ranks: Ranks) -> LearningRun:
    """The run in the folder of ``--resume``, as it stood when it was broken off."""
    output = Path(args.resume)

    def read() -> dict:
        start = read_start(output)
        check_free(output)
        return start

    start = ranks.first(read)
    settings = given_beside_resume(args, start["settings"])
    args = argparse.Namespace(**settings | {"output": str(output), "bars": args.bars})

    def prepare() -> Estimator:
        try:
            estimator = complete(args)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"resume: expected the settings of a run, got others in {str(output / SETTINGS)!r}: {error}; restore "
                "the file from a copy"
            ) from error
        check_process(args, ranks)
        return estimator

    estimator = ranks.all_of(prepare)
    inputs = read_inputs(args, ranks, estimator)
    # the masks come from a snapshot
    ranks.all_of(lambda: convert(inputs.model, args.pattern, init="magnitude", **logits_of(args)))
    if args.refit != "none":
        with telling("resume", f"restore {PROGRESS} from a copy, or begin anew with another --output"):
            put_back_start_weights(inputs.model, output / PROGRESS, start, ranks)
    run = LearningRun(args, ranks, inputs, estimator, loss_of(args), start)
    run.go_on()
    return run
