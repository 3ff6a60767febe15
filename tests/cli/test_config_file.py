"""`maskpro learn --config FILE`."""

from __future__ import annotations

import json
import shutil

import pytest
from helpers.bits import assert_same_bits
from helpers.command import learn, refuses, report
from helpers.damage import edit
from safetensors.torch import load_file

from maskpro_kernels.cli import main
from maskpro_kernels.cli.config_file import options_given, take_config
from maskpro_kernels.cli.estimator_options import load_estimators
from maskpro_kernels.cli.parser import build_parser

pytestmark = pytest.mark.usefixtures("eager_reference")


@pytest.fixture
def written(tmp_path):
    """Gives the options by which a file with these options is read."""

    def write(**options):
        (tmp_path / "config.json").write_text(json.dumps(options))
        return ["--config", str(tmp_path / "config.json")]

    return write


def parsed(*arguments):
    """The options of a command line, with those of its file."""
    load_estimators()
    args = build_parser().parse_args(["learn", *arguments])
    args.given = options_given(list(arguments))
    take_config(args)
    return args


def test_the_settings_of_a_run_learn_the_same_again(run, tmp_path, capsys):
    again = tmp_path / "again"
    assert main.main(["learn", "--config", str(run / "settings.json"), "--output", str(again)]) == 0
    assert_same_bits(load_file(again / "logits.safetensors"), load_file(run / "logits.safetensors"))
    first, second = report(run)["settings"], report(again)["settings"]
    assert first | {"output": str(again)} == second
    assert (again / "settings.json").exists() and "config: left out" not in capsys.readouterr().err


def test_with_more_steps_it_is_evaluated_as_often(run, tmp_path):
    """What a run took a fifth of is not what was given."""
    again = ["learn", "--config", str(run / "settings.json"), "--steps", "10", "--output", str(tmp_path / "again")]
    assert main.main(again) == 0
    assert report(run)["settings"]["eval_every"] == 1 and report(tmp_path / "again")["settings"]["eval_every"] == 2
    assert [row["step"] for row in report(tmp_path / "again")["validation"]] == [0, 2, 4, 6, 8, 10]


def test_steps_between_evaluations_that_were_given_stay(run, tmp_path):
    edit(shutil.copytree(run, tmp_path / "run") / "settings.json", settings={"eval_every": 2})
    assert parsed("--config", str(tmp_path / "run" / "settings.json"), "--steps", "20").eval_every == 2


def test_a_file_of_options(inputs, tmp_path, written):
    command = learn(inputs, tmp_path / "one", "--seed", "3", "--alpha", "0.5", "--report-to", "tensorboard")
    assert main.main(command) == 0
    options = {
        "model": str(inputs / "model"),
        "data": str(inputs / "text.txt"),
        "other_data": "pydoc",
        "device": "cpu",
        "estimator": "reinforce",
        "init": "wanda",
        "steps": 3,
        "batch_size": 4,
        "seq_len": 16,
        "calibration_batches": 2,
        "eval_windows": 5,
        "eval_length": 24,
        "dtype": "float32",
        "seed": 3,
        "alpha": 0.5,
        "report_to": "tensorboard",
        "gradient_checkpointing": False,
        "output": str(tmp_path / "two"),
        "lr": None,
    }
    assert main.main(["learn", *written(**options)]) == 0
    assert_same_bits(*(load_file(tmp_path / name / "logits.safetensors") for name in ("one", "two")))
    assert (tmp_path / "two" / "tensorboard").is_dir()


def test_the_command_line_goes_before(written):
    file = written(seed=3, batch_size=8, gradient_checkpointing=True, device="cpu", steps=7)
    args = parsed("--seed", "0", *file, "--no-gradient-checkpointing", "--steps=9")
    assert (args.seed, args.batch_size, args.gradient_checkpointing, args.steps) == (0, 8, False, 9)
    assert args.device == "cpu" and args.seq_len == 128


