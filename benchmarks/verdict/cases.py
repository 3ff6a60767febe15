"""The cases: what the kernels compute, how a result is judged, what it should cost, and what torch would do.

Draws, scores and updates are compared with the bits of the CPU, products with the error budget of docs/verification.md,
and those of unit vectors with the bits of the weight.
On a GPU a case has a layer of LLaMA-2-7B, on an emulator a small one.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, partial

import cost_model
import torch
import triton
import triton.language as tl
from cards import Card
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS

import maskpro_kernels as mk
from maskpro_kernels import ops
from maskpro_kernels.ops.counter import CachedMask, Counter, MaskSource
from maskpro_kernels.ops.pattern import metadata_of
from maskpro_kernels.ops.triton import masked_gemm, tiles
from maskpro_kernels.ops.triton.device.arithmetic import scaled_reciprocal

from . import needs, served

PATTERN = "2:4"
N = 2
M = 4
GAP = 10.0
ALTERNATIVES = ("dense", "CUTLASS", "cuSPARSELt", "two passes")


class NotRun(Exception):
    """A case that this machine cannot run; the message says what it lacks."""


@dataclass
class Work:
    """A case.

    Attributes:
        shape: of the page.
        ours: what is checked and timed.
        check: raises AssertionError where its result is wrong.
        model: seconds on a card; None: it is not timed.
        alternatives: routes of torch, of the columns ALTERNATIVES; each makes a call.
    """

    shape: str
    ours: Callable[[], object]
    check: Callable[[object], None]
    model: Callable[[Card], float] | None = None
    alternatives: dict[str, Callable[[], Callable]] = field(default_factory=dict)


class Run:
    """Where the cases run: on a GPU with a layer of LLaMA-2-7B, or on an emulator with a small one."""

    def __init__(self, emulator=None):
        self.emulator = emulator
        self.device = "cpu" if emulator else "cuda"
        self.rows, self.k = (96, 128) if emulator else (11008, 4096)
        self.layer = cache(partial(Layer, self))
        self.packed = cache(partial(packed_weight, self))

    def random(self, *shape: int, seed: int) -> Tensor:
        """bfloat16, with the same values on each device."""
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16().to(self.device)


class Layer:
    """A weight, logits with a gap, and the mask that the CPU draws."""

    def __init__(self, run: Run, gap: float):
        self.weight = run.random(run.rows, run.k, seed=1)
        mask = mk.expand_mask(on_cpu(mk.top_n_mask, self.weight.abs(), PATTERN), PATTERN).to(run.device)
        self.logits = gap * mask + 0.1 * run.random(run.rows, run.k, seed=2).float()
        numbers = (torch.tensor(number, device=run.device) for number in (0x123456789ABCDEF, 7, 3, 0))
        self.counter = Counter(*numbers, 0, run.k // M)
        self.codes = on_cpu(ops.sample_mask, self.logits, N, M, 1.0, self.counter).to(run.device)
        self.masked = torch.where(mk.expand_mask(self.codes, PATTERN), self.weight, 0)


@contextlib.contextmanager
def reference() -> Iterator[None]:
    """CPU tensors do not use the kernels of an emulator."""
    target = tiles.ON_CPU
    tiles.ON_CPU = None
    try:
        yield
    finally:
        tiles.ON_CPU = target


def on_cpu(call: Callable, *arguments: object):
    """Call the reference with copies of the arguments on the CPU."""
    with reference():
        return call(*map(copy_on_cpu, arguments))


def copy_on_cpu(argument: object):
    if isinstance(argument, Counter):
        return Counter(*map(copy_on_cpu, argument))
    return argument.cpu().clone() if isinstance(argument, Tensor) else argument


def assert_same_bits(result: Tensor, expected: Tensor) -> None:
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[expected.itemsize]
    differs = int((result.cpu().view(integers) != expected.view(integers)).sum())
    assert not differs, f"{differs} of {expected.numel()} have other bits than on the CPU"


def assert_product(result: Tensor, x: Tensor, weight: Tensor) -> None:
    """Within the error budget of x @ weight.T."""
    exact = x.double() @ weight.double().t()
    error, torch_error = (float((y.double() - exact).abs().max()) for y in (result, linear(x, weight)))
    limit = 2 * torch_error + 1e-6 * float(exact.abs().max())
    assert error <= limit, f"error {error:.3g}, expected at most {limit:.3g}"


def assert_columns(product: Callable[[Tensor], Tensor], weight: Tensor, tokens: int) -> None:
    """Products with unit vectors have the bits of the weight's columns: small weights count as much as large ones."""
    k = weight.shape[1]
    columns = torch.randperm(k, generator=torch.Generator().manual_seed(6))[:tokens]
    result = product(torch.eye(k)[columns].to(weight))
    # a sum that begins with zero has no -0
    assert_same_bits(result, (weight.t()[columns.to(weight.device)] + 0.0).cpu())


