"""`maskpro learn`: what it writes and prints, and when it stops."""

from __future__ import annotations

import json
import os
import shutil
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.command import contents, learn, nonzeros, report
from helpers.damage import edit
from helpers.tiny_llama import tiny_model, tiny_text
from transformers import AutoModelForCausalLM, AutoTokenizer

from maskpro_kernels.checkpoints.logits import load_logits
from maskpro_kernels.cli import learn as learn_module
from maskpro_kernels.cli import main, perplexities
from maskpro_kernels.cli.mask_files import mask_of_step
from maskpro_kernels.cli.perplexities import ValidationPerplexities
from maskpro_kernels.cli.run_files import BEST_MASK
from maskpro_kernels.text.batches import windows
from maskpro_kernels.text.perplexity import perplexity
from maskpro_kernels.text.sources import load_text

pytestmark = pytest.mark.usefixtures("eager_reference")


def test_learn_writes_a_checkpoint_that_has_the_perplexity_it_reports(inputs, run):
    written = report(run)
    model = AutoModelForCausalLM.from_pretrained(run)
    tokenizer = AutoTokenizer.from_pretrained(run)
    assert len(written["converted"]) == 14 and "lm_head" not in written["converted"]
    dense = tiny_model()
    for name in written["converted"]:
        assert (nonzeros(model, name) == 2).all()
        weight, kept = dense.get_submodule(name).weight, model.get_submodule(name).weight
        assert_same_bits(kept, torch.where(kept != 0, weight, 0.0))
    test = windows(load_text(str(inputs / "text.txt"))["test"], tokenizer, 24)[:5]
    table = {row["method"]: row for row in written["table"]}
    assert list(table) == ["dense", "magnitude", "wanda", "reinforce"]
    assert table["reinforce"]["perplexity"] == pytest.approx(perplexity(model, test), rel=1e-6)
    assert table["dense"]["perplexity"] == pytest.approx(perplexity(dense, test), rel=1e-6)
    assert all(row["seconds"] >= 0 for row in table.values())


@pytest.mark.pictures
def test_learn_writes_the_whole_record(run):
    written = report(run)
    assert sorted(os.listdir(run)) == sorted(
        ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
        + ["logits.safetensors", "report.json", "report.html", "residual.png", "perplexity.png"]
        + ["settings.json", "progress", "README.md"]
    )
    assert written["pattern"] == "2:4" and written["settings"]["seed"] == 0 and written["gap"] == 10
    assert {"python", "torch", "transformers"} <= set(written["versions"])
    assert len(written["steps"]) == 3
    assert {"step", "loss", "residual", "advantage", "tracker", "flip_rate"} <= set(written["steps"][0])
    assert written["flipped_groups"] == sum(written["flipped_groups_by_layer"].values())
    assert (run / "residual.png").read_bytes().startswith(b"\x89PNG")
    logits, metadata = load_logits(run / "logits.safetensors")
    assert logits.keys() == set(written["converted"]) and metadata["pattern"] == "2:4"
    assert written["groups"] == sum(tensor.numel() for tensor in logits.values()) // 4


@pytest.mark.parametrize("estimator, gap, lr", [("reinforce", 10.0, 50.0), ("straight-through", 15.0, 0.3)])
def test_learn_tells_of_a_run_that_was_too_short_for_any_group_to_move(inputs, tmp_path, capsys, estimator, gap, lr):
    assert main.main(learn(inputs, tmp_path, "--estimator", estimator, "--gap", str(gap), "--lr", str(lr))) == 0
    (told,) = [line for line in capsys.readouterr().err.splitlines() if "no group has left" in line]
    assert report(tmp_path)["flipped_groups"] == 0
    nearest = float(told.partition("still ")[2].split()[0])
    assert told.startswith("maskpro: warning: ") and f"with a gap of {gap:g}; take more --steps" in told
    logits = torch.cat([own.view(-1, 4) for own in load_logits(tmp_path / "logits.safetensors")[0].values()])
    kept, dropped = logits.topk(3).values[:, 1:].unbind(1)
    assert 0 < nearest <= gap and nearest == pytest.approx((kept - dropped).min().item(), rel=5e-3)


