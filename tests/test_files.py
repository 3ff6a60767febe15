"""Files that are seen as a whole or not at all, and digests."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers.full_disk import files_of_at_most

from maskpro_kernels import files
from maskpro_kernels.files import (
    SIZE,
    append_whole,
    check_output,
    digest,
    digest_of_bytes,
    digest_of_named,
    read_record,
    unfinished,
    write_record,
    write_tensors,
    write_whole,
)


def write_bytes(path, number: int) -> None:
    write_whole(path, bytes([number]) * 10_000)


def write_tensor(path, number: int) -> None:
    write_tensors({"x": torch.full((10_000,), number)}, path, {})


@pytest.mark.parametrize("write", [write_bytes, write_tensor])
def test_writers_of_one_file_do_not_take_each_others_part(write, tmp_path, monkeypatch):
    path = tmp_path / "x"
    wholes = []
    for number in range(2):
        write(path, number)
        wholes.append(path.read_bytes())
    both = threading.Barrier(2, timeout=10)
    # both have written a part before either gives it its name
    monkeypatch.setattr(os, "fsync", lambda _: both.wait())
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(write, [path, path], range(2))) == [None, None]
    assert path.read_bytes() in wholes and list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_leaves_the_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "x"
    write_whole(path, b"before")

    def full(_):
        (part,) = set(tmp_path.iterdir()) - {path}
        # by which a part is known to what cleans up
        assert part.name.startswith("x.") and part.suffix == ".tmp"
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="disk full"):
        write_whole(path, b"after")
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("write", [write_bytes, write_tensor, lambda path, _: append_whole(path, bytes(10_000))])
def test_a_full_disk_is_reported_with_the_path(write, tmp_path):
    with files_of_at_most(100), pytest.raises(OSError, match=f"{tmp_path}/x"):
        write(tmp_path / "x", 1)


def test_a_killed_writer_of_tensors_leaves_names_that_are_recognized(tmp_path, monkeypatch):
    """Also those of the library that writes the file, under a temporary name of its own."""
    names = []

    class Killed(BaseException):
        pass

    def killed(tensors, path, metadata):
        (path.parent / ".tmpAb12Cd").touch()
        raise Killed

    monkeypatch.setattr(files, "save_file", killed)
    # a killed process removes nothing
    monkeypatch.setattr(shutil, "rmtree", lambda folder, **_: names.append(folder.name))
    with pytest.raises(Killed):
        write_tensor(tmp_path / "x", 1)
    (left,) = tmp_path.iterdir()
    assert names == [left.name] and unfinished(tmp_path, "x") == [left]
    check_output(tmp_path)


def test_a_record_is_read_unchanged_or_not_at_all(tmp_path):
    path, content = tmp_path / "record.json", {"format": "x", "rows": [{"step": 0, "loss": 2.5}], "none": None}
    write_record(path, content)
    assert read_record(path) == content
    written = path.read_bytes()
    for at in range(0, len(written), 3):
        path.write_bytes(written[:at] + bytes([written[at] ^ 1]) + written[at + 1 :])
        try:
            assert read_record(path) == content
        except ValueError as error:
            assert "as it was written, got a damaged file" in str(error) and str(path) in str(error)
    for other in (b"", b"[1]", b"{}", written[:-9], b"[" * 100_000):
        path.write_bytes(other)
        with pytest.raises(ValueError, match="as it was written"):
            read_record(path)


def test_check_output(tmp_path):
    check_output(tmp_path)
    check_output(tmp_path / "new" / "deep")
    assert os.listdir(tmp_path) == []
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="output: expected a new or empty folder, got .*not empty"):
        check_output(tmp_path)
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match="output: expected a writable folder, got .*file"):
            check_output(folder)


@pytest.mark.parametrize(("module", "name"), [(tempfile, "TemporaryFile"), (os, "mkdir")])
def test_check_output_refuses_a_folder_it_cannot_write(tmp_path, monkeypatch, module, name):
    """Also one that takes files but no folders, such as by a quota."""

    def refuse(*args, **others):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path))

    monkeypatch.setattr(module, name, refuse)
    with pytest.raises(ValueError, match="output: expected a writable folder, got .*deep.*Permission denied"):
        check_output(tmp_path / "new" / "deep")
    assert os.listdir(tmp_path) == []


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
    """Equal on any machine."""
    tensors = torch.tensor([1.0, -2.0]), torch.tensor([[3]], dtype=torch.uint8)
    assert digest(tensors) == "2f4ac1e68e560915bdc160ac809ca691"
    # of BLAKE2b itself
    assert digest_of_bytes(b"abc").hex() == digest_of_bytes(b"a", b"bc").hex() == "cf4ab791c62b8d2b2109c90275287816"
