"""`maskpro learn`: learn a mask of a language model, or continue a run.

The folder of a run has:

- ``settings.json``: the given options, for ``--resume`` and exports in int4;
- ``progress/``: snapshots, metrics and journal of the trainer (``learn/run.py``); ``start.json``, results before the
  first step; ``validation.json``; and if the run uses them, samples of the dense model and a cache of its predictions;
- at the end ``learned/logits.safetensors``, the checkpoint with its model card, ``report.json`` and
  ``perplexity.png``.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn
from tqdm import tqdm

from ..checkpoints.logits import LOGITS_FILE, Logits, changed_weights, load_logits, save_logits, write_logits
from ..extras import missing
from ..files import (
    check_output,
    digest,
    discard,
    make_folder,
    sync,
    unfinished,
    write_record,
    write_tensors,
    write_whole,
)
from ..functional.checks import LARGEST_GAP, check_gap
from ..functional.masks import top_n_mask
from ..learn.estimator import Estimator, LossFn, StepRecord
from ..learn.reinforce import Reinforce
from ..learn.run import LOCK, snapshots_in
from ..learn.straight_through import StraightThrough
from ..learn.trainer import MaskTrainer
from ..modules import MaskedLinear, initial_logits, masked_layers, tensors_of_base
from ..ops.pattern import NMPattern
from ..prune.convert import convert
from ..prune.density import costliest_layers
from ..prune.finalize import finalize
from ..prune.initial_masks import INITIAL_MASKS, initial_codes, refitted_masks
from ..prune.reconstruction import Reconstruction
from ..prune.refit import put_weights
from ..prune.selection import layers_to_convert
from ..ranks import Ranks, rank_of_torchrun
from ..text.batches import (
    MixedBatches,
    batches,
    check_windows,
    in_a_batch,
    other_kind,
    parse_sources,
    resolved,
    sample_windows,
    split_by_share,
    start_token,
    texts_of,
    turns,
)
from ..text.losses import TeacherCache, distillation_loss
from ..text.perplexity import causal_lm_loss, perplexity
from ..text.sources import SELF, load_text
from ..unfuse import as_linears
from .config import EVAL_LENGTH, Learn, parse
from .inputs import (
    COLUMNS,
    FORMAT,
    LINES,
    PROGRESS,
    REPORT,
    SAMPLES,
    SETTINGS,
    Progress,
    check_context,
    check_least,
    default_dtype,
    device_of,
    digest_of_weights,
    load,
    naming,
    positions_of,
    print_table,
    read_json,
    read_progress,
    read_samples,
    report,
    report_as,
    resume_command,
    save,
    wants_bars,
    windows_of,
)

START = "start.json"
VALIDATION = "validation.json"
TEACHER = "teacher"
# Lock of the process that learns; the trainer within it has one of its own
RUN_LOCK = ".run.lock"
# Settings that were not yet complete at a power cut
UNFINISHED = f"{SETTINGS}.*.tmp"
# Refitted weights with which a run begins
START_WEIGHTS = "start-weights.safetensors"
# Options that may change when a run resumes
BESIDE_RESUME = ("device", "gradient_checkpointing", "report_to")
# Defaults of options by estimator; None: all batches
DEFAULTS = {
    "straight-through": {"init": "reconstruction", "gap": 15.0, "calibration_batches": None, "steps": 200, "lr": 0.3},
    "reinforce": {"init": "wanda", "gap": 10.0, "calibration_batches": 16, "steps": 1000, "lr": 50.0},
}
# Most batches for the initial mask
INIT_BATCHES = 16
# Reason that a layer stays dense because of --density
COSTLY = "the mask would cost most for its size"
# Initial masks that are always in the table
BASELINES = ("magnitude", "wanda")
# Learning stops if the validation perplexity exceeds the initial mask's by this factor twice in a row
DIVERGED = 1.1
# Most tokens of windows whose attention plain products compute in bfloat16 on a CPU: with the backward they are faster
# than torch's function, but need much more memory for longer windows
SHORT = 128
# Most steps in a row whose loss or gradient is not finite
MAX_SKIPPED = 9
# Fields of a step's record for trackers
TRACKED = ("loss", "residual", "advantage", "tracker", "flip_rate")


def learn(options: Learn) -> None:
    """Learn a mask and write the files of a run; with ``resume`` continue one.

    With several ranks, rank 0 alone evaluates, writes and reports, and an error on one rank ends all.
    """
    ranks = Ranks()
    ranks.connect()
    resuming = options.resume is not None
    settings = ranks.run_on_main(_settings_of, options)
    options = ranks.run_on_all(complete, settings, ranks.world_size, resuming)
    output = Path(options.output)
    # of rank 0, from the first write to the last; a killed process frees it
    lock = FileLock(output / PROGRESS / RUN_LOCK, blocking=False)
    try:
        ranks.run_on_main(_claim, output, lock, resuming)
        with _hint_at_resume(output, "before the next step"):
            start = ranks.run_on_main(_read_start, options)
            loaded = _load(options, ranks, start, write_settings=partial(_write_settings, settings, output, lock))
            loss_fn = _loss_of(options)
            begun = start is not None
            if begun:
                _restore_masks(options, ranks, loaded, start)
            else:
                start = _choose_masks(options, ranks, loaded, loss_fn)
        trainer = _trainer_of(options, loaded, loss_fn)
        with closing(trainer):
            run = _Run(options, ranks, trainer, loaded, start)
            with _hint_at_resume(output, "before the next step"):
                run.resume() if begun else run.begin()
            if run.take_steps():
                with _hint_at_resume(output, "before the result was written"):
                    run.end()
    finally:
        lock.release()
    ranks.close()


def _settings_of(options: Learn) -> Learn:
    """Options of the run to resume, or those given, with the dtype that a run keeps if it resumes on another CPU."""
    if options.resume is not None:
        return read_options(options)
    if options.dtype is None:
        return dataclasses.replace(options, dtype=default_dtype(options.device))
    return options


@contextmanager
def _hint_at_resume(output: Path, moment: str) -> Iterator[None]:
    """Report how to continue a run that is interrupted."""
    try:
        yield
    except KeyboardInterrupt:
        written = (output / SETTINGS).is_file()
        report(f"stopped {moment}; {resume_command(output)}" if written else "nothing was written")
        raise


@dataclasses.dataclass
class _Loaded:
    """A model without masks, and the texts that it learns from and is evaluated on.

    Attributes:
        base: digest of the model.
        layers: those that can get a mask, by name.
        skipped: names of the others, with the reasons.
        init: name of the initial mask, or group codes by layer if a path gives them.
        tests: test windows by column of the table.
        validation: windows of the validation text.
        initial: batches for the initial mask.
        calibration: batches of the steps.
    """

    model: nn.Module
    tokenizer: object
    base: str
    layers: dict[str, nn.Module]
    skipped: dict[str, str]
    init: str | dict[str, Tensor]
    tests: dict[str, Tensor]
    validation: Tensor
    initial: Sequence[Tensor]
    calibration: Sequence[Tensor]

    @property
    def evaluated(self) -> str:
        """Digest of the windows by which the run is evaluated."""
        return digest([*self.tests.values(), self.validation])


def _load(options: Learn, ranks: Ranks, start: dict | None, write_settings: Callable[[], None]) -> _Loaded:
    """Load the model and the texts of a run; a new run writes its settings once all arguments are checked.

    Raises:
        ValueError: if the model or the texts are not those of the run that ``start`` belongs to.
    """
    output = Path(options.output)
    texts = ranks.run_on_all(_load_texts, options)
    device = options.device if options.device == "auto" else device_of(options.device)
    cure = None if start is None else f"if it has moved, change its path in {output / SETTINGS}"
    with naming("model", cure):
        model, tokenizer = ranks.run_on_all(load, options.model, options.dtype, device)
    base = ranks.run_on_main(digest, tensors_of_base(model))
    if start is not None and start["base"] != base:
        raise ValueError(
            f"resume: expected the base model of the run, got other weights in {options.model!r}; restore it"
        )
    skipped = ranks.run_on_all(as_linears, model)
    layers, reasons = ranks.run_on_all(layers_to_convert, model, options.pattern)
    if options.gradient_checkpointing:
        from ..hf import checkpoint_activations

        checkpoint_activations(model)
    tests, validation, windows = ranks.run_on_all(_windows, options, texts, model, tokenizer)
    init = options.init
    if start is None:
        if init not in INITIAL_MASKS:
            init = ranks.run_on_main(initial_codes, layers, options.pattern, init)
        ranks.run_on_main(write_settings)

    if SELF in windows:
        samples = ranks.run_on_main(_samples, model, tokenizer, windows[SELF], options, base)
        if not tests.keys() - {"other_perplexity"}:
            # without a text, the first samples are for evaluation
            test, validation, samples = samples.tensor_split([options.eval_windows, 2 * options.eval_windows])
            tests = {"perplexity": test, **tests}
        windows[SELF] = samples.to(model.get_input_embeddings().weight.device)
    learned_from = _learned_from(options)
    sources = parse_sources(options.data)
    if len(sources) == 1 and SELF not in windows:
        every = batches(windows[sources[0].name], options.batch_size, options.seed)
    else:
        every = MixedBatches(windows, sources, options.batch_size, max(learned_from, INIT_BATCHES), options.seed)
    loaded = _Loaded(
        model=model,
        tokenizer=tokenizer,
        base=base,
        layers=layers,
        skipped=skipped | reasons,
        init=init,
        tests=tests,
        validation=validation,
        initial=every[:INIT_BATCHES],
        calibration=every[:learned_from],
    )
    if start is not None and start["evaluated"] != loaded.evaluated:
        raise ValueError("resume: expected the texts that the run is evaluated on, got others; restore them")
    return loaded


def _loss_of(options: Learn) -> LossFn:
    """Loss of the steps, with a cache of the dense model's predictions if weights change."""
    weights_change = options.refit != "none" or options.train_weights is not None
    cache = None
    if weights_change and options.loss != "ce":
        cache = TeacherCache(folder=Path(options.output) / PROGRESS / TEACHER)
    return distillation_loss(options.loss, cache=cache)


