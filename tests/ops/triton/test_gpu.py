"""The kernels on a CUDA device give the bits of the eager reference on the CPU."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.captured_step import CapturedStep
from helpers.refits import problem as refit_problem
from helpers.softmax_model import softmax_batches, softmax_model
from torch import nn

from maskpro_kernels import (
    MaskedLinear,
    MaskTrainer,
    ModelMasks,
    NMPattern,
    Reinforce,
    StraightThrough,
    advance,
    convert,
    expand_mask,
    mask_log_prob,
    masked_linear,
    nm_linear,
    pack_mask,
    pack_nm,
    sample_mask,
    sample_masked_weight,
    score_update_,
    top_n_mask,
)
from maskpro_kernels.modules import initial_logits, masked_layers
from maskpro_kernels.prune.reconstruction import by_place, conditional_blocks, swap_and_refit
from maskpro_kernels.prune.refit import FITS, refit_rows
from maskpro_kernels.text.losses import TeacherCache, distillation_loss

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("eager_reference")]

PATTERNS = ["1:4", "2:4", "4:8", "8:16"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
COUNTER = {"temperature": 0.7, "seed": 0x123456789ABCDEF, "step": 77, "layer": 5, "group_offset": 11}


def problem(dtype):
    logits = torch.randn(1000, 1024, generator=torch.Generator().manual_seed(0)) * 4
    return logits.to(dtype), torch.randn(logits.shape).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_draws_and_updates_have_the_bits_of_the_cpu(pattern, dtype):
    logits, weight = problem(dtype)
    on_gpu = logits.cuda()
    codes = sample_mask(logits, pattern, **COUNTER)
    assert_same_bits(sample_mask(on_gpu, pattern, **COUNTER).cpu(), codes)
    assert_same_bits(top_n_mask(on_gpu, pattern).cpu(), top_n_mask(logits, pattern))
    masked = sample_masked_weight(weight.cuda(), on_gpu, pattern, **COUNTER)
    assert_same_bits(masked.cpu(), sample_masked_weight(weight, logits, pattern, **COUNTER))
    coefs, draws = [0.37, -1.5], [0, 3]
    score_update_(on_gpu, coefs, pattern=pattern, draw=draws, **COUNTER)
    score_update_(logits, coefs, pattern=pattern, draw=draws, **COUNTER)
    assert_same_bits(on_gpu.cpu(), logits)


@pytest.mark.parametrize("pattern", ["1:2", "2:4", "4:8"])
def test_log_probabilities_have_the_bits_of_the_cpu(pattern):
    logits, _ = problem(torch.float32)
    codes = sample_mask(logits, pattern, **COUNTER)
    expected = mask_log_prob(logits, codes, pattern)
    assert_same_bits(mask_log_prob(logits.cuda(), codes.cuda(), pattern).cpu(), expected)


def test_shards_have_the_bits_of_the_cpu():
    logits, _ = problem(torch.float32)
    counter = COUNTER | {"group_row_stride": 1000}
    assert_same_bits(sample_mask(logits.cuda(), "2:4", **counter).cpu(), sample_mask(logits, "2:4", **counter))


def test_a_hundred_million_groups_have_the_bits_of_the_cpu():
    """In pieces, so that the reference does not fill the memory."""
    generator = torch.Generator().manual_seed(1)
    for piece in range(100):
        logits = torch.randn(1000, 4000, generator=generator) * 5
        counter = COUNTER | {"group_offset": piece * 1_000_000}
        assert_same_bits(sample_mask(logits.cuda(), "2:4", **counter).cpu(), sample_mask(logits, "2:4", **counter))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("tokens", [1, 16, 32, 33, 128, 129])
def test_products_and_gradients_are_those_of_the_masked_weight(tokens, pattern, dtype):
    """On the CPU, in float64, under the mask that the CPU draws; the last tiles of rows and of K are not full."""
    generator = torch.Generator().manual_seed(tokens)
    x, upstream = (torch.randn(tokens, size, generator=generator).to(dtype) for size in (528, 300))
    weight, logits = (torch.randn(300, 528, generator=generator) for _ in range(2))
    bias = torch.randn(300, 2, generator=generator).to(dtype)[:, 0]
    weight, logits = weight.to(dtype), 4 * logits
    masked = sample_masked_weight(weight, logits, pattern, **COUNTER)
    kept = expand_mask(sample_mask(logits, pattern, **COUNTER), pattern)
    on_gpu = [t.cuda().requires_grad_() for t in (x, weight)]
    y, log_prob = masked_linear(*on_gpu, logits.cuda(), bias.cuda(), pattern=pattern, **COUNTER)
    y.backward(upstream.cuda())
    wide = [t.double() for t in (x, masked, upstream)]
    linear = nn.functional.linear
    exact = (linear(*wide[:2], bias.double()), wide[2] @ wide[1], torch.where(kept, wide[2].T @ wide[0], 0))
    by_torch = (linear(x, masked, bias), upstream @ masked, torch.where(kept, upstream.T @ x, 0))
    for ours, same, true in zip((y, on_gpu[0].grad, on_gpu[1].grad), by_torch, exact, strict=True):
        error, error_of_torch = ((t.double() - true).abs().max() for t in (ours.detach().cpu(), same))
        assert error <= 2 * error_of_torch + 1e-6 * true.abs().max()
    if NMPattern(pattern).n <= 4:
        z = (logits.view(300, -1, NMPattern(pattern).m) / COUNTER["temperature"]).flatten(-2)
        codes = sample_mask(logits, pattern, **COUNTER)
        torch.testing.assert_close(log_prob.cpu(), mask_log_prob(z, codes, pattern).sum(), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("train_weights", "masks_until"), [(None, None), (1e-3, 1.0), (1e-3, 0.0)])
@pytest.mark.parametrize("pattern", ["1:4", "2:4", "4:8", "8:16"])
def test_straight_through_learning_repeats_itself_and_follows_the_cpu(pattern, train_weights, masks_until):
    """Equal bits twice, and equal to the CPU within float32's sums."""
    learned = {}
    for run in ("cpu", "cuda", "cuda again"):
        device = run.split()[0]
        generator = torch.Generator().manual_seed(0)
        model = nn.Linear(256, 192, bias=False)
        with torch.no_grad():
            model.weight.copy_(torch.randn(192, 256, generator=generator))
        batches = [torch.randn(40, 256, generator=generator).to(device) for _ in range(3)]
        model = nn.Sequential(model).to(device)
        convert(model, pattern, targets=["0"], gap=8.0)
        target = torch.randn(40, 192, generator=generator).to(device)
        trainer = MaskTrainer(
            model,
            lambda model, x, target=target: nn.functional.mse_loss(model(x), target),
            batches,
            StraightThrough(lr=0.3, train_weights=train_weights, masks_until=masks_until),
            seed=5,
        )
        losses = [record.loss for record in trainer.run(6, progress=False)]
        layer = masked_layers(model)["0"]
        learned[run] = losses, layer.logits.detach().cpu(), layer.weight.detach().cpu()
        assert layer.weight_changed == (train_weights is not None)
    dense = torch.randn(192, 256, generator=torch.Generator().manual_seed(0))
    initial = initial_logits(top_n_mask(dense.abs(), pattern), pattern, 8.0)
    moved = learned["cuda"][1] != initial
    assert not moved.any() if masks_until == 0.0 else moved.float().mean() > 0.9
    assert learned["cuda"][0] == learned["cuda again"][0]
    for ours, again in zip(learned["cuda"][1:], learned["cuda again"][1:], strict=True):
        assert_same_bits(ours, again)
    torch.testing.assert_close(torch.tensor(learned["cuda"][0]), torch.tensor(learned["cpu"][0]), rtol=1e-3, atol=0)
    for ours, theirs in zip(learned["cuda"][1:], learned["cpu"][1:], strict=True):
        assert ((ours - theirs).abs() > 1e-2).float().mean() < 0.01


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", ["1:4", "2:4", "4:8", "8:16", "3:4"])
@pytest.mark.parametrize("tokens", [1, 2, 16, 64, 65])
@pytest.mark.parametrize("values", ["keep", "int8", "int4"])
def test_packed_weights_unpack_and_multiply_as_on_the_cpu(values, tokens, pattern, dtype):
    """Rows and runs that no tile divides; in a captured CUDA graph as well."""
    generator = torch.Generator().manual_seed(tokens)
    weight = torch.randn(301, 1056, generator=generator)
    weight = torch.where(expand_mask(top_n_mask(weight.abs(), pattern), pattern), weight, 0).to(dtype)
    x, bias = torch.randn(tokens, 1056, generator=generator).to(dtype), torch.randn(301, generator=generator).to(dtype)
    packed, weight = pack_nm(weight.cuda(), pattern, values), pack_nm(weight, pattern, values).unpack()
    assert_same_bits(packed.unpack().cpu(), weight)
    on_gpu = x.cuda(), packed, bias.cuda()
    y = nm_linear(*on_gpu)
    exact = nn.functional.linear(x.double(), weight.double(), bias.double())
    error, of_torch = ((t.double() - exact).abs().max() for t in (y.cpu(), nn.functional.linear(x, weight, bias)))
    assert error <= 2 * of_torch + 1e-6 * exact.abs().max()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = nm_linear(*on_gpu)
    graph.replay()
    assert_same_bits(captured, y)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_refits_lower_the_error_as_on_the_cpu(pattern, dtype):
    """Alone and with the swaps that count on them; sums of products have another order."""
    m = NMPattern(pattern).m
    weight, kept, gram = (t.cpu() for t in refit_problem(pattern, rows=301, k=320, dtype=dtype))
    codes = pack_mask(kept, pattern)
    errors = {}
    for device in ("cpu", "cuda"):
        ordered = by_place(gram.to(device), m)[0]
        blocks = conditional_blocks(codes.to(device), ordered, NMPattern(pattern))
        operands = weight.to(device), codes.to(device), ordered, blocks, NMPattern(pattern)
        found, refitted, swapped = swap_and_refit(*operands)
        assert found.device.type == refitted.device.type == device and refitted.dtype == dtype
        alone = [refit_rows(weight.to(device), kept.to(device), gram.to(device), FITS[to])[1] for to in FITS]
        errors[device] = torch.stack([swapped, *alone]).sum(1).cpu()
    torch.testing.assert_close(errors["cuda"], errors["cpu"], rtol=1e-2, atol=0)
    assert (errors["cuda"][:, 1] < errors["cuda"][:, 0]).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_model_is_refitted_in_one_pass(dtype):
    batches = [torch.randn(256, 128, generator=torch.Generator().manual_seed(0)).to("cuda", dtype)]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 128)).to("cuda", dtype)
    with torch.no_grad():
        dense = model(batches[0])
    distances = []
    for refit in ("none", "weights"):
        again = copy.deepcopy(model)
        convert(again, "2:4", init="reconstruction", calibration=batches, refit=refit)
        with torch.no_grad():
            distances.append((again.eval()(batches[0]) - dense).float().norm())
    assert distances[1] < 0.9 * distances[0]