def test_learn_prints_the_table(inputs, tmp_path, capsys):
    assert main.main(learn(inputs, tmp_path, "--pattern", "1:4", "--init", "magnitude", "--flip-rate", "0.05")) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[0].split() == "method test perplexity on the other text seconds from dense".split()
    assert [line.split()[0] for line in lines[1:5]] == ["dense", "magnitude", "wanda", "reinforce"]
    assert "groups differ from the magnitude mask" in lines[5]
    assert lines[6].startswith("a step took ") and "forward " in lines[6]
    assert lines[7].startswith("perplexity over the dense model's: ") and "other text (pydoc)" in lines[7]
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (nonzeros(model, "model.layers.1.mlp.down_proj") == 1).all()
    assert report(tmp_path)["settings"]["flip_rate"] == 0.05


@pytest.mark.pictures
def test_learn_by_straight_through_from_reconstruction_masks(inputs, tmp_path, capsys):
    options = "--init reconstruction --estimator straight-through --steps 6 --eval-every 2 --lr 1".split()
    assert main.main(learn(inputs, tmp_path / "run", *options)) == 0
    rows = [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:6]]
    assert rows == ["dense", "magnitude", "wanda", "reconstruction", "straight-through"]
    written = report(tmp_path / "run")
    assert written["gap"] == 15 and written["settings"]["lr"] == 1
    assert [row["step"] for row in written["validation"]] == [0, 2, 4, 6]
    # batches of 4 windows of 16 tokens
    assert [row["tokens"] for row in written["validation"]] == [0, 128, 256, 384]
    assert all(step["residual"] is None and step["loss"] > 0 for step in written["steps"])
    assert not (tmp_path / "run" / "residual.png").exists()
    assert (tmp_path / "run" / "perplexity.png").read_bytes().startswith(b"\x89PNG")
    assert written["flipped_groups"] > 0


class Killed(BaseException):
    pass


def applied(told: str, output: Path) -> list[str]:
    """The command that a run tells, by which its better mask is had."""
    command = told.partition("this command makes a checkpoint of the better mask: maskpro ")[2].splitlines()[0]
    return command.replace("OUT", str(output)).split()


def looked_at(monkeypatch, *validation: float) -> None:
    """These are the perplexities of the validation text, step by step; those of both test texts are others."""
    values = iter([10.0] * 6 + [*validation] + [9.0] * 2)
    monkeypatch.setattr(perplexities, "perplexity", lambda *args, **options: next(values))


def test_a_run_that_ends_higher_tells_how_to_have_the_best_mask(inputs, tmp_path, capsys, monkeypatch):
    options = ["--eval-every", "1", "--flip-rate", "0.3", "--lr", "500"]
    looked_at(monkeypatch, 10.0, 9.0, 8.0, 8.5, 8.1)
    assert main.main(learn(inputs, tmp_path / "run", "--steps", "4", *options)) == 0
    told = capsys.readouterr().err
    assert "warning: the validation perplexity was lowest at step 2, 8.00, and is 8.10 at the end; fewer" in told
    better = {"step": 2, "perplexity": 8.0, "last": 8.1, "file": f"progress/{BEST_MASK}"}
    assert report(tmp_path / "run")["better_mask"] == better
    page = (tmp_path / "run" / "report.html").read_text()
    assert "was lowest at step 2, 8.00, and is 8.10 at the end" in page and f"<code>progress/{BEST_MASK}</code>" in page
    monkeypatch.undo()
    assert main.main(applied(told, tmp_path / "best")) == 0
    assert main.main(learn(inputs, tmp_path / "two", "--steps", "2", *options)) == 0
    best, two, last = (
        dict(AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict()) for name in ("best", "two", "run")
    )
    assert_same_bits(best, two)
    assert any(not torch.equal(last[name], weight) for name, weight in best.items())


@pytest.mark.parametrize(("last", "kept"), [(8.07, False), (8.09, True)])
def test_a_run_that_ends_within_one_percent_of_its_lowest_keeps_no_other_mask(
    inputs, tmp_path, capsys, monkeypatch, last, kept
):
    looked_at(monkeypatch, 10.0, 8.0, last)
    assert main.main(learn(inputs, tmp_path / "run", "--steps", "2", "--eval-every", "1")) == 0
    assert ("was lowest" in capsys.readouterr().err) == kept
    assert (report(tmp_path / "run")["better_mask"] is not None) == kept
    assert ("was lowest" in (tmp_path / "run" / "report.html").read_text()) == kept
    assert (tmp_path / "run" / "progress" / BEST_MASK).exists() == kept


