"""`maskpro sweep`: the runs of a FILE, what they found together, failures, and a FILE that changes."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import statistics
from contextlib import suppress
from pathlib import Path

import pytest
from filelock import FileLock
from helpers.children import ROOT
from helpers.command import contents, refuses, report
from helpers.routes import route_to_the_eager_reference
from helpers.sweeps import base, without_wall_clock, write_sweep

from maskpro_kernels.checked_json import each_once
from maskpro_kernels.cli import main
from maskpro_kernels.cli import sweep as sweep_command
from maskpro_kernels.cli.estimator_options import load_estimators
from maskpro_kernels.cli.sweep_file import read_sweep
from maskpro_kernels.cli.sweep_folder import SweepFolder
from maskpro_kernels.training.trainer import MaskTrainer

pytestmark = pytest.mark.usefixtures("eager_reference")

GRID = {"grid": {"seed": [0, 1]}, "list": [{"alpha": 0.5}, {"draws": 2, "lr": 20.0}]}


def sweep(file, output, *more):
    return main.main(["sweep", str(file), "--output", str(output), *more])


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    """(FILE, folder) of a sweep of four runs that has ended, as the command was given it from their folder."""
    folder = tmp_path_factory.mktemp("sweeps")
    with pytest.MonkeyPatch.context() as monkeypatch:
        route_to_the_eager_reference(monkeypatch)
        monkeypatch.chdir(folder)
        assert sweep(write_sweep(folder, inputs, **GRID), "all") == 0
    return folder / "sweep.json", folder / "all"


@pytest.fixture
def copy(finished, tmp_path):
    """(FILE, folder) of such a sweep that a test may change."""
    file, folder = finished
    shutil.copy(file, tmp_path / "sweep.json")
    shutil.copytree(folder, tmp_path / "all")
    return tmp_path / "sweep.json", tmp_path / "all"


def results(folder):
    return json.loads((folder / "results.json").read_text())


def runs_of(file):
    load_estimators()
    return read_sweep(file, {})[0]


def test_each_run_is_one_of_learn(finished, inputs, tmp_path):
    _, folder = finished
    runs = results(folder)["runs"]
    assert [run["options"] for run in runs] == [{**of, "seed": seed} for of in GRID["list"] for seed in (0, 1)]
    names = [run["name"].rpartition("_")[0] for run in runs]
    assert names[:2] == ["alpha=0.5_seed=0", "alpha=0.5_seed=1"]
    assert names[3] == "draws=2_lr=20.0_seed=1"
    config = tmp_path / "config.json"
    config.write_text(json.dumps(base(inputs) | runs[3]["options"]))
    assert main.main(["learn", "--config", str(config), "--output", str(tmp_path / "alone")]) == 0
    alone, swept = report(tmp_path / "alone"), report(folder / runs[3]["name"])
    for name in ("logits", "validation", "groups", "flipped_groups"):
        assert alone[name] == swept[name]
    assert alone["settings"] | {"output": ""} == swept["settings"] | {"output": ""}


def test_rows_are_means_and_spreads_over_seeds(finished):
    _, folder = finished
    (table,) = results(folder)["tables"]
    assert [row["label"] for row in table["rows"]] == ["alpha=0.5", "draws=2, lr=20.0"]
    for row in table["rows"]:
        assert row["seeds"] == [0, 1]
        reports = [report(folder / name) for name in row["runs"]]
        found = {
            "validation": [one["validation"][-1]["perplexity"] for one in reports],
            "test": [one["table"][-1]["perplexity"] for one in reports],
            "other": [one["table"][-1]["other_perplexity"] for one in reports],
            "initial_test": [one["table"][-2]["perplexity"] for one in reports],
            "moved": [one["flipped_groups"] / one["groups"] for one in reports],
        }
        for name, values in found.items():
            assert row[name] == {"mean": statistics.fmean(values), "spread": statistics.stdev(values)}, name
        seconds = statistics.fmean(one["table"][-1]["seconds"] for one in reports)
        assert row["wall_clock"]["seconds from the dense model"] == seconds


def test_the_best_run_is_named_by_the_validation_text(finished, tmp_path, monkeypatch, capsys):
    file, folder = finished
    found = results(folder)
    (table,) = found["tables"]
    row = min(table["rows"], key=lambda row: row["validation"]["mean"])
    perplexities = {run["name"]: run["validation"] for run in found["runs"]}
    (best,) = table["best"]
    assert best["run"] == min(row["runs"], key=perplexities.get)
    monkeypatch.chdir(folder.parent)
    assert sweep(file, folder.name) == 0
    told = capsys.readouterr().out
    assert f"best by validation perplexity: {row['label']}" in told
    export, compare = (line for line in told.splitlines() if line.startswith("maskpro "))
    monkeypatch.chdir(shutil.copytree(folder.parent, tmp_path / "copy"))
    for line in (export, compare):
        assert main.main(shlex.split(line)[1:]) == 0, line
    assert Path(f"all-{best['run']}", "config.json").exists()
    assert best["run"] in capsys.readouterr().out


@pytest.mark.pictures
def test_the_page_has_the_curves_of_all_runs(copy):
    file, folder = copy
    assert sweep(file, folder) == 0
    page = (folder / "report.html").read_text()
    assert page.count("<svg ") == 2 and "Wall clock" in page
    assert "seconds from the dense model" in page and "seconds" not in without_wall_clock(page)
    for label in ("alpha=0.5", "draws=2, lr=20.0"):
        # in the table, the legend and the wall clock
        assert page.count(label) >= 3
    (first, *_), _ = [run["curve"] for run in results(folder)["runs"][:2]]
    assert first[0] == 0


def test_finished_runs_are_not_repeated(copy, capsys, monkeypatch):
    file, folder = copy
    monkeypatch.setattr(sweep_command, "take_run", None)
    # commands that come next name the folder as it was given
    assert sweep(file, folder) == 0
    before = (folder / "report.html").read_bytes(), (folder / "results.json").read_bytes()
    assert sweep(file, folder) == 0
    assert "sweep: 4 runs: 4 finished" in capsys.readouterr().err
    assert ((folder / "report.html").read_bytes(), (folder / "results.json").read_bytes()) == before


def test_a_changed_file_adds_runs_and_leaves_others_alone(copy, inputs, capsys):
    file, folder = copy
    before = {path: content for path, content in contents(folder).items() if path.parent != folder}
    names = [run["name"] for run in results(folder)["runs"]]
    # the options of two runs are told in another way, that of one is new
    write_sweep(file.parent, inputs, list=[{"alpha": 0.5, "seed": 1}, {"seed": 0}], grid={"gap": [10, 5]})
    assert sweep(file, folder, "--dry-run") == 0
    listed = capsys.readouterr().out.splitlines()
    assert sweep(file, folder) == 0
    told = capsys.readouterr().err
    assert [line.split() for line in listed][0] == ["finished", names[1]]
    assert "sweep: 4 runs: 1 finished, 3 new" in told
    for name in (names[0], *names[2:]):
        assert f"sweep: {name} is no run of {file} any more: it is left alone" in told
        assert name in (folder / "report.html").read_text()
    after = contents(folder)
    assert {path: after[path] for path in before} == before


def test_failed_runs_are_named_and_the_others_go_on(inputs, tmp_path, capsys):
    short = tmp_path / "short.txt"
    short.write_text("w1 w2")
    text = str(inputs / "text.txt")
    file = write_sweep(tmp_path, inputs, grid={"data": [str(short), text], "seed": [0]})
    assert sweep(file, tmp_path / "all") == 1
    told = capsys.readouterr().err
    failed, other = results(tmp_path / "all")["runs"]
    assert (failed["state"], other["state"]) == ("failed", "finished")
    assert (
        failed["error"].startswith("data: source: expected ") and f"{failed['name']} failed: {failed['error']}" in told
    )
    assert "waits" not in told
    assert failed["error"].split("'")[0] in (tmp_path / "all" / "report.html").read_text()
    # once no other is left they are tried again
    assert sweep(file, tmp_path / "all") == 1
    shutil.copy(text, short)
    assert sweep(file, tmp_path / "all") == 0
    assert "1 finished, 1 failed" in capsys.readouterr().err
    assert [run["state"] for run in results(tmp_path / "all")["runs"]] == ["finished", "finished"]


def test_a_fault_in_one_run_is_told_with_its_traceback(inputs, tmp_path, capsys, monkeypatch):
    step = MaskTrainer.step

    def faulty(trainer):
        if trainer.seed == 1:
            raise RuntimeError("a fault")
        return step(trainer)

    monkeypatch.setattr(MaskTrainer, "step", faulty)
    assert sweep(write_sweep(tmp_path, inputs, grid={"seed": [1, 0]}), tmp_path / "all") == 1
    told = capsys.readouterr().err
    assert "failed: RuntimeError('a fault')" in told and "Traceback" in told
    assert [run["state"] for run in results(tmp_path / "all")["runs"]] == ["failed", "finished"]


def test_failed_runs_wait_for_the_others(copy):
    file, folder = copy
    runs = runs_of(file)
    for run in runs[:2]:
        (folder / run.name / "report.json").unlink()
    state = SweepFolder(folder, runs)
    assert state.to_take() == runs[:2]
    with state.held():
        state.keep({runs[0].name: "an error"})
    again = SweepFolder(folder, runs)
    assert again.errors == {runs[0].name: "an error"} and again.to_take() == [runs[1]]
    again.keep({run.name: "an error" for run in runs[:2]})
    assert again.to_take() == runs[:2]


@pytest.mark.slow
def test_a_signal_stops_the_sweep_and_it_goes_on(finished, inputs, tmp_path, capsys, monkeypatch):
    _, whole = finished
    step = MaskTrainer.step

    def signalled(trainer):
        if trainer.seed == 1 and trainer.steps_done == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(trainer)

    file = write_sweep(tmp_path, inputs, **GRID)
    with monkeypatch.context() as patched:
        patched.setattr(MaskTrainer, "step", signalled)
        patched.chdir(tmp_path)
        assert sweep(file, "all") == 0
        assert "sweep: stopped; the same command goes on with it" in capsys.readouterr().err
        patched.setattr(MaskTrainer, "step", step)
        assert sweep(file, "all") == 0
    assert "4 runs: 1 finished, 1 begun, 2 new" in capsys.readouterr().err
    pages = [(folder / "report.html").read_text() for folder in (whole, tmp_path / "all")]
    assert without_wall_clock(pages[0]) == without_wall_clock(pages[1])


def test_a_signal_in_the_last_step_of_a_run_stops_the_sweep(inputs, tmp_path, capsys, monkeypatch):
    step = MaskTrainer.step

    def signalled(trainer):
        if trainer.seed == 0 and trainer.steps_done == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(trainer)

    monkeypatch.setattr(MaskTrainer, "step", signalled)
    assert sweep(write_sweep(tmp_path, inputs, grid={"seed": [0, 1]}), tmp_path / "all") == 0
    assert "sweep: stopped; the same command goes on with it" in capsys.readouterr().err
    assert [run["state"] for run in results(tmp_path / "all")["runs"]] == ["finished", "new"]


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


def test_finished_runs_are_known_without_their_texts(inputs, tmp_path, capsys):
    text = shutil.copy(inputs / "text.txt", tmp_path / "text.txt")
    file = write_sweep(tmp_path, inputs, base={"data": str(text)}, grid={"seed": [0]})
    assert sweep(file, tmp_path / "all") == 0
    before = (tmp_path / "all" / "results.json").read_bytes()
    text.unlink()
    assert sweep(file, tmp_path / "all") == 0
    assert "sweep: 1 runs: 1 finished" in capsys.readouterr().err
    assert (tmp_path / "all" / "results.json").read_bytes() == before
    write_sweep(tmp_path, inputs, base={"data": str(text)}, grid={"seed": [0, 1]})
    arguments = ["sweep", str(file), "--output", str(tmp_path / "all"), "--dry-run"]
    refuses(capsys, tmp_path, arguments, f"data: expected a text, got {str(text)!r}", 'the set {"seed": 1}')


def test_the_documented_name_is_one_of_the_documented_file(tmp_path):
    document = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    (file,) = (code for code in re.findall(r"^```json\n(.*?)^```$", document, re.S | re.M) if '"base"' in code)
    (tmp_path / "ablation.json").write_text(file)
    names = [run.name for run in runs_of(tmp_path / "ablation.json")]
    assert re.search(r"such as `(estimator=[^`]+)`, and ends", document)[1] in names


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
    assert sweep(file, tmp_path / "all", "--dry-run") == 0
    told = capsys.readouterr()
    assert told.err.count("left out calibration_batches, init, lr, steps, which go with what --estimator replaces") == 1
    assert len(told.out.splitlines()) == 4 and not (tmp_path / "all").exists()


def test_another_folder_or_process_is_refused(finished, inputs, tmp_path, capsys):
    file, folder = finished
    run = next(path for path in folder.iterdir() if path.is_dir())
    refuses(capsys, folder, ["sweep", str(file), "--output", str(run)], "which is not empty")
    with FileLock(folder / ".lock"):
        refuses_by_lock = ["sweep", str(file), "--output", str(folder)]
        refuses(capsys, folder, refuses_by_lock, "expected a sweep that no other process is at")
    missing = ["sweep", str(tmp_path / "none.json"), "--output", str(tmp_path / "all")]
    refuses(capsys, tmp_path, missing, "none.json")


def test_a_damaged_state_is_refused(copy, capsys):
    file, folder = copy
    state = folder / "state.json"
    state.write_text(state.read_text().replace('"failed": {}', '"failed": {"a": "b"}'))
    arguments = ["sweep", str(file), "--output", str(folder)]
    refuses(capsys, folder, arguments, "output: expected the state of a sweep in", "move it away")
    state.unlink()
    assert main.main(arguments) == 0


def test_it_is_told_that_a_failed_run_waits(copy, capsys):
    file, folder = copy
    runs = runs_of(file)
    for run in runs[:2]:
        shutil.rmtree(folder / run.name)
    state = SweepFolder(folder, runs)
    with state.held():
        state.keep({runs[0].name: "an error"})
    assert sweep(file, folder) == 1
    told = capsys.readouterr().err
    assert "2 finished, 1 new, 1 failed" in told and "sweep: what failed waits for the next call" in told


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


def test_a_copy_of_a_run_takes_no_place(copy, capsys):
    file, folder = copy
    names = [run["name"] for run in results(folder)["runs"]]
    shutil.copytree(folder / names[0], folder / f"a-copy-of_{names[0]}")
    (folder / "notes").mkdir()
    arguments = ["sweep", str(file), "--output", str(folder), "--dry-run"]
    assert main.main(arguments) == 0
    told = capsys.readouterr()
    assert [line.split()[1] for line in told.out.splitlines()] == names
    assert "a-copy-of" in told.err and "notes" not in told.err
    # of two folders of other names neither is known to be the run's
    (folder / names[0]).rename(folder / f"b_{names[0]}")
    refuses(capsys, folder, arguments, f"expected one folder of the run {names[0]}", "move the copies out of it")
