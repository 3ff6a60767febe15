"""`maskpro learn`: learn a mask, or go on with a run that was broken off."""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from ..checkpoints.logits import save_logits
from ..extras import missing
from ..files import check_output, sync, write_whole
from ..functional.masks import top_n_mask
from ..modules import masked_layers
from ..pattern import NMPattern
from ..pruning.convert import convert
from ..pruning.finalize import finalize
from ..pruning.gap import LARGEST_GAP, gap_for_flip_rate
from ..ranks import FailedRank, MissingRanks, Ranks
from ..report.html import write_html
from ..report.plots import draw_perplexity, draw_residual
from ..report.tensorboard import Scalars
from ..text.perplexity import causal_lm_loss
from ..training.batches import digest
from ..training.reinforce import Reinforce
from ..training.run_folder import JOURNAL, LOCK
from ..training.sharing import PARALLEL, check_shares
from ..training.snapshots import newest_snapshot, snapshots_in
from ..training.straight_through import StraightThrough
from ..training.trainer import MaskTrainer
from .arguments import DTYPES, check_least, device_of, telling
from .baselines import initial_masks, top_n_codes
from .held_out import HeldOut, print_table, table_row
from .inputs import Inputs, read_inputs
from .models import save
from .progress import StepLines, tell
from .runs import (
    LOGITS,
    PAGE,
    PERPLEXITY_PICTURE,
    PROGRESS,
    REPORT,
    RESIDUAL_PICTURE,
    SETTINGS,
    TENSORBOARD,
    VALIDATION,
    check_free,
    digest_of_weights,
    goes_on,
    how_to_go_on,
    logits_metadata,
    read_metrics,
    read_start,
    tell_missing,
)
from .signals import Signals

# What each estimator takes where the command line says nothing: learning rate, gap, distinct batches
DEFAULTS = {"reinforce": (50.0, 10.0, 16), "straight-through": (0.1, 15.0, None)}
ALPHA = 0.99
# Of straight-through runs whose settings have none
EARLIER_LARGEST = 5.0
# Steps in a row whose loss, or gradient, may be no number
MAX_SKIPPED = 9
# Of this process, not of the run
NO_SETTINGS = ("run", "device_given", "parallel", "quiet", "bars")


def learn(args: argparse.Namespace) -> None:
    """Learn a mask and write what a run leaves; ``--resume`` goes on with one.

    Several ranks do so together: rank 0 alone evaluates, writes and tells, and what is wrong on one ends all.
    """
    # the trainer's own are there only behind the evaluation of the initial masks, for which these wait
    ranks = Ranks()
    ranks.connect()
    if hasattr(args, "resume"):
        _resume(args, ranks)
    else:
        _learn(args, ranks)
    ranks.close()


def _learn(args: argparse.Namespace, ranks: Ranks) -> None:
    def check() -> None:
        _complete(args)
        _check_ranks(args, ranks)
        _check_tensorboard(args)

    ranks.all_of(check)
    ranks.first(lambda: _check_output(Path(args.output)))
    inputs = ranks.all_of(lambda: read_inputs(args))
    _train(args, ranks, inputs, initial_masks(args, inputs, ranks), resumed=False)


def _check_output(output: Path) -> None:
    if goes_on(output):
        raise ValueError(
            f"output: expected a new or empty folder, got {str(output)!r}, which holds a run that has not ended; "
            f"{how_to_go_on(output)}"
        )
    check_output(output)


def _resume(args: argparse.Namespace, ranks: Ranks) -> None:
    output = Path(args.resume)

    def read() -> dict:
        start = read_start(output)
        check_free(output)
        return start

    start = ranks.first(read)
    given = {"parallel": args.parallel} if hasattr(args, "parallel") else {}
    if args.device_given:
        given["device"] = args.device
    settings = start["settings"]
    if settings.get("estimator") == "straight-through":
        settings = {"max_update": EARLIER_LARGEST} | settings
    args = argparse.Namespace(**settings | given | {"output": str(output), "bars": args.bars})

    def prepare() -> Inputs:
        try:
            _complete(args)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"resume: expected the settings of a run, got others in {str(output / SETTINGS)!r}: {error}; restore "
                "the file from a copy"
            ) from error
        _check_ranks(args, ranks)
        _check_tensorboard(args)
        inputs = read_inputs(args)
        # the masks come from a snapshot
        convert(inputs.model, args.pattern, init="magnitude", gap=args.gap)
        return inputs

    _train(args, ranks, ranks.all_of(prepare), start, resumed=True)


