"""`maskpro sweep`: the runs that a FILE gives, their names, and a FILE or a folder that is refused."""

from __future__ import annotations

import json
import re
import shutil
from contextlib import suppress

import pytest
from helpers.children import ROOT
from helpers.command import refuses
from helpers.sweeps import base, runs_of, write_sweep

from maskpro_kernels.checked_json import each_once
from maskpro_kernels.cli import main
from maskpro_kernels.cli.sweep_file import read_sweep


def test_what_the_machine_has_is_taken_as_it_is_now(inputs, tmp_path):
    file = write_sweep(tmp_path, inputs, grid={"seed": [0]})
    (run,) = runs_of(file)
    going_on = run.arguments(tmp_path, begun=True, bars=False)
    assert (going_on.resume, going_on.device, going_on.given) == (str(tmp_path), "cpu", {"--device"})
    write_sweep(tmp_path, inputs, base={"device": None, "device_map": {"": "cpu"}}, grid={"seed": [0]})
    (spread,) = runs_of(file)
    # where a run computes shapes no result
    assert spread.digest == run.digest
    assert spread.arguments(tmp_path, begun=True, bars=False).given == {"--device-map"}
    write_sweep(
        tmp_path, inputs, base={"estimator": "straight-through"}, grid={"gradient_checkpointing": [True, False]}
    )
    assert len({run.digest for run in runs_of(file)}) == 2
    # code of a checkpoint may be run in a run that goes on as in one that begins
    (trusted, _), _ = read_sweep(file, {"trust_remote_code": True})
    assert "--trust-remote-code" in trusted.arguments(tmp_path, begun=True, bars=False).given


def test_a_run_is_what_the_file_gives_whatever_is_there(inputs, tmp_path):
    text, mask = shutil.copy(inputs / "text.txt", tmp_path / "text.txt"), tmp_path / "mask.safetensors"
    mask.touch()
    given = {"data": str(text), "other_data": str(text), "init": str(mask), "model": str(tmp_path / "model")}
    shutil.copytree(inputs / "model", tmp_path / "model")
    file = write_sweep(tmp_path, inputs, base=given, grid={"seed": [3]})
    (before,) = runs_of(file)
    for name in (text, mask):
        name.unlink()
    shutil.rmtree(tmp_path / "model")
    assert runs_of(file)[0].digest == before.digest
    write_sweep(tmp_path, inputs, base=given | {"eval_every": 1, "pattern": "2:4"}, grid={"seed": [3]})
    # an option at its default is none
    assert runs_of(file)[0].digest == before.digest
    write_sweep(tmp_path, inputs, base=given | {"eval_every": 2}, grid={"seed": [3]})
    assert runs_of(file)[0].digest != before.digest


def test_the_documented_name_is_one_of_the_documented_file(tmp_path):
    document = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    found = re.search(r"such as `(estimator=[^`]+)`, and ends", document)
    # the last one ahead of the name
    file = re.findall(r"^```json\n(.*?)^```$", document[: found.start()], re.S | re.M)[-1]
    (tmp_path / "ablation.json").write_text(file)
    assert found[1] in [run.name for run in runs_of(tmp_path / "ablation.json")]


