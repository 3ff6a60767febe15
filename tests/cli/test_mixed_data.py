"""`maskpro learn` on several sources: what a batch holds, samples of the dense model, and a text of another kind."""

from __future__ import annotations

import json
from argparse import Namespace

import pytest
import torch
from filelock import FileLock
from helpers.bits import assert_same_bits
from helpers.cases import cases, slow
from helpers.command import broken_off, contents, learn, refuses, report
from helpers.tiny_llama import tiny_text
from safetensors.torch import load_file, save_file

from maskpro_kernels.checkpoints.logits import load_logits
from maskpro_kernels.cli import learning_run, main, run_samples, unbegun
from maskpro_kernels.cli.learning_run import LearningRun
from maskpro_kernels.cli.perplexities import ValidationPerplexities
from maskpro_kernels.cli.run_settings import stored_settings
from maskpro_kernels.learn.run_folder import RunFolder
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


def kill_at(monkeypatch, count):
    """The process ends in the batch of samples behind so many."""
    draw, drawn = run_samples.sample_windows, []

    def killed(*args, keep, **options):
        def kept(found):
            keep(found)
            drawn.append(found)
            if len(drawn) == count:
                raise Killed

        return draw(*args, keep=kept, **options)

    monkeypatch.setattr(run_samples, "sample_windows", killed)


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


@pytest.mark.parametrize("count", [1, slow(3)])
def test_a_run_that_is_killed_while_it_draws_goes_on_by_the_same_command(inputs, tmp_path, monkeypatch, count):
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert main.main(mixed(inputs, whole, "--init-batches", "6")) == 0
    with monkeypatch.context() as patched:
        kill_at(patched, count)
        with pytest.raises(Killed):
            main.main(mixed(inputs, run, "--init-batches", "6"))
    assert len(samples_of(run)) == 2 * count
    # as a process leaves it that is killed while it writes
    half = run / f"{SAMPLES}.{15:016x}.tmp"
    half.write_bytes(b"half")
    assert main.main(mixed(inputs, run, "--init-batches", "6")) == 0
    assert_same_bits(samples_of(run), samples_of(whole))
    assert report(run)["logits"] == report(whole)["logits"]
    assert not half.exists()


KL = "--refit weights --loss kl".split()
BEFORE_THE_FIRST_STEP = [
    (RunFolder, "start_journal"),
    (learning_run, "save_start_weights"),
    (ValidationPerplexities, "add"),
    (learning_run, "write_whole"),
]


@pytest.mark.parametrize(("place", "name"), cases(BEFORE_THE_FIRST_STEP, slow=lambda place, name: name != "add"))
def test_a_run_that_is_killed_before_its_first_step_goes_on_by_the_same_command(
    inputs, tmp_path, monkeypatch, place, name
):
    run, did = tmp_path / "run", getattr(place, name)

    def killed(*args):
        if name != "write_whole":
            did(*args)
        raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(place, name, killed)
        # a process that is killed takes nothing back
        patched.setattr(LearningRun, "_take_back", lambda *_: None)
        main.main(mixed(inputs, run, *KL, "--init-batches", "2"))
    drawn = samples_of(run)
    for half in (
        "settings.json",
        "progress/validation.jsonl",
        f"progress/snapshot-{0:010}-{0:032x}.safetensors",
    ):
        (run / f"{half}.{15:016x}.tmp").write_bytes(b"half")
    monkeypatch.setattr(run_samples, "sample_windows", None)
    # what was of the other options is gone
    assert main.main(mixed(inputs, run, "--init-batches", "2")) == 0
    assert_same_bits(samples_of(run), drawn)
    assert {path.name for path in (run / "progress").iterdir() if not path.name.startswith("snapshot-0000000000-")} == {
        ".lock", "initial-mask.safetensors", "journal", "metrics.jsonl", "samples.safetensors", "validation.jsonl"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("place", "name"), cases(BEFORE_THE_FIRST_STEP, slow=lambda place, name: name != "write_whole")
)
@pytest.mark.parametrize("error", [ValueError("cache: damaged"), slow(Killed())])
def test_an_error_before_the_first_step_leaves_the_samples_alone(inputs, tmp_path, monkeypatch, place, name, error):
    def failing(*args):
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(place, name, failing)
        try:
            assert main.main(mixed(inputs, tmp_path / "run", *KL, "--init-batches", "2")) == 2
        except Killed:
            assert isinstance(error, Killed)
    left = {path.relative_to(tmp_path / "run").as_posix() for path in contents(tmp_path / "run")}
    # what the dense model has said as well
    assert {name for name in left if not name.startswith("progress/teacher/")} == {
        "progress", SAMPLES, "progress/teacher"
    }  # fmt: skip
    assert main.main(mixed(inputs, tmp_path / "run", *KL, "--init-batches", "2")) == 0


