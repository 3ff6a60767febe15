"""`maskpro learn`: what it writes and prints, from which texts and masks it learns, and when it stops."""

from __future__ import annotations

import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.command import interrupted, learn, nonzeros, refuses, report
from helpers.tiny_llama import tiny_model, tiny_text, tiny_tokenizer
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
)

import maskpro_kernels as mk
from maskpro_kernels.checkpoints.logits import load_logits
from maskpro_kernels.cli import inputs as shared
from maskpro_kernels.cli import main
from maskpro_kernels.cli.config import Learn
from maskpro_kernels.cli.learn import command, data, evaluation, result, start, steps
from maskpro_kernels.cli.learn.options import complete
from maskpro_kernels.hf import save_model
from maskpro_kernels.learn.trainer import MaskTrainer
from maskpro_kernels.prune.initial_masks import initial_codes
from maskpro_kernels.text.batches import windows
from maskpro_kernels.text.perplexity import perplexity
from maskpro_kernels.text.sources import load_text

pytestmark = pytest.mark.usefixtures("eager_reference")

STRAIGHT = "--estimator straight-through --lr 1 --gap 2".split()


def logits_of(folder):
    return load_logits(folder / "learned/logits.safetensors").logits


def methods(folder):
    return [row["method"] for row in report(folder)["table"]]


def test_the_checkpoint_has_the_perplexity_that_is_reported(inputs, run):
    written = report(run)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(run), AutoTokenizer.from_pretrained(run)
    assert len(written["converted"]) == 14 and "lm_head" not in written["converted"]
    dense = tiny_model()
    for name in written["converted"]:
        assert (nonzeros(model, name) == 2).all()
        weight, kept = dense.get_submodule(name).weight, model.get_submodule(name).weight
        assert_same_bits(kept, torch.where(kept != 0, weight, 0.0))
    # as long as the context of the model
    test = windows(load_text(str(inputs / "text.txt"))["test"], tokenizer, 64)[:5]
    table = {row["method"]: row for row in written["table"]}
    assert list(table) == ["dense", "magnitude", "wanda", "reinforce"]
    assert table["reinforce"]["perplexity"] == pytest.approx(perplexity(model, test), rel=1e-6)
    assert table["dense"]["perplexity"] == pytest.approx(perplexity(dense, test), rel=1e-6)
    other = windows(load_text("pydoc")["test"], tokenizer, 64)[:5]
    assert table["dense"]["other_perplexity"] == pytest.approx(perplexity(dense, other), rel=1e-6)


@pytest.mark.pictures
def test_a_run_leaves_its_record_and_prints_its_table(inputs, tmp_path, capsys):
    run = tmp_path / "run"
    assert main.main(learn(inputs, run, *STRAIGHT, "--steps", "6", "--eval-every", "2", "--pattern", "1:4")) == 0
    captured, written = capsys.readouterr(), report(run)
    assert sorted(os.listdir(run)) == sorted(
        ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
        + ["learned", "report.json", "perplexity.png", "settings.json", "progress", "README.md"]
    )
    assert (run / "perplexity.png").read_bytes().startswith(b"\x89PNG")
    assert written["settings"]["seed"] == 0 and written["settings"]["gap"] == 2 and written["settings"]["lr"] == 1
    assert [row["step"] for row in written["validation"]] == [0, 2, 4, 6]
    # batches of 4 windows of 16 tokens
    assert [row["tokens"] for row in written["validation"]] == [0, 128, 256, 384]
    assert [row["step"] for row in written["steps"]] == list(range(6))
    assert logits_of(run).keys() == set(written["converted"])
    assert written["groups"] == sum(tensor.numel() for tensor in logits_of(run).values()) // 4
    assert written["flipped_groups"] > 0
    lines = captured.out.splitlines()
    assert lines[0].split() == "method test perplexity on the other text seconds from dense".split()
    assert [line.split()[0] for line in lines[1:5]] == ["dense", "magnitude", "wanda", "straight-through"]
    moved = f"{written['flipped_groups']:,} of {written['groups']:,} groups differ from the initial mask"
    assert lines[5] == f"{moved}; weights frozen; written to {run}"
    assert (nonzeros(AutoModelForCausalLM.from_pretrained(run), "model.layers.1.mlp.down_proj") == 1).all()
    reported = captured.err.splitlines()
    assert "left dense: lm_head (output head)" in reported
    assert [line.split(":")[0] for line in reported if line.startswith("step")] == [
        f"step {step} of 6" for step in range(7)
    ]
    assert sum("validation perplexity" in line for line in reported) == 4