def _choose_masks(options: Learn, ranks: Ranks, loaded: _Loaded, loss_fn: LossFn) -> dict:
    """Convert the model to the initial mask of a new run.

    Returns:
        Results before the first step, which ``start.json`` has: the table, the seconds from the dense model to this
        mask, names, digests.
    """
    cache = getattr(loss_fn, "cache", None)
    if cache is not None:
        report(f"computing the dense model's outputs for {len(loaded.calibration)} batches, since weights will change")
        share = loaded.calibration[ranks.rank :: ranks.world_size]
        ranks.run_on_all(loss_fn.fill, loaded.model, share, progress=wants_bars())
    for name, reason in loaded.skipped.items():
        report(f"left dense: {name} ({reason})")
    start = ranks.run_on_main(_evaluate_initial_masks, options, loaded)
    if ranks.world_size > 1:
        _broadcast_initial_mask(options, loaded.model, start["targets"], ranks)
    costly = {name: COSTLY for name in loaded.layers if name not in start["converted"]}
    return start | {
        "base": loaded.base,
        "evaluated": loaded.evaluated,
        "skipped": loaded.skipped | costly,
        "options": _with_absolute_paths(options),
    }


def _restore_masks(options: Learn, ranks: Ranks, loaded: _Loaded, start: Mapping) -> None:
    """Convert the model as at the start of a run, with its refitted weights; the trainer restores the logits."""
    targets = start["targets"]
    ranks.run_on_all(convert, loaded.model, options.pattern, targets, init="magnitude", gap=options.gap)
    if options.refit != "none":
        ranks.run_on_main(_put_back_start_weights, loaded.model, Path(options.output) / PROGRESS, start)
        _broadcast_weights(loaded.model, ranks)


