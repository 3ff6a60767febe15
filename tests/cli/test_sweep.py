"""`maskpro sweep`: what runs found together, its tables, failures, and a FILE that changes."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import statistics
from pathlib import Path

import pytest
from filelock import FileLock
from helpers.command import contents, refuses, report, reseal
from helpers.routes import route_to_the_eager_reference
from helpers.sweeps import base, results, runs_of, seeds_of, sweep, without_wall_clock, write_sweep

from maskpro_kernels.cli import main
from maskpro_kernels.cli import sweep as sweep_command
from maskpro_kernels.cli.sweep_folder import SweepFolder
from maskpro_kernels.learn.trainer import MaskTrainer
from maskpro_kernels.report.sweep import write_sweep_html

pytestmark = pytest.mark.usefixtures("eager_reference")

GRID = {"grid": {"seed": [0, 1]}, "list": [{"alpha": 0.5}, {"draws": 2, "lr": 20.0}]}


@pytest.fixture(scope="module")
def finished(inputs, frozen, tmp_path_factory):
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
    # of two runs the options of one are told in another way, and those of the other are new
    write_sweep(file.parent, inputs, list=[{"alpha": 0.5, "seed": 1}, {"seed": 0}], grid={"gap": [10]})
    assert sweep(file, folder, "--dry-run") == 0
    listed = capsys.readouterr().out.splitlines()
    assert sweep(file, folder) == 0
    told = capsys.readouterr().err
    assert [line.split() for line in listed][0] == ["finished", names[1]]
    assert "sweep: 2 runs: 1 finished, 1 new" in told
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
@pytest.mark.pictures
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


def test_finished_runs_are_known_without_their_texts(inputs, tmp_path, capsys):
    text = shutil.copy(inputs / "text.txt", tmp_path / "text.txt")
    file = write_sweep(tmp_path, inputs, base={"data": str(text)}, grid={"seed": [0]})
    assert sweep(file, tmp_path / "all") == 0
    before = (tmp_path / "all" / "results.json").read_bytes()
    # a set without options but the seed is called as its folder is
    assert results(tmp_path / "all")["tables"][0]["rows"][0]["label"] == "base"
    text.unlink()
    assert sweep(file, tmp_path / "all") == 0
    assert "sweep: 1 runs: 1 finished" in capsys.readouterr().err
    assert (tmp_path / "all" / "results.json").read_bytes() == before
    write_sweep(tmp_path, inputs, base={"data": str(text)}, grid={"seed": [0, 1]})
    arguments = ["sweep", str(file), "--output", str(tmp_path / "all"), "--dry-run"]
    refuses(capsys, tmp_path, arguments, f"data: expected a text, got {str(text)!r}", 'the set {"seed": 1}')


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


def test_it_is_told_that_a_failed_run_waits(copy, capsys, monkeypatch):
    file, folder = copy
    runs = runs_of(file)
    for run in runs[:2]:
        shutil.rmtree(folder / run.name)
    state = SweepFolder(folder, runs)
    with state.held():
        state.keep({runs[0].name: "an error"})
    taken = []
    monkeypatch.setattr(sweep_command, "take_run", lambda args, shared: bool(taken.append(args.output)))
    assert sweep(file, folder) == 1
    assert taken == [str(folder / runs[1].name)]
    told = capsys.readouterr().err
    assert "2 finished, 1 new, 1 failed" in told and "sweep: what failed waits for the next call" in told


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


@pytest.fixture
def told(copy, capsys):
    """What the command tells and writes where the reports of some runs are changed: called with a change of each."""
    file, folder = copy
    names = [run["name"] for run in results(folder)["runs"]]

    def tell(changes):
        for place, change in changes.items():
            reseal(folder / names[place] / "report.json", change)
        assert sweep(file, folder) == 0
        return results(folder), capsys.readouterr().out, folder, names

    return tell


def test_runs_of_other_weights_or_windows_have_a_table_of_their_own(told):
    def other_weights(report):
        report["table"][0]["perplexity"] *= 1.01

    def other_windows(report):
        report["eval_digest"] = "another"

    found, out, *_ = told({1: other_weights, 3: other_windows})
    assert seeds_of(found) == [[[0], [0]], [[1]], [[1]]]
    dense = [table["dense_test"] for table in found["tables"]]
    titles = [line for line in out.splitlines() if ", dense model" in line]
    initial = found["tables"][1]["rows"][0]["initial_test"]["mean"]
    head, row = out.splitlines()[out.splitlines().index(titles[1]) + 2 :][:2]
    assert head.endswith("  test, initial mask") and row.endswith(f" {initial:.2f}")
    assert len(titles) == 3 and all(f"{value:.2f}" in title for value, title in zip(dense, titles, strict=True))


def test_rounding_of_another_machine_makes_no_table(told):
    def rounded(report):
        report["table"][0]["perplexity"] *= 1 + 1e-9

    assert seeds_of(told({1: rounded})[0]) == [[[0, 1], [0, 1]]]


def test_another_mask_to_begin_with_makes_a_row(told):
    def begun(digest):
        return lambda report: report.update(initial_mask={"kind": "run", "digest": digest})

    found, *_ = told({0: begun("0123456789"), 1: begun("abcdefabcd")})
    assert seeds_of(found) == [[[0], [1], [0, 1]]]
    labels = [row["label"] for row in found["tables"][0]["rows"]]
    assert labels == ["alpha=0.5 (mask 01234567)", "alpha=0.5 (mask abcdefab)", "draws=2, lr=20.0"]


def test_samples_as_test_windows_have_no_spread_and_it_is_told(told):
    def samples(seed):
        settings = {"data": "self"}
        return lambda report: report.update(
            eval_digest=str(seed), learned_texts=[], settings=report["settings"] | settings
        )

    found, out, folder, _ = told({place: samples(place % 2) for place in range(4)})
    assert seeds_of(found) == [[[0], [0]], [[1], [1]]]
    for text in (out, (folder / "report.html").read_text()):
        assert text.count("samples that each seed draws itself: runs of other seeds are in tables of their own") == 2


def test_of_streamed_texts_no_change_is_known_and_it_is_told(told):
    def streamed(report):
        report["learned_texts"] = [None]
        report["settings"]["stream"] = True

    found, out, folder, _ = told({place: streamed for place in range(4)})
    assert seeds_of(found) == [[[0, 1], [0, 1]]]
    for text in (out, (folder / "report.html").read_text()):
        assert "whether it has changed between these runs is not known" in text


def test_several_other_texts_have_no_column(told):
    def other(report):
        report["settings"]["other_data"] = "another"

    found, out, folder, _ = told({2: other})
    assert "on the other text" not in out and "several other texts" in out
    assert found["tables"][0]["rows"][0]["other"] is None
    assert "several other texts" in (folder / "report.html").read_text()


def test_the_best_run_of_each_pattern_is_named(told):
    def dense_pattern(report):
        report["pattern"] = "1:4"
        report["settings"]["pattern"] = "1:4"

    found, out, folder, names = told({place: dense_pattern for place in (2, 3)})
    best = [best["run"] for best in found["tables"][0]["best"]]
    assert [names.index(name) // 2 for name in best] == [0, 1]
    assert "best of 2:4 by" in out and "best of 1:4 by" in out
    # each into a folder of its own, and runs of two patterns do not compare
    assert [line.split()[3] for line in out.splitlines() if "export" in line] == [f"{folder}-{name}" for name in best]
    assert "maskpro compare" not in out


def test_runs_of_another_dtype_have_a_table_of_their_own(told):
    def half(report):
        report["settings"]["dtype"] = "bfloat16"

    assert "maskpro compare" in told({})[1]
    found, out, *_ = told({place: half for place in (0, 1)})
    assert seeds_of(found) == [[[0, 1]], [[0, 1]]] and "maskpro compare" not in out and "in bfloat16" in out


def test_the_page_tells_what_was_run(told):
    found, _, folder, names = told({})
    page = (folder / "report.html").read_text()
    assert "Perplexity of " in page and "text.txt" in page and "Options of all runs" in page
    assert found["options"]["steps"] == 3 and "seed" not in found["options"]
    for name in names:
        assert f'<a href="{name}/report.html">' in page and (folder / name / "report.html").is_file()


@pytest.mark.pictures
def test_long_labels_leave_room_for_the_curves(told, tmp_path):
    found, _, folder, _ = told({})
    (table,) = found["tables"]
    for row in table["rows"]:
        row["label"] = f"data={'/folder' * 40}/{row['label']}.txt"
    write_sweep_html(found, tmp_path / "long.html")
    page = (tmp_path / "long.html").read_text()
    pictures = "".join(re.findall("<svg .*?</svg>", page, re.DOTALL))
    # their ends tell them apart, and their places in the table
    assert "1: …" in pictures and "alpha=0.5.txt" in pictures and "2: …" in pictures
    assert "/folder" * 10 in page and "/folder" * 10 not in pictures
