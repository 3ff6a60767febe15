"""Shared functions of the commands: lines on stderr, devices, models, and windows of texts to evaluate."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm import tqdm

from ..checkpoints.logits import LOGITS_FILE, REPORT
from ..files import check_takes_files, digest, discard, folder_aside, make_folder, read_record, unfinished
from ..functional.checks import check_device, missing_gpu
from ..learn.snapshots import snapshots_in
from ..modules import masked_layers
from ..ops.cpu import cpu_multiplies
from ..packed import KEEP, Int8Linear, NMLinear, bits_a_weight
from ..ranks import rank_of_torchrun
from ..text.batches import check_vocabulary, windows
from .config import DTYPE, DTYPES

# Lines of steps if there is no bar, and seconds between lines of other work
LINES = 50
SECONDS = 10
# Share of the work from which on the time left is estimated: its first parts do more, or compile
ESTIMATED_FROM = 0.05
# Files of a run's folder
SETTINGS = "settings.json"
PROGRESS = "progress"
# File of the samples in the folder of progress
SAMPLES = "samples.safetensors"
# Arguments of functions whose errors ``naming`` prefixes with those of the command, as a regular expression
INNER_ARGUMENTS = "source|text|path|model|output_dir"
# Format of these files; earlier versions have none
FORMAT = "maskpro-run 3"
# Columns of a run's table: titles, and digits of the figures
COLUMNS = {
    "perplexity": ("test perplexity", 2),
    "other_perplexity": ("on the other text", 2),
    "seconds": ("seconds from dense", 1),
}


def report(line: str) -> None:
    """Write a line to stderr, with several ranks only on the first."""
    if rank_of_torchrun() == 0:
        print(line, file=sys.stderr)


def report_as(kind: str, message: object) -> None:
    """Report an error or a warning in one line."""
    report(" ".join(f"maskpro: {kind}: {message}".split()))


def wants_bars() -> bool:
    """Return whether to draw bars: on a terminal, on the first rank."""
    return rank_of_torchrun() == 0 and sys.stderr.isatty()


class Progress:
    """Progress of work: a bar, or a line every ten seconds."""

    def __init__(self, work: str, unit: str):
        self.work = work
        self.unit = unit
        self.bar = None
        self.reported = time.perf_counter()
        # units and time of the first call
        self.first: tuple[int, float] | None = None

    def __call__(self, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` units are done."""
        if wants_bars():
            self.bar = self.bar or tqdm(total=total, desc=self.work, unit=self.unit, leave=False)
            self.bar.update(done - self.bar.n)
            if done == total:
                self.bar.close()
            return
        now = time.perf_counter()
        self.first = self.first or (done, now)
        if now - self.reported < SECONDS:
            return
        self.reported = now
        first_done, first_time = self.first
        line = f"{self.work}: {self.unit} {done} of {total}"
        if done - first_done >= ESTIMATED_FROM * total:
            seconds = (now - first_time) / (done - first_done) * (total - done)
            line += f", {tqdm.format_interval(seconds)} left"
        report(line)


@contextmanager
def naming(argument: str, cure: str | None = None) -> Iterator[None]:
    """Prefix errors with the name of an argument, in place of that of an inner function, and append the remedy."""
    try:
        yield
    except (ValueError, OSError) as error:
        reason = re.sub(rf"^(?:{INNER_ARGUMENTS}|{argument}): ", "", str(error))
        message = f"{argument}: {reason}"
        message += f"; {cure}" if cure else ""
        raise (OSError if isinstance(error, OSError) else ValueError)(message) from error


def check_least(options: object, **minima: int) -> None:
    """Raise ValueError unless each of these options has at least this value."""
    for name, minimum in minima.items():
        value = getattr(options, name)
        if value is not None and not value >= minimum:
            raise ValueError(f"{name}: expected at least {minimum}, got {value}")


def check_new_file(path: str) -> None:
    """Raise ValueError unless a new file can be written at a path."""
    expected = f"output: expected a new file in a writable folder, got {path!r}"
    try:
        if Path(path).exists():
            raise ValueError(f"{expected}, which exists; give another name")
        check_takes_files(Path(path).absolute().parent)
    except OSError as error:
        raise ValueError(f"{expected}: {error}") from error


def device_of(name: str | None) -> torch.device:
    """Return the device of a name, by default a GPU if there is one; ValueError if this machine does not have it."""
    return check_device("device", name or ("cpu" if missing_gpu() else "cuda"))


