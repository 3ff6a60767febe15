"""The counter: Philox against its known answers, no counter used twice, and shards that draw the whole layer's bits."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from helpers.bits import assert_same_bits
from helpers.cases import cases
from helpers.enumerated import KERNEL_DEVICE
from hypothesis import given
from hypothesis import strategies as st

import maskpro_kernels as mk
from maskpro_kernels.ops import philox, reference
from maskpro_kernels.ops.counter import Counter, MaskSource
from maskpro_kernels.ops.cpu import kernels
from maskpro_kernels.ops.pattern import NMPattern
from maskpro_kernels.ops.triton import device as device

KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@triton.jit
def philox_kernel(counters, keys, out, COUNT: tl.constexpr):
    i = tl.arange(0, COUNT)
    words = device.philox4x32(
        tl.load(counters + 4 * i).to(tl.uint32),
        tl.load(counters + 4 * i + 1).to(tl.uint32),
        tl.load(counters + 4 * i + 2).to(tl.uint32),
        tl.load(counters + 4 * i + 3).to(tl.uint32),
        tl.load(keys + 2 * i).to(tl.uint32),
        tl.load(keys + 2 * i + 1).to(tl.uint32),
    )
    for j in tl.static_range(4):
        tl.store(out + 4 * i + j, words[j].to(tl.int64))


@triton.jit
def group_words_kernel(groups, seed, step, layer, draw, out, STREAM: tl.constexpr, COUNT: tl.constexpr):
    i = tl.arange(0, COUNT)
    group = tl.load(groups + i).to(tl.uint32)
    words = device.group_words(group, 32, STREAM, device.load_key(seed, step, layer, draw))
    for j in tl.static_range(32):
        tl.store(out + 32 * i + j, words[j].to(tl.int64))


def kernel_philox(counters, keys):
    """[count, 4] words, count a power of two."""
    out = torch.full((len(counters), 4), -1, dtype=torch.int64, device=KERNEL_DEVICE)
    philox_kernel[(1,)](counters.to(KERNEL_DEVICE), keys.to(KERNEL_DEVICE), out, COUNT=len(counters))
    return out.cpu()


@pytest.mark.parametrize("counter, key, answer", KNOWN_ANSWERS)
def test_known_answers_of_integers_tensors_and_the_kernel(counter, key, answer):
    assert philox.philox4x32(counter, key) == answer
    words = philox.philox4x32([torch.tensor([c]) for c in counter], [torch.tensor([k]) for k in key])
    assert tuple(int(w) for w in words) == answer
    assert kernel_philox(torch.tensor([counter]), torch.tensor([key]))[0].tolist() == list(answer)


def test_kernel_and_torch_agree_on_random_counters():
    generator = torch.Generator().manual_seed(0)
    counters = torch.randint(0, 1 << 32, (4096, 4), generator=generator)
    keys = torch.randint(0, 1 << 32, (4096, 2), generator=generator)
    expected = torch.stack(philox.philox4x32(counters.unbind(1), keys.unbind(1)), dim=1)
    assert_same_bits(kernel_philox(counters, keys), expected)


def counters_of(group, m, stream, seed, step, layer, draw):
    """((four words), (key)) of every block that group_words reads, as integers."""
    seen = []

    def record(counter, key):
        seen.append((tuple(int(c) for c in counter), tuple(int(k) for k in key)))
        return (torch.zeros_like(group),) * 4

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(philox, "philox4x32", record)
        philox.group_words(group, m, stream, [torch.tensor(i) for i in (seed, step, layer, draw)])
    return seen


def test_counter_words_hold_group_layer_step_and_block_stream_draw():
    seen = counters_of(torch.tensor(0xFEDCBA98), 16, philox.STREAM_ROUNDING, 0x0123456789ABCDEF, 0x89ABCDEF, 77, 0xBEEF)
    key = (0x89ABCDEF, 0x01234567)
    assert seen == [((0xFEDCBA98, 77, 0x89ABCDEF, 0xBEEF0100 | block), key) for block in range(4)]


def test_key_holds_a_negative_seed_in_twos_complement():
    ((_, key),) = counters_of(torch.tensor(0), 4, philox.STREAM_DRAW, -2, 0, 0, 0)
    assert key == (0xFFFFFFFE, 0xFFFFFFFF)


word = st.integers(0, (1 << 32) - 1)
counter_fields = st.fixed_dictionaries(
    {
        "group": word,
        "stream": st.sampled_from([philox.STREAM_DRAW, philox.STREAM_ROUNDING]),
        "step": word,
        "layer": word,
        "draw": st.integers(0, philox.MAX_DRAWS - 1),
    }
)


def blocks_of(fields, m=32):
    fields = dict(fields)
    group = torch.tensor(fields.pop("group"))
    return [counter for counter, _ in counters_of(group, m, seed=0, **fields)]


@given(fields=counter_fields)
def test_every_field_can_be_read_back_from_the_counter(fields):
    for block, counter in enumerate(blocks_of(fields)):
        assert all(0 <= w < 1 << 32 for w in counter)
        assert counter[:3] == (fields["group"], fields["layer"], fields["step"])
        last = counter[3]
        assert (last & 0xFF, last >> 8 & 0xFF, last >> 16) == (block, fields["stream"], fields["draw"])


EXTREMES = [
    {"seed": 0, "step": 0, "layer": 0, "draw": 0},
    {"seed": -(1 << 63), "step": (1 << 32) - 1, "layer": (1 << 32) - 1, "draw": (1 << 16) - 1},
    {"seed": (1 << 63) - 1, "step": 1 << 31, "layer": 1 << 31, "draw": 1 << 15},
    {"seed": 0x0123456789ABCDEF, "step": (1 << 31) - 1, "layer": (1 << 31) - 1, "draw": (1 << 15) - 1},
]


@pytest.mark.parametrize("stream", [philox.STREAM_DRAW, philox.STREAM_ROUNDING])
@pytest.mark.parametrize("counter", EXTREMES)
def test_kernel_builds_the_same_counter(counter, stream):
    groups = torch.tensor([0, 1, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 12345, 1 << 16, 99])
    key = [torch.tensor(counter[name]) for name in ("seed", "step", "layer", "draw")]
    expected = philox.group_words(groups, 32, stream, key)
    on_device = [t.to(KERNEL_DEVICE) for t in (groups, *key)]
    out = torch.full((len(groups), 32), -1, dtype=torch.int64, device=KERNEL_DEVICE)
    group_words_kernel[(1,)](*on_device, out, STREAM=stream, COUNT=len(groups))
    assert_same_bits(out.cpu(), torch.stack(expected, dim=1))


MIDDLE = {"seed": 3, "step": 4, "layer": 5, "draw": 6}


@pytest.mark.parametrize(
    ("beyond", "nearest"), [(1 << 32, (1 << 32) - 1), (1 << 62, (1 << 32) - 1), (-1, 0), (-(1 << 62) + 5, 0)]
)
def test_a_step_beyond_its_range_is_no_remainder_on_any_route(beyond, nearest):
    groups = torch.arange(8)

    def key(step):
        return [torch.tensor(value) for value in (MIDDLE | {"step": step}).values()]

    def words(step):
        return torch.stack(philox.group_words(groups, 32, philox.STREAM_DRAW, key(step)), dim=1)

    assert_same_bits(words(beyond), words(nearest))
    out = torch.full((len(groups), 32), -1, dtype=torch.int64, device=KERNEL_DEVICE)
    on_device = [t.to(KERNEL_DEVICE) for t in (groups, *key(beyond))]
    group_words_kernel[(1,)](*on_device, out, STREAM=philox.STREAM_DRAW, COUNT=len(groups))
    assert_same_bits(out.cpu(), words(nearest))
    logits = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))

    def drawn(route, step):
        return route.sample_mask(logits, 2, 4, 1.0, Counter(*key(step), 0, 4))

    for route in (reference, kernels):
        assert_same_bits(drawn(route, beyond), drawn(route, nearest))
        # and not those of the remainder
        assert not torch.equal(drawn(route, beyond), drawn(route, beyond % (1 << 32)))


@pytest.mark.parametrize("m", [2, 4, 8, 16, 32])
def test_a_group_takes_the_leading_words_of_its_blocks(m):
    arguments = (philox.STREAM_DRAW, [torch.tensor(i) for i in (3, 4, 5, 6)])
    group = torch.arange(10)
    words = philox.group_words(group, m, *arguments)
    assert len(words) == m
    assert_same_bits(words, philox.group_words(group, 32, *arguments)[:m])


def public(name, tensors, n, m, seed, step, layer, draw, group_offset, group_row_stride):
    """The public function on contiguous copies of ``tensors``: the kernels."""
    tensors = [t.clone(memory_format=torch.contiguous_format).to(KERNEL_DEVICE) for t in tensors]
    arguments = {
        "pattern": NMPattern(f"{n}:{m}"),
        "seed": seed,
        "step": step,
        "layer": layer,
        "draw": draw,
        "group_offset": group_offset,
        "group_row_stride": group_row_stride,
    }
    if name == "score_update_":
        return mk.score_update_(tensors[0], 3.0, **arguments).cpu()
    return getattr(mk, name)(*tensors, **arguments).cpu()


def plain(name, tensors, n, m, seed, step, layer, draw, group_offset, group_row_stride):
    """The eager reference."""
    tensors = [t.clone(memory_format=torch.contiguous_format) for t in tensors]
    key = [torch.tensor(i) for i in (seed, step, layer, draw)]
    counter = Counter(*key, group_offset, group_row_stride)
    if name == "score_update_":
        reference.score_update_(tensors[0], torch.tensor([3.0]), n, m, 1.0, counter._replace(draw=key[3][None]))
        return tensors[0]
    if name == "sample_mask":
        return reference.sample_mask(*tensors, n, m, 1.0, counter)
    weight, logits = tensors
    return reference.masked_weight(weight, MaskSource(logits, "drawn", n, m, 1.0, counter))


ROWS, GROUPS = 6, 10


KERNELS = {"sample_mask": "sample_mask", "sample_masked_weight": "masked_weight", "score_update_": "score_update"}
SHARDED = [
    ("2:4", torch.float32, 0),
    ("2:4", torch.bfloat16, 1000),
    ("2:4", torch.float16, (1 << 32) - ROWS * GROUPS),
    ("5:8", torch.float16, 1000),
    ("8:16", torch.bfloat16, (1 << 32) - ROWS * GROUPS),
]


SHARDED_CASES = [(route, name, *case) for route in (plain, public) for name in KERNELS for case in SHARDED]


# The larger the groups the slower the interpreter
INTERPRETED = [(name, "2:4", max(offset for *_, offset in SHARDED)) for name in KERNELS]


@pytest.mark.parametrize(
    "route, name, pattern, dtype, offset",
    cases(SHARDED_CASES, slow=lambda on, name, pattern, _, at: on is public and (name, pattern, at) not in INTERPRETED),
)
def test_shards_draw_the_bits_of_the_whole_layer(route, name, pattern, dtype, offset, launched):
    n, m = NMPattern(pattern).n, NMPattern(pattern).m
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(ROWS, GROUPS * m, generator=generator).to(dtype)]
    if name == "sample_masked_weight":
        tensors.insert(0, torch.randn(ROWS, GROUPS * m, generator=generator).to(dtype))

    def run(rows=slice(0, ROWS), groups=slice(0, GROUPS)):
        shard = [t[rows, groups.start * m : groups.stop * m] for t in tensors]
        first = offset + rows.start * GROUPS + groups.start
        return route(name, shard, n, m, 5, 6, 7, 8, first, GROUPS)

    whole = run()
    rows, columns = (slice(0, 2), slice(2, 6)), (slice(0, 3), slice(3, 4), slice(4, 10))
    assert_same_bits(torch.cat([run(rows=r) for r in rows]), whole)
    assert_same_bits(torch.cat([run(groups=c) for c in columns], dim=1), whole)
    both = [torch.cat([run(r, c) for c in columns], dim=1) for r in rows]
    assert_same_bits(torch.cat(both), whole)
    if route is public:
        assert launched[KERNELS[name]] == 1 + 2 + 3 + 6
        assert_same_bits(whole, plain(name, tensors, n, m, 5, 6, 7, 8, offset, GROUPS))


def test_the_default_row_stride_is_that_of_the_given_tensor():
    logits = torch.zeros(5, 12, device=KERNEL_DEVICE)
    default = mk.sample_mask(logits, "2:4", seed=1)
    assert_same_bits(default, mk.sample_mask(logits, "2:4", seed=1, group_row_stride=3))
    assert not torch.equal(default, mk.sample_mask(logits, "2:4", seed=1, group_row_stride=4))
