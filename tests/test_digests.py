"""What a digest covers."""

from __future__ import annotations

import torch

from maskpro_kernels.digests import SIZE, digest, digest_of_bytes, digest_of_named


def named(**changes):
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.arange(6.0).view(2, 3) + 1}
    return tensors | changes


def test_a_digest_covers_names_shapes_dtypes_bytes_and_metadata():
    tensors, metadata = named(), {"pattern": "2:4", "model": "m"}
    flipped = tensors["a"].clone()
    flipped.view(torch.int32)[1, 2] ^= 1
    others = [
        (named(a=flipped), metadata),
        (named(a=-tensors["a"]), metadata),
        (named(a=tensors["a"].view(3, 2)), metadata),
        (named(a=tensors["a"].view(torch.int32)), metadata),
        (named(a=tensors["b"], b=tensors["a"]), metadata),
        ({"a": tensors["a"], "c": tensors["b"]}, metadata),
        ({"a": tensors["a"]}, metadata),
        (tensors, metadata | {"pattern": "1:4"}),
        (tensors, {"pattern": "m", "model": "2:4"}),
        (tensors, {"pattern": "2:4"}),
        # where one ends and the next begins
        (tensors, {"pattern": '2:4"], ["x', "model": "m"}),
    ]
    found = [digest_of_named(*other) for other in [(tensors, metadata), *others]]
    assert len(set(found)) == len(found) and all(len(one) == 2 * SIZE for one in found)


def test_neither_order_nor_strides_change_it():
    tensors = named()
    turned = {"b": tensors["b"].t().contiguous().t(), "a": tensors["a"]}
    assert not turned["b"].is_contiguous()
    assert digest_of_named(turned, {"y": "1", "x": "2"}) == digest_of_named(tensors, {"x": "2", "y": "1"})


def test_known_answers():
    """The same on any machine."""
    tensors = torch.tensor([1.0, -2.0]), torch.tensor([[3]], dtype=torch.uint8)
    assert digest(tensors) == "2f4ac1e68e560915bdc160ac809ca691"
    # of BLAKE2b itself
    assert digest_of_bytes(b"abc").hex() == digest_of_bytes(b"a", b"bc").hex() == "cf4ab791c62b8d2b2109c90275287816"
