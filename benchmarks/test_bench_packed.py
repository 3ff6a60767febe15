"""A linear layer with a packed 2:4 weight, by number of tokens: decoding and short prompts.

Set against the dense layer, against unpacking first, and on a GPU against torch's semi-structured matmul and the dense
layer under torch.compile. On a CPU a weight is multiplied again and again, which leaves it in the caches, and in turn
with as many others as no cache holds, as a model's layers are while it decodes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from dense_loop import dense_loop
from harness import DEVICE, Work
from torch import Tensor, nn

import maskpro_kernels as mk
from maskpro_kernels.packed import hold_in_huge_pages, move_into_huge_pages

PATTERN = "2:4"
DTYPE = "bfloat16"
# Layers of LLaMA-2-7B, on a GPU of 70B and on a CPU of SmolLM2-135M as well
LARGE = [(8192, 28672), (4096, 11008)] if DEVICE == "cuda" else [(576, 1536), (1536, 576)]
SHAPES = [(4096, 4096), (11008, 4096), *LARGE]
TOKENS = [1, 16, 64, 128, 1024] if DEVICE == "cuda" else [1, 2, 4, 8, 16, 64]
# torch's kernels refuse fewer rows of activations
SEMI_STRUCTURED_TOKENS = 8


class Case:
    def __init__(self, rows: int, k: int, tokens: int):
        generator = torch.Generator(DEVICE).manual_seed(0)
        weight = torch.randn(rows, k, generator=generator, device=DEVICE).bfloat16()
        mask = mk.expand_mask(mk.top_n_mask(weight.abs(), PATTERN), PATTERN)
        self.weight = torch.where(mask, weight, 0)
        self.x = torch.randn(tokens, k, generator=generator, device=DEVICE).bfloat16()
        self.packed = mk.pack_24(self.weight)
        self.int8, self.int4 = (mk.pack_nm(self.weight, PATTERN, values) for values in ("int8", "int4"))
        self.layer, *self.rounded = (mk.Sparse24Linear(packed) for packed in (self.packed, self.int8, self.int4))
        self.compiled = torch.compile(nn.functional.linear, dynamic=False)

    def dense(self):
        return nn.functional.linear(self.x, self.weight)

    def providers(self) -> dict[str, Callable[[], Tensor]]:
        functions = {
            "packed": lambda: self.layer(self.x),
            "packed, int8": lambda: self.rounded[0](self.x),
            "packed, int4": lambda: self.rounded[1](self.x),
            "unpack, then matmul": lambda: nn.functional.linear(self.x, self.packed.unpack()),
            "dense": self.dense,
        }
        if DEVICE == "cuda":
            functions["dense under torch.compile"] = lambda: self.compiled(self.x, self.weight)
            if len(self.x) >= SEMI_STRUCTURED_TOKENS:
                semi_structured = torch.sparse.to_sparse_semi_structured(self.weight)
                functions["torch semi-structured"] = lambda: nn.functional.linear(self.x, semi_structured)
        return functions

    def check(self, providers) -> None:
        """Each within twice the error of torch's dense product in the same dtype."""
        for name, provider in providers.items():
            rounded = next((stored for stored in (self.int8, self.int4) if stored.kind in name), None)
            weight = self.weight if rounded is None else rounded.unpack()
            exact = self.x.double() @ weight.double().T
            torch_error = (nn.functional.linear(self.x, weight).double() - exact).abs().max()
            assert (provider().double() - exact).abs().max() <= 2 * torch_error + 1e-6 * exact.abs().max(), name


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_packed_forward(shape, tokens, compare):
    rows, k = shape
    with torch.no_grad():
        case = Case(rows, k, tokens)
        providers = case.providers()
        # nine bits a weight
        work = Work(bytes=rows * k * 9 // 8 + 2 * tokens * (rows + k), flops=2 * tokens * rows * k)
        compare(
            lambda: case.check(providers),
            providers,
            work=work,
            op="packed forward",
            pattern=PATTERN,
            shape=(tokens, *shape),
            dtype=DTYPE,
        )


def cache_bytes() -> int:
    """Bytes of the largest cache of a core."""
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max(int(size.removesuffix("K")) << 10 for size in sizes)


def copies(make: Callable[[], nn.Module], nbytes: int) -> nn.ModuleList:
    """Layers of ``nbytes`` each that no cache holds."""
    # half as many again, for a cache may keep what has just been read
    return nn.ModuleList(make() for _ in range(max(2, 3 * cache_bytes() // (2 * nbytes))))


def packed_layers(packed: mk.PackedNM) -> nn.ModuleList:
    """Copies of a packed layer that no cache holds."""

    def make() -> mk.NMLinear:
        parts = (None if x is None else x.clone() for x in (packed.values, packed.bitmask, packed.scales))
        values, bitmask, scales = parts
        return mk.Sparse24Linear(mk.PackedNM(values, bitmask, PATTERN, scales))

    return copies(make, packed.nbytes)


def in_huge_pages(layers: nn.ModuleList) -> nn.ModuleList:
    """The layers, with packed weights in huge pages."""
    hold_in_huge_pages(layers)
    return layers


class DenseLoop(nn.Module):
    """A layer, so that it costs in Python what the others do."""

    def __init__(self, weight: Tensor, loop: Callable[[Tensor, Tensor], Tensor]):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.loop = loop

    def forward(self, x: Tensor) -> Tensor:
        return self.loop(x, self.weight)


def in_turn(layers: Iterable[nn.Module], x: Tensor) -> Callable[[], Tensor]:
    """The product of x and the next of the layers at each call."""
    following = itertools.cycle(layers)
    return lambda: next(following)(x)


@pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU each call finds empty caches anyway")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_packed_decoding(shape, compare):
    """One token, and weights from memory."""
    rows, k = shape
    with torch.no_grad():
        case = Case(rows, k, 1)
        bfloat16_loop = dense_loop(torch.bfloat16)

        def dense(dtype: torch.dtype) -> nn.ModuleList:
            def make() -> nn.Linear:
                layer = nn.Linear(k, rows, bias=False, dtype=dtype)
                layer.weight.copy_(case.weight)
                return layer

            return copies(make, rows * k * dtype.itemsize)

        loops = [DenseLoop(layer.weight, bfloat16_loop) for layer in dense(torch.bfloat16)]
        # the quickest that a dense product can be: packed layers have that too
        move_into_huge_pages(loop.weight for loop in loops)
        providers = {
            "packed": in_turn(in_huge_pages(packed_layers(case.packed)), case.x),
            "packed, int8": in_turn(in_huge_pages(packed_layers(case.int8)), case.x),
            "packed, int4": in_turn(in_huge_pages(packed_layers(case.int4)), case.x),
            "dense": in_turn(dense(torch.bfloat16), case.x),
            "dense loop": in_turn(loops, case.x),
            "dense, float32": in_turn(dense(torch.float32), case.x.float()),
        }
        compare(
            lambda: case.check(providers),
            providers,
            work=Work(bytes=rows * k * 9 // 8 + 2 * (rows + k), flops=2 * rows * k, from_memory=True),
            op="packed decoding",
            pattern=PATTERN,
            shape=(1, *shape),
            dtype=DTYPE,
        )


@pytest.mark.skipif(DEVICE == "cuda", reason="the pages are a CPU's")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_huge_pages(shape, compare):
    """One token, and packed weights from memory, in small and in huge pages."""
    rows, k = shape
    with torch.no_grad():
        case = Case(rows, k, 1)
        providers = {}
        for name, packed in (("packed", case.packed), ("packed, int8", case.int8), ("packed, int4", case.int4)):
            providers[name] = in_turn(packed_layers(packed), case.x)
            providers[f"{name}, huge pages"] = in_turn(in_huge_pages(packed_layers(packed)), case.x)
        compare(
            lambda: case.check(providers),
            providers,
            work=Work(bytes=rows * k * 9 // 8 + 2 * (rows + k), flops=2 * rows * k, from_memory=True),
            op="huge pages",
            pattern=PATTERN,
            shape=(1, *shape),
            dtype=DTYPE,
        )
