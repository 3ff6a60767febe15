"""Reconstruction: swaps lower the error of every row, and layers see the inputs of a model already masked."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.cases import cases, slow
from helpers.enumerated import KERNEL_DEVICE, kept_of, subset_codes
from helpers.tiny_llama import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import maskpro_kernels as mk
from maskpro_kernels.ops import reference
from maskpro_kernels.ops.cpu import kernels
from maskpro_kernels.ops.pattern import NMPattern
from maskpro_kernels.ops.tables import cpu as table
from maskpro_kernels.prune import calibration
from maskpro_kernels.prune.calibration import calls_by_block, layers_in_order, run_call, watching_inputs
from maskpro_kernels.prune.initial_masks import initial_codes
from maskpro_kernels.prune.reconstruction import reconstruct, swap_descent

PATTERNS = ["1:4", "2:4", "4:8", "8:16"]


def problem(rows, k, seed=0, tokens=200):
    """(weight, Gram matrix of correlated inputs)."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, k, generator=generator)
    x = torch.randn(tokens, k, generator=generator) @ torch.randn(k, k, generator=generator) / k**0.5
    return weight.to(KERNEL_DEVICE), (x.T @ x).to(KERNEL_DEVICE)


def errors(weight, codes, gram, pattern):
    difference = torch.where(mk.expand_mask(codes, pattern), 0.0, -weight.double())
    return ((difference @ gram.double()) * difference).sum(1)


def by_place(weight, product, codes, gram, m):
    """The operands of best_swaps: weights at the same place of their groups lie together."""
    planes = [x.view(len(x), -1, m).transpose(1, 2).contiguous() for x in (weight, product)]
    blocks = [[gram[i::m, j::m].diagonal() for j in range(m)] for i in range(m)]
    return *planes, codes, torch.stack([torch.stack(row) for row in blocks])


@pytest.mark.parametrize(
    "pattern", cases(((pattern,) for pattern in (*PATTERNS, "1:2", "15:16")), slow=lambda p: p == "15:16")
)
def test_all_routes_find_the_same_swaps(pattern, launched, monkeypatch):
    m = NMPattern(pattern).m
    weight, gram = problem(7, 3 * m)
    product = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)).to(weight.device)
    codes = mk.top_n_mask(weight.abs(), pattern)
    operands = by_place(weight, product, codes, gram, m)
    change, swap = torch.ops.maskpro.best_swaps(*operands, NMPattern(pattern).n, m)
    assert launched["best_swaps"] == 1
    cpu = [t.cpu() for t in operands]
    expected = reference.best_swaps(*cpu, NMPattern(pattern).n, m)
    assert_same_bits([change, swap], expected)
    strided = *operands[:2], codes.T.contiguous().T, operands[3]
    assert_same_bits(torch.ops.maskpro.best_swaps(*strided, NMPattern(pattern).n, m), expected)
    # two of the seven rows at a time
    monkeypatch.setattr(kernels, "COPIED_BYTES", 4 * m * m * codes.shape[1])
    monkeypatch.setattr(kernels, "MIN_SHARED_GROUPS", 0)
    assert_same_bits(kernels.best_swaps(*cpu, NMPattern(pattern).n, m), expected)
    for rows, columns in ((0, 3), (7, 0)):
        w, r, code, block = cpu
        none = w[:rows, :, :columns], r[:rows, :, :columns], code[:rows, :columns], block[..., :columns]
        n = NMPattern(pattern).n
        assert_same_bits(kernels.best_swaps(*none, n, m), reference.best_swaps(*none, n, m))
    swapped = mk.expand_mask(codes ^ swap, pattern).view(-1, m)
    assert (swapped.sum(1) == NMPattern(pattern).n).all()


def test_a_cpu_finds_swaps_by_machine_code(compiled_reference, monkeypatch):
    weight, gram = (tensor.cpu() for tensor in problem(3, 16))
    operands = by_place(weight, weight @ gram, mk.top_n_mask(weight.abs(), "2:4"), gram, 4)
    calls = []

    def recorded(*arguments):
        calls.append(arguments[-2:])
        return kernels.best_swaps(*arguments)

    monkeypatch.setattr(table, "best_swaps", recorded)
    assert_same_bits(torch.ops.maskpro.best_swaps(*operands, 2, 4), reference.best_swaps(*operands, 2, 4))
    assert calls == [(2, 4)]


