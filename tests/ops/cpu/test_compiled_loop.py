"""Functions of groups as loops: compiled once, checked against the function, for any number of groups."""

from __future__ import annotations

import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.cases import slow
from helpers.loops import a_loop, check_loop, drawn_loop, loop_tensors

from maskpro_kernels.ops.cpu import codegen
from maskpro_kernels.ops.cpu.loops import MIN_SHARED_GROUPS, CompiledLoop


def test_a_loop_is_compiled_once_for_all_shapes_and_processes(folder, builds):
    loop = a_loop()
    for groups in (1, 2, 5, 33, 4_096, 100_003):
        check_loop(loop, groups)
    # as another process would
    check_loop(a_loop())
    assert len(builds) == 1
    (file,) = folder.glob("*.o")
    # a file left by a killed process or a full disk
    file.write_bytes(file.read_bytes()[:-1])
    check_loop(a_loop())
    assert len(builds) == 2
    assert list(folder.glob("*.o")) == [file] and not list(folder.glob("tmp*"))


def add_numbers(x, index, *, factor):
    return torch.stack([column + index * factor for column in x.unbind(-1)], dim=-1), index


def number_adder(in_place):
    like = (torch.float32, 2)
    return CompiledLoop(add_numbers, (like,), (), True, like, 0 if in_place else None, constants={"factor": 2})


@pytest.mark.parametrize("in_place", [True, False])
def test_a_function_fills_given_memory(in_place, folder, builds):
    """Of its tensor or of another, also where these are pieces of something longer."""
    loop = number_adder(in_place)
    x = torch.ones(50_000, 2)
    out = x if in_place else torch.zeros_like(x)
    for part in (slice(0, 3), slice(3, 50_000)):
        filled, index = loop([x[part], torch.tensor(part.start)], out[part])
        assert_same_bits(index, torch.arange(50_000)[part])
        assert filled.data_ptr() == out[part].data_ptr()
    assert_same_bits(out, 1.0 + 2 * torch.arange(50_000)[:, None].expand(-1, 2))
    assert in_place or (x == 1.0).all()


@pytest.mark.parametrize("part", ["gathered", "numbers", "carried over"])
def test_the_check_sees_what_is_drawn_wrongly(part, monkeypatch):
    """A batch, the numbers of a shard's groups, or what one block leaves to the next."""
    loop = drawn_loop()
    given = [torch.rand(64, 2), torch.rand(64), torch.tensor(2.0), torch.tensor((0, 8, 8, 0))]

    def wrong(tensors, out):
        x, threshold, scale, shard = tensors
        if part == "gathered":
            threshold = threshold.clone()
            threshold[7] = torch.inf if not x[7, 0] < threshold[7] else -torch.inf
        elif part == "numbers":
            shard = torch.tensor((shard[0], shard[1], shard[1], shard[3]))
        (result,) = loop._eager([x, threshold, scale, shard])
        if part == "carried over":
            (last,) = (x[:, 0] < threshold)[: codegen.BLOCK].nonzero()[-1]
            result[last] = x[last]
        return [out.copy_(result)]

    loop._check(loop._eager, given)
    with pytest.raises(RuntimeError, match="the loop of by_bounds differs from the function"):
        loop._check(wrong, given)