@pytest.mark.parametrize(
    ("held", "given", "left_out"),
    [
        ({"data": "self", "samples": 9, "other_data": "stdlib"}, "--data pydoc", "other_data, samples"),
        ({"data": "self", "samples": 9, "other_data": "stdlib"}, "--data pydoc --samples 3", "other_data"),
        ({"loss": "kl", "loss_temperature": 2}, "--loss ce", "loss_temperature"),
        ({"gap": 5}, "--flip-rate 0.1", "gap"),
        ({"flip_rate": 0.1}, "--gap 5", "flip_rate"),
        ({"device": "cuda"}, "--device-map auto", "device"),
        ({"device_map": {"": 0}}, "--device cpu", "device_map"),
        (
            {"estimator": "straight-through", "lr": 0.3, "max_update": 2, "steps": 20, "eval_every": 4, "seed": 1},
            "--estimator reinforce --steps 50",
            "eval_every, lr, max_update",
        ),
    ],
)
def test_what_goes_with_a_replaced_value_is_left_out_and_told(written, capsys, held, given, left_out):
    args = parsed(*written(**held), *given.split())
    told = f"config: left out {left_out}, which go with what"
    assert told in capsys.readouterr().err
    # device has a default
    assert not [name for name in left_out.split(", ") if name != "device" and hasattr(args, name)]


def test_what_the_same_value_goes_with_stays(written, capsys):
    args = parsed(*written(data="self", samples=9, estimator="reinforce", draws=2), "--data", "self")
    assert (args.samples, args.draws) == (9, 2) and not capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('{"batchsize": 3}', "got 'batchsize'; did you mean batch_size?"),
        ('{"batch-size": 3}', "got 'batch-size'; did you mean batch_size?"),
        ('{"resume": "run"}', "got 'resume'"),
        ('{"config": "other.json"}', "got 'config'"),
        ('{"settings": {"seed": 1}}', "got 'settings'"),
        ('{"seed": "1"}', "seed in "),
        ('{"seed": "1"}', 'expected a whole number, got "1"'),
        ('{"steps": 2.0}', "expected a whole number, got 2.0"),
        ('{"steps": true}', "expected a whole number, got true"),
        ('{"lr": [1]}', "expected a number, got [1]"),
        ('{"model": 3}', "expected a text, got 3"),
        ('{"refit": "random"}', 'expected one of none, scales, weights, got "random"'),
        ('{"init": 3}', "expected a text, got 3"),
        ('{"gradient_checkpointing": "yes"}', 'expected true or false, got "yes"'),
        ('{"report_to": ["mlflow"]}', "expected one or several of tensorboard, wandb, none"),
        ('{"gap": 1, "flip_rate": 0.1}', "expected gap or flip_rate"),
        ('{"device_map": "{]"}', "device_map in "),
        ('{"lr": 0.1, "lr": 0.2}', "expected each name once, got 'lr' twice"),
        ("[1]", "expected a JSON object of options by name"),
        ("{", "expected a JSON file"),
    ],
)
def test_a_bad_file_is_refused_by_name(inputs, tmp_path, capsys, content, told):
    (tmp_path / "bad.json").write_text(content)
    arguments = learn(inputs, tmp_path / "run", "--config", str(tmp_path / "bad.json"))
    refuses(capsys, tmp_path, arguments, "argument --config: ", told)


def test_a_value_out_of_its_range_is_refused_as_on_the_command_line(inputs, tmp_path, capsys, written):
    refuses(capsys, tmp_path, learn(inputs, tmp_path / "run", *written(seed=-1)), "seed: expected at least 0, got -1")
    device_map = ["--config", written(device_map={"": "abacus"})[1]]
    arguments = learn(inputs, tmp_path / "run", *device_map)
    at = arguments.index("--device")
    refuses(capsys, tmp_path, arguments[:at] + arguments[at + 2 :], "expected a device of this machine, got 'abacus'")


def test_a_file_stands_beside_no_resume(run, tmp_path, capsys, written):
    refuses(capsys, tmp_path, ["learn", "--resume", str(run), *written(seed=1)], "got --config")
    refuses(capsys, tmp_path, ["learn", "--config", str(tmp_path / "none.json")], "argument --config: ", "none.json")


def test_false_leaves_an_option_out_that_is_switched_on(written):
    assert not hasattr(parsed(*written(stream=False)), "stream")
    assert parsed(*written(gradient_checkpointing=False)).gradient_checkpointing is False