@pytest.mark.parametrize("estimator", ["reinforce", "straight-through"])
def test_without_steps_the_result_is_the_initial_mask(estimator, inputs, tmp_path, capsys):
    run = tmp_path / "run"
    options = ["--estimator", estimator, "--init", "random", "--seed", "3", "--steps", "0"]
    assert main.main(learn(inputs, run, *options)) == 0
    assert "random: the mask of 4,608 groups; weights frozen; written to" in capsys.readouterr().out
    assert methods(run) == ["dense", "magnitude", "wanda", "random"] and not report(run)["steps"]
    layers = {name: tiny_model().get_submodule(name) for name in report(run)["converted"]}
    model = AutoModelForCausalLM.from_pretrained(run)
    for name, codes in initial_codes(layers, "2:4", "random", seed=3).items():
        mask = mk.expand_mask(codes, "2:4")
        assert_same_bits(model.get_submodule(name).weight, torch.where(mask, layers[name].weight, 0.0))


def test_without_steps_weights_may_be_refitted(inputs, tmp_path, capsys):
    run = tmp_path / "run"
    options = ["--estimator", "straight-through", "--refit", "weights", "--init", "magnitude", "--steps", "0"]
    assert main.main(learn(inputs, run, *options)) == 0
    assert "weights refitted" in capsys.readouterr().out
    layers = {name: tiny_model().get_submodule(name) for name in report(run)["converted"]}
    model = AutoModelForCausalLM.from_pretrained(run)
    for name, codes in initial_codes(layers, "2:4", "magnitude").items():
        weight = model.get_submodule(name).weight
        assert torch.equal(weight != 0, mk.expand_mask(codes, "2:4"))
        assert not torch.equal(weight[weight != 0], layers[name].weight[weight != 0])


def test_the_defaults_of_an_estimator_hold_where_nothing_is_given(inputs):
    options = Learn(model=str(inputs / "model"), output="out")
    found = complete(options)
    assert (found.init, found.gap, found.steps, found.lr, found.eval_every) == ("reconstruction", 15.0, 200, 0.3, 40)
    options.estimator, options.gap = "reinforce", 5.0
    found = complete(options)
    assert (found.init, found.gap, found.steps, found.calibration_batches) == ("wanda", 5.0, 1000, 16)


def looked_at(monkeypatch, *validation: float) -> None:
    """These are the perplexities of the validation text, step by step; those of both test texts are others."""
    values = iter([10.0] * 6 + [*validation] + [9.0] * 2)
    monkeypatch.setattr(evaluation, "perplexity", lambda *args, **options: next(values))


@pytest.mark.parametrize("rows", [(10.0, 12.0, 10.5, 11.5, 11.2), (10.0, float("nan"), 10.5, float("nan"), 12.0)])
def test_learning_stops_where_the_validation_perplexity_rises(inputs, tmp_path, capsys, monkeypatch, rows):
    looked_at(monkeypatch, *rows)
    assert main.main(learn(inputs, tmp_path / "run", "--steps", "9", "--eval-every", "1")) == 0
    reported = capsys.readouterr().err
    assert "stopped after 4 steps: the validation perplexity was NaN, or over 10% above" in reported
    assert "maskpro: warning: the validation perplexity was lowest at step 0, 10.00" in reported
    assert len(report(tmp_path / "run")["steps"]) == 4


