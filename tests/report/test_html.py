"""The page of a run, from reports of several kinds of runs and from one run of the command."""

from __future__ import annotations

import json
import math
import re
import shlex
from html.parser import HTMLParser

import pytest
from helpers.tiny_llama import write_inputs
from matplotlib.figure import Figure

from maskpro_kernels.cli import main, parser
from maskpro_kernels.report import html, svg
from maskpro_kernels.report.html import command, write_html

VOID = {"meta", "br", "hr", "img", "input", "link", "base", "source", "embed"}
PROJECTIONS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj")
LLAMA = {f"model.layers.{block}.{name}": 1000 for block in range(2) for name in PROJECTIONS}
REINFORCE = {"estimator": "reinforce", "init": "wanda", "alpha": 0.99, "draws": 1, "lr": 50.0}
SEVERAL_DRAWS = {"estimator": "reinforce", "init": "wanda", "draws": 4, "lr": 50.0}
STRAIGHT_THROUGH = {"estimator": "straight-through", "init": "wanda", "lr": 0.1}


class Page(HTMLParser):
    """A page whose elements are closed in order, whose ids are distinct, and which refers to nothing outside it."""

    def __init__(self, text: str):
        super().__init__()
        self.text = text
        self.open, self.ids, self.references = [], [], []
        self.tables, self.paragraphs, self.pictures, self.headings = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open
        assert len(set(self.ids)) == len(self.ids)
        assert set(self.references) <= set(self.ids)
        assert re.findall(r"url\((?!#)|@import", text) == []

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        names = [name for name, _ in attrs]
        assert len(set(names)) == len(names)
        assert not {tag} & {"script", "link", "iframe", "img", "image", "object", "embed", "base"}
        for name, value in attrs:
            assert not name.startswith("on") and name not in ("src", "srcset", "data", "action"), name
            if name.endswith("href"):
                assert value.startswith("#")
                self.references.append(value[1:])
            self.references += re.findall(r"url\(#([^)]*)\)", value or "")
            if name == "id":
                self.ids.append(value)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("th", "td"):
            self.tables[-1][-1].append("")
        elif tag in ("p", "pre"):
            self.paragraphs.append("")
        elif tag in ("h1", "h2", "h3"):
            self.headings.append("")
        elif tag == "svg":
            self.pictures.append([])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        place = set(self.open)
        if place & {"th", "td"}:
            self.tables[-1][-1][-1] += data
        elif place & {"p", "pre"}:
            self.paragraphs[-1] += data
        elif place & {"h1", "h2", "h3"}:
            self.headings[-1] += data
        elif "svg" in place and data.strip():
            self.pictures[-1].append(data.strip())

    def table(self, *head):
        """The rows of each table with that head."""
        return [rows for first, *rows in self.tables if first == list(head)]

    def says(self, text):
        return any(text in paragraph for paragraph in self.paragraphs)


def step_of(step, **changed):
    record = {"step": step, "loss": 3.0 + math.sin(step), "residual": 0.01, "advantage": 0.02, "tracker": -0.001}
    return record | {"flip_rate": 0.001, "tokens": 1024, "seconds": 2.0} | changed


