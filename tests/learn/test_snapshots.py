"""Snapshots: the last ones are kept, and every damage is found."""

from __future__ import annotations

import os

import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.small_trainer import a_trainer_in, logits_of

from maskpro_kernels.learn.snapshots import newest_snapshot, save_snapshot, snapshots_in, step_of

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
        ValueError, match="snapshot: expected an intact one in .*, got none, 2 are damaged or of another run"
    ):
        newest_snapshot(tmp_path)


def test_two_snapshots_of_a_step_push_out_no_older_one(tmp_path):
    """As where a snapshot is due at the last step of a run, which leaves one at its end as well."""
    for step, state in ((0, 0), (3, 0), (4, 0), (4, 1), (4, 2)):
        save_snapshot(tmp_path, step, {"a": torch.zeros(2)}, {"x": state})
    assert [step_of(path) for path in snapshots_in(tmp_path)] == [0, 3, 4]
    assert newest_snapshot(tmp_path)[2] == {"x": 2}


def test_whatever_is_damaged_in_the_last_snapshot_it_is_set_aside(tmp_path):
    """Its header says how long it is, of what shapes and where; 200 places, most of them there."""
    trainer = a_trainer_in(tmp_path, "straight-through")
    trainer.run(1, progress=False)
    logits = logits_of(trainer.model)
    trainer.run(1, progress=False)
    trainer.close()
    first, _, last = snapshots_in(tmp_path)
    whole, aside = last.read_bytes(), last.with_suffix(".aside")
    places = [*range(8), *range(8, len(whole), len(whole) // 190)]
    assert len(places) > 195
    for at in places:
        last.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        step, _, _, damaged = newest_snapshot(tmp_path)
        assert step == 1 and damaged == [last]
    # the length of the header, its brace, some places in it, and a tensor
    for at in (*range(2, 9), 40, 200, len(whole) - 1):
        last.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        again = a_trainer_in(tmp_path, "straight-through")
        with pytest.warns(UserWarning, match=f"{last.name} is damaged .*: it is set aside"):
            assert again.resume() == 1
        again.close()
        assert_same_bits(logits_of(again.model), logits)
        assert aside.exists() and not last.exists()
        aside.unlink()