def test_a_mask_over_weights_that_learn_is_not_offered(inputs, tmp_path, capsys, monkeypatch):
    looked_at(monkeypatch, 10.0, 8.0, 9.0)
    options = "--steps 2 --eval-every 1 --estimator straight-through --init wanda --train-weights 1e-4".split()
    assert main.main(learn(inputs, tmp_path / "run", *options)) == 0
    told = capsys.readouterr().err
    assert "the validation perplexity was lowest at step 1, 8.00, and is 9.00 at the end" in told
    assert told.rstrip().endswith("the better mask was not kept")
    assert report(tmp_path / "run")["better_mask"]["file"] is None
    assert "holds the better mask" not in (tmp_path / "run" / "report.html").read_text()
    assert not (tmp_path / "run" / "progress" / BEST_MASK).exists()


@pytest.mark.parametrize("estimator", ["reinforce", "straight-through"])
def test_the_best_mask_is_there_behind_a_kill_between_it_and_its_perplexity(
    inputs, tmp_path, capsys, monkeypatch, estimator
):
    looked_at(monkeypatch, 10.0, 8.0, 8.0, 9.0)
    add, kills = ValidationPerplexities.add, iter([True])

    def killed(self, step, *args):
        if step == 1 and next(kills, False):
            raise Killed
        add(self, step, *args)

    monkeypatch.setattr(ValidationPerplexities, "add", killed)
    options = ["--steps", "2", "--eval-every", "1", "--init", "magnitude", "--estimator", estimator]
    with pytest.raises(Killed):
        main.main(learn(inputs, tmp_path / "run", *options))
    assert (tmp_path / "run" / "progress" / BEST_MASK).exists()
    assert main.main(["learn", "--resume", str(tmp_path / "run")]) == 0
    told = capsys.readouterr().err
    assert "lowest at step 1, 8.00, and is 9.00 at the end" in told
    assert main.main(applied(told, tmp_path / "best")) == 0


def test_a_best_mask_of_another_evaluation_or_a_damaged_one_is_not_offered(inputs, tmp_path, capsys, monkeypatch):
    looked_at(monkeypatch, 10.0, 8.0, 9.0)
    assert main.main(learn(inputs, tmp_path / "run", "--steps", "2", "--eval-every", "1")) == 0
    progress, args = tmp_path / "run" / "progress", Namespace(init="wanda")
    run = json.loads((tmp_path / "run" / "settings.json").read_text())["run"]
    assert mask_of_step(args, progress, 1, 8.0, run) == progress / BEST_MASK
    for other in ((2, 8.0, run), (1, 8.5, run), (1, 8.0, "another")):
        assert mask_of_step(args, progress, *other) is None
    (progress / BEST_MASK).write_bytes(b"half of one")
    assert mask_of_step(args, progress, 1, 8.0, run) is None


def test_what_options_leave_out_is_told_before_anything_takes_long(inputs, tmp_path, capsys, monkeypatch):
    def stop(*args):
        raise Killed

    monkeypatch.setattr(learn_module, "read_inputs", stop)
    given = [*learn(inputs, tmp_path / "run", "--estimator", "straight-through", "--steps", "2")]
    given[given.index("--data") : given.index("--other-data") + 2] = ["--data", "pydoc,stdlib"]
    pytest.raises(Killed, main.main, given)
    far, other = capsys.readouterr().err.splitlines()
    assert far == (
        "maskpro: warning: no mask will change: kept and dropped logits begin 15 apart, and all steps together bring "
        "them at most 8 nearer; give more --steps, a smaller --gap or a greater --max-update"
    )
    assert other == "no text of another kind will be looked at: name one by --other-data"


def test_steps_that_reach_no_mask_are_told_once(inputs, tmp_path, capsys):
    options = "--estimator straight-through --steps 1 --eval-every 1 --init magnitude".split()
    assert main.main(learn(inputs, tmp_path / "run", *options)) == 0
    assert capsys.readouterr().err.count("no mask will change") == 1


def test_learning_stops_where_the_validation_perplexity_rises(inputs, tmp_path, capsys, monkeypatch):
    looked_at(monkeypatch, 10.0, 12.0, 10.5, 11.5, 11.2)
    assert main.main(learn(inputs, tmp_path / "run", "--steps", "9", "--eval-every", "1")) == 0
    told = capsys.readouterr().err
    assert "stopped after 4 steps: the validation perplexity was NaN, or over 10% above" in told
    written = report(tmp_path / "run")
    assert "worse than the initial one: its validation perplexity is 11.20, that of the initial one 10.00; " in told
    assert main.main(applied(told, tmp_path / "initial")) == 0
    wanda = tmp_path / "one"
    monkeypatch.undo()
    assert main.main(learn(inputs, wanda, "--steps", "1", "--gap", "26")) == 0
    models = [AutoModelForCausalLM.from_pretrained(path) for path in (tmp_path / "initial", wanda)]
    assert_same_bits(*(dict(model.state_dict()) for model in models))
    assert [row["perplexity"] for row in written["validation"]] == [10.0, 12.0, 10.5, 11.5, 11.2]
    assert len(written["steps"]) == 4