@pytest.mark.parametrize(
    "options, used",
    [
        ([*STRAIGHT, "--dtype", "bfloat16"], "eager"),
        (STRAIGHT, "sdpa"),
        (["--dtype", "bfloat16"], "sdpa"),
        ([*STRAIGHT, "--dtype", "bfloat16", "--seq-len", "17"], "sdpa"),
    ],
    ids=["bfloat16", "float32", "no backward", "long"],
)
def test_attention_of_steps_on_a_cpu(options, used, inputs, tmp_path, monkeypatch):
    seen, step, perplexity = [], MaskTrainer.step, evaluation.perplexity

    def recorded(trainer):
        seen.append(trainer.model.config._attn_implementation)
        return step(trainer)

    def evaluated(model, *args, **how):
        # each evaluation, also between steps, uses the same attention
        assert model.config._attn_implementation == "sdpa"
        return perplexity(model, *args, **how)

    monkeypatch.setattr(steps, "SHORT", 16)
    monkeypatch.setattr(MaskTrainer, "step", recorded)
    monkeypatch.setattr(evaluation, "perplexity", evaluated)
    assert main.main(learn(inputs, tmp_path / "run", *options, "--steps", "3", "--eval-every", "1")) == 0
    assert seen == [used] * 3


def test_an_initial_mask_without_a_validation_perplexity_is_refused(inputs, tmp_path, capsys, monkeypatch):
    # undoing all would undo the route as well
    with monkeypatch.context() as patch:
        looked_at(patch, float("inf"))
        assert main.main(learn(inputs, tmp_path / "run")) == 2
    reported = "validation perplexity at step 0: expected a finite number, got inf; use another --dtype"
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"maskpro: error: {reported}")
    # the folder may be given again
    assert main.main(learn(inputs, tmp_path / "run")) == 0


def test_several_texts_and_samples_of_the_model_are_mixed(inputs, tmp_path, capsys, monkeypatch):
    (tmp_path / "two.txt").write_text(tiny_text(seed=1), encoding="utf-8")
    seen, step = [], MaskTrainer.__init__

    def noting(trainer, model, loss_fn, batches, estimator, **how):
        seen.append(torch.stack(list(batches)))
        step(trainer, model, loss_fn, batches, estimator, **how)

    monkeypatch.setattr(MaskTrainer, "__init__", noting)
    data = f"{inputs / 'text.txt'}:1,{tmp_path / 'two.txt'}:1,self:2"
    assert main.main(learn(inputs, tmp_path / "run", "--data", data)) == 0
    with safe_open(tmp_path / "run" / "progress" / "samples.safetensors", framework="pt") as file:
        drawn = file.get_tensor("tokens")
    tokens = [
        windows(load_text(str(path))["calibration"], tiny_tokenizer(), 16)
        for path in (inputs / "text.txt", tmp_path / "two.txt")
    ]
    rows = seen[0].flatten(0, 1)
    counts = [sum(bool((row == source).all(1).any()) for row in rows) for source in (*tokens, drawn)]
    assert counts == [2, 2, 4] and len(drawn) == 32
    # five windows, three of the first text by its turns
    assert "sampling 32 windows of 16 tokens" in capsys.readouterr().err


def test_samples_alone_are_evaluated_as_well(inputs, tmp_path):
    assert main.main(learn(inputs, tmp_path / "run", "--data", "self")) == 0
    written = report(tmp_path / "run")
    assert written["validation"][0]["perplexity"] > 1 and written["table"][0]["perplexity"] > 1


def test_a_dataset_is_read_only_as_far_as_needed(inputs, tmp_path, datasets_cache, monkeypatch):
    rows = "".join(f'{{"text": "{paragraph}"}}\n' for paragraph in tiny_text().split("\n\n"))
    (tmp_path / "rows.jsonl").write_text(rows, encoding="utf-8")
    asked, load = [], data.load_text
    monkeypatch.setattr(data, "load_text", lambda name, **how: (asked.append((name, how)), load(name, **how))[1])
    source = str(tmp_path / "rows.jsonl")
    assert main.main(learn(inputs, tmp_path / "run", "--data", source, "--documents", "40")) == 0
    assert asked[0] == (source, {"documents": 40})


