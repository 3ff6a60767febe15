"""Jobs in several processes, the ranks of one run: the result of each, or its end."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import wait

import torch
import torch.distributed as dist

from helpers.children import search_path
from maskpro_kernels.ops import dispatch

# Seconds: more than any of these runs takes on a busy machine
LONGEST = 120


class Ended(Exception):
    """A process has ended without an answer."""


def one_rank(pipe, job, rank: int, world: int, port: int, arguments: dict) -> None:
    """In a process of its own: the result of a job, or its error."""
    torch.set_num_threads(1)
    # where it hangs, before it is killed
    faulthandler.dump_traceback_later(0.9 * LONGEST)
    dispatch.interpreting = dispatch.compiler_available = lambda: False
    if world > 1:
        # as with torchrun the store is in none of the ranks
        store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=LONGEST))
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    try:
        pipe.send(job(rank, **arguments))
    except Exception as error:
        pipe.send(error)
    pipe.recv()


@contextmanager
def forking():
    """Return a context of processes: one imports torch and late modules, and forks into the others."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["helpers.small_trainer", "helpers.tiny_llama", "torch._dynamo"])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = search_path()
    try:
        yield context
    finally:
        os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)


def in_ranks(world: int, job, **arguments) -> list:
    """Run a job on each rank, and return its results, errors, or ``Ended``."""
    with forking() as context:
        return _in_ranks(context, world, job, arguments)


def _in_ranks(context, world: int, job, arguments: dict) -> list:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pipes, processes = [], []
    try:
        for rank in range(world):
            ours, theirs = context.Pipe()
            arguments_of_one = (theirs, job, rank, world, store.port, arguments)
            processes.append(context.Process(target=one_rank, args=arguments_of_one, daemon=True))
            processes[-1].start()
            theirs.close()
            pipes.append(ours)
        return _answers(pipes)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _answers(pipes: list) -> list:
    """Collect the messages of all ranks; if one fails alone, the others may wait, and its error is reported."""
    results: dict = {}
    while len(results) < len(pipes):
        ready = wait([pipe for pipe in pipes if pipe not in results], LONGEST)
        if not ready:
            failed = (result for result in results.values() if isinstance(result, Exception))
            waiting = [rank for rank, pipe in enumerate(pipes) if pipe not in results]
            raise AssertionError(f"ranks {waiting} do not end") from next(failed, None)
        for pipe in ready:
            try:
                results[pipe] = pipe.recv()
            except EOFError:
                results[pipe] = Ended()
    return [results[pipe] for pipe in pipes]


def all_in_ranks(world: int, job, **arguments) -> list:
    results = in_ranks(world, job, **arguments)
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results