def report_device(name: str | None) -> None:
    """Report the device of ``--device``, or the one that is used without it, and why."""
    reason = missing_gpu()
    if name is not None and name != "auto":
        report(f"device: {device_of(name)}, by --device")
    elif reason is not None:
        report(f"device: cpu, since there is no GPU: {reason}")
    elif name == "auto":
        report(f"device: auto, GPUs: {torch.cuda.device_count()}")
    else:
        device = device_of(name)
        report(f"device: {device}, {torch.cuda.get_device_name(device)}")


def default_dtype(device: str | None) -> str:
    """bfloat16, or float32 on a CPU on which that is faster."""
    on_cpu = missing_gpu() is not None if device in (None, "auto") else device.startswith("cpu")
    return "float32" if on_cpu and not cpu_multiplies(DTYPES[DTYPE]) else DTYPE


def load(name: str, dtype: str | None, device: torch.device | str, title: str | None = None):
    """Load (model, tokenizer) on a device, or with "auto" on several; arguments and errors as for ``hf.load_model``.

    The line that reports it has the name, or a title for a temporary folder.
    """
    from ..hf import load_model, show_bars

    check_ended(name)
    report(f"loading {title or name}")
    show_bars(wants_bars())
    placement = {"device_map": "auto"} if device == "auto" else {"device": device}
    return load_model(name, dtype and DTYPES[dtype], **placement)


def check_ended(model: str) -> None:
    """Raise ValueError if a name is the folder of a run that has not ended."""
    if (Path(model) / SETTINGS).is_file() and not (Path(model) / REPORT).is_file():
        state = state_without_report(model)
        raise ValueError(f"model: expected a model or a run with {REPORT}, got {model!r}; {state}")


def save(
    model: nn.Module, tokenizer, folder: str | Path, base: str, pattern: str, table: Sequence[Mapping] = ()
) -> None:
    """Write a checkpoint with its model card, which has the table of a run."""
    from ..hf import save_model

    titles = {"method": ("mask", 0), **COLUMNS}
    rows = [{title: row[name] for name, (title, _) in titles.items() if name in row} for row in table]
    folder = Path(folder)
    with naming("output"):
        make_folder(folder)
        for temporary in unfinished(folder):
            report_as(
                "warning", f"{temporary} is of a process that was killed, or still writes; remove it if none does"
            )
        with folder_aside(folder / "checkpoint") as aside:
            # the card has the name of the folder
            checkpoint = aside / folder.resolve().name
            save_model(model, tokenizer, checkpoint, base_model=base_name(base), pattern=pattern, table=rows)
            for path in sorted(checkpoint.iterdir()):
                if (folder / path.name).is_dir():
                    discard(folder / path.name)
                os.replace(path, folder / path.name)


def base_name(model: str) -> str:
    """Name of a base model on the hub, or the last part of its folder's path."""
    from ..hf import SMOLLM2, SMOLLM2_ID

    if model == SMOLLM2:
        return SMOLLM2_ID
    return Path(model).resolve().name if Path(model).exists() else model


def resume_command(run: str | Path) -> str:
    """Command that continues a run."""
    return f"continue with: maskpro learn --resume {shlex.quote(str(run))}"


def state_without_report(run: str | Path) -> str:
    """Whether a run without a report has ended, and what to do."""
    if cannot_resume(run):
        return (
            f"its run has ended, but {REPORT} is missing: restore it from a copy, or write the result again with: "
            f"maskpro export {shlex.quote(str(run))} FOLDER"
        )
    return f"its run has not ended, {resume_command(run)}"


def cannot_resume(run: str | Path) -> bool:
    """Return whether a folder has a result but no snapshots, as at the end of a run without a journal."""
    return (Path(run) / LOGITS_FILE).is_file() and not snapshots_in(Path(run) / PROGRESS)


def report_damaged_settings(run: Path) -> None:
    """Warn of settings that cannot be read; after the end of a run only an export in int4 needs them."""
    if not (run / SETTINGS).is_file():
        return
    try:
        read_json(run / SETTINGS)
    except ValueError as error:
        report_as("warning", f"{error}; only `--resume` and an export in int4 need it")


def digest_of_weights(model: nn.Module) -> str:
    return digest(layer.weight for layer in masked_layers(model).values())


def read_json(path: Path) -> dict:
    """Read a file of a run of this version; ValueError for another one."""
    try:
        content = json.loads(path.read_bytes())
        _check_format(content, path)
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise ValueError(f"run: expected a file of `maskpro learn` in {str(path)!r}, got {error}") from error
    return content


