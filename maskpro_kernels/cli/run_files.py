"""What a run leaves in its folder, and reading it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from ..checkpoints.logits import LOGITS_FILE
from ..digests import digest
from ..learn.run import LOCK
from ..modules import masked_layers
from ..pattern import NMPattern
from ..text.batches import texts_of
from ..text.sources import is_dataset
from .arguments import DTYPES

# What a run leaves at its end
LOGITS, REPORT = LOGITS_FILE, "report.json"
PERPLEXITY_PICTURE, RESIDUAL_PICTURE = "perplexity.png", "residual.png"
# And while it goes on
SETTINGS, PROGRESS, VALIDATION = "settings.json", "progress", "validation.jsonl"
# In PROGRESS, of a run whose weights were refitted: those that it begins with
START_WEIGHTS = "start-weights.safetensors"
# In it too, of a run whose weights stay: the mask that it begins with, against which its mask takes few bytes
INITIAL_MASK = "initial-mask.safetensors"
# And the one behind the step with the lowest validation perplexity so far
BEST_MASK = "best-mask.safetensors"
# And in it, the dense model's logits, where its weights change
TEACHER = "teacher"
# What is read of a report, and of the settings in it
REPORTED = ("model", "pattern", "eval_tokens", "eval_digest", "table", "validation", "converted", "weights")
REPORTED_SETTINGS = ("data", "dtype", "eval_windows", "eval_length")
# What a run goes on by: its settings, and what was known before its first step
RESUMED_SETTINGS = ("model", "data", "init", "refit", "dtype", "logits_dtype", "gradient_checkpointing", "estimator",
                    "steps", "gap", "seed")  # fmt: skip
RESUMED = ("settings", "table", "seconds", "converted", "skipped", "dense_weights", "start_weights",
           "run")  # fmt: skip


def goes_on(output: Path) -> bool:
    """Whether the folder is that of a run that has begun to learn and has not ended."""
    return (output / SETTINGS).is_file() and (output / PROGRESS).is_dir() and not (output / REPORT).exists()


def logits_metadata(settings: Mapping, weights: str, dense_weights: str, weights_are: str, run: str) -> dict[str, str]:
    """What stands beside the logits of a run with these settings: all that an export takes besides them.

    Args:
        weights: the digest of the masked layers' weights that the masks belong to, in the dtype of the settings.
        dense_weights: the same of the dense model.
        weights_are: what became of the weights, see ``told_weights``.
        run: the id of the run.
    """
    metadata = {name: settings[name] for name in ("model", "pattern", "dtype")}
    return metadata | {"weights": weights, "dense_weights": dense_weights, "weights_are": weights_are, "run": run}


def digest_of_weights(model: torch.nn.Module) -> str:
    """That of the masked layers, as the snapshots of a run hold it."""
    return digest(layer.weight for layer in masked_layers(model).values())


def check_not_going_on(model: str) -> None:
    """Raise ValueError where a model is the folder of a run that has not ended, and has no checkpoint yet."""
    folder = Path(model)
    if goes_on(folder) and not (folder / "config.json").is_file():
        raise ValueError(f"model: expected a model or a run that has ended, got {model!r}; {how_to_go_on(folder)}")


def how_to_go_on(output: Path) -> str:
    return f"continue with: maskpro learn --resume {shlex.quote(str(output))}"


def check_ended(output: Path, lacking: str) -> None:
    """Raise ValueError unless the folder of a run holds a file that is written at the end."""
    if not (output / lacking).is_file():
        cure = f"its run has not ended, {how_to_go_on(output)}" if goes_on(output) else "give the folder of a run"
        raise ValueError(
            f"run: expected a folder written by `maskpro learn`, got {str(output)!r}, without {lacking}; {cure}"
        )


def check_free(output: Path) -> None:
    """Raise ValueError if another process is at a run; the trainer would, but after the model has been loaded."""
    lock = output / PROGRESS / LOCK
    if lock.exists():
        try:
            with FileLock(lock, blocking=False):
                pass
        except Timeout:
            raise ValueError(
                f"resume: expected a run that no process is at, got {str(output)!r}; wait for the other, or end it"
            ) from None


def read_report(path: Path, more: Sequence[str] = ()) -> dict:
    """What a run reported; ValueError unless it is one.

    Args:
        path: of the report.
        more: entries that are given besides.
    """
    check_ended(path.parent, REPORT)
    try:
        report = read_own(path)
        settings = report["settings"]
        read = {name: report[name] for name in (*REPORTED, *more)}
        read |= {name: settings[name] for name in REPORTED_SETTINGS}
        _check_report(read)
        return read | {"other_data": settings.get("other_data")}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"run: expected a report of `maskpro learn`, got {str(path)!r}: {error!r}; restore it from a copy, or move "
            "it away: `maskpro learn --resume` then writes that of a run with a journal again"
        ) from error


def _check_report(report: dict) -> None:
    NMPattern(report["pattern"])
    if report["dtype"] not in DTYPES:
        raise ValueError(f"dtype {report['dtype']!r}")
    if not report["converted"] or not all(isinstance(name, str) for name in report["converted"]):
        raise ValueError("no names of layers")
    _check_table(report["table"])
    _check_numbers(report["validation"], ("step", "tokens", "perplexity"))


def _check_table(table: Sequence[Mapping]) -> None:
    if not table or not all(isinstance(row["method"], str) for row in table):
        raise ValueError("no names of methods in its table")
    _check_numbers(table, ("perplexity", "seconds"))


def _check_numbers(rows: Sequence[Mapping], names: Sequence[str]) -> None:
    wrong = [row[name] for row in rows for name in names if not isinstance(row[name], (int, float))]
    if wrong:
        raise ValueError(f"{wrong[0]!r} for a number")


def read_start(output: Path) -> dict:
    """The settings of a run that has not ended, and what was known before its first step; ValueError if it is none."""
    if (output / REPORT).exists():
        raise ValueError(
            f"resume: expected a run that has not ended, got {str(output)!r}, which has a report; `maskpro eval` and "
            "`maskpro export` take it"
        )
    if not (output / SETTINGS).is_file():
        raise ValueError(
            f"resume: expected a folder in which `maskpro learn` had begun to learn, got {str(output)!r}, without "
            f"{SETTINGS}; begin with `maskpro learn --output`, which goes on with what a run has left there that was "
            "killed before its first step"
        )
    try:
        start = read_settings(output)
        for holder, names in ((start, RESUMED), (start["settings"], RESUMED_SETTINGS)):
            missing = [name for name in names if name not in holder]
            if missing:
                raise ValueError(f"no {', '.join(missing)} in {SETTINGS}")
        _check_table(start["table"])
        _check_numbers([start], ("seconds",))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"resume: expected a folder in which `maskpro learn` had begun to learn, got {str(output)!r}: {error!r}; "
            f"restore {SETTINGS} from a copy, or begin anew with another --output"
        ) from error
    return start


def read_own(path: Path) -> dict:
    """The content of a file of JSON that a run wrote.

    Raises:
        ValueError: if it is no JSON object.
        OSError: if it cannot be read.
    """
    found = json.loads(path.read_bytes())
    if not isinstance(found, dict):
        raise ValueError(f"expected a JSON object in {str(path)!r}, got {type(found).__name__}")
    return found


def read_settings(output: Path) -> dict:
    """What ``read_own`` gives of the settings of a run."""
    return read_own(output / SETTINGS)


def stored_data(output: Path) -> dict:
    """What a run has learned from and how it was read, from whatever folder that is asked, by the names of the options.

    Raises:
        ValueError: if it is not known.
    """
    try:
        settings = read_settings(output)["settings"]
        if not isinstance(settings["data"], str):
            raise TypeError(f"{settings['data']!r} for the data")
        data = {"data": settings["data"]}
        if any(is_dataset(name) for name, _ in texts_of(settings["data"])):
            data |= {name: settings[name] for name in ("text_column", "documents") if name in settings}
        return data
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"data: expected --data, or the settings of the run in {str(output / SETTINGS)!r}, got {error!r}; name the "
            "text, or restore the file from a copy"
        ) from error