def _complete(args: argparse.Namespace) -> None:
    """Put in what the command line left out, and check what can be told before anything is loaded."""
    for name in ("model", "data", "output"):
        if not hasattr(args, name):
            raise ValueError(f"{name}: expected --{name}, or --resume alone, got none")
    pattern = NMPattern(args.pattern)
    if args.dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {args.dtype!r}")
    flip_rate = getattr(args, "flip_rate", None)
    lr, gap, distinct = DEFAULTS[args.estimator]
    args.lr = getattr(args, "lr", lr)
    args.gap = getattr(args, "gap", gap)
    args.calibration_batches = getattr(args, "calibration_batches", distinct)
    args.eval_every = getattr(args, "eval_every", max(args.steps // 5, 1))
    # the settings of earlier runs have none
    args.accumulate = getattr(args, "accumulate", 1)
    check_least(args, steps=1, batch_size=1, accumulate=1, seq_len=2, init_batches=1)
    check_least(args, eval_windows=1, eval_length=2, eval_every=1, seed=0)
    if args.calibration_batches is not None:
        check_least(args, calibration_batches=1)
    if not (math.isfinite(args.gap) and args.gap > 0):
        raise ValueError(f"gap: expected a positive number, got {args.gap}")
    if flip_rate is not None:
        # Its range is told now, not after the model has been loaded
        args.gap = gap_for_flip_rate(flip_rate, pattern)
    if args.seed >= 1 << 63:
        raise ValueError(f"seed: expected an int below 2**63, got {args.seed}")
    if args.estimator == "reinforce":
        if args.gap > LARGEST_GAP:
            raise ValueError(f"gap: expected at most {LARGEST_GAP:g}, which is as far as noise reaches, got {args.gap}")
        args.draws = getattr(args, "draws", 1)
        if args.draws == 1:
            args.alpha = getattr(args, "alpha", ALPHA)
        elif hasattr(args, "alpha"):
            raise ValueError(f"alpha: expected none beside several draws, which need no tracker, got {args.alpha}")
        _check_none(args, "straight-through", "max_update")
    else:
        args.max_update = getattr(args, "max_update", StraightThrough().max_update)
        _check_none(args, "reinforce", "alpha", "draws")
    _estimator(args)


def _check_none(args: argparse.Namespace, estimator: str, *names: str) -> None:
    for name in names:
        if hasattr(args, name):
            raise ValueError(
                f"{name}: expected none, for it is of {estimator} alone, got {getattr(args, name)}; leave it out"
            )


def _estimator(args: argparse.Namespace) -> Reinforce | StraightThrough:
    if args.estimator == "reinforce":
        return Reinforce(lr=args.lr, alpha=getattr(args, "alpha", ALPHA), draws=args.draws)
    return StraightThrough(lr=args.lr, steps=args.steps, max_update=args.max_update)


def _check_ranks(args: argparse.Namespace, ranks: Ranks) -> None:
    """Whether the ranks can share the work; and the device, which each has of its own."""
    check_shares(ranks.world, _parallel(args), args.accumulate, getattr(args, "draws", 1))
    if device_of(args.device).type != "cpu" and ranks.world > 1 and torch.device(args.device).index is not None:
        raise ValueError(
            f"device: expected one without a number, for each rank takes that of its own, got {args.device!r}"
        )


def _parallel(args: argparse.Namespace) -> str:
    return getattr(args, "parallel", PARALLEL[0])


def _check_tensorboard(args: argparse.Namespace) -> None:
    lacking = missing("tensorboard") if hasattr(args, "tensorboard") else None
    if lacking:
        raise ValueError(f"tensorboard: expected {lacking}")


def _train(args: argparse.Namespace, ranks: Ranks, inputs: Inputs, start: Mapping, resumed: bool) -> None:
    """Learn, from the first step or from where a run was broken off, and write what was learned."""
    output = Path(args.output)
    progress = output / PROGRESS
    trainer = MaskTrainer(
        inputs.model,
        causal_lm_loss,
        inputs.calibration,
        _estimator(args),
        seed=args.seed,
        output_dir=progress,
        max_skipped=MAX_SKIPPED,
        accumulate=args.accumulate,
        parallel=_parallel(args),
    )
    held_out = HeldOut(progress / VALIDATION, inputs.model, inputs.validation, args.eval_every, args.steps, args.bars)

    def tokens_done() -> int:
        return sum(record["tokens"] for record in read_metrics(progress))

    def look() -> None:
        """Find the perplexity of the held-out text where the run stands, and tell it."""
        found = held_out.add(trainer.steps_done, tokens_done())
        if not args.bars:
            tell(f"step {trainer.steps_done} of {args.steps}: perplexity {found:.2f}")

    if resumed:
        ranks.first(held_out.read)
        with telling("resume", "put back the model, the text and what the folder held when the run was broken off"):
            trainer.resume()
        held_out.restart(trainer.steps_done)
        tell(f"{trainer.steps_done} steps were taken before")
    else:
        _begin(trainer, look, output, args.bars)
        # Behind the first snapshot: a folder with settings can be gone on with.
        settings = json.dumps({"settings": _settings(args), **start}, indent=1).encode()
        ranks.first(lambda: write_whole(output / SETTINGS, settings))

    def has_more() -> bool:
        """Whether there are steps to take, by what is known of the held-out text."""
        if held_out.due(trainer.steps_done):
            look()
        return trainer.steps_done < args.steps and not held_out.risen()

    more = ranks.first(has_more)
    if ranks.rank > 0:
        with _taking_steps(output) as signals:
            if more:
                trainer.run(args.steps - trainer.steps_done, progress=False, after_step=lambda _: signals.came)
        trainer.close()
        return
    earlier = sum(record["seconds"] for record in read_metrics(progress))
    began, checked = time.perf_counter(), held_out.seconds
    lines = StepLines(args.steps, trainer.steps_done)
    board = nullcontext()
    if hasattr(args, "tensorboard"):
        board = closing(Scalars(output / TENSORBOARD, trainer.steps_done, held_out.rows))
    with _taking_steps(output) as signals, board as scalars:

        def check(record) -> bool:
            step = record.step + 1
            found = held_out.add(step, tokens_done()) if held_out.due(step) else None
            if not args.bars:
                lines.add(record, found)
            if scalars is not None:
                scalars.add(record, held_out.rows)
            return held_out.risen() or signals.came

        try:
            if more:
                trainer.run(args.steps - trainer.steps_done, progress=args.bars, after_step=check)
        except (FloatingPointError, torch.OutOfMemoryError, KeyboardInterrupt, OSError):
            where = _keep_logits(args, trainer)
            tell(f"stopped after {trainer.steps_done} steps; {where}; {how_to_go_on(output)}")
            raise
    # the signal may have come to another rank
    if trainer.steps_done < args.steps and (signals.came or not held_out.risen()):
        with telling("output", how_to_go_on(output)):
            _save_logits(args, inputs.model)
        tell(f"stopped after {trainer.steps_done} steps; {how_to_go_on(output)}")
        trainer.close()
        return
    if trainer.steps_done < args.steps:
        tell(f"stopped after {trainer.steps_done} steps: the held-out perplexity rose")
    seconds = time.perf_counter() - began - (held_out.seconds - checked) + earlier + start["seconds"]
    with telling("output", how_to_go_on(output)):
        report = _finish(args, inputs, start, held_out, seconds)
    # What is learned is in the logits; what a replay starts from stays
    for old in snapshots_in(progress)[1 if args.estimator == "reinforce" else 0 :]:
        old.unlink()
    print_table(report["table"])
    print(
        f"{report['flipped_groups']} of {report['groups']} groups differ from the {args.init} mask; written to {output}"
    )
    trainer.close()


@contextmanager
def _taking_steps(output: Path) -> Iterator[Signals]:
    """Signals are noted; and of ranks that end it is told before the signal that torchrun then sends."""
    with Signals() as signals:
        try:
            yield signals
        except MissingRanks as error:
            tell_missing(error, output)
            raise SystemExit(2) from error


def _begin(trainer: MaskTrainer, look: Callable[[], None], output: Path, bars: bool) -> None:
    """What stands before the first step; where it fails, the folder is as it was and may be given again.

    Args:
        look: finds the perplexity that the later ones are compared with.
    """
    progress = output / PROGRESS
    made = [folder for folder in (progress, output, *output.parents) if not folder.exists()]

    try:
        trainer.begin(progress=bars)
        trainer.ranks.first(look)
    except (FloatingPointError, torch.OutOfMemoryError, KeyboardInterrupt, OSError, MissingRanks, FailedRank):
        trainer.close()
        if trainer.ranks.rank > 0:
            raise
        for left in (*snapshots_in(progress), progress / JOURNAL, progress / LOCK, progress / VALIDATION):
            left.unlink(missing_ok=True)
        # a folder that holds anything else stays
        with suppress(OSError):
            for folder in made:
                folder.rmdir()
        raise


def _keep_logits(args: argparse.Namespace, trainer: MaskTrainer) -> str:
    """Save what was learned before an error, which stays the one that is told; gives where it is."""
    if trainer.broken:
        goes_on = "are rebuilt" if args.estimator == "reinforce" else "of the last snapshot are taken"
        return f"the next one was broken off in its update, and the logits {goes_on} where the run goes on"
    try:
        _save_logits(args, trainer.model)
    except OSError as error:
        return f"the logits could not be saved: {error}"
    return f"the logits are in {Path(args.output) / LOGITS}"


def _finish(args: argparse.Namespace, inputs: Inputs, start: Mapping, held_out: HeldOut, seconds: float) -> dict:
    """Write what a run leaves that has taken its last step; gives its report."""
    model, output, pattern = inputs.model, Path(args.output), NMPattern(args.pattern)
    progress = output / PROGRESS
    masked = masked_layers(model)
    table = [*start["table"], table_row(args.estimator, model, inputs.tests, seconds, args.bars)]
    _save_logits(args, model)
    learned = top_n_codes(masked, pattern)
    flips = _flips(progress, learned, pattern)
    groups = sum(code.numel() for code in learned.values())
    records = read_metrics(progress)
    logits = {name: layer.logits for name, layer in masked.items()}

    save(finalize(model), inputs.tokenizer, output)
    draw_perplexity({args.estimator: held_out.rows}, output / PERPLEXITY_PICTURE)
    if args.estimator == "reinforce" and args.draws == 1:
        draw_residual(records, output / RESIDUAL_PICTURE)
    report = {
        "model": _settings(args)["model"],
        "pattern": str(pattern),
        "settings": {name: value for name, value in vars(args).items() if name not in (*NO_SETTINGS, "gap")},
        # Not among the settings: with a flip rate it is not the one on the command line.
        "gap": args.gap,
        "versions": versions(),
        "eval_tokens": inputs.tests["perplexity"].numel(),
        "table": table,
        "validation": held_out.rows,
        "groups": groups,
        "groups_by_layer": {name: code.numel() for name, code in learned.items()},
        "flipped_groups": sum(flips.values()),
        "flipped_groups_by_layer": flips,
        # What a replay prints
        "logits": digest(logits[name] for name in sorted(logits)),
        "converted": start["converted"],
        "skipped": start["skipped"],
        "steps": records,
    }
    write_html(report, output / PAGE)
    # Last, and behind all else on the disk too: a folder with a report is a run that ended.
    for written in (*filter(Path.is_file, output.iterdir()), output):
        sync(written)
    write_whole(output / REPORT, (json.dumps(report, indent=1) + "\n").encode())
    return report


def _settings(args: argparse.Namespace) -> dict:
    """The arguments by which a run goes on, from whatever folder."""
    settings = {name: value for name, value in vars(args).items() if name not in (*NO_SETTINGS, "output")}
    for name in ("model", "data", "other_data"):
        if name in settings and Path(settings[name]).exists():
            settings[name] = str(Path(settings[name]).resolve())
    return settings


def _save_logits(args: argparse.Namespace, model: torch.nn.Module) -> None:
    save_logits(model, Path(args.output) / LOGITS, logits_metadata(_settings(args), digest_of_weights(model)))


def _flips(progress: Path, learned: Mapping[str, torch.Tensor], pattern: NMPattern) -> dict[str, int]:
    """How many groups of each layer differ from the mask that learning began with."""
    try:
        _, initial, _, _ = newest_snapshot(progress, at_most=0)
    except ValueError as error:
        tell(f"how many groups differ from the initial mask is not known: {error}")
        return {}
    return {name: int((codes.cpu() != top_n_mask(initial[name], pattern)).sum()) for name, codes in learned.items()}


def versions() -> dict[str, str]:
    """Of Python and of the packages that decide what a run gives."""
    versions = {"python": platform.python_version()}
    for package in ("maskpro-kernels", "torch", "triton", "transformers", "safetensors"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return versions