def _check_format(content: dict, path: Path) -> None:
    if content.get("format") != FORMAT:
        raise ValueError(
            f"run: expected a run of this version ({FORMAT}) in {str(path)!r}, got one of another; use that version"
        )


def read_progress(path: Path) -> dict:
    """Read a file by which a run resumes; ValueError for a damaged one, or one of another version."""
    content = read_record(path)
    _check_format(content, path)
    return content


def read_report(run: Path) -> dict:
    """Read the report of a finished run; ValueError if it has not ended, or is of another version."""
    if not (run / REPORT).is_file():
        has_settings = (run / SETTINGS).is_file()
        advice = state_without_report(run) if has_settings else "give a run's folder"
        raise ValueError(f"run: expected a folder written by `maskpro learn`, got {str(run)!r}; {advice}")
    return read_json(run / REPORT)


def read_samples(progress: Path, settings: str | None = None) -> Tensor | None:
    """Read samples of the dense model; None if there are none of these settings, or the file is damaged."""
    with suppress(SafetensorError, FileNotFoundError), safe_open(progress / SAMPLES, framework="pt") as file:
        tokens = file.get_tensor("tokens")
        metadata = file.metadata() or {}
        if metadata == {"settings": settings or metadata.get("settings"), "digest": digest([tokens])}:
            return tokens
    return None


def packed_size(model: nn.Module) -> str:
    """Describe the memory of the packed layers of a model and of dense ones."""
    layers = [module for module in model.modules() if isinstance(module, NMLinear)]
    weights = sum(layer.packed.shape.numel() for layer in layers)
    bits = bits_a_weight(layers)
    dtype = layers[0].packed.dtype
    kinds = sorted({layer.kind for layer in layers} - {KEEP})
    in_int8 = [module for module in model.modules() if isinstance(module, Int8Linear)]
    integers = sum(layer.kind != KEEP for layer in layers)
    return (
        f"{len(layers)} packed layers take {bits:.2f} bits a weight, {bits * weights / 8e6:.2f} MB, where dense "
        f"{str(dtype).removeprefix('torch.')} takes {8 * dtype.itemsize} bits, {dtype.itemsize * weights / 1e6:.2f} MB"
        + (f", values of {integers} rounded to {' and '.join(kinds)}" if integers else "")
        + "".join(f"; another layer in int8 takes {layer.nbytes / 1e6:.2f} MB" for layer in in_int8)
    )


def positions_of(model: nn.Module) -> int | None:
    """Number of tokens that a model's config allows, its context; None if the config has no limit."""
    config = getattr(model.config, "text_config", None) or model.config
    return getattr(config, "max_position_embeddings", None)


def check_context(model: nn.Module, length: int, argument: str) -> None:
    """Raise ValueError if windows of a length exceed a model's context."""
    positions = positions_of(model)
    if positions is not None and length > positions:
        raise ValueError(
            f"{argument}: expected windows of at most {positions} tokens, the context of the model, got {length}"
        )


def windows_of(text: str, model: nn.Module, tokenizer, length: int, argument: str, option: str | None = None) -> Tensor:
    """Cut a text into windows int64 [windows, length]; ValueError if it is too short or not for this model.

    Args:
        argument, option: names of the text's argument and the length's option, for errors.
    """
    check_context(model, length, option.removeprefix("--").replace("-", "_") if option else argument)
    with naming(argument, f"give a longer text, or a smaller {option}" if option else "give a longer text"):
        tokens = windows(text, tokenizer, length)
    check_vocabulary(tokens, model.get_input_embeddings().num_embeddings)
    return tokens


def print_table(rows: Sequence[Mapping], titles: Mapping[str, tuple[str, int]], first: str) -> None:
    """Print rows of figures.

    Args:
        rows: a name, under "method", and figures.
        titles: of the columns of all rows, and digits of their figures, by name.
        first: title of the names.
    """
    columns = [[first, *(row["method"] for row in rows)]]
    for name, (title, digits) in titles.items():
        if all(name in row for row in rows):
            columns.append([title, *(f"{row[name]:.{digits}f}" for row in rows)])
    names, *figures = columns
    widths = [max(map(len, column)) for column in figures]
    for name, *cells in zip(names, *figures, strict=True):
        aligned = (f"  {cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        print(f"{name:<{max(16, *map(len, names))}}" + "".join(aligned))
