"""Options in YAML and JSON files, and how they go with those of the command line."""

from __future__ import annotations

import dataclasses
import json

import pytest
from helpers.bits import assert_same_bits
from helpers.command import learn, refuses
from safetensors.torch import load_file

from maskpro_kernels.cli import main
from maskpro_kernels.cli.config import COMMANDS, Learn, parse

pytestmark = pytest.mark.usefixtures("eager_reference")

YAML = """
model: smollm2-135m
# not a number of base 60
pattern: 2:4
steps: 5
lr: 1e-3
gradient_checkpointing: true
batch-size: 4
init:
"""


def test_a_file_gives_options_and_the_command_line_wins(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(YAML, encoding="utf-8")
    options, arguments = parse("learn", [str(file), "--steps", "7", "--seed=3"])
    assert arguments == {}
    expected = Learn(model="smollm2-135m", steps=7, lr=1e-3, gradient_checkpointing=True, batch_size=4, seed=3)
    assert options == expected
    (tmp_path / "eval.json").write_text(json.dumps({"eval_length": 9, "dtype": None}), encoding="utf-8")
    options, arguments = parse("eval", [str(tmp_path / "eval.json"), "one", "two"])
    assert (options.eval_length, options.dtype, arguments) == (9, None, {"models": ["one", "two"]})


def test_learn_has_few_options():
    assert len(dataclasses.fields(Learn)) <= 26


@pytest.mark.parametrize("command", COMMANDS)
def test_each_option_has_a_help_that_is_printed(command, capsys):
    with pytest.raises(SystemExit, match="^0$"):
        main.main([command, "--help"])
    printed = capsys.readouterr().out
    options, positional = COMMANDS[command]
    assert all(f"--{field.name}" in printed and field.metadata["help"] for field in dataclasses.fields(options))
    assert all(name.upper() in printed for name, *_ in positional)
    assert "(default: None)" not in printed


def test_the_settings_of_a_run_repeat_it(inputs, run, tmp_path):
    """With another option where the command line gives one."""
    settings = str(run / "settings.json")
    assert main.main(["learn", settings, "--output", str(tmp_path / "again")]) == 0
    assert_same_bits(
        load_file(tmp_path / "again" / "learned/logits.safetensors"), load_file(run / "learned/logits.safetensors")
    )
    assert main.main(["learn", settings, "--pattern", "1:4", "--output", str(tmp_path / "other")]) == 0
    assert json.loads((tmp_path / "other" / "settings.json").read_text())["options"]["pattern"] == "1:4"


@pytest.mark.parametrize(
    ("name", "content", "reported"),
    [
        ("a.yaml", "steps: [", "options: expected a YAML or JSON file"),
        ("a.json", "{", "options: expected a YAML or JSON file"),
        ("a.json", "[1]", "options: expected options by name in"),
        ("a.yaml", "step: 3", "options: expected names of options of `maskpro learn` in"),
        ("a.yaml", "resume: run", "options: expected names of options"),
        ("a.yaml", "steps: many", "argument --steps: invalid int value: 'many'"),
        ("a.json", '{"steps": 2.5}', "argument --steps: invalid int value: '2.5'"),
        ("a.json", '{"model": ["a"]}', "model: expected one value in"),
        ("a.yaml", "refit: all", "argument --refit: invalid choice: 'all'"),
        ("a.json", "[" * 100_000, "maskpro: error: "),
        ("none.yaml", None, "No such file"),
    ],
)
def test_a_bad_file_is_refused(inputs, tmp_path, capsys, name, content, reported):
    if content is not None:
        (tmp_path / name).write_text(content, encoding="utf-8")
    _, *words = learn(inputs, tmp_path / "run")
    refuses(capsys, tmp_path, ["learn", str(tmp_path / name), *words], reported)