def test_opcheck():
    weight, gram = problem(3, 16)
    codes = mk.top_n_mask(weight.abs(), "2:4")
    operands = by_place(weight, weight @ gram, codes, gram, 4)
    torch.library.opcheck(torch.ops.maskpro.best_swaps.default, (*operands, 2, 4))


@pytest.mark.parametrize("pattern", PATTERNS[:3])
def test_the_change_is_that_of_the_error(pattern):
    """Against the error of every swap of every group, worked out again."""
    m = NMPattern(pattern).m
    weight, gram = problem(3, 2 * m)
    codes = mk.top_n_mask(weight.abs(), pattern)
    difference = torch.where(mk.expand_mask(codes, pattern), 0.0, -weight)
    operands = by_place(weight, difference @ gram, codes, gram, m)
    change, swap = reference.best_swaps(*(t.cpu() for t in operands), NMPattern(pattern).n, m)
    before = errors(weight, codes, gram, pattern)
    for row, group in itertools.product(range(3), range(2)):
        code = int(codes[row, group])
        kept = kept_of(code, m)
        changes = {}
        for i, j in itertools.product(kept, set(range(m)) - set(kept)):
            other = codes.clone()
            other[row, group] = code ^ (1 << i | 1 << j)
            changes[1 << i | 1 << j] = float((errors(weight, other, gram, pattern) - before)[row])
        assert float(change[row, group]) == pytest.approx(min(changes.values()), rel=1e-4, abs=1e-4)
        assert changes[int(swap[row, group])] == pytest.approx(min(changes.values()), rel=1e-4, abs=1e-4)


@pytest.mark.usefixtures("eager_reference")
@settings(max_examples=30)
@given(
    pattern=st.sampled_from(PATTERNS),
    rows=st.integers(1, 9),
    groups=st.integers(1, 12),
    seed=st.integers(0, 1 << 20),
    sweeps=st.integers(0, 12),
    tokens=st.integers(1, 64),
)
def test_the_error_of_no_row_rises(pattern, rows, groups, seed, sweeps, tokens):
    m = NMPattern(pattern).m
    weight, gram = problem(rows, groups * m, seed, tokens)
    codes = mk.top_n_mask(weight.abs(), pattern)
    before = errors(weight, codes, gram, pattern)
    found, fallen = swap_descent(weight, codes, gram, pattern, sweeps)
    after = errors(weight, found, gram, pattern)
    assert (after <= before).all()
    torch.testing.assert_close(fallen.double(), before - after, rtol=1e-3, atol=1e-5 * float(before.max()))
    assert (mk.expand_mask(found, pattern).view(-1, m).sum(1) == NMPattern(pattern).n).all()


@pytest.mark.parametrize("pattern", ["1:2", "1:4", "2:4"])
@pytest.mark.parametrize("seed", range(5))
def test_four_groups_end_in_a_local_optimum_under_swaps(seed, pattern):
    n, m = NMPattern(pattern).n, NMPattern(pattern).m
    weight, gram = problem(1, 4 * m, seed)
    codes, _ = swap_descent(weight, mk.top_n_mask(weight.abs(), pattern), gram, pattern, sweeps=200)
    sets = torch.tensor(subset_codes(n, m)).to(codes.dtype)
    everything = torch.cartesian_prod(*[sets] * 4).to(KERNEL_DEVICE)
    energy = errors(weight.expand(len(everything), -1), everything, gram, pattern)
    difference = (everything ^ codes).cpu().to(torch.int64)
    swapped_bits = sum(difference >> i & 1 for i in range(m))
    neighbours = (swapped_bits.sum(1) == 2) & (swapped_bits.max(1).values == 2)
    assert neighbours.sum() == 4 * n * (m - n)
    own = energy[(everything == codes).all(1)]
    assert (energy[neighbours.to(energy.device)] >= own * (1 - 2e-6)).all()


