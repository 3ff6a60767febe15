"""Time and memory of a training step beyond the model's own forward.

Measured in child processes without Triton's interpreter, on the route that users get.
"""

from __future__ import annotations

import copy
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from helpers.children import environment
from torch import nn

# Of the eager formulation's draws and updates, and of a REINFORCE step of 1,024 tokens
LARGEST_COST = 1 / 16
LARGEST_SHARE = 0.3

# Of forward and backward of the unmasked model with the gradients of the same weights
LARGEST_STRAIGHT_THROUGH_COST = 1.6
STRAIGHT_THROUGH_ROUNDS = 3

LAYERS, WIDTH, BATCH = 8, 1024, 32
MEMORY_SLACK = 0.05

GAP = 10.0
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def in_child(*arguments: str) -> dict:
    """Output of this file with those arguments."""
    done = subprocess.run([sys.executable, __file__, *arguments], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_steps_own_work_costs_a_sixteenth_of_the_eager_formulation():
    seconds = in_child("cost")
    ours = seconds["ours"]
    # round by round, for the machine may slow down in between
    cost, share = (
        statistics.median(own / other for own, other in zip(ours, seconds[name], strict=True))
        for name in ("eager", "step")
    )
    print(f"draw and update: {1 / cost:.1f} times as fast as the eager formulation, {share:.0%} of a REINFORCE step")
    assert cost <= LARGEST_COST, seconds
    assert share <= LARGEST_SHARE, seconds


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_step_holds_the_logits_and_one_masked_weight(dtype):
    peaks = in_child("memory", dtype)
    extra = peaks["step"] - peaks["plain"]
    assert extra >= peaks["logits"], "the measurement missed the logits"
    held = ("logits", "masked_weight", "noise_levels", "initial_masks")
    allowed = (1 + MEMORY_SLACK) * sum(peaks[name] for name in held)
    assert extra <= allowed, f"{extra} bytes, {allowed:.0f} allowed: {peaks}"


@pytest.mark.slow
def test_a_straight_through_step_costs_little_more_than_training_the_weights():
    seconds = in_child("straight_through_cost")
    ratio = statistics.median(ours / plain for ours, plain in zip(seconds["ours"], seconds["plain"], strict=True))
    print(f"straight-through step: {ratio:.2f} times a step that trains the weights")
    assert ratio <= LARGEST_STRAIGHT_THROUGH_COST, f"{ratio:.2f} times: {seconds}"


@pytest.mark.slow
def test_a_straight_through_step_holds_one_layers_gradient():
    bytes_ = in_child("straight_through_memory")
    allowed = (1 + MEMORY_SLACK) * (bytes_["weights"] + bytes_["logits"] + bytes_["activations"] + bytes_["transients"])
    peak = bytes_["weights"] + bytes_["logits"] + bytes_["step"]
    assert bytes_["step"] >= bytes_["activations"], "the measurement missed the activations"
    assert peak <= allowed, f"{peak} bytes, {allowed:.0f} allowed: {bytes_}"
    assert bytes_["step"] - bytes_["activations"] < bytes_["gradients"] / 4, bytes_


def seconds_of(function) -> float:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure_cost() -> dict:
    """Seconds by round of the draws and updates of all layers of SmolLM2-135M, ours and eager, and of a whole step.

    Ours are all masked weights and an update, as a trainer has them.
    """
    from harness import paired
    from test_bench_model import Layers

    import maskpro_kernels as mk
    from maskpro_kernels.text.perplexity import causal_lm_loss

    model, batch = language_model()
    layers = Layers(copy.deepcopy(model))
    mk.convert(model, "2:4", gap=GAP)
    trainer = mk.MaskTrainer(model, causal_lm_loss, [batch], mk.Reinforce(lr=1.0), seed=0)
    # the initial loss belongs to no step
    trainer.begin()

    own = copy.deepcopy(model).train()
    masks = mk.ModelMasks(own)

    def ours():
        with masks.drawn(0):
            for layer in masks.layers.values():
                layer.masked_weight()
        masks.score_update_((1e-9,), draw=(0,))

    formulation = layers.provider_parts()["eager formulation"]
    providers = {"ours": ours, "eager": lambda: [part() for part in formulation], "step": trainer.step}
    with torch.inference_mode():
        visits = [paired(providers) for _ in range(2)]
    return {name: [seconds for visit in visits for seconds in visit[name]] for name in providers}


def plain_model(dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(0)
    blocks = [module for _ in range(LAYERS) for module in (nn.Linear(WIDTH, WIDTH, bias=False), nn.ReLU())]
    return nn.Sequential(*blocks).to(DEVICE, dtype).eval()


def loss_fn(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return model(batch).float().square().mean()


def peak_bytes(measured, before=lambda: None) -> int:
    """Most bytes of tensors that lived at once in ``measured``, beyond those that lived before ``before``.

    Every allocation counts, by torch's own records.
    """
    if DEVICE == "cuda":
        at_start = torch.cuda.memory_allocated()
        before()
        torch.cuda.reset_peak_memory_stats()
        measured()
        return torch.cuda.max_memory_allocated() - at_start
    changes, start, end = memory_changes(measured, before)
    lived = itertools.accumulate(bytes_ for _, bytes_ in changes)
    return max(bytes_ for (ts, _), bytes_ in zip(changes, lived, strict=True) if start <= ts <= end)


def memory_changes(measured, before=lambda: None) -> tuple[list[tuple[float, int]], float, float]:
    """((time, bytes) of every allocation and, negative, of every release on the CPU, start and end of ``measured``)."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        before()
        with torch.profiler.record_function("measured"):
            measured()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    (span,) = (event for event in events if event.get("name") == "measured" and event.get("cat") == "user_annotation")
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]")
    return changes, span["ts"], span["ts"] + span["dur"]


def measure_memory(dtype_name: str) -> dict:
    """Peak bytes of a plain model's forward, and of a step of its converted self beyond the same start."""
    import maskpro_kernels as mk

    dtype = getattr(torch, dtype_name)
    batch = torch.randn(BATCH, WIDTH, device=DEVICE, dtype=dtype)

    def converted(model: nn.Module) -> mk.MaskTrainer:
        mk.convert(model, "2:4", gap=GAP)
        trainer = mk.MaskTrainer(model, loss_fn, [batch], mk.Reinforce(lr=1.0), seed=0)
        trainer.step()
        return trainer

    # compilation and the caches it fills are not the step's
    converted(plain_model(dtype))
    model = plain_model(dtype)
    with torch.inference_mode():
        loss_fn(model, batch)
        plain = peak_bytes(lambda: loss_fn(model, batch))
    trainers = []
    step = peak_bytes(lambda: trainers[0].step(), before=lambda: trainers.append(converted(model)))
    layers = trainers[0].layers.values()
    groups = sum(layer.logits.numel() // 4 for layer in layers)
    return {
        "plain": plain,
        "step": step,
        "logits": sum(layer.logits.nbytes for layer in layers),
        "masked_weight": max(layer.weight.nbytes for layer in layers),
        # a byte a group, from the draw to the update
        "noise_levels": groups if DEVICE == "cpu" else 0,
        # a byte a group in the memory of the host, since the trainer has no folder
        "initial_masks": groups if DEVICE == "cpu" else 0,
    }


def language_model() -> tuple[nn.Module, torch.Tensor]:
    """(SmolLM2-135M with frozen weights, a batch of 1,024 tokens)."""
    from maskpro_kernels.hf import load_model

    model, _ = load_model("smollm2-135m", torch.bfloat16)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    batch = torch.randint(0, 49152, (8, 128), generator=torch.Generator().manual_seed(0))
    return model.to(DEVICE), batch.to(DEVICE)


def measure_straight_through_cost() -> dict:
    """Seconds by round of a straight-through step, and of forward and backward with the weights' gradients."""
    import maskpro_kernels as mk
    from maskpro_kernels.text.perplexity import causal_lm_loss

    plain, batch = language_model()
    model, _ = language_model()
    names = mk.convert(model, "2:4", gap=15.0).converted
    weights = [plain.get_submodule(name).weight.requires_grad_() for name in names]
    trainer = mk.MaskTrainer(model, causal_lm_loss, [batch], mk.StraightThrough(), seed=0)

    def plain_step():
        causal_lm_loss(plain, batch).backward()
        for weight in weights:
            weight.grad = None

    seconds = {"ours": [], "plain": []}
    trainer.step()
    plain_step()
    for _ in range(STRAIGHT_THROUGH_ROUNDS):
        seconds["ours"].append(seconds_of(trainer.step))
        seconds["plain"].append(seconds_of(plain_step))
    return seconds


def measure_straight_through_memory() -> dict:
    """Peak bytes of a straight-through step with checkpointed activations, and of the same without logits to learn."""
    import maskpro_kernels as mk
    from maskpro_kernels.text.perplexity import causal_lm_loss

    model, batch = language_model()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    # what is embedded requires its gradient, so that backward runs through the whole of the frozen model
    embedded = model.get_input_embeddings().register_forward_hook(lambda module, args, out: out.requires_grad_())
    causal_lm_loss(model, batch).backward()
    activations = peak_bytes(lambda: causal_lm_loss(model, batch).backward())
    embedded.remove()
    model.eval()
    mk.convert(model, "2:4", gap=15.0)
    trainer = mk.MaskTrainer(model, causal_lm_loss, [batch], mk.StraightThrough(), seed=0)
    # compilation and the caches it fills are not the step's
    trainer.step()
    layers = trainer.layers.values()
    largest = max(layer.weight.numel() for layer in layers)
    return {
        "weights": sum(p.nbytes for name, p in model.named_parameters() if not name.endswith("logits")),
        "logits": sum(layer.logits.nbytes for layer in layers),
        "activations": activations,
        # a masked weight and a gradient in bfloat16, the second derivative in float32, and group codes
        "transients": largest * (2 + 2 + 4 + 1),
        "gradients": sum(layer.weight.nbytes for layer in layers),
        "step": peak_bytes(trainer.step),
    }


MEASUREMENTS = {
    "cost": measure_cost,
    "memory": measure_memory,
    "straight_through_cost": measure_straight_through_cost,
    "straight_through_memory": measure_straight_through_memory,
}

if __name__ == "__main__":
    measurement, *options = sys.argv[1:]
    print(json.dumps(MEASUREMENTS[measurement](*options)))
