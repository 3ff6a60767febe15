"""Graphs are compiled once, kept on disk under all that they depend on, and made anew where the file is damaged."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from maskpro_kernels import graphs


def scaled_sum(x, index, scale, *, power):
    """A function of groups with two results."""
    return (x * scale).sum(-1), index * power


LIKE = (((torch.float32, 4), (torch.int64,)), ((torch.float32,),))


def a_graph(power=3, groups=LIKE[0], rest=LIKE[1]):
    return graphs.Graph(scaled_sum, groups, rest, True, {"power": power})


def tensors(rows):
    x = torch.arange(rows * graphs.ROW * 4, dtype=torch.float32).view(rows, graphs.ROW, 4)
    return [x, torch.arange(rows * graphs.ROW).view(rows, -1), torch.tensor(0.5, dtype=torch.float32), torch.tensor(7)]


def check(graph, rows=5):
    given = tensors(rows)
    total, index = graph(list(given))
    assert torch.equal(total, given[0].sum(-1) * 0.5)
    assert torch.equal(index, (given[1] + 7) * 3)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(graphs, "cache_folder", lambda: tmp_path)
    return tmp_path


@pytest.fixture
def builds(monkeypatch):
    """How often something was compiled; nothing falls back to eager."""
    count = []
    build = graphs.Graph._build

    def counted(*args):
        count.append(args)
        build(*args)

    monkeypatch.setattr(graphs.Graph, "_build", counted)
    monkeypatch.setattr(graphs.Graph, "_eager", None)
    return count


def test_a_graph_is_compiled_once_for_all_shapes_and_processes(folder, builds):
    graph = a_graph()
    for rows in (2, 5, 4096):
        check(graph, rows)
    # as another process would
    check(a_graph())
    assert len(builds) == 1
    (file,) = folder.iterdir()
    # a file that a killed process or a full disk left behind
    file.write_bytes(file.read_bytes()[:5_000])
    check(a_graph())
    assert len(builds) == 2
    assert list(folder.iterdir()) == [file]


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
    names.append(a_graph(groups=((torch.float32, 8), (torch.int64,)))._digest())
    for name, value in (("processor", lambda: "another"), ("sources", lambda: "edited"), ("OPTIONS", {})):
        with monkeypatch.context() as patch:
            patch.setattr(graphs, name, value)
            names.append(a_graph()._digest())
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "3.0")
        names.append(a_graph()._digest())
    assert len(set(names)) == len(names)
    assert a_graph()._digest() == names[0]


def test_the_sources_are_what_graphs_are_made_from(tmp_path, monkeypatch):
    for name in graphs.SOURCES:
        (tmp_path / f"{name}.py").write_text("x = 1\n")
    monkeypatch.setattr(graphs, "__file__", str(tmp_path / "graphs.py"))
    digests = [graphs.sources.__wrapped__()]
    for name in graphs.SOURCES:
        (tmp_path / f"{name}.py").write_text("x = 2\n")
        digests.append(graphs.sources.__wrapped__())
    assert len(set(digests)) == len(digests)


CHILD = "from maskpro_kernels import graphs; print(graphs.cache_folder())"


@pytest.mark.parametrize("given", ["XDG_CACHE_HOME", "HOME"])
def test_the_cache_lies_where_caches_do(given, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "XDG_CACHE_HOME"}
    environment[given] = str(tmp_path)
    done = subprocess.run([sys.executable, "-c", CHILD], env=environment, capture_output=True, text=True, check=True)
    expected = tmp_path if given == "XDG_CACHE_HOME" else tmp_path / ".cache"
    assert done.stdout.strip() == str(expected / "maskpro_kernels")


def test_where_no_cache_can_be_written_graphs_live_as_long_as_the_process(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    environment = os.environ | {"XDG_CACHE_HOME": str(file)}
    code = f"{CHILD}; assert graphs.cache_folder().is_dir()"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "maskpro_kernels-" in done.stdout
    assert not os.path.exists(done.stdout.strip())
