"""Graphs are compiled once, kept on disk under all that they depend on, and made anew where the file is damaged."""

from __future__ import annotations

import functools
import itertools
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from filelock import FileLock, Timeout
from helpers.source_tree import modules_of, reached_from
from llvmlite import binding

import maskpro_kernels
from maskpro_kernels.cli.progress import log_told
from maskpro_kernels.ops import bounds, dispatch, reference
from maskpro_kernels.ops.cpu import cache, compiled_loop, loops


def scaled_sum(x, index, scale, *, power):
    """A function of groups with two results."""
    return reference.fixed_sum(reference.columns(x * scale)), index * power


LIKE = (((torch.float32, 4),), ((torch.float32,),))


def a_graph(power=3, groups=LIKE[0], rest=LIKE[1]):
    return compiled_loop.CompiledLoop(scaled_sum, groups, rest, numbered=True, constants={"power": power})


def tensors(groups):
    x = torch.arange(groups * 4, dtype=torch.float32).view(groups, 4)
    return [x, torch.tensor(0.5, dtype=torch.float32), torch.tensor(7)]


def check(graph, groups=5):
    given = tensors(groups)
    total, index = graph(list(given))
    assert torch.equal(total, given[0].sum(-1) * 0.5)
    assert torch.equal(index, (torch.arange(groups) + 7) * 3)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "folder", lambda: tmp_path)
    return tmp_path


@pytest.fixture
def builds(monkeypatch):
    """How often something was compiled; nothing falls back to eager."""
    count = []
    build = compiled_loop.CompiledLoop._build

    def counted(graph):
        count.append(graph)
        return build(graph)

    monkeypatch.setattr(compiled_loop.CompiledLoop, "_build", counted)
    monkeypatch.setattr(compiled_loop.CompiledLoop, "_made", compiled_loop.CompiledLoop._compiled)
    return count


# Machine code of nothing, and what runs instead of it
NOTHING = (b"code", ((torch.int64,),))


@pytest.fixture
def nothing(monkeypatch):
    monkeypatch.setattr(compiled_loop.CompiledLoop, "_build", lambda graph: NOTHING)
    monkeypatch.setattr(compiled_loop.CompiledLoop, "_loaded", lambda graph, code, results: graph._eager)


def test_a_graph_is_compiled_once_for_all_shapes_and_processes(folder, builds):
    graph = a_graph()
    for groups in (1, 2, 5, 33, 4_096, 100_003):
        check(graph, groups)
    # as another process would
    check(a_graph())
    assert len(builds) == 1
    (file,) = folder.glob("*.o")
    # a file that a killed process or a full disk left behind
    file.write_bytes(file.read_bytes()[:-1])
    check(a_graph())
    assert len(builds) == 2
    assert list(folder.glob("*.o")) == [file] and not list(folder.glob("tmp*"))


def add_numbers(x, index, *, factor):
    return torch.stack([column + index * factor for column in x.unbind(-1)], dim=-1), index


def number_adder(in_place):
    like = (torch.float32, 2)
    return compiled_loop.CompiledLoop(
        add_numbers, (like,), (), True, like, 0 if in_place else None, constants={"factor": 2}
    )


@pytest.mark.parametrize("in_place", [True, False])
def test_a_function_fills_given_memory(in_place, folder, builds):
    """Of its tensor or of another, also where these are pieces of something longer."""
    graph = number_adder(in_place)
    x = torch.ones(50_000, 2)
    out = x if in_place else torch.zeros_like(x)
    for part in (slice(0, 3), slice(3, 50_000)):
        filled, index = graph([x[part], torch.tensor(part.start)], out[part])
        assert torch.equal(index, torch.arange(50_000)[part])
        assert filled.data_ptr() == out[part].data_ptr()
    assert torch.equal(out, 1.0 + 2 * torch.arange(50_000)[:, None].expand(-1, 2))
    assert in_place or (x == 1.0).all()


