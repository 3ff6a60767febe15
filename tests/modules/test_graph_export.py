"""torch.export and torch.onnx.export of models with masked and packed layers."""

from __future__ import annotations

import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.cases import slow
from helpers.onnx_models import as_onnx, matrices, some_x, sparse_net
from torch import nn

import maskpro_kernels as mk
from maskpro_kernels.functional.linear import codes_linear

pytestmark = pytest.mark.usefixtures("eager_reference")

KINDS = ("masked", "packed", "int8", "int4")


@pytest.mark.parametrize("kind", KINDS)
def test_torch_export_gives_the_same(kind, tmp_path):
    model, x = sparse_net(kind), some_x()
    torch.export.save(torch.export.export(model, (x,)), tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    assert_same_bits(loaded(x), model(x))


def test_a_masked_onnx_graph_gives_the_same():
    """Ties, of which one model has many, go to the lower index in ONNX as well."""
    model, x = sparse_net("masked"), some_x()
    with torch.no_grad():
        model[2].logits.copy_(torch.randint(0, 2, model[2].logits.shape).float())
    torch.testing.assert_close(as_onnx(model, x)[1], model(x).detach())


@pytest.mark.parametrize("kind", ["packed", slow("int8"), "int4"])
def test_a_packed_onnx_graph_gives_the_same_and_holds_dense_weights(kind):
    model, x = sparse_net(kind), some_x()
    graph, y = as_onnx(model, x)
    torch.testing.assert_close(y, model(x).detach())
    # the exporter has folded the unpacking
    assert {node.op_type for node in graph.node} <= {"MatMul", "Add", "Gemm", "Relu", "Transpose", "Reshape"}
    assert matrices(graph) in ([[8, 64], [64, 32]], [[32, 64], [64, 8]])


class Given(nn.Module):
    """Under group codes, which no ONNX graph can hold."""

    def forward(self, x):
        weight = torch.ones(8, 32)
        return codes_linear(x, weight, mk.top_n_mask(weight, "2:4"), pattern="2:4")


@pytest.mark.parametrize("model", [lambda: sparse_net("masked").train(), Given], ids=["drawn", "given"])
def test_masks_that_no_onnx_graph_can_hold_are_refused(model):
    with pytest.raises(Exception, match="model: expected masks of the N largest logits for ONNX") as refused:
        as_onnx(model(), some_x())
    assert "export the dense model that finalize returns" in str(refused.value)
