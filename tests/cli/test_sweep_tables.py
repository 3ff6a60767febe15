"""`maskpro sweep`: which of its runs stand in one table and in one row, and what it tells of each table."""

from __future__ import annotations

import json
import re
import shutil

import pytest
from helpers.command import reseal
from helpers.routes import route_to_the_eager_reference
from helpers.sweeps import write_sweep

from maskpro_kernels.cli import main
from maskpro_kernels.report.sweep import write_sweep_html

pytestmark = pytest.mark.usefixtures("eager_reference")


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    """(FILE, folder) of a sweep of two rows with two seeds each."""
    folder = tmp_path_factory.mktemp("tables")
    file = write_sweep(folder, inputs, list=[{"alpha": 0.5}, {}], grid={"seed": [0, 1]})
    with pytest.MonkeyPatch.context() as monkeypatch:
        route_to_the_eager_reference(monkeypatch)
        assert main.main(["sweep", str(file), "--output", str(folder / "all")]) == 0
    return file, folder / "all"


@pytest.fixture
def told(finished, tmp_path, capsys):
    """What the command tells and writes where the reports of some runs are changed: called with a change of each."""
    file, folder = finished
    folder = shutil.copytree(folder, tmp_path / "all")
    names = [run["name"] for run in json.loads((folder / "results.json").read_text())["runs"]]

    def tell(changes):
        for place, change in changes.items():
            reseal(folder / names[place] / "report.json", change)
        assert main.main(["sweep", str(file), "--output", str(folder)]) == 0
        return json.loads((folder / "results.json").read_text()), capsys.readouterr().out, folder, names

    return tell


def seeds_of(found):
    return [[row["seeds"] for row in table["rows"]] for table in found["tables"]]


def test_runs_of_other_weights_or_windows_have_a_table_of_their_own(told):
    def other_weights(report):
        report["table"][0]["perplexity"] *= 1.01

    def other_windows(report):
        report["eval_digest"] = "another"

    found, out, *_ = told({1: other_weights, 3: other_windows})
    assert seeds_of(found) == [[[0], [0]], [[1]], [[1]]]
    dense = [table["dense_test"] for table in found["tables"]]
    titles = [line for line in out.splitlines() if ", dense model" in line]
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
    # a set without options is called as its folder is
    assert labels == ["alpha=0.5 (mask 01234567)", "alpha=0.5 (mask abcdefab)", "base"]


def test_samples_as_test_windows_have_no_spread_and_it_is_told(told):
    def samples(seed):
        return lambda report: report.update(eval_digest=str(seed), settings=report["settings"] | {"data": "self"})

    found, out, folder, _ = told({place: samples(place % 2) for place in range(4)})
    assert seeds_of(found) == [[[0], [0]], [[1], [1]]]
    for text in (out, (folder / "report.html").read_text()):
        assert text.count("samples that each seed draws itself: runs of other seeds are in tables of their own") == 2


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
