"""The Trainer of transformers on sparse models."""

from __future__ import annotations

from types import SimpleNamespace

import accelerate
import pytest
import torch
from helpers.architectures import loss_of, tiny
from helpers.bits import assert_same_bits
from helpers.tiny_llama import tiny_model
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainerState, TrainingArguments

import maskpro_kernels as mk
from maskpro_kernels.hf import KeepMask, MaskCallback
from maskpro_kernels.kept_zeros import KeptZeros
from maskpro_kernels.modules import masked_layers
from maskpro_kernels.text.perplexity import causal_lm_loss

pytestmark = pytest.mark.usefixtures("eager_reference")

LAYER = "model.layers.0.mlp.down_proj"


def texts(count: int = 16) -> list[dict]:
    ids = torch.randint(0, 30, (count, 8), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in ids]


def trained(model, folder, steps: int = 8, callbacks=(), resume: str | None = None, rows=None, **options) -> Trainer:
    defaults = {
        "per_device_train_batch_size": 4, "learning_rate": 1e-2, "weight_decay": 0.1, "max_grad_norm": 0.5,
        "save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True,
    }  # fmt: skip
    arguments = TrainingArguments(str(folder), max_steps=steps, **defaults | options)
    trainer = Trainer(model, arguments, train_dataset=rows or texts(), callbacks=list(callbacks))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def sparse(pattern: str = "2:4"):
    model = tiny_model()
    mk.convert(model, pattern)
    return mk.finalize(model).requires_grad_()


def counts(model, pattern) -> list[torch.Tensor]:
    """Of each group of each layer the weights that are not zero."""
    kept = KeptZeros(sparse(pattern), pattern).held
    return [(model.get_parameter(name).view(-1, mk.NMPattern(pattern).m) != 0).sum(1) for name in kept]


@pytest.mark.parametrize("pattern", ["2:4", pytest.param("4:8", marks=pytest.mark.slow)])
def test_keep_mask_keeps_the_pattern_exactly(pattern, tmp_path):
    before, n = sparse(pattern), mk.NMPattern(pattern).n
    model = sparse(pattern)
    trained(model, tmp_path, callbacks=[KeepMask(pattern)])
    assert all((count == n).all() for count in counts(model, pattern))
    zeros = before.get_submodule(LAYER).weight == 0
    assert torch.equal(model.get_submodule(LAYER).weight == 0, zeros)
    assert (model.get_submodule(LAYER).weight != before.get_submodule(LAYER).weight)[~zeros].all()


def test_without_it_the_pattern_is_lost(tmp_path):
    """The fault that it is there for."""
    model = sparse()
    trained(model, tmp_path, steps=1)
    assert not all((count <= 2).all() for count in counts(model, "2:4"))


def test_a_model_that_follows_no_pattern_is_refused(tmp_path):
    with pytest.raises(ValueError, match="pattern: expected one that some layer follows, got 2:4, which none follows"):
        trained(tiny_model().requires_grad_(), tmp_path, callbacks=[KeepMask("2:4")])
    model = tiny_model()
    mk.convert(model, "2:4")
    for kind in (model, mk.finalize(model, to="packed")):
        with pytest.raises(ValueError, match="finalize a masked model first; a packed model"):
            KeptZeros(kind, "2:4")
    with pytest.raises(ValueError, match="pattern: expected N:M"):
        KeepMask("2:5")


def test_layers_that_are_all_frozen_are_reported(tmp_path):
    model = tiny_model()
    mk.convert(model, "2:4")
    with pytest.warns(UserWarning, match="KeepMask: expected weights that train, got 14 frozen ones"):
        trained(mk.finalize(model), tmp_path, steps=1, callbacks=[KeepMask("2:4")])