def test_names_are_safe_for_file_systems(inputs, tmp_path):
    many = {"seed": [0], "init_batches": [3], "eval_windows": [6], "alpha": [0.123456789], "calibration_batches": [2]}
    path = {"model": [str(inputs / "model")], "data": [f"{inputs / 'text.txt'}:0.5,self:0.5"], "samples": [None]}
    (run,) = runs_of(write_sweep(tmp_path, inputs, grid={**path, **many}))
    assert len(run.name) <= 109 and set(run.name) <= set("abcdefghijklmnopqrstuvwxyz0123456789.+=_-")
    assert run.name.endswith(f"_{run.digest}") and "-0.5-self-0.5_samples=default" in run.name


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "expected a JSON file"),
        ('{"grid": {"seed": [0]}, "grid": {"seed": [1]}}', "expected each name once, got 'grid' twice"),
        ('{"grid": {"seed": [0], "seed": [1]}}', "expected each name once, got 'seed' twice"),
        ("[1]", "expected a JSON object with base, and with grid, list or both"),
        ('{"base": {}}', "got 'base'"),
        ('{"grids": {}, "list": [{}]}', "got 'grids'"),
        ('{"lr": 0.1, "seed": 1}', "got 'lr', 'seed'; put them into base"),
        ('{"list": []}', "expected a list with at least one entry as list of"),
        ('{"list": [3]}', "expected an object of options by name as list of"),
        ('{"grid": [1]}', "expected an object of lists by option as grid of"),
        ('{"grid": {"seed": 1}}', "expected a list with at least one entry as seed in grid of"),
        ('{"grid": {"seed": ["1"]}}', "seed in grid of"),
        ('{"grid": {"sed": [1]}}', "got 'sed'; did you mean seed?"),
        ('{"grid": {"resume": ["run"]}}', "got 'resume'"),
        ('{"base": {"output": "x"}, "list": [{}]}', "expected no output in base of"),
        ('{"base": {"lr": "x"}, "list": [{}]}', 'expected a number, got "x"'),
        ('{"list": [{"seed": 1}], "grid": {"seed": [1]}}', "got seed in both; take it out of one"),
        ('{"list": [{"gap": 1, "flip_rate": 0.1}]}', "expected gap or flip_rate in list of"),
        ('{"grid": {"seed": [0, 0]}}', 'got {"seed": 0} and {"seed": 0}; take one out'),
        ('{"list": [{}, {"seed": 0}]}', 'got {} and {"seed": 0}; take one out'),
        ('{"grid": {"seed": [0, -1]}}', 'seed: expected at least 0, got -1; it stands in the set {"seed": -1} of'),
        ('{"grid": {"init": ["wanda", "wonder"]}}', "init: expected one of magnitude"),
        ('{"base": {"data": "./none.txt"}, "grid": {"seed": [0]}}', "data: expected a text, got './none.txt'"),
        ('{"base": {"other_data": "none.txt"}, "grid": {"seed": [0]}}', "other_data: expected a text, got 'none.txt'"),
        ('{"base": {"model": "./none"}, "grid": {"seed": [0]}}', "model: expected a folder, or a name on the hub"),
        ('{"grid": {"max_update": [1]}}', "max_update: expected none, for it is of straight-through alone"),
        ('{"grid": {"device": ["abacus"]}}', "device: expected a device of this machine"),
        ('{"base": {"model": null}, "list": [{}]}', "model: expected --model"),
    ],
)
def test_an_unfit_file_is_refused_before_anything_starts(inputs, tmp_path, capsys, content, told):
    with suppress(ValueError):
        given = json.loads(content, object_pairs_hook=each_once)
        if isinstance(given, dict) and given.keys() & {"list", "grid"}:
            content = json.dumps(given | {"base": base(inputs) | given.get("base", {})})
    (tmp_path / "sweep.json").write_text(content)
    refuses(capsys, tmp_path, ["sweep", str(tmp_path / "sweep.json"), "--output", str(tmp_path / "all")], told)


def test_what_goes_with_a_replaced_value_is_left_out_and_told_once(inputs, tmp_path, capsys):
    methods = [{}, {"estimator": "straight-through"}]
    file = write_sweep(
        tmp_path, inputs, base={"estimator": "reinforce", "lr": 50.0}, list=methods, grid={"seed": [0, 1]}
    )
    assert main.main(["sweep", str(file), "--output", str(tmp_path / "all"), "--dry-run"]) == 0
    told = capsys.readouterr()
    assert told.err.count("left out calibration_batches, init, lr, steps, which go with what --estimator replaces") == 1
    assert len(told.out.splitlines()) == 4 and not (tmp_path / "all").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [("results.json", '{"tables": [], "runs": []}'), ("results.json", "[1]"), ("state.json", '{"failed": {}}')],
)
def test_a_folder_of_another_program_is_refused(inputs, tmp_path, capsys, name, content):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / name).write_text(content)
    (foreign / "report.html").write_text("<p>theirs</p>")
    file = write_sweep(tmp_path, inputs, grid={"seed": [0]})
    refuses(capsys, tmp_path, ["sweep", str(file), "--output", str(foreign)], name, "; give another --output")
