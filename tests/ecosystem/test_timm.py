"""Networks for images of timm: converted, learned, finalized; what has no mask is named."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

timm = pytest.importorskip("timm")

import maskpro_kernels as mk  # noqa: E402

pytestmark = [pytest.mark.ecosystem, pytest.mark.usefixtures("eager_reference")]

# a transformer, and two of convolutions, one of which has linear maps between them
NETWORKS = {
    "vit_tiny_patch16_224": {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2},
    "convnext_tiny": {"depths": (1, 1, 1, 1), "dims": (16, 16, 32, 32)},
    "resnet10t": {},
}


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, pretrained=False, num_classes=10, **NETWORKS[name]).eval()


def loss_fn(model, batch):
    images, labels = batch
    return nn.functional.cross_entropy(model(images), labels)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "convnext_tiny"])
def test_a_network_is_converted_learns_and_is_finalized(name):
    model, images = network(name), torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        conversion = mk.convert(model, "2:4", calibration=[images], gap=2.0)
    convolutions = {f"{path}.weight" for path, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    assert convolutions and convolutions <= conversion.unmasked.keys()
    assert any(".mlp.fc1" in path for path in conversion.converted)
    batches = [(images, torch.arange(4))]
    mk.MaskTrainer(model, loss_fn, batches, mk.StraightThrough(lr=0.5, steps=3), seed=0).run(3, progress=False)
    expected = model.eval()(images).detach()
    packed = mk.finalize(copy.deepcopy(model), to="packed")
    for sparse in (mk.finalize(model), packed):
        torch.testing.assert_close(sparse(images), expected, rtol=1e-4, atol=1e-5)


def test_the_convolutions_of_a_network_are_named():
    model = network("resnet10t")
    with pytest.warns(UserWarning, match="0.1% of its matrix weights have a mask") as reported:
        conversion = mk.convert(model, "2:4", calibration=[torch.randn(2, 3, 32, 32)])
    convolutions = {f"{path}.weight" for path, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    assert len(reported) == 1 and conversion.masked_share < 0.1
    assert convolutions == conversion.unmasked.keys() - {"fc.weight"}