@pytest.mark.parametrize("name", ["GPT-2", "Mixtral", "gpt-oss"])
def test_matrices_of_other_modules_are_held_too(name):
    model, batch = tiny(name)
    mk.convert(model, "2:4")
    mk.finalize(model).requires_grad_()
    kept = KeptZeros(model, "2:4")
    held = {key: matrix.get().clone() for key, matrix in kept.held.items()}
    linears = {f"{key}.weight" for key, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert kept.held.keys() > linears - {"lm_head.weight", "head.weight"}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    loss_of(model, batch).backward()
    optimizer.step()
    assert any((matrix.get()[held[key] == 0] != 0).any() for key, matrix in kept.held.items())
    kept.restore()
    for key, matrix in kept.held.items():
        assert ((matrix.get().reshape(-1, 4) != 0).sum(1) == 2).all()
        assert torch.equal(matrix.get() == 0, held[key] == 0)


def test_groups_with_fewer_than_n_keep_n():
    layer = torch.nn.Linear(8, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.0, 5, 0, 0, 1, 2, 0, 0], [0, 0, 0, 0, 0, 0, 3, 4]]))
    kept = KeptZeros(torch.nn.Sequential(layer), "2:4")
    with torch.no_grad():
        layer.weight.fill_(torch.nan)
    kept.restore()
    assert (~layer.weight.isnan()).nonzero().tolist() == [
        [0, 2], [0, 3], [0, 6], [0, 7], [1, 2], [1, 3], [1, 4], [1, 5],
    ]  # fmt: skip


@pytest.mark.slow
def test_a_checkpoint_of_a_converted_model_has_its_masks(tmp_path):
    """One that the Trainer writes: its model is back with logits and pattern, and the trainer continues from it."""
    model = tiny_model()
    mk.convert(model, "2:4", gap=2.0)
    whole = trained(model, tmp_path / "whole", steps=4, save_strategy="steps", save_steps=2)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "whole/checkpoint-4")
    assert_same_bits([x.logits for x in masked_layers(loaded).values()],
                     [x.logits for x in masked_layers(whole.model).values()])  # fmt: skip
    # which the Trainer trains, as it would the model that was saved
    trained(loaded, tmp_path / "again", steps=1)


def test_packed_models_are_fine_tuned(tmp_path):
    model = tiny_model()
    mk.convert(model, "2:4")
    mk.finalize(model, to="packed").save_pretrained(tmp_path / "packed")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed").requires_grad_(False)
    before = loaded.get_submodule(LAYER).packed
    values, bitmask = before.values.clone(), before.bitmask.clone()
    for module in loaded.modules():
        if isinstance(module, mk.NMLinear):
            module.values.requires_grad_()
    trained(loaded, tmp_path / "run", steps=3, save_strategy="steps", save_steps=3)
    layer = loaded.get_submodule(LAYER)
    assert (layer.values != values).all() and torch.equal(layer.bitmask, bitmask)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "run/checkpoint-3")
    assert_same_bits(again.get_submodule(LAYER).values, layer.values)


def masked(gap: float = 4.0):
    model = tiny_model()
    mk.convert(model, "2:4", gap=gap)
    return model


def logits(model) -> dict[str, torch.Tensor]:
    return {name: layer.logits.detach().clone() for name, layer in masked_layers(model).items()}


def learned(folder, steps: int = 6, model=None, resume=None, callbacks=(), **options) -> Trainer:
    options = {"learning_rate": 0.3, "weight_decay": 0.0, "logging_steps": 1} | options
    model = masked() if model is None else model
    return trained(model, folder, steps, [MaskCallback(), *callbacks], resume, **options)


