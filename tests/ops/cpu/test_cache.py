"""Loops are kept on disk under all that they depend on, for one owner, and made again where the file is damaged."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch
from filelock import FileLock, Timeout
from helpers.loops import LIKE, NOTHING, a_loop, by_bounds, check_loop, draw_full, loop_tensors, oddness, scaled_sum
from helpers.source_tree import modules_of, reached_from

import maskpro_kernels
from maskpro_kernels.ops.cpu import cache
from maskpro_kernels.ops.cpu.loops import CompiledLoop


def test_the_name_on_disk_holds_all_that_the_code_depends_on(monkeypatch):
    constants = {"power": 3}
    loops = [a_loop(), a_loop(power=4), a_loop(rest=((torch.float64,),)), a_loop(groups=((torch.float32, 8),))]
    loops.append(CompiledLoop(scaled_sum, *LIKE, constants=constants))
    loops.append(CompiledLoop(check_loop, *LIKE, True, constants=constants))
    for out in itertools.product((torch.int32, torch.int64), (1, 2)):
        drawn = ((None, None), (oddness, by_bounds), (oddness, draw_full), (scaled_sum, draw_full))
        for in_place, by in itertools.product((None, 0, 1), drawn):
            loops.append(CompiledLoop(scaled_sum, *LIKE, True, out, in_place, *by, constants))
    names = [cache.digest(loop.key) for loop in loops]
    for module, name, value in (
        (cache, "processor", lambda: "another"),
        (cache, "CODE", "edited"),
        (torch, "__version__", "3.0"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, value)
            names.append(cache.digest(a_loop().key))
    assert len(set(names)) == len(names)
    assert cache.digest(a_loop().key) == names[0]


def test_the_name_of_a_loop_changes_with_all_that_it_is_made_from(tmp_path, monkeypatch):
    package = Path(maskpro_kernels.__file__).parent
    modules = modules_of(package)
    products = [f"maskpro_kernels.ops.cpu.packed_gemm.{name}" for name in ("products", "amx", "gathered", "strips")]
    names = {x for name in ("maskpro_kernels.ops.cpu.kernels", *products) for x in reached_from(name, modules)}
    needed = [modules[name] for name in sorted(names)]
    assert {"loops.py", "plackett_luce.py", "pattern.py", "weight.py"} <= {path.name for path in needed}
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
    building, loop = threading.Barrier(2, timeout=60), a_loop()
    builds = []

    def slow(loop):
        builds.append(loop)
        time.sleep(0.2)
        return NOTHING

    monkeypatch.setattr(CompiledLoop, "_build", slow)
    monkeypatch.setattr(CompiledLoop, "_loaded", lambda loop, code, results: loop._eager)

    def call():
        building.wait()
        loop(loop_tensors(2))

    threads = [threading.Thread(target=call) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(builds) == 1


def test_a_process_waits_for_another_that_compiles_the_same(folder, monkeypatch):
    loop, path = a_loop(), folder / "scaled_sum-x.o"
    monkeypatch.setattr(cache, "digest", lambda _: "x")

    def build(loop):
        with pytest.raises(Timeout):
            FileLock(path.with_suffix(".lock"), is_singleton=False, timeout=0).acquire()
        return NOTHING

    monkeypatch.setattr(CompiledLoop, "_loaded", lambda loop, code, results: loop._eager)
    monkeypatch.setattr(CompiledLoop, "_build", build)
    loop(loop_tensors(2))
    assert path.exists()
    with FileLock(path.with_suffix(".lock"), is_singleton=False, timeout=0):
        pass


def test_what_nobody_loads_goes(folder):
    kept, old, left = folder / "kept.o", folder / "old.o", folder / "tmpx"
    for path in (kept, old):
        path.write_bytes(b"")
    left.mkdir()
    (left / "loop.o").write_bytes(b"")
    long_ago = time.time() - cache.KEPT_SECONDS - 1
    for path in (old, left):
        os.utime(path, (long_ago, long_ago))
    cache.remove_unused(folder)
    assert list(folder.iterdir()) == [kept]


def test_the_lock_of_what_is_loaded_stays(folder, monkeypatch, nothing):
    loop, lock = a_loop(), folder / "scaled_sum-x.lock"
    monkeypatch.setattr(cache, "digest", lambda _: "x")
    lock.write_bytes(b"")
    os.utime(lock, (0, 0))
    loop(loop_tensors(2))
    assert lock.exists() and time.time() - lock.stat().st_mtime < cache.KEPT_SECONDS


def test_a_folder_that_was_deleted_is_made_again_and_all_is_of_its_owner_alone(tmp_path, monkeypatch, nothing):
    folder = tmp_path / "maskpro_kernels"
    monkeypatch.setattr(cache, "folder", lambda: folder)
    before = os.umask(0)
    try:
        a_loop()(loop_tensors(2))
    finally:
        os.umask(before)
    (path,) = folder.glob("*.o")
    assert folder.stat().st_mode & 0o777 == 0o700 and path.stat().st_mode & 0o777 == 0o600
    assert cache.load(path) == NOTHING


def test_damage_of_any_kind_is_seen(tmp_path):
    path = tmp_path / "loop.o"
    assert cache.load(path) is None
    cache.store(path, b"code" * 8, ((torch.float32, 4), (torch.uint8,)))
    whole = path.read_bytes()
    assert cache.load(path) == (b"code" * 8, ((torch.float32, 4), (torch.uint8,)))
    for place in range(len(whole)):
        for bit in (0, 3, 7):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << bit
            path.write_bytes(damaged)
            # and nothing is raised
            assert cache.load(path) is None
        path.write_bytes(whole[:place])
        assert cache.load(path) is None


SOUND = (b"code" * 8, ((torch.float32, 4),))


def replanted(path: Path, how: str) -> None:
    """Another file or folder in the place of a valid file, from another user or program."""
    content = path.read_bytes()
    path.unlink()
    if how == "a pipe":
        os.mkfifo(path, 0o600)
    elif how == "a link":
        elsewhere = path.with_name("elsewhere")
        elsewhere.write_bytes(content)
        elsewhere.chmod(0o600)
        path.symlink_to(elsewhere)
    else:
        path.write_bytes(content)
    if how.startswith("mode "):
        path.chmod(int(how.removeprefix("mode "), 8))


@pytest.mark.parametrize("how", ["a pipe", "a link", "mode 666", "mode 620", "mode 602"])
def test_files_that_others_may_have_put_there_are_compiled_again(folder, monkeypatch, how):
    """Its digest is right: who may write to it can make one."""
    monkeypatch.setattr(cache, "digest", lambda _: "x")
    path, builds = folder / "loop-x.o", []

    def make():
        builds.append(how)
        return SOUND

    assert cache.compiled("loop", (), make) == cache.compiled("loop", (), make) == SOUND
    replanted(path, how)
    assert cache.compiled("loop", (), make) == SOUND and len(builds) == 2
    assert cache.compiled("loop", (), make) == SOUND and len(builds) == 2
    assert path.is_file() and not path.is_symlink() and path.stat().st_mode & 0o777 == 0o600


def test_a_file_of_another_user_is_not_loaded(folder, monkeypatch):
    path = folder / "loop-x.o"
    cache.store(path, *SOUND)
    assert cache.load(path) == SOUND
    if os.getuid() == 0:
        os.chown(path, 1, 1)
    else:
        monkeypatch.setattr(os, "getuid", lambda: path.stat().st_uid + 1)
    assert cache.load(path) is None


def test_the_owner_asked_for_is_that_of_the_file_which_is_read(folder, monkeypatch):
    """Not of another file with its name a moment before or after."""
    path, planted = folder / "loop-x.o", folder / "planted"
    cache.store(path, *SOUND)
    planted.write_bytes(path.read_bytes())
    planted.chmod(0o666)
    really_open = os.open

    def swapped(name, *how, **more):
        os.replace(planted, path)
        return really_open(name, *how, **more)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", swapped)
        assert cache.load(path) is None


def test_a_loop_under_the_name_of_another_is_not_loaded(folder):
    path, other = folder / "loop-x.o", folder / "loop-y.o"
    cache.store(path, *SOUND)
    shutil.copy(path, other)
    assert other.stat().st_mode & 0o777 == 0o600
    assert cache.load(other) is None and cache.load(path) == SOUND


def folder_of(monkeypatch, **given: str | None) -> Path:
    """Path of the cache with these variables in the environment; None removes one."""
    with monkeypatch.context() as patch:
        for name, value in given.items():
            patch.delenv(name, raising=False) if value is None else patch.setenv(name, value)
        # not what this process has found
        return cache.folder.__wrapped__()


def test_the_cache_lies_where_caches_do(tmp_path, monkeypatch):
    home, base = tmp_path / "home", tmp_path / "cache"
    assert folder_of(monkeypatch, XDG_CACHE_HOME=str(base), HOME=str(home)) == base / "maskpro_kernels"
    for unset in (None, "relative"):
        expected = home / ".cache" / "maskpro_kernels"
        assert folder_of(monkeypatch, XDG_CACHE_HOME=unset, HOME=str(home)) == expected
    assert (base / "maskpro_kernels").stat().st_mode & 0o777 == 0o700


def test_loops_live_as_long_as_the_process_where_others_may_write_or_nobody(tmp_path, monkeypatch):
    shared = tmp_path / "maskpro_kernels"
    shared.mkdir()
    shared.chmod(0o777)
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setattr(cache.folder, "temporary", None, raising=False)
    for base in (tmp_path, file):
        folder = folder_of(monkeypatch, XDG_CACHE_HOME=str(base))
        assert folder.name.startswith("maskpro_kernels-") and folder.is_dir()
        cache.folder.temporary.cleanup()
        assert not folder.exists()


@pytest.mark.parametrize("lacking", ["the folder", "the folder above it", "the lock"])
def test_a_disk_that_takes_no_file_compiles_what_is_not_kept(tmp_path, monkeypatch, caplog, lacking):
    """As one without inodes or space, or a home that is read only."""

    def folder():
        if lacking == "the folder above it":
            raise OSError(errno.ENOSPC, "No space left on device")
        return tmp_path / "file" if lacking == "the folder" else tmp_path

    monkeypatch.setattr(cache, "folder", folder)
    monkeypatch.setattr(cache, "digest", lambda _: "x")
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "loop-x.lock").mkdir()
    assert cache.compiled("loop", (), lambda: SOUND) == SOUND
    assert "loop is compiled, and not stored: [Errno" in caplog.text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "loop-x.lock"]
