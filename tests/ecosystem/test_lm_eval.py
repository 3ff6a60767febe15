"""lm-eval with all tasks of its own beside a local one: by `maskpro eval`, and by its own command behind an import."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

import pytest
from helpers.children import environment
from helpers.command import refuses
from helpers.lm_eval_task import NAME, write_models, write_task

from maskpro_kernels.cli import main
from maskpro_kernels.cli.tasks import Tasks, task_names

pytest.importorskip("lm_eval")
pytestmark = [pytest.mark.ecosystem, pytest.mark.usefixtures("eager_reference")]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    write_models(folder)
    write_task(folder / "tasks")
    return folder


def arguments(place, tasks: str, *more: str) -> list[str]:
    options = f"--tasks {tasks} --include-path {place / 'tasks'} --device cpu --dtype float32".split()
    return ["eval", str(place / "packed"), *options, *more]


def test_both_commands_find_the_same(place, tmp_path):
    assert main.main(arguments(place, "which_w*", "--output", str(tmp_path / "ours.json"))) == 0
    ours = json.loads((tmp_path / "ours.json").read_text(encoding="utf-8"))["tasks"]["results"]
    code = "import maskpro_kernels.hf; from lm_eval.__main__ import cli_evaluate; cli_evaluate()"
    model = f"pretrained={place / 'packed'},dtype=float32"
    options = f"--model hf --model_args {model} --tasks {NAME} --include_path {place / 'tasks'} --device cpu".split()
    own = [*options, "--batch_size", "8", "--output_path", str(tmp_path / "theirs.json")]
    subprocess.run(
        [sys.executable, "-c", code, *own], check=True, capture_output=True, env=environment() | {"HF_HUB_OFFLINE": "1"}
    )
    (file,) = tmp_path.rglob("theirs*.json")
    theirs = json.loads(file.read_text(encoding="utf-8"))["results"]
    assert ours[NAME]["acc,none"] == theirs[NAME]["acc,none"]


def test_lm_eval_knows_the_papers_tasks():
    """Names are looked up before a model is loaded."""
    tasks = Tasks(argparse.Namespace(tasks="paper"))
    assert set(tasks.names) == set(task_names("paper")) and len(tasks.names) == 7


def test_an_unknown_task_is_told_with_what_is_near(place, capsys):
    refuses(capsys, place, arguments(place, "helaswag"), "expected one that lm-eval knows, got 'helaswag'", "hellaswag")