def _trainer_of(options: Learn, loaded: _Loaded, loss_fn: LossFn) -> MaskTrainer:
    return MaskTrainer(
        loaded.model,
        loss_fn,
        loaded.calibration,
        estimator_of(options),
        seed=options.seed,
        output_dir=Path(options.output) / PROGRESS,
        max_skipped=MAX_SKIPPED,
        accumulate=options.accumulate,
    )


def read_options(given: Learn) -> Learn:
    """Read the options of the run in the folder of ``resume``, and add options that may change.

    Raises:
        ValueError: if the folder is not an unfinished run of this version, or another option is given.
    """
    folder = Path(given.resume)
    fields = {field.name: field.default for field in dataclasses.fields(Learn)}
    others = [
        name for name in fields if name not in ("resume", *BESIDE_RESUME) and getattr(given, name) != fields[name]
    ]
    if others:
        allowed = ", ".join(f"--{name.replace('_', '-')}" for name in BESIDE_RESUME)
        raise ValueError(f"resume: expected no other option but {allowed}, got {', '.join(others)}")
    _check_not_ended(folder)
    if not (folder / SETTINGS).is_file():
        raise ValueError(f"resume: expected the folder of `maskpro learn`, got {str(folder)!r}, without {SETTINGS}")
    read_json(folder / SETTINGS)
    with naming("resume"):
        options, _ = parse("learn", [str(folder / SETTINGS), f"--output={folder}"])
    for name in BESIDE_RESUME:
        if getattr(given, name) != fields[name]:
            setattr(options, name, getattr(given, name))
    return options


def _check_not_ended(folder: Path) -> None:
    if (folder / REPORT).is_file():
        raise ValueError(
            f"resume: expected a run that has not ended, got {str(folder)!r}; use `maskpro eval` or `export`"
        )