def report_of(steps, settings, layers=LLAMA, **changed):
    """A report of records of steps, with a hundredth of every layer's groups moved."""
    if settings["estimator"] == "straight-through" or settings["draws"] > 1:
        steps = [step | {"residual": None, "advantage": None, "tracker": None} for step in steps]
    count = len(steps)
    values = {
        "model": "smollm2-135m",
        "pattern": "2:4",
        "settings": {"data": "pydoc", "steps": count, "seed": 0, "output": "runs/mine", "dtype": "bfloat16"} | settings,
        "gap": 10.0,
        "start": settings["init"],
        "weights": "weights frozen",
        "versions": {"python": "3.12.1", "triton": "not installed"},
        "eval_tokens": 12288,
        "table": [
            {"method": "dense", "perplexity": 14.27, "seconds": 0.0},
            {"method": "magnitude", "perplexity": 2652.29, "seconds": 0.1},
            {"method": "wanda", "perplexity": 73.02, "seconds": 21.0},
            {"method": settings["estimator"], "perplexity": 26.16, "seconds": 286.0},
        ],
        "validation": [{"step": step, "tokens": 1024 * step, "perplexity": 40 / (step + 1)} for step in (0, count)],
        "better_mask": None,
        "groups": sum(layers.values()),
        "groups_by_layer": layers,
        "flipped_groups": sum(layers.values()) // 100,
        "flipped_groups_by_layer": {name: groups // 100 for name, groups in layers.items()},
        "logits": "0123456789abcdef",
        "converted": list(layers),
        "skipped": {"lm_head": "output head"},
        "memory": {"needed": {"weights": 2500000000, "logits": 0}, "used": {"process": 4500000000}},
        "steps": steps,
    }
    return values | changed


def line_of(values):
    return shlex.join(word for words in command(values) for word in words)


def page_of(values, folder):
    """The page of what a report file would hold."""
    write_html(json.loads(json.dumps(values)), folder / "report.html")
    return Page((folder / "report.html").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("settings", "curves"),
    [(REINFORCE, 3), (SEVERAL_DRAWS, 1), (STRAIGHT_THROUGH, 1)],
    ids=["reinforce", "several draws", "straight-through"],
)
@pytest.mark.parametrize("count", [1, 2, 300])
def test_page_of_a_run(tmp_path, settings, curves, count):
    page = page_of(report_of([step_of(step) for step in range(count)], settings), tmp_path)
    assert page.headings[0] == "2:4 mask of smollm2-135m"
    told = f"Learned on pydoc by {settings['estimator']}. It began with wanda, whose test perplexity is 73.02."
    assert page.says(told)
    assert not page.says("not those of the dense model")
    (methods,) = page.table("mask", "test perplexity", "seconds from the dense model")
    assert methods == [
        ["none (dense)", "14.27", "0.0"],
        ["magnitude", "2,652.29", "0.1"],
        ["wanda", "73.02", "21.0"],
        [settings["estimator"], "26.16", "286.0"],
    ]
    validation, losses = page.pictures
    assert "validation perplexity" in validation and "tokens learned from" in validation
    assert len([one for one in page.ids if re.fullmatch(r"loss-axes_\d+", one)]) == curves
    assert {"loss, nats a token", "step"} <= set(losses)
    assert ("tracker" in losses and "advantage, nats a token" in losses) == (curves == 3)
    assert page.says(f"40.00 after 0 steps, {40 / (count + 1):.2f} after {count} step{'s'[: count - 1]}.")
    # one step has one place
    assert len([text for text in losses if text in ("0", "−0")]) == 1
    assert not page.says("ended early") and not page.says("changed nothing")
    tables = sum(page.tables, [])
    assert ["python", "3.12.1"] in tables and ["lm_head", "output head"] in tables and ["gap", "10.0"] in tables
    assert page.says("0123456789abcdef")


def test_the_scheme_gives_a_picture_its_colours(tmp_path):
    text = page_of(report_of([step_of(step) for step in range(3)], REINFORCE), tmp_path).text
    pictures = text[text.index("<svg") :]
    assert re.findall(r"(?:fill|stroke): (?!none|var)[^;\"]*", pictures) == []
    used = set(re.findall(r"var\((--[a-z]+)\)", text))
    for scheme in re.findall(r":root \{(.*?)\}", text, re.DOTALL):
        assert used - {"--heat"} <= set(re.findall(r"(--[a-z]+):", scheme))


def test_the_same_run_gives_the_same_page(tmp_path):
    values = report_of([step_of(step) for step in range(3)], REINFORCE)
    assert page_of(values, tmp_path).text == page_of(values, tmp_path).text


def test_shares_by_block_and_projection(tmp_path):
    moved = dict(zip(LLAMA, [0, 5, 250, 1000, 10, 1], strict=True))
    page = page_of(report_of([step_of(0)], STRAIGHT_THROUGH, flipped_groups_by_layer=moved), tmp_path)
    shares, rates = page.table("block", "q_proj", "o_proj", "up_proj")
    assert shares == [["0", "0", "0.500%", "25.000%"], ["1", "100.000%", "1.000%", "0.100%"]]
    assert rates == [["0", "0.100%", "–", "–"], ["1", "–", "–", "–"]]
    assert re.findall(r"--heat: ([\d.]+)", page.text)[:6] == ["0.00", "0.00", "0.19", "0.75", "0.01", "0.00"]
    assert '<dd>21.100%</dd><dd class="faint">1,266 of 6,000</dd>' in page.text


def test_layers_of_every_name(tmp_path):
    """Stacks have maps of their own, experts share a cell, and what lies in no block has its own table."""
    layers = {
        "encoder.layers.0.self_attn.q_proj": 100,
        "decoder.layers.10.self_attn.q_proj": 100,
        "decoder.layers.10.cross_attn.q_proj": 200,
        "decoder.layers.9.self_attn.q_proj": 100,
        "decoder.layers.9.mlp.experts.0.up_proj": 100,
        "decoder.layers.9.mlp.experts.1.up_proj": 300,
        "bridge": 1000,
        "net.0": 1000,
        "head.1.2": 100,
    }
    moved = dict(zip(layers, [1, 2, 3, 4, 5, 7, 8, 0, 9], strict=True))
    steps = [step_of(step, flip_rate=step / 100) for step in range(len(layers))]
    page = page_of(report_of(steps, STRAIGHT_THROUGH, layers, flipped_groups_by_layer=moved), tmp_path)
    assert page.headings.count("encoder.layers") == page.headings.count("decoder.layers") == 2
    assert page.table("block", "q_proj") == [[["0", "1.000%"]], [["0", "0"]]]
    shares, rates = page.table("block", "self_attn.q_proj", "cross_attn.q_proj", "mlp.experts.up_proj")
    assert shares == [["9", "4.000%", "–", "3.000%"], ["10", "2.000%", "1.500%", "–"]]
    # (100 * 4% + 300 * 5%) / 400
    assert rates == [["9", "3.000%", "–", "4.750%"], ["10", "1.000%", "2.000%", "–"]]
    assert page.table("block", "2")[0] == [["1", "9.000%"]]
    assert page.table("layer", "share")[0] == [["bridge", "0.800%"], ["net.0", "0"]]


def test_flip_rates_are_those_of_the_newest_steps(tmp_path):
    """Step i looks at layer i modulo their number; what a journal has rebuilt knows no rate."""
    layers = {"one": 100, "two": 100}
    rates = [0.5, 0.9, 0.01, math.nan, 0.02, math.nan, 0.03, 0.3, 0.04, 0.1, 0.05]
    steps = [step_of(step, flip_rate=rate) for step, rate in enumerate(rates)]
    page = page_of(report_of(steps, REINFORCE, layers), tmp_path)
    assert page.table("layer", "share")[1] == [["one", "3.000%"], ["two", "43.333%"]]
    unknown = [step_of(step, flip_rate=math.nan, seconds=0.0) for step in range(4)]
    page = page_of(report_of(unknown, REINFORCE, layers), tmp_path)
    assert page.says("No flip rate is known") and len(page.table("layer", "share")) == 1
    assert "tokens a second" not in page.text


def test_flips_that_are_not_known(tmp_path):
    page = page_of(report_of([step_of(0)], REINFORCE, flipped_groups_by_layer={}, flipped_groups=0), tmp_path)
    assert page.says("How many groups differ from the initial mask is not known")
    assert '<dd>not known</dd><dd class="faint">of 6,000</dd>' in page.text
    assert len(page.table("block", "q_proj", "o_proj", "up_proj")) == 1


def test_few_flips_are_not_none(tmp_path):
    layers = {"model.layers.0.q_proj": 10_000_000, "model.layers.0.k_proj": 10_000_000}
    moved = dict(zip(layers, [1, 0], strict=True))
    page = page_of(report_of([step_of(0)], REINFORCE, layers, flipped_groups_by_layer=moved), tmp_path)
    assert page.table("block", "q_proj", "k_proj")[0] == [["0", "<0.001%", "0"]]


def test_skipped_steps_are_listed(tmp_path):
    bad = {"loss": math.nan, "residual": None, "advantage": None}
    steps = [step_of(step, **bad if step in (1, 4, 5, 6) else {}) for step in range(9)]
    page = page_of(report_of(steps, REINFORCE), tmp_path)
    assert page.says("4 of 9 steps changed nothing, because a loss was no finite number: 1, 4 to 6.")
    every_second = [step_of(step, **bad if step % 2 else {}) for step in range(400)]
    page = page_of(report_of(every_second, REINFORCE), tmp_path)
    assert page.says("200 of 400 steps changed nothing") and page.says("97, 99, and 150 later ones.")
    page = page_of(report_of([step_of(0, **bad)], REINFORCE), tmp_path)
    assert page.says("No step has a finite loss") and page.says("1 of 1 step changed nothing")


def test_perplexities_that_are_no_numbers(tmp_path):
    rows = [{"step": step, "tokens": step, "perplexity": math.inf} for step in range(3)]
    values = report_of([step_of(0), step_of(1)], REINFORCE, validation=rows)
    values["table"][1]["perplexity"] = math.inf
    page = page_of(values, tmp_path)
    assert page.says("No finite value is known") and len(page.pictures) == 1
    assert page.table("mask", "test perplexity", "seconds from the dense model")[0][1][1] == "inf"
    rows[1]["perplexity"] = 30.0
    page = page_of(report_of([step_of(0), step_of(1)], REINFORCE, validation=rows), tmp_path)
    assert len(page.pictures) == 2


def test_another_text_has_its_column(tmp_path):
    values = report_of([step_of(0)], STRAIGHT_THROUGH | {"other_data": "stdlib"})
    values["table"] = [row | {"other_perplexity": 7.43 + at} for at, row in enumerate(values["table"])]
    page = page_of(values, tmp_path)
    (methods,) = page.table("mask", "test perplexity", "on the other text", "seconds from the dense model")
    assert [row[2] for row in methods] == ["7.43", "8.43", "9.43", "10.43"]
    assert page.says("The other text: stdlib.")


def test_a_run_that_ended_early_says_so(tmp_path):
    values = report_of([step_of(step) for step in range(3)], REINFORCE | {"steps": 9})
    page = page_of(values, tmp_path)
    assert page.says("ended early") and "in 3 of 9 steps" in page.text


def test_what_was_given_is_text(tmp_path):
    """Of names and paths nothing becomes markup."""
    nasty = '"><script src="http://example.com/x.js">&amp;</script>'
    layers = {nasty: 10, f"{nasty}.layers.0.{nasty}": 10, "other.layers.0.up": 10}
    values = report_of([step_of(0)], REINFORCE | {"data": nasty, "output": nasty}, layers, model=nasty)
    values |= {"versions": {nasty: nasty}, "skipped": {nasty: nasty}, "logits": nasty}
    page = page_of(values, tmp_path)
    assert page.headings[0] == f"2:4 mask of {nasty}" and f"{nasty}.layers" in page.headings
    assert [nasty, nasty] in sum(page.tables, []) and ["data", nasty] in sum(page.tables, [])
    assert page.says(line_of(values))


@pytest.mark.parametrize("settings", [REINFORCE, STRAIGHT_THROUGH], ids=["reinforce", "straight-through"])
def test_page_of_a_long_run_stays_small(tmp_path, settings):
    names = [*"qkvo", "gate", "up", "down"]
    layers = {f"model.layers.{block}.{name}_proj": 100_000 for block in range(80) for name in names}
    steps = [step_of(step, residual=math.sin(step), tracker=math.cos(step)) for step in range(10_000)]
    rows = [{"step": step, "tokens": 1024 * step, "perplexity": 40 - step / 1000} for step in range(0, 10_001, 10)]
    page = page_of(report_of(steps, settings, layers, validation=rows), tmp_path)
    assert (tmp_path / "report.html").stat().st_size < 500_000
    assert page.says("Curves are means of 500 stretches")
    assert [len(rows) for rows in page.table("block", *(f"{name}_proj" for name in names))] == [80, 80]


def test_a_long_curve_is_thinned_out_and_keeps_its_extremes():
    points = [(step, 1.0 if step % 2 else -1.0) for step in range(10_000)]
    points[5000], points[7000], points[7001] = (5000, 90.0), (7000, math.nan), (7001, None)
    axes = Figure().subplots()
    svg.curve(axes, points, "loss", "#000000")
    (line,), (band,) = axes.lines, axes.collections
    x, y = line.get_xydata().T
    assert len(x) == svg.MOST_POINTS and (x[1:] > x[:-1]).all()
    assert x[0] == pytest.approx(sum(range(20)) / 20, abs=1) and abs(y[0]) < 0.1
    low, high = band.get_paths()[0].vertices[:, 1].min(), band.get_paths()[0].vertices[:, 1].max()
    assert (low, high) == (-1, 90)


@pytest.mark.parametrize(("line", "style"), [(True, "-"), (False, "None")])
def test_a_short_curve_shows_every_point(line, style):
    axes = Figure().subplots()
    svg.curve(axes, [(0, 1.0), (1, math.nan), (2, math.inf), (3, None), (4, 5.0)], "loss", "#000000", line)
    (drawn,) = axes.lines
    assert drawn.get_xydata().tolist() == [[0, 1], [4, 5]] and not axes.collections
    assert drawn.get_linestyle() == style and drawn.get_marker() == "o"


@pytest.mark.parametrize("name", sorted(html.NEEDED))
def test_a_report_with_something_missing_is_refused(tmp_path, name):
    values = report_of([step_of(0)], REINFORCE)
    del values[name]
    with pytest.raises(ValueError, match=f"^report: expected that of `maskpro learn`, got one without {name}$"):
        write_html(values, tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "gap", "line"),
    [
        (REINFORCE | {"flip_rate": 0.05, "calibration_batches": 16}, 3.0, "--flip-rate 0.05"),
        (
            SEVERAL_DRAWS | {"gradient_checkpointing": True, "report_to": ["tensorboard", "wandb"]},
            10.0,
            "--draws 4 --lr 50.0 --gradient-checkpointing --report-to tensorboard wandb",
        ),
        (
            SEVERAL_DRAWS | {"gradient_checkpointing": False, "device_map": {"": "cuda:0"}},
            10.0,
            """--draws 4 --lr 50.0 --device-map '{"": "cuda:0"}'""",
        ),
        (REINFORCE | {"accumulate": 4}, 10.0, "--accumulate 4"),
        (STRAIGHT_THROUGH | {"calibration_batches": None, "data": "a text.txt"}, 15.0, "--data 'a text.txt'"),
    ],
    ids=["flip rate", "several trackers", "device map", "several batches", "straight-through"],
)
def test_the_line_to_run_it_again_is_one_that_the_command_takes(options, gap, line):
    values = report_of([step_of(0)], options, gap=gap)
    assert line in line_of(values)
    parsed = vars(parser.build_parser().parse_args(shlex.split(line_of(values))[1:]))
    expected = values["settings"] | {"model": "smollm2-135m", "output": "runs/mine-again"}
    if "flip_rate" in options:
        assert "gap" not in parsed
    else:
        expected |= {"gap": gap}
    if options.get("calibration_batches", 1) is None:
        del expected["calibration_batches"]
        assert "calibration_batches" not in parsed
    assert expected.items() <= parsed.items()


