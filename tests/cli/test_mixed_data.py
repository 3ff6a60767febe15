"""`maskpro learn` on several sources: what a batch holds, samples of the dense model, and a text of another kind."""

from __future__ import annotations

import json
from argparse import Namespace

import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.cases import slow
from helpers.command import broken_off, learn, refuses, report
from helpers.tiny_llama import tiny_text
from safetensors.torch import load_file

from maskpro_kernels.checkpoints.logits import load_logits
from maskpro_kernels.cli import main, run_samples
from maskpro_kernels.cli.run_settings import stored_settings
from maskpro_kernels.learn.trainer import MaskTrainer
from maskpro_kernels.report.parting import parting, told

pytestmark = pytest.mark.usefixtures("eager_reference")

SAMPLES = "progress/samples.safetensors"


class Killed(BaseException):
    pass


def kill():
    raise Killed


@pytest.fixture(autouse=True)
def drawn_in_small_batches(monkeypatch):
    monkeypatch.setattr(run_samples, "TOGETHER", 2)


@pytest.fixture
def batches(monkeypatch):
    """The batches of each trainer that is made."""
    seen, make = [], MaskTrainer.__init__

    def made(trainer, model, loss_fn, batches, *args, **options):
        seen.append(list(batches))
        make(trainer, model, loss_fn, batches, *args, **options)

    monkeypatch.setattr(MaskTrainer, "__init__", made)
    return seen


def mixed(inputs, output, *more):
    return learn(inputs, output, "--data", f"{inputs / 'text.txt'}:3,self:1", *more)


def samples_of(run):
    return load_file(run / SAMPLES)["tokens"]


def test_batches_hold_text_and_samples_by_their_shares(inputs, tmp_path, batches, capsys):
    assert main.main(mixed(inputs, tmp_path / "run", "--steps", "5", "--estimator", "straight-through")) == 0
    # 2 batches to learn from and 5 steps: the initial mask sees as many as it has batches
    own = samples_of(tmp_path / "run")
    (seen,) = batches
    assert len(seen) == 2 and own.shape == (16, 16)
    known = {tuple(row) for row in own.tolist()}
    assert all(sum(tuple(row) in known for row in batch.tolist()) == 1 for batch in seen)
    assert report(tmp_path / "run")["settings"]["samples"] == 2048
    assert "drawing 16 windows of 16 tokens from the dense model" in capsys.readouterr().err


@pytest.mark.slow
def test_at_most_so_many_windows_are_drawn(inputs, tmp_path, batches):
    options = ["--steps", "9", "--samples", "3", "--init-batches", "1", "--calibration-batches", "99"]
    assert main.main(mixed(inputs, tmp_path / "run", *options)) == 0
    known = [tuple(row) for row in samples_of(tmp_path / "run").tolist()]
    assert len(known) == 3 and len(batches[0]) == 9
    taken = [known.index(tuple(row)) for batch in batches[0] for row in batch.tolist() if tuple(row) in known]
    assert [sorted(taken[at : at + 3]) for at in (0, 3, 6)] == [[0, 1, 2]] * 3


@pytest.mark.parametrize(("share", "drawn", "taken"), [(99, 1, 0), slow(2, 2, 1)])
def test_small_shares_of_a_short_run(inputs, tmp_path, batches, capsys, share, drawn, taken):
    options = ["--data", f"{inputs / 'text.txt'}:{share},self:1", "--steps", "1", "--init-batches", "1"]
    assert main.main(learn(inputs, tmp_path / "run", *options)) == 0
    own = samples_of(tmp_path / "run")
    assert len(own) == drawn
    known = {tuple(row) for row in own.tolist()}
    assert sum(tuple(row) in known for batch in batches[0] for row in batch.tolist()) == taken
    told = "no window of 'self' is learned from: its share of so few batches is less than one"
    assert (told in capsys.readouterr().err) == (taken == 0)


@pytest.mark.slow
def test_samples_are_of_the_dense_model_whatever_mask_is_learned(inputs, tmp_path):
    options = ["--init-batches", "2"]
    assert main.main(mixed(inputs, tmp_path / "one", *options)) == 0
    assert main.main(mixed(inputs, tmp_path / "two", *options, "--pattern", "1:4", "--init", "magnitude")) == 0
    assert main.main(mixed(inputs, tmp_path / "other", *options, "--seed", "1")) == 0
    one, two, other = (samples_of(tmp_path / name) for name in ("one", "two", "other"))
    assert_same_bits(one, two)
    assert not torch.equal(one, other)


def test_a_run_goes_on_with_the_samples_in_its_folder(inputs, tmp_path, capsys, monkeypatch):
    run, step = tmp_path / "run", MaskTrainer.step

    def killed(trainer):
        if trainer.steps_done == 1:
            raise Killed
        return step(trainer)

    assert main.main(mixed(inputs, tmp_path / "whole")) == 0
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(MaskTrainer, "step", killed)
        main.main(mixed(inputs, run))
    capsys.readouterr()
    with monkeypatch.context() as patched:
        patched.setattr(run_samples, "sample_windows", None)
        assert main.main(["learn", "--resume", str(run)]) == 0
    assert "drawing" not in capsys.readouterr().err
    ours, theirs = (load_logits(folder / "logits.safetensors")[0] for folder in (run, tmp_path / "whole"))
    assert_same_bits(ours, theirs)