def test_masks_by_name_and_by_path_are_begun_with(inputs, run, tmp_path, monkeypatch):
    """A mask file, a run and a packed checkpoint give the mask of the run."""
    assert main.main(["export", str(run), str(tmp_path / "mine.mask"), "--to", "mask"]) == 0
    assert main.main(["export", str(run), str(tmp_path / "packed"), "--to", "packed"]) == 0
    perplexities = {row["method"]: row["perplexity"] for row in report(run)["table"]}
    monkeypatch.chdir(tmp_path)
    for number, source in enumerate(("mine.mask", str(run), "packed")):
        folder = tmp_path / str(number)
        assert main.main(learn(inputs, folder, "--init", source, "--steps", "1")) == 0
        table = {row["method"]: row["perplexity"] for row in report(folder)["table"]}
        assert table[f"mask of {os.path.basename(source)}"] == perplexities["reinforce"]
    for name in ("sparsegpt", "random"):
        folder = tmp_path / name
        assert main.main(learn(inputs, folder, "--init", name, "--seed", "3", "--steps", "1", "--gap", "26")) == 0
        assert methods(folder) == ["dense", "magnitude", "wanda", name, "reinforce"]
    layers = {name: tiny_model().get_submodule(name) for name in report(tmp_path / "random")["converted"]}
    codes = {name: mk.top_n_mask(tensor, "2:4") for name, tensor in logits_of(tmp_path / "random").items()}
    assert_same_bits(codes, initial_codes(layers, "2:4", "random", seed=3))


def test_a_density_that_no_matrix_fits_is_warned_of(inputs, tmp_path, capsys):
    assert main.main(learn(inputs, tmp_path / "run", "--density", "0.5000001", "--steps", "1")) == 0
    assert "no matrix is small enough to stay dense within --density 0.5000001" in capsys.readouterr().err
    assert list(report(tmp_path / "run")["skipped"]) == ["lm_head"]


def test_a_run_that_is_interrupted_before_its_first_step_names_the_command_that_continues_it(
    inputs, tmp_path, monkeypatch, capsys
):
    run = tmp_path / "run"

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(command, "choose_masks", interrupt)
        assert main.main(learn(inputs, run)) == 130
    lines = capsys.readouterr().err.splitlines()
    assert f"stopped before the next step; continue with: maskpro learn --resume {run}" in lines
    assert main.main(["learn", "--resume", str(run)]) == 0
    with monkeypatch.context() as patched:
        patched.setattr(result, "save", interrupt)
        assert main.main(learn(inputs, tmp_path / "last")) == 130
    assert "stopped before the result was written; continue with: " in capsys.readouterr().err
    assert main.main(["learn", "--resume", str(tmp_path / "last")]) == 0
    # nothing to continue before the settings are on disk
    with monkeypatch.context() as patched:
        patched.setattr(data, "load", interrupt)
        assert main.main(learn(inputs, tmp_path / "other")) == 130
    assert capsys.readouterr().err.splitlines()[-2:] == ["nothing was written", "maskpro: interrupted"]
    assert not (tmp_path / "other").exists()


def test_evaluations_report_their_progress_without_a_terminal(inputs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shared, "SECONDS", 0)
    assert main.main(learn(inputs, tmp_path / "run", "--eval-every", "1")) == 0
    lines = capsys.readouterr().err.splitlines()
    assert "evaluation of dense: window 4 of 5" in lines
    assert any(line.startswith("validation: window ") for line in lines)
    assert any(line.startswith("dense: test perplexity ") and "seconds" not in line for line in lines)
    assert any(line.startswith("wanda: test perplexity ") and "seconds" in line for line in lines)