def test_what_has_learned_makes_no_room(inputs, tmp_path, monkeypatch, capsys):
    """Though its settings are lost; nor does what a process holds that begins at the same time."""
    run = tmp_path / "run"
    with pytest.raises(Killed):
        broken_off(inputs, run, monkeypatch, 2, ["--init-batches", "2"], kill)
    for lost in ("settings.json", "progress/metrics.jsonl"):
        (run / lost).unlink()
        refuses(capsys, tmp_path, learn(inputs, run), "output: expected a new or empty folder")
    before = contents(run)
    unbegun.clear_unbegun(run)
    assert contents(run) == before
    journal = run / "progress" / "journal"
    journal.write_bytes(journal.read_bytes()[:20])
    refuses(capsys, tmp_path, learn(inputs, run), "output: expected a new or empty folder")
    journal.unlink()
    with FileLock(run / "progress" / ".lock"):
        before = contents(run)
        unbegun.clear_unbegun(run)
        assert contents(run) == before


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


def test_samples_that_are_damaged_or_of_another_run_are_refused(inputs, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    with monkeypatch.context() as patched, pytest.raises(Killed):
        kill_at(patched, 1)
        main.main(mixed(inputs, run))
    capsys.readouterr()
    refuses(capsys, tmp_path, mixed(inputs, run, "--seed", "1"), "samples: expected those of this run in", "other seed")
    file, metadata = run / SAMPLES, run_samples.json.dumps({})
    sound = file.read_bytes()
    for damage, message in (
        (lambda: file.write_bytes(sound[:-1]), "samples: expected whole ones in"),
        (lambda: file.write_bytes(sound[:-1] + b"\1"), "samples: expected those of their digest in"),
        (lambda: save_file({"tokens": torch.zeros(2, 16)}, file, {"of": metadata}), "samples: expected whole ones in"),
    ):
        damage()
        refuses(capsys, tmp_path, mixed(inputs, run), message, "or remove the file to draw them anew")
    file.unlink()
    with FileLock(run / "progress" / ".lock"):
        assert main.main(mixed(inputs, run)) == 2
        assert "output: expected a folder that no other process is at" in capsys.readouterr().err
    (run / "of mine").touch()
    refuses(capsys, tmp_path, mixed(inputs, run), "output: expected a new or empty folder")


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
    told = "data: expected --data, --protocol or --tasks, since only a run has a text of"
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
def test_runs_that_learn_from_more_are_compared_on_the_same_text(inputs, run, tmp_path, capsys):
    assert main.main(mixed(inputs, tmp_path / "mixed", "--init-batches", "1")) == 0
    capsys.readouterr()
    assert main.main(["compare", str(run), str(tmp_path / "mixed")]) == 0
    assert f"reinforce: {tmp_path / 'mixed'}" in capsys.readouterr().out
    both = f"{inputs / 'text.txt'},pydoc,self"
    assert main.main(learn(inputs, tmp_path / "both", "--data", both, "--init-batches", "1")) == 0
    capsys.readouterr()
    refuses(capsys, tmp_path, ["compare", str(run), str(tmp_path / "both")], "expected the same data in all")


@pytest.mark.slow
def test_runs_on_samples_alone_are_compared_on_the_same_samples(inputs, tmp_path, capsys):
    for name, options in (("one", []), ("longer", ["--steps", "4"]), ("other", ["--seed", "1"])):
        options = ["--data", "self", "--init-batches", "1", *options]
        assert main.main(learn(inputs, tmp_path / name, *options)) == 0
    capsys.readouterr()
    assert main.main(["compare", str(tmp_path / "one"), str(tmp_path / "longer")]) == 0
    compared = ["compare", str(tmp_path / "one"), str(tmp_path / "other")]
    refuses(capsys, tmp_path, compared, "run: expected the same test windows in all, got others in", "--seed")


@pytest.mark.slow
def test_a_text_that_is_named_from_its_folder_is_told_by_its_path(inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(inputs)
    assert main.main(learn(inputs, tmp_path / "run", "--data", "text.txt", "--other-data", "text.txt")) == 0
    settings, path = report(tmp_path / "run")["settings"], str(inputs / "text.txt")
    assert (settings["data"], settings["other_data"]) == (path, path)
    assert settings["output"] == str(tmp_path / "run")


def test_who_ends_the_drawing_is_told_how_it_goes_on(inputs, tmp_path, monkeypatch, capsys):
    def interrupted(*args, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr(run_samples, "sample_windows", interrupted)
    assert main.main(mixed(inputs, tmp_path / "run")) == 130
    assert "the same command goes on with the samples that are kept" in capsys.readouterr().err


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


def test_report_and_page_say_how_far_the_texts_part(inputs, run):
    written = report(run)
    found = parting(written["table"])
    assert written["parting"] == found and json.loads(json.dumps(found)) == found
    page = (run / "report.html").read_text(encoding="utf-8")
    assert told(found, "pydoc")[1:].replace("'", "&#x27;") in page


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