@pytest.mark.parametrize("part", ["gathered", "numbers", "carried over"])
def test_the_check_sees_what_is_drawn_wrongly(part, monkeypatch):
    """A batch, the numbers of a shard's groups, or what one block leaves to the next."""
    like, scalar = (torch.float32, 2), (torch.float32,)
    graph = compiled_loop.CompiledLoop(by_bounds, (like, scalar), (scalar,), False, like, 0, draw_full, {"power": 3})
    given = [torch.rand(64, 2), torch.rand(64), torch.tensor(2.0), torch.tensor((0, 8, 8, 0))]

    def wrong(tensors, out):
        x, threshold, scale, shard = tensors
        if part == "gathered":
            threshold = threshold.clone()
            threshold[7] = torch.inf if not x[7, 0] < threshold[7] else -torch.inf
        elif part == "numbers":
            shard = torch.tensor((shard[0], shard[1], shard[1], shard[3]))
        (result,) = graph._eager([x, threshold, scale, shard])
        if part == "carried over":
            (last,) = (x[:, 0] < threshold)[: loops.BLOCK].nonzero()[-1]
            result[last] = x[last]
        return [out.copy_(result)]

    graph._check(graph._eager, given)
    with pytest.raises(RuntimeError, match="the loop of by_bounds differs from the function"):
        graph._check(wrong, given)


def test_flags_of_another_kind_are_refused():
    def of_no_flags(x, threshold, scale, *, power):
        return x * scale, threshold

    like, scalar = (torch.float32, 2), (torch.float32,)
    graph = compiled_loop.CompiledLoop(of_no_flags, (like, scalar), (scalar,), False, like, 0, draw_full, {"power": 3})
    with pytest.raises(ValueError, match="full: expected the results of the function but its flags"):
        graph._build()


def test_memory_of_another_kind_is_refused(folder):
    graph = compiled_loop.CompiledLoop(
        add_numbers, ((torch.float32, 2),), (), True, (torch.float32, 4), constants={"factor": 2}
    )
    with pytest.raises(ValueError, match="out: expected .torch.float32, 2., got .torch.float32, 4."):
        graph._compiled([torch.ones(3, 2), torch.tensor(0)])


def by_bounds(x, threshold, scale, *, power):
    """Groups that begin below their threshold are left open, and as they are."""
    is_open = x[:, 0] < threshold
    determined = [torch.where(is_open, column, column * scale) for column in x.unbind(-1)]
    return torch.stack(determined, dim=-1), torch.where(is_open, 1, 0).to(torch.uint8)


def draw_full(x, number, scale, *, power):
    return torch.stack([column * scale + (number * power).to(torch.float32) for column in x.unbind(-1)], dim=-1)


