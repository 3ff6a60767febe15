"""A task of lm-eval on a local file, so that no network is needed."""

from __future__ import annotations

import functools
import json
import random
from pathlib import Path

from helpers.tiny_llama import WORDS, tiny_model, tiny_tokenizer
from maskpro_kernels import convert, finalize
from maskpro_kernels.hf import save_model

NAME = "which_word"
DOCUMENTS = 12

TASK = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""


def write_task(folder: Path) -> Path:
    """Write the YAML file of a task, which asks for the word that goes on a text, and its documents."""
    draw = random.Random(0)
    rows = []
    for index in range(DOCUMENTS):
        context, choices = " ".join(draw.choices(WORDS, k=5)), draw.sample(WORDS, k=3)
        rows.append({"context": context, "choices": choices, "label": index % 3})
    folder.mkdir()
    (folder / "documents.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "task.yaml").write_text(TASK.format(name=NAME, file=folder / "documents.jsonl"), encoding="utf-8")
    return folder


def leave_own_tasks_aside(monkeypatch) -> None:
    """lm-eval without the thousands of tasks of its own, which it takes seconds to look through."""
    # not among the packages of all tests
    import lm_eval.tasks as tasks

    monkeypatch.setattr(tasks, "TaskManager", functools.partial(tasks.TaskManager, include_defaults=False))


def write_models(folder: Path) -> None:
    """Write one sparse model in three ways: `dense` with zeros, `masked` and `packed`."""
    tokenizer, model = tiny_tokenizer(), tiny_model()
    tokenizer.eos_token = "[PAD]"
    convert(model, "2:4")
    save_model(model, tokenizer, folder / "masked")
    save_model(finalize(model), tokenizer, folder / "dense")
    again = tiny_model()
    convert(again, "2:4")
    save_model(finalize(again, to="packed"), tokenizer, folder / "packed")
