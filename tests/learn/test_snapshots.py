"""Snapshots: the last ones are kept, and every damage is found."""

from __future__ import annotations

import os

import pytest
import torch
from helpers.bits import assert_same_bits

from maskpro_kernels.learn.run import newest_snapshot, save_snapshot

pytestmark = pytest.mark.usefixtures("eager_reference")


def test_snapshots(tmp_path):
    tensors = [{"a": torch.randn(4, 8), "b": torch.randn(3).bfloat16()} for _ in range(5)]
    for step, one in enumerate(tensors):
        save_snapshot(tmp_path, step, one, {"step": step, "square": 0.1 + step})
    step, read, state, damaged = newest_snapshot(tmp_path)
    assert (step, state, damaged) == (4, {"step": 4, "square": 4.1}, [])
    assert_same_bits(read, tensors[4])
    # the first and the last two are kept
    assert [newest_snapshot(tmp_path, at_most)[0] for at_most in range(5)] == [0, 0, 0, 3, 4]
    assert len(list(tmp_path.iterdir())) == 3


def test_every_byte_of_a_snapshot_flipped_is_found(tmp_path):
    save_snapshot(tmp_path, 0, {"a": torch.zeros(2)}, {"x": 1})
    path = save_snapshot(tmp_path, 3, {"a": torch.randn(4, 8)}, {"x": 1})
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
        step, _, _, damaged = newest_snapshot(tmp_path)
        assert step == 0 and damaged == [path]
    path.write_bytes(whole[:-1])
    assert newest_snapshot(tmp_path)[0] == 0
    path.rename(path.with_name(path.name.replace("0000000003", "0000000004")))
    assert newest_snapshot(tmp_path)[0] == 0
    (tmp_path / sorted(os.listdir(tmp_path))[0]).write_bytes(b"")
    with pytest.raises(
        ValueError, match="snapshot: expected a sound one in .*, got none, 2 are damaged or of another run"
    ):
        newest_snapshot(tmp_path)