def test_the_time_left_is_estimated_without_the_first_parts(monkeypatch, capsys):
    """They compile, and collect what the others need."""
    clock = iter([0.0, 100.0, *(100.0 + 11 * done for done in range(1, 20))])
    monkeypatch.setattr(shared, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    progress = shared.Progress("masks", "layer")
    for done in range(1, 21):
        progress(done, 20)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "masks: layer 1 of 20" and lines[1] == "masks: layer 2 of 20, 03:18 left"
    assert lines[-1] == "masks: layer 20 of 20, 00:00 left"


def test_a_checkpoint_with_other_kept_weights_is_warned_of(inputs, tmp_path, capsys):
    model = tiny_model()
    mk.convert(model, "2:4", init="random")
    mk.finalize(model)
    model.get_submodule("model.layers.0.self_attn.q_proj").weight.data *= 2
    save_model(model, tiny_tokenizer(), tmp_path / "pruned")
    assert main.main(learn(inputs, tmp_path / "run", "--init", str(tmp_path / "pruned"), "--steps", "1")) == 0
    reported = [line for line in capsys.readouterr().err.splitlines() if line.startswith("maskpro: warning: ")]
    assert any("model.layers.0.self_attn.q_proj" in line for line in reported)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (["--refit", "scales"], ["wanda, scales refitted", "reinforce, scales refitted"]),
        (
            [*STRAIGHT, "--refit", "weights", "--loss", "kl"],
            ["wanda, weights refitted", "straight-through, weights refitted"],
        ),
        (
            ["--estimator", "straight-through", "--train-weights", "1e-3", "--loss", "ce+kl"],
            ["straight-through, weights trained"],
        ),
    ],
)
def test_weights_that_change_are_named_and_kept_with_the_logits(inputs, tmp_path, capsys, options, names):
    assert main.main(learn(inputs, tmp_path / "run", *options)) == 0
    moved = report(tmp_path / "run")["moved_weights"]
    if "--train-weights" in options:
        end = f"weights trained; kept weights moved by {moved:.2%} of their length; written to {tmp_path / 'run'}"
        assert 0.0 < moved < 0.2 and capsys.readouterr().out.splitlines()[-1].endswith(f"mask; {end}")
    else:
        assert moved is None
    assert methods(tmp_path / "run")[-len(names) :] == names
    learned = load_logits(tmp_path / "run" / "learned/logits.safetensors")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    dense, changed = tiny_model(), 0
    for name, logits in learned.logits.items():
        kept = mk.expand_mask(mk.top_n_mask(logits, "2:4"), "2:4")
        weight = learned.weights.get(name, dense.get_submodule(name).weight)
        assert_same_bits(model.get_submodule(name).weight, torch.where(kept, weight, 0.0))
        changed += int(not torch.equal(weight, dense.get_submodule(name).weight))
    assert changed == 14
    assert not (tmp_path / "run" / "progress" / "teacher").exists()


def test_whole_matrices_stay_dense_up_to_the_density(inputs, tmp_path, capsys):
    run, packed = tmp_path / "run", tmp_path / "packed"
    assert main.main(learn(inputs, run, *STRAIGHT, "--refit", "weights", "--density", "0.6")) == 0
    written, model, dense = report(run), AutoModelForCausalLM.from_pretrained(run), tiny_model()
    left = [name for name, reason in written["skipped"].items() if reason == start.COSTLY]
    assert left and not set(left) & set(written["converted"]) and len(left) + len(written["converted"]) == 14
    assert f"left dense: {len(left)} of 14 layers ({start.COSTLY})" in capsys.readouterr().err
    for name in left:
        assert_same_bits(model.get_submodule(name).weight, dense.get_submodule(name).weight)
    assert all((nonzeros(model, name) == 2).all() for name in written["converted"])
    sizes = {name: dense.get_submodule(name).weight.numel() for name in [*left, *written["converted"]]}
    share = 0.5 + 0.5 * sum(sizes[name] for name in left) / sum(sizes.values())
    # the smallest matrix has 512 of 18,432 weights
    assert 0.6 - 512 / 18432 < share <= 0.6
    assert main.main(["export", str(run), str(packed), "--to", "packed"]) == 0
    again = AutoModelForCausalLM.from_pretrained(packed)
    ids = torch.arange(24)[None]
    torch.testing.assert_close(again(ids).logits, model(ids).logits)
    assert {name for name, module in again.named_modules() if isinstance(module, mk.NMLinear)} == set(
        written["converted"]
    )