def test_the_command_writes_a_page_and_its_line_runs_again(eager_reference, tmp_path):
    write_inputs(tmp_path)
    options = "--steps 3 --batch-size 4 --seq-len 16 --eval-windows 5 --eval-length 24 --dtype float32 --device cpu"
    sources = ["--model", str(tmp_path / "model"), "--data", str(tmp_path / "text.txt")]
    options += " --estimator straight-through --lr 1 --flip-rate 0.05"
    output = tmp_path / "run"
    assert main.main(["learn", *sources, *options.split(), "--output", str(output)]) == 0
    page = Page((output / "report.html").read_text(encoding="utf-8"))
    values = json.loads((output / "report.json").read_text(encoding="utf-8"))
    assert values["groups_by_layer"].keys() == set(values["converted"]) == values["flipped_groups_by_layer"].keys()
    assert sum(values["groups_by_layer"].values()) == values["groups"]
    assert values["groups_by_layer"]["model.layers.1.mlp.down_proj"] == 32 * 64 // 4
    assert page.headings[0] == f"2:4 mask of {tmp_path / 'model'}" and len(page.pictures) == 2
    projections = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
    shares, rates = page.table("block", *projections)
    moved = values["flipped_groups_by_layer"]["model.layers.1.mlp.down_proj"]
    assert moved and shares[1][-1] == f"{100 * moved / 512:.3f}%" and [row.count("–") for row in rates] == [4, 7]
    (line,) = [text for text in page.paragraphs if text.startswith("maskpro learn")]
    assert main.main(shlex.split(line)[1:]) == 0
    again = json.loads((tmp_path / "run-again" / "report.json").read_text(encoding="utf-8"))
    assert again["logits"] == values["logits"] and again["gap"] == values["gap"]


def test_the_time_of_a_step_stands_by_part(tmp_path):
    parts = {"data": 0.25, "forward": 1.0, "update": 0.75}
    steps = [step_of(0), *(step_of(step, parts=parts, seconds=2.01) for step in (1, 2))]
    (rows,) = page_of(report_of(steps, REINFORCE), tmp_path).table("part", "milliseconds a step", "share")
    assert rows == [
        ["forward", "1,000.00", "50.0%"],
        ["update", "750.00", "37.5%"],
        ["data", "250.00", "12.5%"],
        ["all parts", "2,000.00", "100.0%"],
        ["a step by the wall clock", "2,010.00", "100.5%"],
    ]
    unknown = page_of(report_of([step_of(0)], REINFORCE), tmp_path)
    assert unknown.says("How long the parts of the steps took is not known")