SHARD = (3, 10, 17, 5)


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize(("share", "threads"), [slow(0.0, 2), (0.01, 3), slow(0.5, 1), (0.5, 2), slow(1.0, 2)])
def test_what_a_function_leaves_open_is_drawn_in_full(share, threads, in_place, folder, builds, monkeypatch):
    """At both ends of blocks, of batches and of the shares of threads."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    loop = drawn_loop(0 if in_place else None)
    start, columns, row_stride, offset = SHARD
    counts = [1, 7, 8, 9, codegen.BATCH, codegen.BLOCK - 1, codegen.BLOCK, 2 * codegen.BLOCK + 9]
    for count in [*counts, MIN_SHARED_GROUPS, 3 * MIN_SHARED_GROUPS + 5]:
        generator = torch.Generator().manual_seed(count)
        x, chance = torch.rand(count, 2, generator=generator), torch.rand(count, generator=generator)
        chance[[0, -1]] = 0.0
        chance[[x for x in (codegen.BLOCK - 1, codegen.BLOCK, count // 2 - 1, count // 2) if 0 <= x < count]] = 0.0
        is_open = chance < share
        local = torch.arange(start, start + count)
        number = local // columns * row_stride + local % columns + offset
        expected = 2.0 * x + torch.where(is_open, 3.0 * number, number & 1)[:, None]
        tensors = [x, torch.where(is_open, 2.0, -1.0), torch.tensor(2.0), torch.tensor(SHARD)]
        assert_same_bits(*loop._eager(tensors), expected)
        out = x if in_place else torch.empty_like(x)
        (result,) = loop(tensors, out)
        assert result is out
        assert_same_bits(out, expected)
    assert len(builds) == 1


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_one_call_runs_over_many_layers(threads, folder, builds, monkeypatch):
    """Of all sizes, none among them, each with numbers of its own; threads begin and end in the midst of a layer."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    loop, scale = drawn_loop(), torch.tensor(2.0)
    counts = [0, 5, codegen.BLOCK + 3, 1, MIN_SHARED_GROUPS, 0, 777]
    layers, expected = [], []
    for seed, count in enumerate(counts):
        generator = torch.Generator().manual_seed(seed)
        x, threshold = torch.rand(count, 2, generator=generator), torch.rand(count, generator=generator)
        layers.append([x, threshold, scale, torch.tensor((seed, 10, 17, 5 * seed))])
        expected.append(loop._eager(layers[-1])[0] if count else x)
    firsts = torch.tensor([0, *counts]).cumsum(0)
    table = torch.zeros(len(counts) + 1, 5, dtype=torch.int64)
    table[:, 0] = firsts
    for row, tensors in zip(table, layers, strict=False):
        row[1:] = torch.tensor([tensor.data_ptr() for tensor in tensors])
    loop.over_layers(layers[1])(table)
    for (x, *_), right in zip(layers, expected, strict=True):
        assert_same_bits(x, right)
    assert len(builds) == 1


def test_what_runs_eagerly_has_no_call_for_many_layers(monkeypatch):
    monkeypatch.setattr(CompiledLoop, "_compiled", lambda *_: 1 / 0)
    with pytest.warns(UserWarning, match="compilation failed"):
        assert a_loop().over_layers(loop_tensors(5)) is None


@pytest.mark.parametrize("wrong", ["index", "x"])
def test_a_loop_that_differs_from_its_function_is_not_kept(wrong, folder, monkeypatch):
    """By the last bit of one group."""
    loop = number_adder(in_place=True)

    def miscompiled(tensors, out):
        x, index = loop._eager(tensors, out)
        if wrong == "index":
            index[-1] += 1
        else:
            x[-1, -1] = x[-1, -1].nextafter(torch.tensor(torch.inf))
        return x, index

    monkeypatch.setattr(CompiledLoop, "_loaded", lambda *_: miscompiled)
    x = torch.ones(300, 2)
    with pytest.warns(UserWarning, match="compilation failed .the loop of add_numbers differs from the function"):
        _, index = loop([x, torch.tensor(0)], x)
    assert_same_bits(index, torch.arange(300))
    assert_same_bits(x, 1.0 + 2 * torch.arange(300)[:, None].expand(-1, 2))
    assert not list(folder.glob("*.o"))


def test_inference_mode_and_default_dtype_do_not_reach_the_loop(folder, builds):
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode():
            loop = a_loop()
            check_loop(loop)
    finally:
        torch.set_default_dtype(torch.float32)
    check_loop(loop)