def test_rows_do_not_depend_on_each_other(compiled_reference, monkeypatch):
    weight, gram = problem(9, 64)
    codes = mk.top_n_mask(weight.abs(), "2:4")
    whole, _ = swap_descent(weight, codes, gram, "2:4")
    monkeypatch.setattr("maskpro_kernels.prune.reconstruction.PIECE", 2 * 64)
    pieces, _ = swap_descent(weight, codes, gram, "2:4")
    assert_same_bits(whole, pieces)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"gram": torch.eye(16, device="meta")}, ValueError, "gram: expected .* on cpu, got .* on meta"),
        ({"gram": torch.eye(8)}, ValueError, r"gram: expected a float32 tensor \[16, 16\]"),
        ({"codes": torch.zeros(3, 3, dtype=torch.uint8)}, ValueError, "codes: expected shape"),
    ],
)
def test_bad_arguments_of_swap_descent(change, error, message):
    weight, gram = problem(3, 16)
    given = {"weight": weight.cpu(), "codes": mk.top_n_mask(weight.abs(), "2:4").cpu(), "gram": gram.cpu()} | change
    with pytest.raises(error, match=message):
        swap_descent(**given, pattern="2:4")


class Residual(nn.Module):
    """Two Linears that share an input, and one after them."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.out = nn.Linear(16, 16), nn.Linear(16, 16, bias=False), nn.Linear(16, 16)

    def forward(self, x, scale):
        return x + scale * self.out(torch.relu(self.left(x)) * self.right(x))


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Residual() for _ in range(3)])

    def forward(self, x):
        for block in self.blocks:
            x = block(x, scale=0.5)
        return x


class Tangled(Stack):
    """Equal layers, but no chain of blocks: the input of each is the sum of all before."""

    def forward(self, x):
        total = x
        for block in self.blocks:
            total = total + block(total * 1.0, scale=0.5)
        return total


def layers_of(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def step_by_step(model, layers, batches, pattern):
    """Reconstruction by hand: masks written into the weights, the whole model run for every layer."""
    weights = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    codes = {name: mk.top_n_mask(weight.abs(), pattern) for name, weight in weights.items()}

    def mask(name):
        kept = mk.expand_mask(codes[name], pattern)
        layers[name].weight.data.copy_(torch.where(kept, weights[name], 0))

    for name in layers:
        mask(name)
    for name, layer in layers.items():
        inputs = []
        handle = layer.register_forward_pre_hook(lambda module, args, inputs=inputs: inputs.append(args[0].detach()))
        for batch in batches:
            model(batch)
        handle.remove()
        x = torch.cat(inputs).reshape(-1, layer.in_features)
        gram = x.T @ x
        gram += torch.diag(0.01 * gram.diagonal().mean().expand(len(gram)))
        codes[name], _ = swap_descent(weights[name], codes[name], gram, pattern)
        mask(name)
    for name, layer in layers.items():
        layer.weight.data.copy_(weights[name])
    return codes


@pytest.mark.parametrize("model", [slow(Stack), Tangled])
def test_each_layer_sees_the_inputs_of_the_masked_model(model, compiled_reference):
    torch.manual_seed(0)
    model = model().to(KERNEL_DEVICE)
    layers = layers_of(model)
    batches = [torch.randn(5, 7, 16, device=KERNEL_DEVICE) for _ in range(3)]
    start = initial_codes(layers, "2:4", "magnitude")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = reconstruct(model, layers, start, "2:4", batches).codes
    expected = step_by_step(model, layers, batches, "2:4")
    same = [(found[name] == expected[name]).float().mean() for name in layers]
    # the order of sums differs, and a tie may fall the other way
    assert min(same) > 0.9 and sum(same) / len(same) > 0.98, same
    assert_same_bits(model.state_dict(), before)
    assert all("forward" not in layer.__dict__ and not layer._forward_pre_hooks for layer in layers.values())


@pytest.mark.parametrize("pattern", PATTERNS[:4])
def test_outputs_come_closer_to_those_of_the_dense_model(pattern, eager_reference):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(3)))
    layers = layers_of(model)
    # few directions carry most of the inputs, as in language models
    mixing = torch.randn(32, 32) * 0.8 ** torch.arange(32)[:, None]
    batches = [torch.randn(64, 32) @ mixing for _ in range(8)]
    with torch.no_grad():
        dense = [model(x) for x in batches]

    def distance(codes):
        weights = {name: layer.weight.data for name, layer in layers.items()}
        for name, layer in layers.items():
            layer.weight.data = torch.where(mk.expand_mask(codes[name], pattern), weights[name], 0)
        with torch.no_grad():
            total = sum(float((model(x) - y).square().sum()) for x, y in zip(batches, dense, strict=True))
        for name, layer in layers.items():
            layer.weight.data = weights[name]
        return total

    start = initial_codes(layers, pattern, "wanda", model, batches)
    found = reconstruct(model, layers, start, pattern, batches).codes
    assert distance(found) < 0.9 * distance(start)


def test_a_language_model_is_a_chain_of_blocks(eager_reference):
    model = tiny_model()
    batches = [torch.randint(0, model.config.vocab_size, (2, 12)) for _ in range(2)]
    layers = {name: module for name, module in layers_of(model).items() if name != "lm_head"}
    calls = [((batch,), {}) for batch in batches]
    with torch.no_grad(), calibration._without_cache(model):
        found = list(calls_by_block(model, layers, calls))
        stages = layers_in_order(*found[0], layers)
    assert [block for block, _ in found] == list(model.model.layers)
    assert [[[name.split(".")[-1] for name in names] for names in groups] for groups, _ in stages] == [
        [["q_proj", "k_proj", "v_proj"]],
        [["o_proj"]],
        [["gate_proj", "up_proj"]],
        [["down_proj"]],
    ]
    assert all(once for _, once in stages)
    assert model.config.use_cache
    found = reconstruct(model, layers, initial_codes(layers, "2:4", "magnitude"), "2:4", batches).codes
    assert found.keys() == layers.keys()


def test_hooks_of_a_block_change_its_input_once():
    """Also where the block runs by itself."""
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(2)))
    for block in model:
        block.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))
    calls = [((x,), {}) for x in torch.randn(2, 3, 8)]
    layers, seen = layers_of(model), []
    with torch.no_grad():
        expected = [x for (x,) in (call[0] for call in calls)]
        for block, block_calls in calls_by_block(model, layers, calls):
            with watching_inputs([(block[0], seen.append)]):
                for call in block_calls:
                    run_call(block, call)
            assert_same_bits(seen, [x + 1 for x in expected])
            expected, seen[:] = [(block[0](x + 1)).relu() for x in expected], []


def test_convert_takes_reconstruction_masks_from_any_iterable(eager_reference):
    torch.manual_seed(0)
    model = Stack()
    batches = [torch.randn(32, 16) for _ in range(2)]
    layers = layers_of(model)
    start = initial_codes(layers, "2:4", "wanda", model, batches)
    expected = reconstruct(model, layers, start, "2:4", batches).codes
    mk.convert(model, "2:4", init="reconstruction", calibration=(batch for batch in batches))
    for name, layer in model.named_modules():
        if isinstance(layer, mk.MaskedLinear):
            assert_same_bits(mk.top_n_mask(layer.logits.detach(), "2:4"), expected[name])


def test_reconstruction_needs_batches_that_reach_every_layer():
    model = Stack()
    layers = layers_of(model)
    start = initial_codes(layers, "2:4", "magnitude")
    with pytest.raises(ValueError, match="calibration: expected at least one batch, got none"):
        reconstruct(model, layers, start, "2:4", [])
    with pytest.raises(TypeError, match="calibration: expected an iterable of batches, got int"):
        reconstruct(model, layers, start, "2:4", 3)
    model.unused = nn.Linear(16, 16)
    layers["unused"] = model.unused
    start["unused"] = start["blocks.0.out"]
    with pytest.raises(ValueError, match=r"calibration: .*run every layer, \['unused'\] got no input"):
        reconstruct(model, layers, start, "2:4", [torch.randn(1, 16)])
    assert all("forward" not in layer.__dict__ for layer in layers.values())