def complete(options: Learn, world: int = 1, resuming: bool = False) -> Learn:
    """Add the defaults of the estimator to options, and check all that needs no model.

    Raises:
        ValueError, TypeError: if an option is missing, out of its range, or excluded by another.
    """
    for name in ("model", "output"):
        if getattr(options, name) is None:
            raise ValueError(f"{name}: expected --{name}, or --resume alone, got none")
    pattern = NMPattern(options.pattern)
    given = {name: value for name, value in vars(options).items() if value is not None}
    options = dataclasses.replace(options, **DEFAULTS[options.estimator] | given)
    if options.eval_every is None:
        options.eval_every = max(options.steps // 5, 1)
    check_least(options, steps=1, batch_size=1, accumulate=1, seq_len=2, calibration_batches=1)
    check_least(options, eval_windows=1, eval_every=1, seed=0, documents=1)
    if options.seed >= 1 << 63:
        raise ValueError(f"seed: expected an int below 2**63, got {options.seed}")
    check_gap(options.gap)
    if options.density is not None and not pattern.n / pattern.m < options.density < 1:
        raise ValueError(
            f"density: expected above {pattern.n / pattern.m:g}, that of {pattern}, and below 1, got {options.density}"
        )
    if options.estimator == "reinforce":
        if options.gap > LARGEST_GAP:
            raise ValueError(f"gap: expected at most {LARGEST_GAP:g}, which noise can cross, got {options.gap}")
        for name in ("train_weights", "gradient_checkpointing"):
            if getattr(options, name):
                raise ValueError(f"{name}: expected none with --estimator reinforce, which uses no gradients")
    if options.init not in INITIAL_MASKS and not resuming and not Path(options.init).exists():
        raise ValueError(
            f"init: expected one of {', '.join(INITIAL_MASKS)}, or the path of a mask file, a run or a sparse "
            f"checkpoint, got {options.init!r}"
        )
    with naming("data"):
        texts = texts_of(options.data)
    with naming("eval_windows"):
        split_by_share(texts, options.eval_windows)
    if options.accumulate % world:
        raise ValueError(f"accumulate: expected a multiple of the {world} ranks, got {options.accumulate}")
    if world > 1 and options.device not in (None, "cpu", "cuda"):
        raise ValueError(f"device: expected cpu or cuda, since each rank uses its own, got {options.device!r}")
    if options.device != "auto":
        device_of(options.device)
    for name in _trackers_of(options):
        if missing("accelerate", name):
            raise ValueError(f"report_to: expected {missing('accelerate', name)}")
    # refuses settings out of their range now
    estimator_of(options)
    return dataclasses.replace(options, pattern=str(pattern))


def estimator_of(options: Learn) -> Estimator:
    """Make the estimator of complete options; ValueError or TypeError if one is out of its range."""
    if options.estimator == "reinforce":
        return Reinforce(lr=options.lr)
    return StraightThrough(steps=options.steps, lr=options.lr, train_weights=options.train_weights)


def _claim(output: Path, lock: FileLock, resuming: bool) -> None:
    """Raise unless this process may learn in a folder; acquire the lock of a run that it has."""
    if resuming or Path(lock.lock_file).exists():
        _acquire(lock, "resume" if resuming else "output", output)
    if resuming:
        # again: another process may have ended it
        _check_not_ended(output)
    else:
        _check_output(output)


def _acquire(lock: FileLock, argument: str, output: Path) -> None:
    try:
        lock.acquire()
    except Timeout as error:
        raise ValueError(
            f"{argument}: expected a folder that no other process learns in, got {str(output)!r}"
        ) from error


def _check_output(output: Path) -> None:
    """Raise unless a folder can get a new run: missing, empty, or with a run before its first step."""
    left = {path.name for path in output.iterdir() if not path.match(UNFINISHED)} if output.is_dir() else set()
    if left == {PROGRESS} and {path.name for path in (output / PROGRESS).iterdir()} <= {LOCK, RUN_LOCK}:
        # of a run that ended before its settings were on disk
        return
    if (output / SETTINGS).is_file() and not (output / REPORT).is_file():
        read_json(output / SETTINGS)
        if left <= {SETTINGS, PROGRESS} and not (output / PROGRESS / START).is_file():
            report(f"{output} has a run that was stopped before its first step: this one takes its place")
            return
        raise ValueError(
            f"output: expected a new or empty folder, got {str(output)!r}, which has a run that has not ended; "
            f"{resume_command(output)}"
        )
    check_output(output)


def _with_absolute_paths(options: Learn) -> dict:
    """Options by name, with absolute paths."""
    stored = {name: value for name, value in vars(options).items() if name not in ("output", "resume")}
    if Path(options.model).exists():
        stored["model"] = str(Path(options.model).resolve())
    if options.init not in (None, *INITIAL_MASKS):
        stored["init"] = str(Path(options.init).resolve())
    return stored | {"data": resolved(options.data)}


def _write_settings(options: Learn, output: Path, lock: FileLock) -> None:
    """Write options for resuming from any folder; remove files of a run that did not begin."""
    make_folder(output / PROGRESS)
    if not lock.is_locked:
        _acquire(lock, "output", output)
        # again: while the model was loaded, another process may have begun a run, or ended one
        _check_output(output)
    for path in (*output.glob(UNFINISHED), *(output / PROGRESS).iterdir()):
        if path.name not in (SAMPLES, TEACHER, LOCK, RUN_LOCK):
            discard(path)
    content = {"format": FORMAT, "options": _with_absolute_paths(options)}
    write_whole(output / SETTINGS, json.dumps(content, indent=1).encode())


def _read_start(options: Learn) -> dict | None:
    """Read the results before the first step; None before it. ValueError if the run began with other options."""
    progress = Path(options.output) / PROGRESS
    if not (progress / START).is_file():
        return None
    with naming("resume"):
        start = read_progress(progress / START)
        for name, value in _with_absolute_paths(options).items():
            begun = start["options"][name]
            # model and texts may have moved: their content is compared; that of an initial mask is in the logits
            is_path = name in ("model", "data") or (name == "init" and not {value, begun} & {*INITIAL_MASKS})
            if name not in BESIDE_RESUME and not is_path and value != begun:
                raise ValueError(
                    f"expected {name} {begun!r}, with which the run began, got {value!r} in "
                    f"{str(progress.parent / SETTINGS)!r}"
                )
    return start


def _load_texts(options: Learn) -> dict[str, dict[str, str]]:
    """Load the texts of the data by name, and under "" a text of another kind, which shows forgetting."""
    with naming("data"):
        texts = {name: load_text(name, documents=options.documents) for name, _ in texts_of(options.data)}
    other = other_kind(options.data)
    return texts | ({"": load_text(other)} if other else {})


def _windows(
    options: Learn, texts: Mapping[str, Mapping[str, str]], model: nn.Module, tokenizer
) -> tuple[dict[str, Tensor], Tensor, dict[str, Tensor | int]]:
    """(test windows by column of the table, validation windows, windows to learn from by source).

    For the model's own samples the last has the number of windows to sample.
    """
    length = min(EVAL_LENGTH, positions_of(model) or EVAL_LENGTH)
    sources = texts_of(options.data)
    counts = split_by_share(sources, options.eval_windows)

    def evaluated(split: str) -> Tensor:
        parts = [
            windows_of(texts[name][split], model, tokenizer, length, "data")[:count]
            for (name, _), count in zip(sources, counts, strict=True)
        ]
        return torch.cat(parts)

    tests = {"perplexity": evaluated("test")} if sources else {}
    validation = evaluated("validation") if sources else torch.empty(0)
    if "" in texts:
        other = windows_of(texts[""]["test"], model, tokenizer, length, "other text")
        tests["other_perplexity"] = other[: options.eval_windows]
    device = model.get_input_embeddings().weight.device
    windows = {
        name: windows_of(texts[name]["calibration"], model, tokenizer, options.seq_len, "data", "--seq-len").to(device)
        for name, _ in sources
    }
    every = parse_sources(options.data)
    with naming("data", "give a longer text, or a smaller --batch-size or --seq-len"):
        check_windows(every, windows, options.batch_size)
    if SELF in dict(every):
        check_context(model, options.seq_len, "seq_len")
        whose = turns([share for _, share in every], options.batch_size * max(_learned_from(options), INIT_BATCHES))
        wanted = whose.count([name for name, _ in every].index(SELF))
        held_out = 0 if sources else 2 * options.eval_windows
        windows[SELF] = max(in_a_batch(dict(every)[SELF], options.batch_size), wanted) + held_out
    return tests, validation, windows


def _learned_from(options: Learn) -> int:
    """Most distinct batches of the steps."""
    all_steps = options.steps * options.accumulate
    return all_steps if options.calibration_batches is None else min(options.calibration_batches, all_steps)


def _samples(model: nn.Module, tokenizer, count: int, options: Learn, base: str) -> Tensor:
    """Sample int64 [windows, seq_len] from the dense model, or load those of the same settings from the folder."""
    progress = Path(options.output) / PROGRESS
    start = start_token(tokenizer)
    settings = json.dumps([start, count, options.seq_len, options.seed, base])
    if (stored := read_samples(progress, settings)) is not None:
        return stored
    report(f"sampling {count} windows of {options.seq_len} tokens from the dense model, to store in {progress}")
    bar = Progress("samples", "step")
    tokens = sample_windows(model, start, count, options.seq_len, seed=options.seed, progress=bar)
    write_tensors({"tokens": tokens}, progress / SAMPLES, {"settings": settings, "digest": digest([tokens])})
    return tokens


def _evaluate_initial_masks(options: Learn, loaded: _Loaded) -> dict:
    """Evaluate the dense model and initial masks; the model keeps the mask of ``--init``, with its weights."""
    model = loaded.model
    pattern = NMPattern(options.pattern)
    dense = _initial_row("dense", options, loaded, 0.0)
    chosen, masks, seconds = _initial_masks(options, loaded)
    codes = masks[chosen].codes
    targets = None
    if options.density is not None:
        began = time.perf_counter()
        targets = _layers_to_mask(options, loaded, masks[chosen])
        codes = {name: codes[name] for name in targets}
        seconds[chosen] += time.perf_counter() - began
    conversion = convert(model, pattern, targets, init=codes, gap=options.gap)
    masked = masked_layers(model)
    dense_weights = digest_of_weights(model)
    rows = {}
    # last the mask that learning starts from, so that its logits and weights stay
    for name in sorted(masks, key=lambda name: name == chosen):
        _set_logits(masked, masks[name].codes, options)
        put_weights(masked, {layer: weight for layer, weight in masks[name].weights.items() if layer in masked})
        rows[name] = _initial_row(name, options, loaded, seconds[name])
    in_order = [_name_of(name, options) for name in INITIAL_MASKS] + [chosen]
    return {
        "table": [dense, *(rows[name] for name in dict.fromkeys(in_order) if name in rows)],
        "seconds": seconds[chosen],
        "targets": targets,
        "converted": list(conversion.converted),
        "dense_weights": dense_weights,
        "start_weights": digest_of_weights(model),
    }


def _initial_row(method: str, options: Learn, loaded: _Loaded, seconds: float) -> dict:
    """Evaluate the model before the first step: a row of the table."""
    row = _table_row(method, loaded.model, loaded.tests, seconds)
    if method == "dense" and math.isnan(row["perplexity"]):
        raise ValueError(f"model: expected a finite loss, got nan in {options.dtype}; use --dtype float32")
    if not wants_bars():
        from_dense = "" if method == "dense" else f", {seconds:.1f} seconds from the dense model"
        report(f"{method}: test perplexity {row['perplexity']:.2f}{from_dense}")
    return row


def _initial_masks(options: Learn, loaded: _Loaded) -> tuple[str, dict[str, Reconstruction], dict[str, float]]:
    """Compute the masks of the table: (name of the one of ``--init``, masks by name, seconds by name)."""
    pattern = NMPattern(options.pattern)
    method = options.init if options.init in INITIAL_MASKS else f"mask of {Path(options.init).name}"
    chosen = _name_of(method, options, _changes(options))
    wanted = [(_name_of(name, options), name, "none") for name in BASELINES]
    wanted.append((chosen, loaded.init, options.refit))
    masks = {}
    seconds = {}
    for name, init, refit in wanted:
        if name in masks:
            continue
        began = time.perf_counter()
        progress = Progress(name, "layer")
        masks[name] = refitted_masks(
            loaded.layers, pattern, init, refit, loaded.model, loaded.initial, progress, options.seed
        )
        seconds[name] = time.perf_counter() - began
    return chosen, masks, seconds


def _layers_to_mask(options: Learn, loaded: _Loaded, mask: Reconstruction) -> list[str]:
    """Names of the layers that get a mask in a model of the density: not those whose masks cost most."""
    pattern = NMPattern(options.pattern)
    layers = loaded.layers
    report(f"computing by {len(loaded.initial)} batches which masks cost most")
    costly = costliest_layers(loaded.model, layers, mask, pattern, causal_lm_loss, loaded.initial, options.density)
    report(f"left dense: {len(costly)} of {len(layers)} layers ({COSTLY})")
    if not costly:
        report_as("warning", f"no matrix is small enough to stay dense within --density {options.density:.7g}")
    return [name for name in layers if name not in costly]


def _table_row(method: str, model: nn.Module, tests: Mapping[str, Tensor], seconds: float) -> dict:
    figures = {
        name: perplexity(model, test, progress=Progress(f"evaluation of {method}", "window"))
        for name, test in tests.items()
    }
    return {"method": method, **figures, "seconds": seconds}


def _changes(options: Learn, trained: bool = False) -> list[str]:
    return [f"{options.refit} refitted"] * (options.refit != "none") + ["weights trained"] * trained


def _name_of(method: str, options: Learn, changes: Sequence[str] = ()) -> str:
    """Name of a mask in the table, with changes of the weights and a density."""
    density = [] if options.density is None else [f"density {options.density:g}"]
    return ", ".join([method, *changes, *density])


@torch.no_grad()
def _set_logits(layers: Mapping[str, MaskedLinear], codes: Mapping[str, Tensor], options: Learn) -> None:
    for name, layer in layers.items():
        layer.logits.copy_(initial_logits(codes[name], NMPattern(options.pattern), options.gap))


def _broadcast_initial_mask(options: Learn, model: nn.Module, targets: Sequence[str] | None, ranks: Ranks) -> None:
    """Send the mask and the weights of rank 0 to all ranks: another processor may compute others."""
    pattern = NMPattern(options.pattern)

    def convert_as_main_process() -> None:
        if not ranks.is_main_process:
            convert(model, pattern, targets, init="magnitude", gap=options.gap)

    ranks.run_on_all(convert_as_main_process)
    masked = masked_layers(model)
    codes = {name: top_n_mask(layer.logits.detach(), pattern) for name, layer in masked.items()}
    for code in codes.values():
        ranks.broadcast(code)
    _set_logits(masked, codes, options)
    if options.refit != "none":
        _broadcast_weights(model, ranks)


def _broadcast_weights(model: nn.Module, ranks: Ranks) -> None:
    if ranks.world_size > 1:
        for layer in masked_layers(model).values():
            weight = layer.weight.detach().clone()
            ranks.broadcast(weight)
            layer.weight.data = weight
            layer.weight_changed = True


def _put_back_start_weights(model: nn.Module, progress: Path, start: Mapping) -> None:
    with naming("resume", "restore it from a copy"):
        put_weights(masked_layers(model), load_logits(progress / START_WEIGHTS).weights)
    if digest_of_weights(model) != start["start_weights"]:
        raise ValueError(f"resume: expected the refitted weights in {str(progress / START_WEIGHTS)!r}, got others")


@dataclasses.dataclass
class _Run:
    """A run in three calls: ``begin`` or ``resume``, ``take_steps``, and if this returns true ``end``."""

    options: Learn
    ranks: Ranks
    trainer: MaskTrainer
    loaded: _Loaded
    # results before the first step
    start: dict
    # validation perplexities by step, with their seconds
    rows: list[dict] = dataclasses.field(default_factory=list)
    evaluating: float = 0.0

    def __post_init__(self):
        self.model = self.trainer.model
        self.output = Path(self.options.output)
        self.progress = self.output / PROGRESS
        self.seconds = self.start["seconds"]

    def begin(self) -> None:
        """Prepare the first step; afterwards ``--resume`` can continue the run."""
        self.trainer.begin(progress=wants_bars())
        self.start = {"format": FORMAT, **self.start, "run": self.trainer.run_id}
        self.ranks.run_on_main(self._write_start)

    def _write_start(self) -> None:
        changed = changed_weights(masked_layers(self.model))
        if changed:
            write_logits(Logits({}, changed, {}), self.progress / START_WEIGHTS)
        self._evaluate()
        write_record(self.progress / START, self.start)

    def resume(self) -> None:
        """Restore logits and rows from the folder."""
        with naming("resume", "restore the model, the text and the content of the folder when the run was interrupted"):
            self.trainer.resume(progress=wants_bars())
            if self.ranks.is_main_process and self.start["run"] != self.trainer.run_id:
                raise ValueError(f"expected the {START} of this run, got another run's")
        done = self.trainer.steps_done
        if self.ranks.is_main_process:
            with naming("resume"):
                stored = read_progress(self.progress / VALIDATION)
            if stored["run"] != self.start["run"]:
                raise ValueError(f"resume: expected the {VALIDATION} of this run, got another run's")
            self.rows = [row for row in stored["rows"] if row["step"] <= done]
        self.seconds += sum(record["seconds"] for record in self.trainer.metrics)
        report(f"{done} steps are done")

    def take_steps(self) -> bool:
        """Take the remaining steps, until the run ends or a signal comes; return whether it has ended."""
        options = self.options
        trainer = self.trainer

        def has_more() -> bool:
            if self._is_due(trainer.steps_done):
                self._evaluate()
            return trainer.steps_done < options.steps and not self._has_diverged()

        more = self.ranks.run_on_main(has_more)
        began = time.perf_counter()
        evaluating = self.evaluating
        weight = self.model.get_input_embeddings().weight
        parts = self.model.modules()
        used = {part.config._attn_implementation for part in parts if hasattr(part, "set_attn_implementation")}
        by_products = trainer.estimator.needs_gradients and weight.is_cpu and weight.dtype == torch.bfloat16
        by_products = by_products and options.seq_len <= SHORT and used == {"sdpa"}
        attend = self.model.set_attn_implementation if by_products else lambda by: None
        with _signals() as signals, ExitStack() as stack:
            attend("eager")
            stack.callback(attend, "sdpa")
            if more and not self.ranks.is_main_process:
                trainer.run(options.steps - trainer.steps_done, progress=False, after_step=lambda _: bool(signals))
            elif more:
                # logits of an earlier stop: if the run is killed now, they must not look like its result
                (self.output / LOGITS_FILE).unlink(missing_ok=True)
                track = stack.enter_context(self._trackers())
                before = trainer.steps_done
                started = time.perf_counter()

                def after_step(record: StepRecord) -> bool:
                    done = record.step + 1
                    value = None
                    if self._is_due(done):
                        attend("sdpa")
                        value = self._evaluate()
                        attend("eager")
                    shown = value is not None or done % max(options.steps // LINES, 1) == 0
                    if shown and not wants_bars():
                        left = (time.perf_counter() - started) / (done - before) * (options.steps - done)
                        report(
                            f"step {done} of {options.steps}: loss {record.loss:.4f}, "
                            + (f"validation perplexity {value:.2f}, " if value is not None else "")
                            + f"{record.tokens / record.seconds:.0f} tokens a second, {tqdm.format_interval(left)} left"
                        )
                    track(record, value)
                    return self._has_diverged() or bool(signals)

                try:
                    trainer.run(options.steps - trainer.steps_done, progress=wants_bars(), after_step=after_step)
                except (FloatingPointError, torch.OutOfMemoryError, KeyboardInterrupt, OSError, ValueError):
                    if not trainer.broken:
                        self._save_logits()
                    report(f"stopped after {trainer.steps_done} steps; {resume_command(self.output)}")
                    raise
        if not self.ranks.is_main_process:
            return False
        self.seconds += time.perf_counter() - began - (self.evaluating - evaluating)
        if trainer.steps_done == options.steps:
            return True
        if not signals and self._has_diverged():
            report(
                f"stopped after {trainer.steps_done} steps: the validation perplexity was NaN, or over 10% above the "
                "initial mask's, at two evaluations in a row"
            )
            return True
        self._save_logits()
        report(f"stopped after {trainer.steps_done} steps; {resume_command(self.output)}")
        return False

    def end(self) -> None:
        """Write checkpoint, logits, picture and report, and print the table."""
        options = self.options
        output = self.output
        pattern = NMPattern(self.options.pattern)
        trained = digest_of_weights(self.model) != self.start["start_weights"]
        learned = _name_of(options.estimator, options, _changes(options, trained))
        table = [*self.start["table"], _table_row(learned, self.model, self.loaded.tests, self.seconds)]
        self._save_logits()
        masked = masked_layers(self.model)
        groups = sum(layer.logits.numel() // pattern.m for layer in masked.values())
        # None if the first snapshot is damaged
        flipped = self.trainer.moved()
        logits = digest(masked[name].logits for name in sorted(masked))
        for part in unfinished(output):
            # of this run, killed at this point
            discard(part)
        save(finalize(self.model), self.loaded.tokenizer, output, options.model, str(pattern), table)
        # it takes a second to import
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.subplots()
        axes.plot([row["step"] for row in self.rows], [row["perplexity"] for row in self.rows], "o-")
        axes.set(title=learned, xlabel="steps", ylabel="validation perplexity")
        figure.savefig(output / "perplexity.png", dpi=120)
        found = {
            "format": FORMAT,
            "settings": _with_absolute_paths(options),
            "table": table,
            "validation": self.rows,
            "weights": ", ".join(_changes(options, trained)) or "weights frozen",
            "groups": groups,
            "flipped_groups": flipped,
            "logits": logits,
            "converted": self.start["converted"],
            "skipped": self.start["skipped"],
            "steps": self.trainer.metrics,
        }
        # last, also on the disk: a folder with a report is a finished run
        for written in (*filter(Path.is_file, output.iterdir()), output):
            sync(written)
        write_whole(output / REPORT, (json.dumps(found, indent=1) + "\n").encode())
        # the result is in the logits; keep the start of a replay
        journaled = self.trainer.estimator.journaled
        for old in snapshots_in(self.progress)[1 if journaled else 0 :]:
            discard(old)
        shutil.rmtree(self.progress / TEACHER, ignore_errors=True)
        best = min(self.rows, key=lambda row: row["perplexity"])
        last = self.rows[-1]["perplexity"]
        if not last <= 1.01 * best["perplexity"]:
            report_as(
                "warning",
                f"the validation perplexity was lowest at step {best['step']}, {best['perplexity']:.2f}, and is "
                f"{last:.2f} at the end; fewer --steps, more text or a lower --lr may give a lower one",
            )
        print_table(table, COLUMNS, "method")
        moved = "an unknown number" if flipped is None else f"{flipped:,}"
        print(f"{moved} of {groups:,} groups differ from the initial mask; {found['weights']}; written to {output}")

    def _is_due(self, step: int) -> bool:
        measured = bool(self.rows) and self.rows[-1]["step"] == step
        return not measured and (step % self.options.eval_every == 0 or step >= self.options.steps)

    def _evaluate(self) -> float:
        """Compute the validation perplexity of the current step and store it."""
        began = time.perf_counter()
        step = self.trainer.steps_done
        value = perplexity(self.model, self.loaded.validation, progress=Progress("validation", "window"))
        if not self.rows and not math.isfinite(value):
            raise FloatingPointError(
                f"validation perplexity at step {step}: expected a finite number, got {value}; use another --dtype, "
                "--init or --data"
            )
        tokens = sum(record["tokens"] for record in self.trainer.metrics)
        self.rows.append({"step": step, "tokens": tokens, "perplexity": value})
        write_record(self.progress / VALIDATION, {"format": FORMAT, "run": self.start["run"], "rows": self.rows})
        self.evaluating += time.perf_counter() - began
        if step == 0 and not wants_bars():
            report(f"step 0 of {self.options.steps}: validation perplexity {value:.2f}")
        return value

    def _has_diverged(self) -> bool:
        """Return whether the last two validation perplexities are NaN or over 10% above the initial mask's."""
        most = DIVERGED * self.rows[0]["perplexity"] if self.rows else math.inf
        return len(self.rows) > 2 and not any(row["perplexity"] <= most for row in self.rows[-2:])

    def _save_logits(self) -> None:
        """Write the logits, with weights that have changed, and metadata for exports."""
        name = self.options.model
        metadata = {
            "model": str(Path(name).resolve()) if Path(name).exists() else name,
            "pattern": self.options.pattern,
            "dtype": self.options.dtype,
            "weights": digest_of_weights(self.model),
            "dense_weights": self.start["dense_weights"],
            "base": self.start["base"],
            "run": self.start["run"],
        }
        make_folder((self.output / LOGITS_FILE).parent)
        save_logits(self.model, self.output / LOGITS_FILE, metadata)

    @contextmanager
    def _trackers(self) -> Iterator[Callable[[StepRecord, float | None], None]]:
        """Yield a function that sends a step, and the perplexity after it, to the trackers of ``--report-to``."""
        trackers = []
        for name in _trackers_of(self.options):
            from accelerate.state import PartialState
            from accelerate.tracking import TensorBoardTracker, WandBTracker

            PartialState()
            if name == "tensorboard":
                tracker = TensorBoardTracker("tensorboard", logging_dir=self.output)
            else:
                project = os.environ.get("WANDB_PROJECT", "huggingface")
                own = {"id": self.start["run"], "resume": "allow", "dir": str(self.output)}
                tracker = WandBTracker(project, config=vars(self.options), **own)
            tracker.start()
            trackers.append(tracker)

        def track(record: StepRecord, value: float | None) -> None:
            figures = {f"train/{name}": getattr(record, name) for name in TRACKED if getattr(record, name) is not None}
            figures["train/tokens_per_second"] = record.tokens / record.seconds
            if value is not None:
                figures["eval/perplexity"] = value
            for tracker in trackers:
                tracker.log(figures, step=record.step)

        try:
            yield track
        finally:
            for tracker in trackers:
                tracker.finish()


def _trackers_of(options: Learn) -> tuple[str, ...]:
    return {"none": (), "all": ("tensorboard", "wandb")}.get(options.report_to, (options.report_to,))


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list, so that the step can end first; a second signal has its usual effect."""
    came = []
    before = {}

    def put_back() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, frame) -> None:
        came.append(number)
        if rank_of_torchrun() == 0 and sys.__stderr__ is not None:
            # without its buffer: the handler may interrupt a write of the same thread, which has the lock
            line = f"{signal.Signals(number).name}: the run stops after this step\n"
            os.write(sys.__stderr__.fileno(), line.encode())
        put_back()

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            # a job in the background must not end by a signal for the foreground
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, note)
    try:
        yield came
    finally:
        put_back()
