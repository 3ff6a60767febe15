"""What a run leaves in its folder, and reading it."""

from __future__ import annotations

import json
from pathlib import Path

from ..trainer import METRICS

# What a run leaves at its end
LOGITS, REPORT = "logits.safetensors", "report.json"
PERPLEXITY_PICTURE, RESIDUAL_PICTURE = "perplexity.png", "residual.png"
# And while it goes on
SETTINGS, PROGRESS, VALIDATION = "settings.json", "progress", "validation.jsonl"
# What is read of a report, and of the settings in it
REPORTED = ("model", "pattern", "eval_tokens", "table", "validation", "converted")
REPORTED_SETTINGS = ("data", "dtype", "eval_length")


def read_report(path: Path) -> dict:
    """What a run reported; ValueError unless it is one."""
    if not path.is_file():
        raise ValueError(
            f"run: expected a folder written by `maskpro learn`, got {str(path.parent)!r}, without {REPORT}"
        )
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        settings = report["settings"]
        read = {name: report[name] for name in REPORTED} | {name: settings[name] for name in REPORTED_SETTINGS}
        return read | {"other_data": settings.get("other_data")}
    except (json.JSONDecodeError, KeyError) as error:
        raise ValueError(f"run: expected a report of `maskpro learn`, got {str(path)!r}: {error!r}") from error


def read_start(output: Path) -> dict:
    """The settings of a run that has not ended, and what was known before its first step; ValueError if it is none."""
    if (output / REPORT).exists():
        raise ValueError(f"resume: expected a run that has not ended, got {str(output)!r}, which has a report")
    try:
        start = json.loads((output / SETTINGS).read_text(encoding="utf-8"))
        start["settings"]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"resume: expected a folder in which `maskpro learn` had begun to learn, got {str(output)!r}: {error!r}"
        ) from error
    return start


def read_metrics(progress: Path) -> list[dict]:
    """What the trainer wrote of each step."""
    path = progress / METRICS
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