def product_check(product: Callable[[Tensor], Tensor], x: Tensor, weight: Tensor) -> Callable[[Tensor], None]:
    """Check of product(x), which should be x @ weight.T."""

    def check(result: Tensor) -> None:
        assert_product(result, x, weight)
        assert_columns(product, weight, len(x))

    return check


@triton.jit
def reciprocal_kernel(x, out, total, SCALE: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < total
    tl.store(out + offsets, scaled_reciprocal(tl.load(x + offsets, mask=inside, other=1.0), SCALE), mask=inside)


def reciprocals(x: Tensor, scale: float) -> Tensor:
    """scale / x, by ``scaled_reciprocal``."""
    out = torch.empty_like(x)
    grid = (triton.cdiv(len(x), 1024),)
    reciprocal_kernel[grid](x, out, len(x), SCALE=scale, BLOCK=1024, enable_fp_fusion=False)
    return out


def all_reciprocals(run: Run) -> Work:
    """Of all 2^23 significands, or on an emulator of 4,096 with both ends."""
    count, exponents = (4096, [0]) if run.emulator else (1 << 23, [-60, -1, 0, 1, 59])
    significands = (torch.arange(count) * ((1 << 23) - 1) // (count - 1)).int()
    x = torch.cat([(significands | 127 + exponent << 23).view(torch.float32) for exponent in exponents])

    def check(results: list[Tensor]) -> None:
        for y, expected in zip(results, (4096.0 / x, 1 / 4096 / -x), strict=True):
            assert_same_bits(y, expected)

    x_on_device = x.to(run.device)
    return Work(f"{count:,}", lambda: [reciprocals(x_on_device, 4096.0), reciprocals(-x_on_device, 1 / 4096)], check)


def gradients(run: Run) -> Work:
    """Of x and of the weight. The gradient of x has its kernel, for rows are a multiple of 16, but of no tile."""
    tokens = 33
    rows = 304
    k = 64 if run.emulator else 528
    grad, x, weight = (run.random(*size, seed=7) for size in ((tokens, rows), (tokens, k), (rows, k)))
    codes = on_cpu(mk.top_n_mask, weight, PATTERN).to(run.device)
    mask = MaskSource(codes, "codes", N, M, 1.0)
    kept = mk.expand_mask(codes, PATTERN)

    def check(results: tuple[Tensor, Tensor]) -> None:
        x_grad, weight_grad = results
        assert_product(x_grad, grad, torch.where(kept, weight, 0).t())
        assert not weight_grad[~kept].any(), "gradients of dropped weights: expected zeros"
        dense_grad = linear(grad.t(), x.t())
        assert_product(torch.where(kept, weight_grad, dense_grad), grad.t(), x.t())

    def ours() -> tuple[Tensor, Tensor]:
        return ops.masked_linear_input_grad(grad, weight, mask), ops.masked_linear_weight_grad(grad, x, mask)

    return Work(f"{tokens} x {rows} x {k}", ours, check)


def over_groups(run: Run, kernel: str) -> Work:
    layer = run.layer(GAP)
    logits = layer.logits
    if kernel == "sample_mask":
        call = ops.sample_mask
        arguments = N, M, 1.0, layer.counter
    elif kernel == "mask_score":
        call = ops.mask_score
        arguments = layer.codes, run.random(run.rows, run.k // M, seed=3).float(), N, M, 1.0
    else:
        logits = logits.clone()
        coef = torch.tensor([0.37], device=run.device)
        arguments = coef, N, M, 1.0, layer.counter._replace(draw=layer.counter.draw[None])

        def call(logits: Tensor, *arguments) -> Tensor:
            ops.score_update_(logits, *arguments)
            return logits

    def check(result: Tensor) -> None:
        assert_same_bits(result, on_cpu(call, layer.logits, *arguments))

    model = partial(cost_model.over_groups, kernel=kernel, rows=run.rows, k=run.k, gap=GAP)
    return Work(f"{run.rows} x {run.k}", partial(call, logits, *arguments), check, model)


def masked(run: Run, tokens: int, gap: float, kind: str = "drawn") -> Work:
    """One pass, whatever the limit of the target; the two passes of torch mask the weight first."""
    layer = run.layer(gap)
    x = run.random(tokens, run.k, seed=4)
    mask = MaskSource(layer.codes if kind == "codes" else layer.logits, kind, N, M, 1.0, layer.counter)

    def call(x: Tensor, max_tokens: int = tokens) -> Tensor:
        limit = masked_gemm.one_pass_tokens
        masked_gemm.one_pass_tokens = lambda *_: max_tokens
        try:
            return ops.masked_linear(x, layer.weight, None, False, mask)[0]
        finally:
            masked_gemm.one_pass_tokens = limit

    check = product_check(call, x, layer.masked)
    model = partial(cost_model.masked, tokens=tokens, rows=run.rows, k=run.k, gap=gap, kind=kind)
    alternatives = {"dense": lambda: partial(linear, x, layer.weight), "two passes": lambda: partial(call, x, 0)}
    return Work(f"{tokens} x {run.rows} x {run.k}", partial(call, x), check, model, alternatives)


def masked_by_default(run: Run) -> Work:
    """In as many passes as the target takes."""
    tokens = 128
    layer = run.layer(GAP)
    x = run.random(tokens, run.k, seed=4)
    mask = MaskSource(layer.logits, "drawn", N, M, 1.0, layer.counter)

    def call(x: Tensor) -> Tensor:
        return ops.masked_linear(x, layer.weight, None, False, mask)[0]

    check = product_check(call, x, layer.masked)
    model = partial(cost_model.by_default, tokens=tokens, rows=run.rows, k=run.k, gap=GAP)
    alternatives = {"dense": lambda: partial(linear, x, layer.weight)}
    return Work(f"{tokens} x {run.rows} x {run.k}", partial(call, x), check, model, alternatives)


def training_step(run: Run) -> Work:
    """Straight-through by a MaskedLinear: draw, forward, gradients of x and of the weight, update of the logits."""
    tokens = 40 if run.emulator else 2048
    rate = torch.tensor(0.5, device=run.device)
    weight = run.layer(GAP).weight
    logits = run.layer(GAP).logits
    layer = mk.MaskedLinear(weight, None, logits.clone(), PATTERN).train()
    x = run.random(tokens, run.k, seed=8).requires_grad_()
    upstream = run.random(tokens, run.rows, seed=9) / tokens

    def update(grad: Tensor, x: Tensor, weight: Tensor, mask: MaskSource) -> None:
        ops.straight_through_update_(grad, x, weight, 1.0, rate, 2.0, mask)

    layer.logits_backward = update

    def ours() -> tuple[Tensor, Tensor]:
        # once for the step, as a trainer draws it
        layer.cached_mask = CachedMask(layer.drawn_codes(), layer.own_logits, layer.counter_state)
        with torch.enable_grad():
            y = layer(x)
            x_grad, _ = torch.autograd.grad(y, [x, layer.logits], upstream, allow_unused=True)
        layer.cached_mask = None
        return y.detach(), x_grad

    def check(result: tuple[Tensor, Tensor]) -> None:
        y, x_grad = result
        codes = on_cpu(ops.sample_mask, logits, N, M, 1.0, layer.counter())
        kept = mk.expand_mask(codes, PATTERN).to(run.device)
        masked_weight = torch.where(kept, weight, 0)
        assert_product(y, x.detach(), masked_weight)
        assert_product(x_grad, upstream, masked_weight.t())
        change = (rate * slope(upstream.float(), x.detach().float(), weight.float(), kept)).clamp_(-2.0, 2.0)
        error = float((layer.logits.detach() - (logits - change)).abs().max())
        limit = 1e-4 * float(change.abs().max())
        assert error <= limit, f"logits: error {error:.3g}, expected at most {limit:.3g}"

    def dense() -> None:
        for first, second in ((x, weight.t()), (upstream, weight), (upstream.t(), x)):
            torch.mm(first.detach(), second)

    model = partial(cost_model.training_step, tokens=tokens, rows=run.rows, k=run.k, gap=GAP)
    return Work(f"{tokens} x {run.rows} x {run.k}", ours, check, model, {"dense": lambda: dense})


def slope(grad: Tensor, x: Tensor, weight: Tensor, kept: Tensor) -> Tensor:
    """``reference.group_mask_slope`` of float32 operands, for a loss that is a mean over all tokens."""
    second = torch.outer(grad.square().sum(0), x.square().sum(0))
    h = weight * (grad.t() @ x) + torch.where(kept, -0.5, 0.5) * weight.square() * second
    groups = h.view(len(h), -1, M)
    return (groups - groups.mean(2, keepdim=True)).view(weight.shape)


def packed_weight(run: Run, stored: str) -> tuple[list[Tensor | None], Tensor]:
    """(values, bitmask or metadata, scales; the weight that the CPU unpacks), on the device."""
    packed = mk.pack_nm(run.layer(GAP).masked, PATTERN, stored)
    bitmask = packed.bitmask
    if stored == "keep" and bitmask.dtype != torch.int16:
        bitmask = metadata_of(bitmask)
    copy = packed.to("cpu")
    with reference():
        weight = copy.unpack().to(run.device)
    return [packed.values, bitmask, packed.scales], weight


def packed(run: Run, tokens: int, stored: str) -> Work:
    """A product with a packed weight, by the route of its tokens, beside torch's on sparse tensor cores."""
    tokens = min(tokens, 72) if run.emulator else tokens
    x = run.random(tokens, run.k, seed=5)
    tensors, weight = run.packed(stored)
    bits = {"int8": 8, "int4": 4}.get(stored)

    def model(card: Card) -> float:
        size = tokens, run.rows, run.k
        return cost_model.packed(card, *size, bits) if bits else cost_model.sparse(card, *size)[1]

    alternatives = {"dense": lambda: partial(linear, x, weight)}
    if not bits:
        alternatives |= {
            "CUTLASS": lambda: partial(linear, x, SparseSemiStructuredTensorCUTLASS.from_dense(weight)),
            "cuSPARSELt": lambda: partial(linear, x, SparseSemiStructuredTensorCUSPARSELT.from_dense(weight)),
        }

    def call(x: Tensor) -> Tensor:
        return ops.nm_linear(x, *tensors, None, N, M)

    check = product_check(call, x, weight)
    return Work(f"{tokens} x {run.rows} x {run.k}", partial(call, x), check, model, alternatives)


def unpack(run: Run) -> Work:
    (values, bitmask, _), weight = run.packed("keep")

    def check(result: Tensor) -> None:
        assert_same_bits(result, weight.cpu())

    model = partial(cost_model.unpacked, rows=run.rows, k=run.k)
    return Work(f"{run.rows} x {run.k}", partial(ops.unpack_nm, values, bitmask, N, M), check, model)


def small_layers(device: str) -> dict[str, nn.Module]:
    """A masked layer that draws, and a packed one."""
    torch.manual_seed(0)
    dense = nn.Linear(256, 512).bfloat16().to(device)
    masked = mk.MaskedLinear.from_linear(dense, PATTERN).train()
    return {"masked": masked, "packed": mk.Sparse24Linear.from_masked(masked)}


def compiled(run: Run, kind: str) -> Work:
    """A layer under torch.compile has the bits of the layer without."""
    layer = small_layers(run.device)[kind]
    x = run.random(16, 256, seed=10)

    def ours() -> Tensor:
        # an emulator has no device for the code of inductor
        return torch.compile(layer, backend="aot_eager" if run.emulator else "inductor", fullgraph=True)(x)

    def check(result: Tensor) -> None:
        assert_same_bits(result, layer(x).cpu())

    return Work("16 x 512 x 256", ours, check)


def second_gpu(run: Run) -> Work:
    """Layers on cuda:1 while cuda:0 is the current device."""
    if run.emulator or torch.cuda.device_count() < 2:
        raise NotRun("one GPU")
    layers = small_layers("cuda:1")
    x = run.random(16, 256, seed=10)

    def ours() -> list[Tensor]:
        assert torch.cuda.current_device() == 0
        return [layer(x.to("cuda:1")) for layer in layers.values()]

    def check(results: list[Tensor]) -> None:
        for result, expected in zip(results, (layer(x) for layer in small_layers("cuda:0").values()), strict=True):
            assert result.device == torch.device("cuda:1")
            assert_same_bits(result, expected.cpu())

    return Work("16 x 512 x 256", ours, check)


def served_by_vllm(run: Run) -> Work:
    """A model with layers of all kinds, in a process of its own: vLLM keeps what it sets for a process."""
    if run.emulator:
        raise NotRun("vLLM has no emulator")
    if reason := needs.of_vllm():
        raise NotRun(reason)

    def ours() -> dict:
        command = [sys.executable, served.__file__, "bfloat16"]
        variables = os.environ | {"PYTHONPATH": os.pathsep.join([str(needs.ROOT), os.environ.get("PYTHONPATH", "")])}
        done = subprocess.run(command, env=variables, capture_output=True, text=True)
        lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
        assert done.returncode == 0, (
            f"vLLM has ended with {done.returncode}: {lines[-1] if lines else 'without a word'}"
        )
        return json.loads(lines[-1])

    return Work(f"{served.LAYERS} layers of {served.HIDDEN}", ours, partial(served.check, on_gpu=True))


CASES: dict[str, Callable[[Run], Work]] = {
    "scaled_reciprocal": all_reciprocals,
    "gradients, 304 rows": gradients,
    "torch.compile, masked layer": partial(compiled, kind="masked"),
    "torch.compile, packed layer": partial(compiled, kind="packed"),
    "layers on a second GPU": second_gpu,
    "packed model in vLLM": served_by_vllm,
    "draw": partial(over_groups, kernel="sample_mask"),
    "score": partial(over_groups, kernel="mask_score"),
    "update": partial(over_groups, kernel="score_update"),
    "masked product, 32 tokens, gap 10": partial(masked, tokens=32, gap=GAP),
    "masked product, 128 tokens": masked_by_default,
    "in one pass, 128 tokens, gap 10": partial(masked, tokens=128, gap=GAP),
    "in one pass, 128 tokens, gap 8": partial(masked, tokens=128, gap=8.0),
    "in one pass, 128 tokens, gap 5.7": partial(masked, tokens=128, gap=5.7),
    "product by codes, 128 tokens": partial(masked, tokens=128, gap=GAP, kind="codes"),
    "training step, 2,048 tokens": training_step,
    **{
        f"{name} product, {tokens:,} token{'s' * (tokens > 1)}": partial(packed, tokens=tokens, stored=stored)
        for name, stored, counts in (
            ("int8", "int8", (1, 16, 64)),
            ("int4", "int4", (1, 16, 64)),
            ("2:4", "keep", (1, 16, 64, 1024, 4096)),
        )
        for tokens in counts
    },
    "unpack": unpack,
}