def test_a_model_whose_logits_are_not_finite_writes_nothing(inputs, tmp_path, capsys, monkeypatch):
    from helpers.tiny_llama import tiny_model, tiny_tokenizer

    model = tiny_model()
    model.model.norm.weight.data[3] = torch.nan
    monkeypatch.setattr("maskpro_kernels.hf.load_model", lambda name, dtype, device_map, **_: (model, tiny_tokenizer()))
    assert main.main(mixed(inputs, tmp_path / "run")) == 2
    assert "model: expected finite logits" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run" / SAMPLES).exists()


def test_without_a_text_some_samples_are_kept_aside(inputs, tmp_path, batches, capsys):
    run = tmp_path / "run"
    assert main.main(learn(inputs, run, "--data", "self", "--init-batches", "2")) == 0
    own = samples_of(run)
    # 5 windows to test, 5 to decide when to stop, and 2 batches of 4
    assert own.shape == (18, 16) and report(run)["eval_tokens"] == 5 * 16
    learned = {tuple(row) for batch in batches[0] for row in batch.tolist()}
    assert learned == {tuple(row) for row in own[10:].tolist()}
    refuses(capsys, tmp_path, ["eval", str(run), "--device", "cpu"], "data: expected a text, got 'self'")


def test_of_several_texts_each_is_evaluated_by_its_share(inputs, tmp_path, capsys):
    (tmp_path / "second.txt").write_text(tiny_text(seed=5), encoding="utf-8")
    both = f"{inputs / 'text.txt'}:1,{tmp_path / 'second.txt'}:4"
    for name, data in (("both", both), ("first", str(inputs / "text.txt")), ("second", str(tmp_path / "second.txt"))):
        options = ["--data", data, "--eval-windows", {"both": "5", "first": "1", "second": "4"}[name]]
        assert main.main(["eval", str(inputs / "model"), *options, "--eval-length", "24", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = [float(line.split()[2]) for line in lines if line.startswith("test perplexity")]
    assert found[0] == pytest.approx(found[1] ** 0.2 * found[2] ** 0.8, abs=0.02)


def test_a_text_that_has_fewer_windows_than_its_share_is_told(inputs, tmp_path, capsys):
    few = "\n\n".join(tiny_text(seed=5).split("\n\n")[:12])
    (tmp_path / "few.txt").write_text(few, encoding="utf-8")
    data = f"{inputs / 'text.txt'}:1,{tmp_path / 'few.txt'}:99"
    options = ["eval", str(inputs / "model"), "--data", data, "--eval-length", "24", "--device", "cpu"]
    assert main.main([*options, "--eval-windows", "24"]) == 0
    captured = capsys.readouterr()
    (line,) = [line for line in captured.err.splitlines() if "windows" in line]
    assert line.startswith(f"the test text of '{tmp_path / 'few.txt'}' has ")
    assert line.endswith(" windows of 24 tokens, fewer than the 23 of its share")
    # and the other one has its window, though its share is less
    assert f"over {int(line.split(' has ')[1].split()[0]) + 1} windows of 24 tokens" in captured.out
    refuses(capsys, tmp_path, [*options, "--eval-windows", "1"], "eval_windows: expected at least 2, one for each text")
    refuses(
        capsys, tmp_path, learn(inputs, tmp_path / "run", "--data", data, "--eval-windows", "1"),
        "eval_windows: expected at least 2, one for each text",
    )  # fmt: skip


def test_a_run_is_evaluated_on_its_own_text_from_any_folder(inputs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(inputs)
    options = ["--data", "text.txt:1,self:1", "--init-batches", "1"]
    assert main.main(learn(inputs, tmp_path / "run", *options)) == 0
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    sizes = "--eval-windows 5 --eval-length 24 --device cpu".split()
    assert main.main(["eval", str(tmp_path / "run"), *sizes]) == 0
    learned = report(tmp_path / "run")["table"][-1]["perplexity"]
    assert capsys.readouterr().out.splitlines()[0] == f"test perplexity {learned:.2f} over 5 windows of 24 tokens"
    told = "data: expected --data or --protocol, since only a run has a text of"
    refuses(capsys, tmp_path, ["eval", str(inputs / "model")], told)
    refuses(capsys, tmp_path, ["eval", str(tmp_path / "lost")], "there is no such folder")
    (tmp_path / "run" / "settings.json").unlink()
    refuses(capsys, tmp_path, ["eval", str(tmp_path / "run")], "data: expected --data, or the settings of the run in")


def test_a_run_beside_files_that_are_called_like_its_sources_goes_on(inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("self", "pydoc", "stdlib", "smollm2-135m"):
        (tmp_path / name).touch()
    options = ["--data", f"{inputs / 'text.txt'}:1,self:1", "--init-batches", "1"]
    with pytest.raises(Killed):
        broken_off(inputs, tmp_path / "run", monkeypatch, 1, options, kill)
    settings = json.loads((tmp_path / "run" / "settings.json").read_text())["settings"]
    assert (settings["data"], settings["other_data"]) == (f"{inputs / 'text.txt'}:1/2,self:1/2", "pydoc")
    assert main.main(["learn", "--resume", str(tmp_path / "run")]) == 0
    assert main.main(["eval", str(tmp_path / "run"), "--eval-windows", "2", "--eval-length", "24"]) == 0
    assert stored_settings(Namespace(model="smollm2-135m", data="self", init="wanda"))["model"] == "smollm2-135m"


@pytest.mark.slow
def test_a_text_that_is_named_from_its_folder_is_told_by_its_path(inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(inputs)
    assert main.main(learn(inputs, tmp_path / "run", "--data", "text.txt", "--other-data", "text.txt")) == 0
    settings, path = report(tmp_path / "run")["settings"], str(inputs / "text.txt")
    assert (settings["data"], settings["other_data"]) == (path, path)
    assert settings["output"] == str(tmp_path / "run")


def test_without_data_a_run_learns_from_half_its_own_samples(inputs, tmp_path, batches, capsys):
    arguments = learn(inputs, tmp_path / "run", "--init-batches", "1")
    at = arguments.index("--data")
    assert main.main(arguments[:at] + arguments[at + 4 :]) == 0
    settings = report(tmp_path / "run")["settings"]
    assert (settings["data"], settings["other_data"]) == ("stdlib:0.5,self:0.5", "pydoc")
    own = {tuple(row) for row in samples_of(tmp_path / "run").tolist()}
    assert [sum(tuple(row) in own for row in batch.tolist()) for batch in batches[0]] == [2, 2]
    assert "other text (pydoc)" in capsys.readouterr().out.splitlines()[-1]


def rows(*perplexities):
    return [{"perplexity": own, "other_perplexity": other} for own, other in perplexities]


def test_texts_part_where_the_mask_is_farther_from_dense_on_the_other():
    assert parting(rows((10, 20), (99, 99), (15, 37))) == {"own": 1.5, "other": 1.85, "parted": False}
    found = parting(rows((10, 20), (99, 99), (15, 38)))
    assert found == {"own": 1.5, "other": 1.9, "parted": True}
    assert told(found, "stdlib").startswith(
        "perplexity over the dense model's: 1.50 on the run's own text, 1.90 on the other text (stdlib). The mask holds"
    )
    assert "holds less" not in told(found | {"parted": False}, "stdlib")
    assert parting(rows((10, 20), (10, float("inf"))))["parted"]
    assert parting([{"perplexity": 1.0}, *rows((2, 2))]) is None


def test_windows_that_come_round_often_are_told_where_gradients_are_learned_from(inputs, tmp_path, capsys):
    few = ["--samples", "4", "--steps", "12", "--calibration-batches", "12"]
    by_gradients = ["--estimator", "straight-through", "--init", "magnitude"]
    assert main.main(mixed(inputs, tmp_path / "often", *few, *by_gradients)) == 0
    # of each batch of 4 windows one is drawn; the text has enough for the others
    (told,) = (line for line in capsys.readouterr().err.splitlines() if "by heart" in line)
    assert told.startswith("'self': 4 windows of 16 tokens are learned from about 3 times each, and a mask may")
    assert told.endswith("give a higher --samples, or take fewer --steps")
    assert main.main(mixed(inputs, tmp_path / "rarely", *few, "--steps", "5", *by_gradients)) == 0
    assert main.main(mixed(inputs, tmp_path / "by losses", *few, "--estimator", "reinforce")) == 0
    assert "by heart" not in capsys.readouterr().err


def test_batches_that_come_round_often_are_told_too(inputs, tmp_path, capsys):
    options = "--estimator straight-through --init magnitude --steps 6 --calibration-batches 2".split()
    assert main.main(learn(inputs, tmp_path / "run", *options)) == 0
    (told,) = (line for line in capsys.readouterr().err.splitlines() if "by heart" in line)
    assert "text.txt': 8 windows of 16 tokens are learned from about 3 times each" in told
    assert "give a higher --calibration-batches, or" in told
    # all of a text but what does not fill a batch
    options[-2:] = ["--steps", "60", "--calibration-batches", "99"]
    assert main.main(learn(inputs, tmp_path / "whole", *options)) == 0
    (told,) = (line for line in capsys.readouterr().err.splitlines() if "by heart" in line)
    windows = int(told.partition("text.txt': ")[2].split()[0])
    assert windows % 4 == 0 and f"about {240 / windows:.0f} times each" in told and "give more text, or" in told