def test_learning_stops_where_the_validation_perplexity_is_no_number(inputs, tmp_path, capsys, monkeypatch):
    looked_at(monkeypatch, 10.0, float("nan"), 10.5, float("nan"), float("nan"))
    assert main.main(learn(inputs, tmp_path / "run", "--steps", "9", "--eval-every", "1")) == 0
    assert "stopped after 4 steps: the validation perplexity was NaN, or over 10% above" in capsys.readouterr().err


@pytest.mark.parametrize("found", [float("nan"), float("inf")])
def test_an_initial_mask_without_a_validation_perplexity_is_refused(inputs, tmp_path, capsys, monkeypatch, found):
    looked_at(monkeypatch, found)
    assert main.main(learn(inputs, tmp_path / "deep" / "run")) == 2
    told = f"validation perplexity at step 0: expected a finite number, got {found}; take another --dtype"
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"maskpro: error: {told}")
    assert contents(tmp_path) == {}


def test_another_text_has_its_own_column(inputs, run, tmp_path, capsys):
    """It neither moves a mask nor is the text that learning stops by; compare shows it where it is the same."""
    other = tmp_path / "other.txt"
    other.write_text(tiny_text(seed=1), encoding="utf-8")
    assert main.main(learn(inputs, tmp_path / "run", "--other-data", str(other))) == 0
    table = [line.split() for line in capsys.readouterr().out.splitlines()[:5]]
    assert table[0] == "method test perplexity on the other text seconds from dense".split()
    plain, both = report(run), report(tmp_path / "run")
    assert plain["settings"]["other_data"] == "pydoc"
    assert both["settings"]["other_data"] == str(other) and both["validation"] == plain["validation"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    test = windows(load_text(str(other))["test"], AutoTokenizer.from_pretrained(tmp_path / "run"), 24)[:5]
    for row, same, printed in zip(both["table"], plain["table"], table[1:], strict=True):
        assert row["perplexity"] == same["perplexity"] and row["other_perplexity"] != same["other_perplexity"]
        assert printed[1:3] == [f"{row['perplexity']:.2f}", f"{row['other_perplexity']:.2f}"]
    assert both["table"][-1]["other_perplexity"] == pytest.approx(perplexity(model, test), rel=1e-6)
    copy, changed = tmp_path / "copy", tmp_path / "changed"
    shutil.copytree(tmp_path / "run", copy)
    shutil.copytree(tmp_path / "run", changed)
    both["table"][0]["other_perplexity"] += 1
    edit(changed / "report.json", table=both["table"])
    for another, shown in (copy, True), (run, False), (changed, False):
        assert main.main(["compare", str(tmp_path / "run"), str(another)]) == 0
        printed = capsys.readouterr().out
        assert ("on the other text" in printed) == shown and len(printed.splitlines()) == 6, printed


def test_seconds_count_from_the_dense_model(run):
    table = {row["method"]: row["seconds"] for row in report(run)["table"]}
    assert table["reinforce"] > table["wanda"] > 0


@pytest.mark.slow
def test_the_same_seed_gives_the_same_logits(inputs, run, tmp_path):
    assert main.main(learn(inputs, tmp_path / "again")) == 0
    assert main.main(learn(inputs, tmp_path / "other", "--seed", "1")) == 0
    first, again, other = (
        load_logits(folder / "logits.safetensors")[0] for folder in (run, tmp_path / "again", tmp_path / "other")
    )
    assert_same_bits(again, first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_all_that_a_run_leaves_is_on_disk_before_its_report(inputs, tmp_path, monkeypatch):
    sync, replace, done = os.fsync, os.replace, []

    def synced(descriptor):
        done.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        sync(descriptor)

    def replaced(source, target):
        replace(source, target)
        done.append(("replaced", Path(target)))

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    output = tmp_path / "deep" / "run"
    assert main.main(learn(inputs, output)) == 0
    before = done[: done.index(("replaced", output / "report.json"))]
    files = {path for path in output.iterdir() if path.is_file()} - {output / "report.json"}
    assert files <= set(before)
    # their names too, and those of the folders
    assert max(map(before.index, files)) < len(before) - 1 - before[::-1].index(output)
    assert {tmp_path, tmp_path / "deep"} <= set(before)
