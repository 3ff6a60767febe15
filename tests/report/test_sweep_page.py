"""The page of a sweep, from results of several kinds."""

from __future__ import annotations

from matplotlib.axes import Axes

from maskpro_kernels.report.sweep import STRETCHES, write_sweep_html


def results_of(labels, kinds=("ce",), last=30.0, steps=200):
    """A run for each label and seed, and one that has failed."""
    runs, rows = [], []
    for at, label in enumerate(labels):
        names = [f"{at}_seed={seed}" for seed in range(2)]
        for name in names:
            curve = [[0, 40.0], [1000, last if at else 30.0]]
            losses = [[step, float("nan") if step == 3 else 3.0] for step in range(steps)]
            kind = kinds[at % len(kinds)]
            run = {"name": name, "state": "finished", "curve": curve, "losses": losses, "loss_kind": kind}
            runs.append(run | {"options": {}, "steps_taken": steps, "validation": 31.0, "test": 32.0})
        figure = {"mean": 30.0, "spread": 0.5}
        row = {"label": label, "seeds": [0, 1], "runs": names, "moved": None, "other": None}
        row |= {name: figure for name in ("validation", "test", "initial_test")}
        times = {"seconds from the dense model": 9.0, "seconds a step": 0.25}
        rows.append(row | {"wall_clock": times | {"parts": {"forward": 0.1, ("draw" if at else "backward"): 0.1}}})
    runs.append({"name": "bad", "state": "failed", "error": "lr: expected <1>", "options": {}})
    best = {"told": "best by validation perplexity: it", "next": ["maskpro export a b"]}
    table = {"model": "m", "dtype": "float32", "texts": "pydoc", "eval_tokens": 9, "dense_test": 14.0, "rows": rows}
    table |= {"best": [best], "notes": ["The test windows are not the same ones."]}
    return {"options": {"batch_size": 3}, "runs": runs, "tables": [table], "left_alone": ["an & old one"]}


def page_of(results, folder):
    write_sweep_html(results, folder / "report.html")
    return (folder / "report.html").read_text(encoding="utf-8")


def test_all_that_is_known_stands_on_the_page(tmp_path):
    page = page_of(results_of(["lr=0.1", "init=$a$<b>"], kinds=("ce", "kl")), tmp_path)
    assert "4 of them have finished" in page and "The test windows are not the same ones" in page
    assert "lr: expected &lt;1&gt;" in page and "an &amp; old one" in page and "<b>" not in page
    assert page.count("30.00 ± 0.50") == 6 and "loss (ce)" in page and "loss (kl)" in page
    # of parts that a row does not have
    assert page.count(">0.0%</td>") == 2 and page.count("50.0%") == 4
    assert page.count(">31.00</td>") == 4 and 'href="0_seed=0/report.html"' in page and "batch_size" in page


def test_the_wall_clock_names_the_table_of_each_row(tmp_path):
    results = results_of(["init=magnitude", "init=wanda"])
    assert "table 1" not in page_of(results, tmp_path).lower()
    results["tables"] *= 2
    page = page_of(results, tmp_path)
    sections, clock = page.split("<h2>Wall clock</h2>")
    for number in (1, 2):
        assert sections.count(f"<h2>Table {number}: perplexity of pydoc</h2>") == 1
        for label in ("init=magnitude", "init=wanda"):
            assert clock.count(f"table {number}: {label}<") == 1


def test_runs_that_are_far_apart_stand_on_a_logarithmic_axis(tmp_path, monkeypatch):
    scales = []
    monkeypatch.setattr(Axes, "set_yscale", lambda axes, scale: scales.append(scale))
    page_of(results_of(["a", "b"]), tmp_path)
    assert scales == []
    page_of(results_of(["a", "b"], last=1e5), tmp_path)
    assert scales == ["log"]


def test_many_rows_have_lines_of_their_own(tmp_path, monkeypatch):
    drawn, plot = [], Axes.plot

    def plotted(axes, x, y, **how):
        drawn.append((how["color"], how["linestyle"], len(x)))
        return plot(axes, x, y, **how)

    monkeypatch.setattr(Axes, "plot", plotted)
    page_of(results_of([f"seed={at}" for at in range(30)]), tmp_path)
    assert len({(colour, style) for colour, style, _ in drawn}) == 30
    assert {points for _, _, points in drawn} == {2, STRETCHES}


def test_nothing_is_known_at_first(tmp_path):
    waiting = {"name": "one", "state": "new", "options": {}}
    page = page_of({"options": {}, "runs": [waiting], "tables": [], "left_alone": []}, tmp_path)
    assert "0 of them have finished" in page and "<svg" not in page and "Wall clock" not in page