def test_mask_callback_learns_the_masks_alone(tmp_path):
    model = masked()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parameters = trainable(model)
    trainer = learned(tmp_path, model=model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == (not name.endswith(("logits", "_extra_state"))), name
    assert {int(layer.counter_state.step) for layer in masked_layers(model).values()} == {6}
    # as before, and no memory of an optimizer
    assert trainable(model) == parameters
    assert all(layer.logits_backward is None for layer in masked_layers(model).values())
    assert trainer.optimizer.state.keys() == {"masks"}


class Fail(TrainerCallback):
    def on_substep_end(self, *args, **kwargs):
        raise InterruptedError

    on_step_end = on_substep_end


def partly_frozen():
    """Some logits and some of the other parameters are frozen."""
    model = masked()
    model.get_submodule(LAYER).logits.requires_grad_(False)
    model.model.norm.weight.requires_grad_(False)
    return model, trainable(model)


def trainable(model) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def test_mask_callback_lets_go_of_a_model_whose_training_was_interrupted(tmp_path):
    (model, before), callback = partly_frozen(), MaskCallback()
    with pytest.raises(InterruptedError):
        trained(model, tmp_path, 2, [callback, Fail()], None, learning_rate=0.3, weight_decay=0.0)
    assert not model.get_input_embeddings().weight.requires_grad
    for _ in range(2):
        callback.release()
    assert trainable(model) == before
    assert all(layer.logits_backward is None for layer in masked_layers(model).values())


@pytest.mark.parametrize("first", ["refused", "interrupted", "unused"])
def test_every_parameter_gets_back_its_requires_grad_when_training_ends(first, tmp_path):
    """Also if an earlier Trainer with another callback has frozen the model, and its training has no end."""
    model, before = partly_frozen()
    if first == "refused":
        with pytest.raises(ValueError, match="learning_rate: expected one for logits"):
            learned(tmp_path, 1, model, learning_rate=5e-5)
        assert trainable(model) == before
    elif first == "interrupted":
        with pytest.raises(InterruptedError):
            learned(tmp_path, 1, model, callbacks=[Fail()])
    elif first == "unused":
        # kept, so that it stays alive
        unused = Trainer(model, TrainingArguments(str(tmp_path), report_to="none"), callbacks=[MaskCallback()])
        assert trainable(unused.model) == [name for name in dict(model.named_parameters()) if "logits" in name]
    learned(tmp_path, 1, model)
    assert trainable(model) == before
    # which another Trainer trains
    trained(model, tmp_path, 1)
    assert trainable(model) == before


@pytest.mark.parametrize("accumulate", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_mask_callback_takes_the_steps_of_mask_trainer(accumulate, tmp_path):
    """With batches in the order of the texts, without clipping, at the rate that falls in the same way."""
    model, rows = masked(), torch.stack([row["input_ids"] for row in texts()])
    trainer = mk.MaskTrainer(
        model, causal_lm_loss, list(rows.split(4)), mk.StraightThrough(lr=0.3, steps=4), seed=42, accumulate=accumulate
    )
    trainer.run(4, progress=False)
    options = {"max_grad_norm": 0.0, "train_sampling_strategy": "sequential"}
    ours = learned(tmp_path, 4, gradient_accumulation_steps=accumulate, **options)
    torch.testing.assert_close(logits(ours.model), logits(model), rtol=1e-4, atol=1e-4)


def test_mask_callback_counts_the_labels_of_all_batches_of_a_step(tmp_path):
    """Completions of one to four tokens: the Trainer divides by their number in the step, and so does the curvature."""
    rows = [row | {"labels": row["labels"].clone()} for row in texts()]
    for index, row in enumerate(rows):
        row["labels"][: 7 - index // 4] = -100
    batches = [{name: torch.stack([row[name] for row in part]) for name in part[0]}
               for part in (rows[first : first + 4] for first in range(0, 16, 4))]  # fmt: skip
    model = masked()
    trainer = mk.MaskTrainer(
        model, lambda model, batch: model(**batch).loss, batches, mk.StraightThrough(lr=0.3, steps=4), seed=42,
        accumulate=2,
    )  # fmt: skip
    trainer.run(4, progress=False)
    options = {"max_grad_norm": 0.0, "train_sampling_strategy": "sequential", "gradient_accumulation_steps": 2}
    ours = learned(tmp_path, 4, rows=rows, **options)
    torch.testing.assert_close(logits(ours.model), logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_model_that_the_trainer_compiles_stays_one_graph_with_mask_callback(tmp_path):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    results = []
    for options in ({}, {"torch_compile": True, "torch_compile_backend": "aot_eager"}):
        model = tiny_model(num_hidden_layers=1)
        mk.convert(model, "2:4", gap=15.0, targets=[LAYER])
        results.append(logits(learned(tmp_path, 3, model, **options).model))
    assert not torch._dynamo.utils.counters["graph_break"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_the_last_step_of_an_epoch_may_have_fewer_batches(tmp_path):
    """Of 16 texts in batches of 4, the second step has one batch, which is scaled by 1 and not by a third."""
    seen = []

    class Scales(TrainerCallback):
        def on_substep_end(self, args, state, control, model=None, **kwargs):
            seen.append(float(masked_layers(model)["model.layers.0.mlp.down_proj"].logits_backward.loss_scale))

        on_pre_optimizer_step = on_substep_end

    learned(tmp_path, 4, callbacks=[Scales()], gradient_accumulation_steps=3)
    assert seen == [1 / 3, 1 / 3, 1 / 3, 1.0] * 2


def test_a_run_that_is_resumed_has_the_bits_of_a_whole_one(tmp_path):
    saving = {"steps": 4, "save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2}
    whole = learned(tmp_path / "run", **saving)
    again = learned(tmp_path / "again", resume=str(tmp_path / "run/checkpoint-2"), **saving)
    assert_same_bits(logits(again.model), logits(whole.model))
    assert again.state.log_history[:-1] == whole.state.log_history[:-1]
    # and so has one whose model comes from the checkpoint
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run/checkpoint-2")
    third = learned(tmp_path / "third", model=loaded, resume=str(tmp_path / "run/checkpoint-2"), **saving)
    assert_same_bits(logits(third.model), logits(whole.model))


@pytest.mark.slow
def test_what_moves_is_logged(tmp_path):
    seen = []

    class Reporter(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(logs.get("mask_moved"))

    trainer = learned(tmp_path, callbacks=[Reporter()])
    *steps, last = trainer.state.log_history
    assert [entry["mask_moved"] for entry in steps] == seen[:-1]
    assert 0.0 == seen[0] < seen[5] < 0.1 and all(0.0 < entry["mask_flip_rate"] < 0.2 for entry in steps)
    assert "mask_moved" not in last


@pytest.mark.slow
def test_bfloat16_and_checkpointed_activations(tmp_path):
    plain = learned(tmp_path / "plain", bf16=True)
    again = learned(tmp_path / "again", bf16=True, gradient_checkpointing=True)
    assert_same_bits(logits(again.model), logits(plain.model))
    assert not torch.equal(logits(plain.model)[LAYER], logits(masked())[LAYER])


def test_mask_callback_refuses_what_would_learn_nothing(tmp_path):
    with pytest.raises(ValueError, match="model: expected a model with MaskedLinear layers, got none"):
        learned(tmp_path, model=tiny_model())
    for rate in (5e-5, 0.0):
        with pytest.raises(ValueError, match=rf"learning_rate: expected one for logits, such as 0.3, got {rate:g}"):
            learned(tmp_path, learning_rate=rate)
    with pytest.raises(ValueError, match="max_update: expected a float above 0"):
        MaskCallback(max_update=0.0)


@pytest.mark.slow
def test_a_callback_that_is_added_later_learns_too(tmp_path):
    arguments = TrainingArguments(
        str(tmp_path), max_steps=3, learning_rate=0.3, report_to="none", use_cpu=True, save_strategy="no"
    )
    model = masked()
    embeddings = model.get_input_embeddings().weight.clone()
    trainer = Trainer(model, arguments, train_dataset=texts())
    trainer.add_callback(MaskCallback())
    trainer.train()
    assert torch.equal(model.get_input_embeddings().weight, embeddings)
    assert not torch.equal(logits(model)[LAYER], logits(masked())[LAYER])


def test_without_it_the_trainer_warns_of_masks_left_alone(tmp_path):
    before = logits(masked())
    with pytest.warns(UserWarning, match="MaskedLinear: this backward gives the logits no gradient"):
        model = trained(masked(), tmp_path, steps=1).model
    assert_same_bits(logits(model), before)


@pytest.mark.slow
def test_layers_that_do_not_follow_the_pattern_are_reported(tmp_path):
    model = tiny_model(tie_word_embeddings=False)
    mk.convert(model, "2:4", targets=["*.mlp.*"])
    mk.finalize(model).requires_grad_()
    with pytest.warns(UserWarning, match="KeepMask: 6 matrices follow 2:4 and keep their zeros, 8 do not .*: model."):
        trained(model, tmp_path, steps=1, callbacks=[KeepMask("2:4")])
    left_out = KeptZeros(model, "2:4").left_out
    assert len(left_out) == 9 and "of its groups have more than 2 that are not zero" in left_out["lm_head.weight"]


@pytest.mark.slow
def test_interrupted_training_begins_again(tmp_path):
    class Breaks(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    model, masks = masked(), MaskCallback()
    with pytest.raises(KeyboardInterrupt):
        trained(model, tmp_path, 2, [masks, Breaks()], learning_rate=0.3)
    trained(model, tmp_path, 2, [masks], learning_rate=0.3)
    assert {int(layer.counter_state.step) for layer in masked_layers(model).values()} == {3}


@pytest.mark.parametrize("fused", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_gradient_scaler_skips_what_is_not_finite(fused):
    """As the Trainer has it in float16, where a fused optimizer is still called, with ``found_inf``."""
    arguments = TrainingArguments("unused", use_cpu=True, report_to="none")
    accelerate.Accelerator(cpu=True)
    model, rows = masked().train(), torch.stack([row["input_ids"] for row in texts()]).split(4)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    own = torch.optim.AdamW([layer.logits for layer in masked_layers(model).values()], lr=0.3, fused=fused)
    optimizer = accelerate.optimizer.AcceleratedOptimizer(own, scaler=scaler)
    masks, state = MaskCallback(), TrainerState(max_steps=4)
    masks.on_train_begin(arguments, state, None, model=model, optimizer=optimizer)
    for index, batch in enumerate([rows[0], rows[1], *rows[1:]]):
        masks.on_step_begin(arguments, state, None, optimizer=optimizer, train_dataloader=rows)
        scaler.scale(causal_lm_loss(model, batch) * (torch.inf if index == 1 else 1.0)).backward()
        scaler.unscale_(own)
        optimizer.step()
        assert scaler.get_scale() == (256.0 if index == 0 else 128.0)
        assert all(layer.logits.grad is None for layer in masked_layers(model).values()) or (index == 1 and not fused)
        optimizer.zero_grad()
    masks.on_train_end(arguments, state, None)
    expected = masked()
    mk.MaskTrainer(expected, causal_lm_loss, list(rows), mk.StraightThrough(lr=0.3), seed=42).run(4, progress=False)
    torch.testing.assert_close(logits(model), logits(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_evaluation_and_the_best_model(tmp_path):
    model = masked()
    arguments = TrainingArguments(
        str(tmp_path), max_steps=4, learning_rate=0.3, report_to="none", use_cpu=True, disable_tqdm=True,
        eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2, load_best_model_at_end=True,
    )  # fmt: skip
    trainer = Trainer(
        model, arguments, train_dataset=texts(), eval_dataset=texts(4), callbacks=[MaskCallback()]
    )  # fmt: skip
    trainer.train()
    best = AutoModelForCausalLM.from_pretrained(trainer.state.best_model_checkpoint)
    assert_same_bits(logits(model), logits(best))


@pytest.mark.parametrize(
    ("loss_type", "encoder_decoder", "expected"),
    [("ForCausalLM", False, 21), (None, False, 21), ("ForTokenClassification", False, 24), ("ForMaskedLM", False, 24),
     ("ForConditionalGeneration", True, 24)],
)  # fmt: skip
def test_mask_callback_counts_the_first_labels_of_models_that_do_not_shift(loss_type, encoder_decoder, expected):
    model, callback = SimpleNamespace(loss_type=loss_type, config=SimpleNamespace()), MaskCallback()
    model.config.is_encoder_decoder = encoder_decoder
    callback._tokens = torch.ones(())
    callback._loss_parts = 1
    callback._masks = SimpleNamespace(slopes=SimpleNamespace())
    ids = torch.ones(3, 8, dtype=torch.int64)
    callback._count(model, (), {"input_ids": ids, "labels": ids})
    assert float(callback._masks.slopes.tokens) == expected