@pytest.mark.parametrize(("fast", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_a_run_keeps_the_dtype_that_its_first_cpu_multiplies(inputs, tmp_path, monkeypatch, fast, dtype):
    def without_dtype(*given):
        arguments = learn(*given)
        place = arguments.index("--dtype")
        return arguments[:place] + arguments[place + 2 :]

    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr("helpers.command.learn", without_dtype)
    monkeypatch.setattr("maskpro_kernels.cli.inputs.cpu_multiplies", lambda _: fast)
    assert interrupted(inputs, tmp_path / "run", monkeypatch, 1, ["--steps", "2"], interrupt) == 130
    monkeypatch.setattr("maskpro_kernels.cli.inputs.cpu_multiplies", lambda _: not fast)
    assert main.main(["learn", "--resume", str(tmp_path / "run")]) == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run").dtype == getattr(torch, dtype)


def test_what_only_saves_memory_changes_no_bit(inputs, tmp_path):
    options = {"plain": [], "checkpointed": ["--gradient-checkpointing"], "off": ["--gradient-checkpointing", "false"]}
    for name, more in options.items():
        assert main.main(learn(inputs, tmp_path / name, *STRAIGHT, *more)) == 0
    plain, *others = (logits_of(tmp_path / name) for name in options)
    for other in others:
        assert_same_bits(other, plain)


def test_a_model_of_learned_positions_and_one_in_bfloat16(inputs, tmp_path):
    options = ["--dtype", "bfloat16", "--accumulate", "2", *STRAIGHT]
    assert main.main(learn(inputs, tmp_path / "run", *options)) == 0
    weight = AutoModelForCausalLM.from_pretrained(tmp_path / "run").get_submodule("model.layers.0.mlp.up_proj").weight
    assert weight.dtype == torch.bfloat16
    assert report(tmp_path / "run")["validation"][-1]["tokens"] == 3 * 2 * 4 * 16


def tiny_gpt2():
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=32, n_positions=64, n_embd=32, n_layer=1, n_head=2, bos_token_id=None, eos_token_id=None)
    )


def tiny_mixtral():
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    experts = {"num_key_value_heads": 1, "num_local_experts": 2, "max_position_embeddings": 64}
    return MixtralForCausalLM(MixtralConfig(vocab_size=32, bos_token_id=None, eos_token_id=None, **sizes, **experts))


@pytest.mark.parametrize("model", [tiny_gpt2, tiny_mixtral])
def test_modules_with_matrices_of_their_own_are_learned_as_layers(model, inputs, tmp_path):
    torch.manual_seed(0)
    dense = model().eval()
    dense.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text((inputs / "text.txt").read_text())
    assert main.main(learn(tmp_path, tmp_path / "run")) == 0
    learned = type(dense).from_pretrained(tmp_path / "run").state_dict()
    sparse = [name for name, tensor in learned.items() if (tensor == 0).float().mean() > 0.45]
    assert len(sparse) >= 4 and learned.keys() == dense.state_dict().keys()


def test_a_run_continues_without_the_file_of_its_initial_mask(inputs, run, tmp_path, monkeypatch):
    shutil.copytree(run, tmp_path / "first")
    options = ["--init", str(tmp_path / "first")]

    def stop():
        raise KeyboardInterrupt

    assert interrupted(inputs, tmp_path / "run", monkeypatch, 2, options, stop) == 130
    shutil.rmtree(tmp_path / "first")
    assert main.main(["learn", "--resume", str(tmp_path / "run")]) == 0


def test_logits_of_another_run_are_not_exported(inputs, run, tmp_path, capsys):
    assert main.main(learn(inputs, tmp_path / "other", "--seed", "5", "--lr", "7")) == 0
    shutil.copytree(run, tmp_path / "run")
    shutil.copy(tmp_path / "other" / "learned/logits.safetensors", tmp_path / "run" / "learned/logits.safetensors")
    refuses(capsys, tmp_path, ["export", str(tmp_path / "run"), str(tmp_path / "dense")], "expected the logits that")
