"""Models as ONNX, by torch's exporter, and their results in onnx's reference evaluation."""

from __future__ import annotations

import warnings

import torch
from torch import nn

import maskpro_kernels as mk


def sparse_net(kind: str, pattern: str = "2:4", dtype=torch.float32) -> nn.Module:
    """Two layers in eval mode, "masked", "packed", "int8" or "int4"."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8, bias=False)).to(dtype)
    mk.convert(model, pattern)
    if kind != "masked":
        mk.finalize(model, to="packed", values="keep" if kind == "packed" else kind)
    return model.eval()


def some_x(dtype=torch.float32) -> torch.Tensor:
    return torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(1)).to(dtype)


def as_onnx(model: nn.Module, x: torch.Tensor):
    """(the graph, its output for x)."""
    from onnx.reference import ReferenceEvaluator

    with warnings.catch_warnings():
        # of torch's own
        warnings.simplefilter("ignore")
        program = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
    (name,) = (value.name for value in program.model_proto.graph.input)
    y, *_ = ReferenceEvaluator(program.model_proto).run(None, {name: x.numpy()})
    return program.model_proto.graph, torch.from_numpy(y)


def matrices(graph) -> list[list[int]]:
    """Shapes of the matrices in a graph."""
    return sorted(list(tensor.dims) for tensor in graph.initializer if len(tensor.dims) == 2)