SHARD = (3, 10, 17, 5)


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize(("share", "threads"), [(0.0, 2), (0.01, 3), (0.5, 1), (0.5, 2), (1.0, 2)])
def test_what_a_function_leaves_open_is_drawn_in_full(share, threads, in_place, folder, builds, monkeypatch):
    """At both ends of blocks, of batches and of the shares of threads."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    like, scalar = (torch.float32, 2), (torch.float32,)
    place = 0 if in_place else None
    graph = compiled_loop.CompiledLoop(
        by_bounds, (like, scalar), (scalar,), False, like, place, draw_full, {"power": 3}
    )
    start, columns, row_stride, offset = SHARD
    counts = [1, 7, 8, 9, loops.BATCH, loops.BLOCK - 1, loops.BLOCK, 2 * loops.BLOCK + 9]
    for count in [*counts, compiled_loop.LEAST_SHARED, 3 * compiled_loop.LEAST_SHARED + 5]:
        generator = torch.Generator().manual_seed(count)
        x, chance = torch.rand(count, 2, generator=generator), torch.rand(count, generator=generator)
        chance[[0, -1]] = 0.0
        chance[[x for x in (loops.BLOCK - 1, loops.BLOCK, count // 2 - 1, count // 2) if 0 <= x < count]] = 0.0
        is_open = chance < share
        local = torch.arange(start, start + count)
        number = local // columns * row_stride + local % columns + offset
        expected = 2.0 * x + torch.where(is_open, 3.0 * number, 0.0)[:, None]
        tensors = [x, torch.where(is_open, 2.0, -1.0), torch.tensor(2.0), torch.tensor(SHARD)]
        assert torch.equal(*graph._eager(tensors), expected)
        out = x if in_place else torch.empty_like(x)
        (result,) = graph(tensors, out)
        assert result is out and torch.equal(out, expected)
    assert len(builds) == 1


@pytest.mark.parametrize("wrong", ["index", "x"])
def test_a_graph_that_differs_from_its_function_is_not_kept(wrong, folder, monkeypatch):
    """By the last bit of one group."""
    graph = number_adder(in_place=True)

    def miscompiled(tensors, out):
        x, index = graph._eager(tensors, out)
        if wrong == "index":
            index[-1] += 1
        else:
            x[-1, -1] = x[-1, -1].nextafter(torch.tensor(torch.inf))
        return x, index

    monkeypatch.setattr(compiled_loop.CompiledLoop, "_loaded", lambda *_: miscompiled)
    x = torch.ones(300, 2)
    with pytest.warns(UserWarning, match="compilation failed .the loop of add_numbers differs from the function"):
        _, index = graph([x, torch.tensor(0)], x)
    assert torch.equal(index, torch.arange(300))
    assert torch.equal(x, 1.0 + 2 * torch.arange(300)[:, None].expand(-1, 2))
    assert not list(folder.glob("*.o"))


def twice(graph, tensors, out):
    graph._eager(tensors, out)
    return graph._eager(tensors, out)


def flags_of_what_is_updated(graph, tensors, out):
    graph._eager(tensors, out)
    return [out, graph.whole(*tensors)[1]]


def first_column_ahead(graph, tensors, out):
    out[:, 0] = graph.whole(*tensors)[0][:, 0]
    return graph._eager(tensors, out)


def zeros_negated(graph, tensors, out):
    results = graph._eager(tensors, out)
    out.sub_(0.0).masked_fill_(out == 0.0, -0.0)
    return results


@pytest.mark.parametrize(
    "hazard", [twice, flags_of_what_is_updated, first_column_ahead, zeros_negated], ids=lambda hazard: hazard.__name__
)
@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 4), (1, 8), (4, 8)])
def test_the_check_sees_what_is_read_behind_its_change(n, m, hazard, monkeypatch):
    """As by a loop that updates columns of logits before another one reads them."""
    like = (torch.float32, m)
    graph = compiled_loop.CompiledLoop(
        bounds.group_expected_update,
        (like, (torch.uint8,)),
        ((torch.float32, 1), (torch.float32,)),
        False,
        like,
        0,
        constants={"n": n},
    )
    # of a first step, which changes nothing
    x, rest = torch.zeros(96, m), [torch.zeros(1), torch.tensor(1.0)]
    levels = bounds.group_noise_levels(torch.arange(96), *map(torch.tensor, (7, 0, 3, 0)), m=m)
    given = [x, levels, *rest]
    graph._check(graph._eager, given)
    if hazard is zeros_negated:
        sample = graph._sample(given)
        sample[0][0, 0] = 0.0
        monkeypatch.setattr(graph, "_sample", lambda _: [tensor.clone() for tensor in sample])
    with pytest.raises(RuntimeError, match="the loop of group_expected_update differs from the function"):
        graph._check(functools.partial(hazard, graph), given)


def test_inference_mode_and_default_dtype_do_not_reach_the_graph(folder, builds):
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode():
            graph = a_graph()
            check(graph)
    finally:
        torch.set_default_dtype(torch.float32)
    check(graph)


def test_the_name_on_disk_holds_all_that_the_code_depends_on(monkeypatch):
    names = [a_graph()._digest(), a_graph(power=4)._digest(), a_graph(rest=((torch.float64,),))._digest()]
    names.append(a_graph(groups=((torch.float32, 8),))._digest())
    constants = {"power": 3}
    names.append(compiled_loop.CompiledLoop(scaled_sum, *LIKE, constants=constants)._digest())
    names.append(compiled_loop.CompiledLoop(check, *LIKE, True, constants=constants)._digest())
    for out in itertools.product((torch.int32, torch.int64), (1, 2)):
        for in_place, full in itertools.product((None, 0, 1), (None, by_bounds, draw_full)):
            names.append(compiled_loop.CompiledLoop(scaled_sum, *LIKE, True, out, in_place, full, constants)._digest())
    for name, value in (("processor", lambda: "another"), ("CODE", "edited")):
        with monkeypatch.context() as patch:
            patch.setattr(cache, name, value)
            names.append(a_graph()._digest())
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "3.0")
        names.append(a_graph()._digest())
    assert len(set(names)) == len(names)
    assert a_graph()._digest() == names[0]


def test_the_name_of_a_loop_changes_with_all_that_it_is_made_from(tmp_path, monkeypatch):
    package = Path(maskpro_kernels.__file__).parent
    modules = modules_of(package)
    needed = [modules[name] for name in reached_from("maskpro_kernels.ops.cpu.kernels", modules)]
    assert {"codegen.py", "score.py", "pattern.py"} <= {path.name for path in needed}
    assert cache.sources() == cache.CODE
    copy = shutil.copytree(package, tmp_path / "copy")
    monkeypatch.setattr(cache, "__file__", str(copy / "ops" / "cpu" / "cache.py"))
    digests = [cache.sources()]
    for path in needed:
        with open(copy / path.relative_to(package), "a") as file:
            file.write("x = 2\n")
        digests.append(cache.sources())
    assert digests[0] == cache.CODE
    assert len(set(digests)) == len(digests)


def test_threads_that_come_together_compile_once(folder, monkeypatch):
    building, graph = threading.Barrier(2, timeout=60), a_graph()
    builds = []

    def slow(graph):
        builds.append(graph)
        time.sleep(0.2)
        return NOTHING

    monkeypatch.setattr(compiled_loop.CompiledLoop, "_build", slow)
    monkeypatch.setattr(compiled_loop.CompiledLoop, "_loaded", lambda graph, code, results: graph._eager)

    def call():
        building.wait()
        graph(tensors(2))

    threads = [threading.Thread(target=call) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(builds) == 1


def test_a_process_waits_for_another_that_compiles_the_same(folder, monkeypatch):
    graph, path = a_graph(), folder / "scaled_sum-x.o"
    monkeypatch.setattr(compiled_loop.CompiledLoop, "_digest", lambda _: "x")

    def build(graph):
        with pytest.raises(Timeout):
            FileLock(path.with_suffix(".lock"), is_singleton=False, timeout=0).acquire()
        return NOTHING

    monkeypatch.setattr(compiled_loop.CompiledLoop, "_loaded", lambda graph, code, results: graph._eager)
    monkeypatch.setattr(compiled_loop.CompiledLoop, "_build", build)
    graph(tensors(2))
    assert path.exists()
    with FileLock(path.with_suffix(".lock"), is_singleton=False, timeout=0):
        pass


def test_what_nobody_loads_goes(folder):
    kept, old, left = folder / "kept.o", folder / "old.o", folder / "tmpx"
    for path in (kept, old):
        path.write_bytes(b"")
    left.mkdir()
    (left / "graph.o").write_bytes(b"")
    long_ago = time.time() - cache.KEPT_SECONDS - 1
    for path in (old, left):
        os.utime(path, (long_ago, long_ago))
    cache.remove_unused(folder)
    assert list(folder.iterdir()) == [kept]


def test_a_command_tells_that_it_compiles(folder, capsys, nothing):
    with log_told():
        a_graph()(tensors(2))
    told = capsys.readouterr().err
    assert told == f"compiling scaled_sum: once, it is kept in {folder}\n"
    a_graph(power=5)(tensors(2))
    assert not capsys.readouterr().err


def test_that_no_compiler_is_found_is_told(monkeypatch, caplog):
    def none_found():
        raise RuntimeError("no compiler")

    monkeypatch.setattr(binding, "get_host_cpu_name", none_found)
    # the answer of this process is kept
    assert not dispatch.compiler_available.__wrapped__()
    assert "LLVM does not compile here (no compiler)" in caplog.text


def test_what_another_process_removes_meanwhile_is_passed_over(folder, monkeypatch):
    """Or a process would run eagerly, though its graph has been built."""
    (folder / "left").write_bytes(b"")
    listed = list(folder.iterdir())
    (folder / "left").unlink()
    monkeypatch.setattr(type(folder), "iterdir", lambda _: iter(listed))
    cache.remove_unused(folder)


def test_the_lock_of_what_is_loaded_stays(folder, monkeypatch, nothing):
    graph, lock = a_graph(), folder / "scaled_sum-x.lock"
    monkeypatch.setattr(compiled_loop.CompiledLoop, "_digest", lambda _: "x")
    lock.write_bytes(b"")
    os.utime(lock, (0, 0))
    graph(tensors(2))
    assert lock.exists() and time.time() - lock.stat().st_mtime < cache.KEPT_SECONDS


def test_a_folder_that_was_deleted_is_made_anew_for_its_owner_alone(tmp_path, monkeypatch, nothing):
    folder = tmp_path / "maskpro_kernels"
    monkeypatch.setattr(cache, "folder", lambda: folder)
    before = os.umask(0o002)
    try:
        a_graph()(tensors(2))
    finally:
        os.umask(before)
    assert folder.stat().st_mode & 0o777 == 0o700


def test_damage_of_any_kind_is_seen(tmp_path):
    path = tmp_path / "graph.o"
    assert cache.intact(path) is None
    cache.keep(path, b"code" * 8, ((torch.float32, 4), (torch.uint8,)))
    whole = path.read_bytes()
    assert cache.intact(path) == (b"code" * 8, ((torch.float32, 4), (torch.uint8,)))
    for place in range(len(whole)):
        for bit in (0, 3, 7):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << bit
            path.write_bytes(damaged)
            # and nothing is raised
            assert cache.intact(path) is None
        path.write_bytes(whole[:place])
        assert cache.intact(path) is None


CHILD = "from maskpro_kernels.ops.cpu import cache; print(cache.folder())"


def folder_of(**given: str | None) -> str:
    """What a process with that environment, None where a variable is missing, takes for the cache."""
    environment = {name: value for name, value in (os.environ | given).items() if value is not None}
    done = subprocess.run([sys.executable, "-c", CHILD], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_the_cache_lies_where_caches_do(tmp_path):
    home, cache = str(tmp_path / "home"), str(tmp_path / "cache")
    assert folder_of(XDG_CACHE_HOME=cache, HOME=home) == f"{cache}/maskpro_kernels"
    for unset in (None, "", "relative"):
        assert folder_of(XDG_CACHE_HOME=unset, HOME=home) == f"{home}/.cache/maskpro_kernels"
    assert (tmp_path / "cache" / "maskpro_kernels").stat().st_mode & 0o777 == 0o700


def test_graphs_live_as_long_as_the_process_where_others_may_write_or_nobody(tmp_path):
    shared = tmp_path / "maskpro_kernels"
    shared.mkdir()
    shared.chmod(0o777)
    file = tmp_path / "file"
    file.write_text("")
    for base in (tmp_path, file):
        folder = folder_of(XDG_CACHE_HOME=str(base))
        assert "maskpro_kernels-" in folder
        assert not os.path.exists(folder)