def test_a_captured_graph_draws_again_after_each_advance():
    model = nn.Sequential(nn.Linear(1024, 512, bias=False)).cuda()
    convert(model, "2:4", gap=1.0)
    model.train()
    layer = masked_layers(model)["0"]
    with torch.no_grad():
        x = torch.eye(1024, device="cuda")[:128]
        layer.masked_weight(), model(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            weight, y = layer.masked_weight(), model(x)
            advance(model)
        layer.counter_state.step.zero_()
        for step in range(3):
            graph.replay()
            expected = sample_masked_weight(layer.weight, layer.logits, "2:4", seed=0, step=step)
            assert_same_bits(weight, expected)
            assert_same_bits(y.T, expected[:, :128])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", ["2:4", "4:8", "8:16"])
def test_a_reinforce_step_is_one_captured_graph(pattern, dtype):
    """Draw, forward, update and advance: each replay draws again, and moves the logits by the factor that it finds."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 64))
    models = {}
    for device in ("cpu", "cuda"):
        models[device] = copy.deepcopy(plain).to(device)
        convert(models[device], pattern, gap=1.0, logits_dtype=dtype)
        models[device].train()
    on_gpu, on_cpu = models["cuda"], models["cpu"]
    masks, x, factor = ModelMasks(on_gpu), torch.ones(16, 512, device="cuda"), torch.zeros((), device="cuda")

    def step():
        with torch.no_grad(), masks.drawn():
            loss = on_gpu(x).square().mean()
            masks.score_update_(factor)
        advance(on_gpu)
        return loss

    # with a factor of 0: it makes the tables, and moves nothing
    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    for i, value in enumerate((0.5, -0.25, 1.0)):
        factor.fill_(value)
        for model in models.values():
            model[0].counter_state.step.fill_(i)
        graph.replay()
        assert torch.isfinite(loss)
        ModelMasks(on_cpu).score_update_(value)
        for ours, theirs in zip(masked_layers(on_gpu).values(), masked_layers(on_cpu).values(), strict=True):
            assert_same_bits(ours.logits.detach().cpu(), theirs.logits.detach())
        assert int(on_gpu[0].counter_state.step) == i + 1


@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
def test_a_straight_through_step_is_one_captured_graph(pattern):
    """Replays move logits, running mean squares and rates as steps do that are not captured."""
    replayed = CapturedStep("cuda", pattern)
    stepped = CapturedStep("cuda", pattern)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        stepped()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed()
    for _ in range(3):
        graph.replay()
    for _ in range(2):
        stepped()
    for ours, expected in zip(replayed.logits(), stepped.logits(), strict=True):
        assert_same_bits(ours, expected)
    assert replayed.estimator.state() == stepped.estimator.state()


@pytest.mark.parametrize("sizes", [[(1000, 1024), (3, 64), (257, 96)]], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_layers_of_one_launch_have_the_bits_of_the_cpu(pattern, dtype, sizes):
    generator, models = torch.Generator().manual_seed(0), {}
    layers = [(4 * torch.randn(*size, generator=generator)).to(dtype) for size in sizes]
    for device in ("cpu", "cuda"):
        model = nn.ModuleList(
            MaskedLinear(torch.ones_like(logits, device=device), None, logits.to(device), pattern, layer=i)
            for i, logits in enumerate(layers)
        ).train()
        for layer in model:
            layer.counter_state = model[0].counter_state
        models[device], masks = model, ModelMasks(model)
        with torch.no_grad(), masks.drawn():
            codes = [layer.cached_codes.cpu() for layer in model]
            rates = [masks.flip_rate(str(i)) for i in range(len(sizes))]
            masks.score_update_(0.37)
        found = codes, rates, [layer.logits.detach().cpu() for layer in model]
        models[device] = found
    for ours, theirs in zip(models["cuda"][0] + models["cuda"][2], models["cpu"][0] + models["cpu"][2], strict=True):
        assert_same_bits(ours, theirs)
    assert models["cuda"][1] == models["cpu"][1]


@pytest.mark.parametrize("estimator", [Reinforce, StraightThrough])
def test_logits_in_main_memory_learn_the_same_and_three_copies_are_there_at_a_time(estimator):
    torch.manual_seed(0)
    plain = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(12))).cuda()
    batches = [torch.randn(32, 1024, generator=torch.Generator().manual_seed(1)).cuda() / 32]
    found, peaks = [], []
    for device in (None, "cpu"):
        model = copy.deepcopy(plain)
        convert(model, "2:4", gap=1.0, logits_device=device)
        layers = masked_layers(model).values()
        assert all(layer.logits.is_pinned() == (device == "cpu") for layer in layers)
        trainer = MaskTrainer(model, lambda model, x: model(x).square().mean(), batches, estimator(), seed=3)
        trainer.step()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        trainer.run(4, progress=False)
        peaks.append(torch.cuda.max_memory_allocated() - before)
        found.append([layer.logits.detach().cpu().clone() for layer in layers])
    assert_same_bits(*found)
    # a copy has 4 MiB
    assert peaks[1] < peaks[0] + 4 * (4 << 20)


@pytest.mark.parametrize("k", [None, 3])
def test_learning_by_the_dense_model_repeats_itself_and_follows_the_cpu(k):
    """Sampled labels are those of the CPU, so the squares of Fisher passes are, but for the sums of float32."""
    learned = {}
    for run in ("cpu", "cuda", "cuda again"):
        device = run.split()[0]
        loss = distillation_loss("ce+kl", 2.0, cache=None if k is None else TeacherCache(k))
        model, batches = softmax_model().to(device), [ids.to(device) for ids in softmax_batches()]
        trainer = MaskTrainer(model, loss, batches, StraightThrough(lr=0.3, fisher_every=2), seed=5)
        losses = [record.loss for record in trainer.run(6, progress=False)]
        (squares,) = trainer.estimator.tensors().values()
        learned[run] = torch.tensor(losses), model.head.logits.detach().cpu(), squares.cpu()
    for ours, again, theirs in zip(*(learned[run] for run in ("cuda", "cuda again", "cpu")), strict=True):
        assert_same_bits(ours, again)
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2)


def test_speed_reports_what_a_model_takes_of_the_device():
    pytest.importorskip("transformers")
    from helpers.tiny_llama import tiny_model

    from maskpro_kernels.hf import measure_speed

    models = {"dense": tiny_model().cuda(), "copy": tiny_model().cuda()}
    report = measure_speed(models, torch.arange(12, device="cuda").view(2, 6), new_tokens=4, rounds=2)
    assert report.agree and all(model.weight_bytes < model.device_bytes < 1e9 for model in report.models)
