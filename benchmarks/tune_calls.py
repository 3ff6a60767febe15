"""The calls by which ``tune.py`` times each kernel, and finds a wrong candidate.

Every kernel is called as the operations call it, past the dispatcher. Those that work in place are checked on copies.
They are timed on tensors of their own, with steps so small that thousands leave these as they are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

import maskpro_kernels as mk
from maskpro_kernels.counter import Counter, MaskSource
from maskpro_kernels.functional.checks import counter_of
from maskpro_kernels.modules import initial_logits
from maskpro_kernels.ops import reference
from maskpro_kernels.ops.layer_groups import GroupedLayer, LayerGroup, knows_score
from maskpro_kernels.ops.triton import (
    adamw,
    grouped,
    masked_gemm,
    packed,
    sampling,
    semi_structured,
    split_k,
    straight_through,
    swaps,
    tiles,
)
from maskpro_kernels.packed import quantized
from maskpro_kernels.pattern import bitmask_of

# Of kernels over groups, and over all layers of a model
MATRIX, LAYERS = (4096, 4096), 8
# Of a product whose columns several programs share out
FEW_ROWS = (1024, 4096)
# In training most draws are determined at the first, and few at the last
GAP, OPEN_GAP = 10.0, 5.0
INVERSE_TEMPERATURE, MAX_UPDATE = 1.0, 1e3
# Of a step: where it is checked, and where it is timed
WHOLE, LITTLE = 0.3, 1e-12


class Results(NamedTuple):
    """What a call gives: tensors whose bits no launch changes, and sums in an order that a launch chooses."""

    exact: tuple[Tensor, ...] = ()
    near: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Case:
    """A call in which a kernel is launched.

    Attributes:
        check: what it gives, on copies of what it changes.
        timed: the same call, to be repeated.
    """

    name: str
    check: Callable[[], Results]
    timed: Callable[[], object]


def exact(name: str, call: Callable[[], Tensor | tuple[Tensor, ...]]) -> Case:
    """Of a call that gives new tensors."""

    def check() -> Results:
        found = call()
        return Results(found if isinstance(found, tuple) else (found,))

    return Case(name, check, call)


def near(name: str, call: Callable[[], Tensor]) -> Case:
    return Case(name, lambda: Results(near=(call(),)), call)


def in_place(name: str, call: Callable[..., Results], tensors: tuple[Tensor, ...], whole, little) -> Case:
    """Of call(*tensors, step), which changes the tensors."""
    own = [tensor.clone() for tensor in tensors]
    return Case(name, lambda: call(*(tensor.clone() for tensor in tensors), whole), lambda: call(*own, little))


@dataclass(frozen=True)
class Matrix:
    """Logits [rows, K] of a layer in training, and what kernels take beside them."""

    n: int
    m: int
    device: str
    dtype: torch.dtype = torch.float32
    gap: float = GAP
    shape: tuple[int, int] | None = None

    @property
    def name(self) -> str:
        return f"{self.n}:{self.m}, {self.dtype}, gap {self.gap:g}"

    @functools.cached_property
    def generator(self) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(self.n + self.m)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        shape = shape or self.size
        return torch.randn(shape, generator=self.generator, device=self.device).to(dtype)

    def full(self, *shape: int, value: float) -> Tensor:
        return torch.full(shape, value, device=self.device)

    @property
    def size(self) -> tuple[int, int]:
        rows, k = self.shape or MATRIX
        return rows, k - k % self.m

    @functools.cached_property
    def codes(self) -> Tensor:
        return reference.top_n_mask(self.normal().abs(), n=self.n, m=self.m)

    @functools.cached_property
    def logits(self) -> Tensor:
        logits = initial_logits(self.codes, mk.NMPattern(f"{self.n}:{self.m}"), self.gap)
        return (logits + self.normal()).to(self.dtype)

    @functools.cached_property
    def counter(self) -> Counter:
        return counter_of(self.logits, mk.NMPattern(f"{self.n}:{self.m}"), seed=11, step=3, layer=5)

    def source(self, kind: str, logits: Tensor | None = None) -> MaskSource:
        if kind == "codes":
            return MaskSource(self.codes, "codes", self.n, self.m)
        logits = self.logits if logits is None else logits
        return MaskSource(logits, "drawn", self.n, self.m, INVERSE_TEMPERATURE, self.counter)


def sample_mask(of: Matrix) -> Iterator[Case]:
    yield exact(of.name, lambda: sampling.sample_mask(of.logits, of.n, of.m, INVERSE_TEMPERATURE, of.counter))


def masked_weight(of: Matrix) -> Iterator[Case]:
    weight = of.normal(dtype=torch.bfloat16)
    for kind in ("drawn", "codes"):
        source = of.source(kind)
        yield exact(f"{of.name}, {kind}", lambda source=source: sampling.masked_weight(weight, source))


def top_n_mask(of: Matrix) -> Iterator[Case]:
    yield exact(of.name, lambda: sampling.top_n_mask(of.logits, of.n, of.m))


def mask_log_prob(of: Matrix) -> Iterator[Case]:
    yield exact(of.name, lambda: sampling.mask_log_prob(of.logits, of.codes, of.n, of.m, INVERSE_TEMPERATURE))


def mask_score(of: Matrix) -> Iterator[Case]:
    grad = of.normal(*of.codes.shape)
    yield exact(of.name, lambda: sampling.mask_score(of.logits, of.codes, grad, of.n, of.m, INVERSE_TEMPERATURE))


def score_update(of: Matrix, draws: int = 1) -> Iterator[Case]:
    counter = of.counter._replace(draw=torch.arange(draws, device=of.device))

    def update(logits: Tensor, coef: Tensor) -> Results:
        sampling.score_update_(logits, coef, of.n, of.m, INVERSE_TEMPERATURE, counter)
        return Results((logits,))

    yield in_place(of.name, update, (of.logits,), of.full(draws, value=WHOLE), of.full(draws, value=LITTLE))


def descend(of: Matrix) -> Iterator[Case]:
    gradient = of.normal()

    def step(logits: Tensor, rate: Tensor) -> Results:
        mean = straight_through.descend_(logits, gradient, rate, MAX_UPDATE, of.m, of.counter)
        return Results((logits,), (mean,))

    yield in_place(of.name, step, (of.logits,), of.full(value=WHOLE), of.full(value=LITTLE))


def adamw_step(of: Matrix) -> Iterator[Case]:
    master, first, gradient, second = of.normal(), of.normal(), of.normal(), of.normal().square()
    usable, count = torch.tensor(True, device=of.device), of.full(value=3.0)

    def step(weight: Tensor, master: Tensor, first: Tensor, second: Tensor, scalars: Tensor) -> Results:
        adamw.adamw_(weight, master, first, second, gradient, of.codes, scalars, of.m)
        return Results((weight, master, first, second))

    scalars = (reference.adamw_scalars(usable, count, rate, 0.0) for rate in (WHOLE, LITTLE))
    yield in_place(of.name, step, (master.bfloat16(), master, first, second), *scalars)


def best_swaps(of: Matrix) -> Iterator[Case]:
    rows, groups = of.codes.shape
    weight, product = of.normal(rows, of.m, groups), of.normal(rows, of.m, groups)
    blocks = of.normal(of.m, of.m, groups).abs()
    yield exact(of.name, lambda: swaps.best_swaps(weight, product, of.codes, blocks, of.n, of.m))


def unpack(of: Matrix) -> Iterator[Case]:
    rows, groups = of.codes.shape
    values, bitmask = of.normal(rows, groups * of.n, dtype=torch.bfloat16), bitmask_of(of.codes, of.m)
    yield exact(of.name, lambda: packed.unpack_nm(values, bitmask, of.n, of.m))


def layers_of(of: Matrix, logits: Tensor) -> LayerGroup:
    """Parts of the matrix as layers, with codes."""
    layers = [GroupedLayer(part, i, 0, part.shape[1] // of.m) for i, part in enumerate(logits.chunk(LAYERS))]
    group = LayerGroup(layers, of.n, of.m)
    group.allocate_codes()
    for codes, part in zip(group.codes, of.codes.chunk(LAYERS), strict=True):
        codes.copy_(part)
    return group


def sample_masks(of: Matrix) -> Iterator[Case]:
    group = layers_of(of, of.logits)

    def draw() -> Tensor:
        seed, step, _, draw = of.counter.key
        flips = grouped.draw_layers_(group, INVERSE_TEMPERATURE, seed, step, draw)
        return torch.stack([of_layer.sum() for of_layer in flips])

    def check() -> Results:
        flips = draw()
        return Results((flips, *(codes.clone() for codes in group.codes)))

    yield Case(of.name, check, draw)


def score_update_of_layers(of: Matrix, draws: int = 1) -> Iterator[Case]:
    seed, step, _, _ = of.counter.key
    which = torch.arange(draws, device=of.device)
    coefs = of.full(draws, value=WHOLE), of.full(draws, value=LITTLE)

    def update(group: LayerGroup, coef: Tensor, by_codes: bool) -> Results:
        grouped.update_layers_(group, coef, INVERSE_TEMPERATURE, seed, step, which, by_codes)
        return Results(tuple(layer.logits for layer in group.layers))

    for by_codes in (False, True) if knows_score(of.n, draws) else (False,):
        own = layers_of(of, of.logits.clone())
        yield Case(
            f"{of.name}, {'codes' if by_codes else 'drawn'}",
            lambda by_codes=by_codes: update(layers_of(of, of.logits.clone()), coefs[0], by_codes),
            lambda own=own, by_codes=by_codes: update(own, coefs[1], by_codes),
        )


# By the names of the launch tables
OVER_GROUPS: dict[str, Callable[[Matrix], Iterator[Case]]] = {
    "sample_mask": sample_mask,
    "masked_weight": masked_weight,
    "top_n_mask": top_n_mask,
    "mask_log_prob": mask_log_prob,
    "mask_score": mask_score,
    "score_update": score_update,
    "score_updates": functools.partial(score_update, draws=2),
    "best_swaps": best_swaps,
    "descend": descend,
    "unpack": unpack,
    "adamw": adamw_step,
    "sample_masks": sample_masks,
    "score_update_of_layers": score_update_of_layers,
    "score_updates_of_layers": functools.partial(score_update_of_layers, draws=2),
}


@dataclass(frozen=True)
class Product:
    """Operands of a product with a masked weight.

    Attributes:
        size: bytes of an operand.
        kind: "drawn" or "codes"; of packed weights "keep" or "int8".
    """

    shape: tuple[int, int]
    tokens: int
    kind: str
    device: str
    size: int = 2
    n: int = 2
    m: int = 4

    @property
    def name(self) -> str:
        return f"{self.n}:{self.m}, {self.shape[0]}x{self.shape[1]}, {self.tokens} tokens, {self.kind}"

    @functools.cached_property
    def matrix(self) -> Matrix:
        return Matrix(self.n, self.m, self.device, shape=self.shape)

    def normal(self, *shape: int) -> Tensor:
        return self.matrix.normal(*shape, dtype=torch.bfloat16 if self.size == 2 else torch.float32)

    @property
    def mask(self) -> MaskSource:
        return self.matrix.source(self.kind)


def masked_linear(of: Product) -> Case:
    x, weight, mask = of.normal(of.tokens, of.shape[1]), of.normal(*of.shape), of.mask
    return near(of.name, lambda: masked_gemm.masked_linear(x, weight, None, mask, False)[0])


def masked_linear_input_grad(of: Product) -> Case:
    grad, weight, mask = of.normal(of.tokens, of.shape[0]), of.normal(*of.shape), of.mask
    return near(of.name, lambda: masked_gemm.masked_linear_input_grad(grad, weight, mask))


def masked_linear_weight_grad(of: Product) -> Case:
    grad, x, mask = of.normal(of.tokens, of.shape[0]), of.normal(of.tokens, of.shape[1]), of.mask
    return near(of.name, lambda: masked_gemm.masked_linear_weight_grad(grad, x, mask))


def straight_through_update(of: Product, fused: bool = True) -> Case:
    """The step of the logits by one kernel, or of a product that is there already."""
    (rows, k), matrix = of.shape, of.matrix
    grad, x, weight = of.normal(of.tokens, rows), of.normal(of.tokens, k), of.normal(rows, k)
    squares = matrix.normal(rows).square(), matrix.normal(k).square()
    product = None if fused else grad.float().t() @ x.float()

    def step(logits: Tensor, rate: Tensor) -> Results:
        mask = matrix.source("drawn", logits)._replace(codes=matrix.codes if of.kind == "codes" else None)
        operands = grad, x, weight, *squares, rate, MAX_UPDATE, mask, None
        with stepping(product):
            mean = straight_through.straight_through_update_(*operands)
        return Results((), (logits, mean))

    case = in_place(of.name, step, (matrix.logits,), matrix.full(value=WHOLE), matrix.full(value=LITTLE))

    def check() -> Results:
        # of the step alone, beside which the logits are large
        logits, mean = case.check().near
        return Results((), (logits - matrix.logits, mean))

    return Case(case.name, check, case.timed)


@contextmanager
def stepping(product: Tensor | None) -> Iterator[None]:
    """A product that is given is taken instead of one that torch would have to make."""
    saved = straight_through.fused, straight_through.weight_gradient
    straight_through.fused = lambda *_: product is None
    straight_through.weight_gradient = lambda *_: product
    try:
        yield
    finally:
        straight_through.fused, straight_through.weight_gradient = saved


def packed_product(of: Product) -> Case:
    """Of one token or several."""
    values, scales = of.normal(of.shape[0], of.shape[1] // of.m * of.n), None
    bitmask, x = bitmask_of(of.matrix.codes, of.m), of.normal(of.tokens, of.shape[1])
    if of.kind == "int8":
        values, scales = quantized(values)
    return near(of.name, lambda: packed.nm_linear(x, values, bitmask, scales, None, of.n, of.m))


PRODUCTS: dict[str, Callable[[Product], Case]] = {
    "masked_linear": masked_linear,
    "masked_linear_input_grad": masked_linear_input_grad,
    "masked_linear_weight_grad": masked_linear_weight_grad,
    "straight_through": straight_through_update,
    "straight_through_step": functools.partial(straight_through_update, fused=False),
    "packed_linear": packed_product,
    "packed_vector": packed_product,
}


def split_sum(device: str) -> Case:
    rows, k = FEW_ROWS
    x = torch.zeros(16, k, dtype=torch.bfloat16, device=device)
    split = split_k.SplitResult("masked_linear", tiles.Tiles(out=16, tokens=16, k=64), (16, rows), k, x, None)
    split.out.copy_(torch.randn(split.out.shape, generator=torch.Generator(device).manual_seed(0), device=device))
    return Case(f"{split.parts} parts of 16 x {rows}", lambda: Results((split.sum().clone(),)), split.sum)


def metadata(device: str) -> Case:
    bitmask = bitmask_of(Matrix(2, 4, device).codes, 4)
    return exact("2:4", lambda: semi_structured.metadata(bitmask))


OVER_ELEMENTS: dict[str, Callable[[str], Case]] = {"split_sum": split_sum, "metadata": metadata}
