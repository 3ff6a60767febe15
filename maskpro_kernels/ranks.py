"""The processes that learn one mask together, and what they tell each other: the one place for collectives.

Numbers go through gloo, whatever the device. When a process ends, the kernel closes its sockets, and gloo fails where
something waits for it. It does not say which rank has ended, and those that wait for another rank learn nothing. So the
rank that sees a failure starts a roll call in the store that the ranks share. All waiting ranks look there once a
second and answer.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import pickle
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Result = TypeVar("Result")

# Seconds: between two looks at the store, for answers to a roll call, for one connection
LOOK, ANSWER, CONNECTION = 1.0, 5.0, 2.0
# Seconds between two looks for answers, the first ones and the last ones
FIRST_PAUSE, LAST_PAUSE = 0.05, 0.4
# Connections that are tried at the same time, and that wait to be accepted at most, where the kernel allows as many
TRIED, QUEUE = 32, socket.SOMAXCONN
MEETING = timedelta(minutes=30)
# For what is waited for as long as it takes
NO_LIMIT = timedelta(days=365)
CALL = "roll call"


def of_torchrun() -> bool:
    """Whether torchrun has started this process."""
    return dist.is_available() and dist.is_torchelastic_launched()


def rank_of_torchrun() -> int:
    """The rank that this process has under torchrun, known before the ranks have met; 0 without torchrun."""
    return int(os.environ["RANK"]) if of_torchrun() else 0


@contextmanager
def under_torchrun() -> Iterator[int]:
    """Join the processes that torchrun has started, where it has started this one; gives its number on its machine.

    That is 0 without torchrun. With GPUs each process takes the one of its number.

    Raises:
        ValueError: if the machine has GPUs, but fewer than processes.
    """
    if not of_torchrun():
        yield 0
        return
    number = int(os.environ["LOCAL_RANK"])
    if torch.cuda.is_available():
        processes, gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        # all on this machine see it, before they wait for each other
        if processes > gpus:
            raise ValueError(
                f"nproc-per-node: expected at most {gpus}, the GPUs of this machine, got {processes}; with "
                "CUDA_VISIBLE_DEVICES= the ranks run on CPU"
            )
        torch.cuda.set_device(number)
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    yield number
    # not after an error: it would wait for what is under way
    dist.destroy_process_group()


class MissingRanks(RuntimeError):
    """Ranks have ended, or do not answer.

    Attributes:
        missing: which; empty where all answer, but a connection between them broke.
    """

    def __init__(self, message: str, missing: Sequence[int] = ()):
        super().__init__(message)
        self.missing = list(missing)


class FailedRank(RuntimeError):
    """Another rank has raised what is no ValueError; the message tells which, and what."""


class Ranks:
    """This process among those of a run: those of torch.distributed where it is initialized, else it is alone.

    All ranks call the same methods in the same order, ``connect`` first. Alone, nothing is sent.

    Args:
        timeout: seconds that a method waits for the other ranks, unless it is patient. A rank that has ended is
            noticed at once.

    Attributes:
        rank: of this process, from 0.
        world: how many there are.
        bytes_sent: of the tensors that this rank has given to the others.

    Methods raise MissingRanks where ranks have ended or do not come; every call from then on does.
    """

    def __init__(self, timeout: float = 600.0):
        together = dist.is_available() and dist.is_initialized()
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
        self.timeout = timeout
        self.bytes_sent = 0
        self._group: dist.ProcessGroup | None = None
        self._failure: RuntimeError | None = None

    def connect(self) -> None:
        """Meet the other ranks, where that has not been done; torch raises where they do not come in half an hour."""
        if self.world == 1 or self._group is not None:
            return
        self._group = dist.new_group(backend="gloo", timeout=MEETING)
        # torch has no public name for the store, nor for another limit of time
        store = dist.distributed_c10d._get_default_store()
        self._store = dist.PrefixStore(f"maskpro_kernels/{self._group.group_name}", store)
        self._sign, self._addresses = SignOfLife(), {}
        own = socket.gethostname(), self._sign.port
        addresses = {
            rank: ("127.0.0.1" if host == own[0] else host, port)
            for rank, (host, port) in enumerate(self.gather_objects(own))
            if rank != self.rank
        }
        # a refusal tells nothing where a connection cannot be had anyway
        taken = _connect_to_all(addresses.values())
        self._addresses = {rank: address for rank, address in addresses.items() if taken[address]}

    def close(self) -> None:
        """Part from the other ranks; they need not do so at the same time."""
        if self._group is None:
            return
        self._sign.close()
        if self._failure is None:
            # else something may be under way, and destroying would wait for it
            dist.destroy_process_group(self._group)
            self._failure = RuntimeError("ranks: expected open ones, got closed ones")
        self._group = None

    def gather(self, numbers: Sequence[float]) -> list[list[float]]:
        """The numbers of every rank, in float64, by rank. All ranks give as many."""
        if self.world == 1:
            return [list(numbers)]
        return [row.tolist() for row in self._gather(torch.tensor(numbers, dtype=torch.float64, device="cpu"))]

    def on_any(self, function: Callable[[], object] | None) -> bool:
        """Whether a function gives what is true on any rank; a rank without one takes that of others as it comes.

        Patient, but not until all ranks have come to it.
        """
        if self.world == 1:
            return function is not None and bool(function())
        if not any(asked for (asked,) in self.gather([function is not None])):
            return False
        flag = function is not None and bool(function())
        return any(row.item() for row in self._gather(torch.tensor([flag], device="cpu"), patient=True))

    def gather_objects(self, thing: object) -> list:
        """What every rank gives, by rank. Patient."""
        if self.world == 1:
            return [thing]
        content = torch.frombuffer(bytearray(pickle.dumps(thing)), dtype=torch.uint8)
        sizes = self._gather(torch.tensor([len(content)], device="cpu"), patient=True)
        padded = torch.zeros(int(max(sizes)), dtype=torch.uint8, device="cpu")
        padded[: len(content)] = content
        rows = self._gather(padded, patient=True)
        return [pickle.loads(row[: int(size)].numpy().tobytes()) for row, size in zip(rows, sizes, strict=True)]

    def first(self, function: Callable[[], Result]) -> Result:
        """What a function gives on rank 0, which alone calls it. Patient.

        Raises:
            Exception: what it raises there; on the others a ValueError where it is one, else a FailedRank.
        """
        if self.world == 1:
            return function()
        result = error = told = None
        if self.rank == 0:
            try:
                result = function()
            except Exception as raised:
                error, told = raised, _told(raised, 0)
        result, told = self.gather_objects((result, told))[0]
        if told is not None:
            raise error or told
        return result

    def all_of(self, function: Callable[[], Result]) -> Result:
        """What a function gives on this rank, once it has ended on all of them, which all call it. Patient.

        Raises:
            Exception: what it raises here; where it raises on others alone, a ValueError or FailedRank that names the
                first of them.
        """
        if self.world == 1:
            return function()
        result = error = told = None
        try:
            result = function()
        except Exception as raised:
            error, told = raised, _told(raised, self.rank)
        failed = next(filter(None, self.gather_objects(told)), None)
        if failed is not None:
            raise error or failed
        return result

    def agree(self, settings: Mapping[str, object]) -> None:
        """Compare settings that JSON can hold. Patient.

        Raises:
            ValueError: on all ranks, if some have others than rank 0; it names the ranks and the settings.
        """
        if self.world == 1:
            return
        own = {
            name: hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).digest()
            for name, value in settings.items()
        }
        first, *others = self.gather_objects(own)
        differing = {
            rank: sorted(name for name in first.keys() | theirs.keys() if first.get(name) != theirs.get(name))
            for rank, theirs in enumerate(others, 1)
        }
        told = [f"other {', '.join(names)} on rank {rank}" for rank, names in differing.items() if names]
        if told:
            raise ValueError(f"ranks: expected what rank 0 has on all of them, got {'; '.join(told)}")

    def sum_(self, tensor: Tensor) -> None:
        """Replace a tensor by its sum over the ranks: the same bits on all of them."""
        if self.world > 1:
            self.bytes_sent += tensor.nbytes
            self._run(lambda group: dist.all_reduce(tensor, group=group, async_op=True), tensor.device)

    def spread_(self, tensor: Tensor) -> None:
        """Replace a tensor by that of rank 0."""
        if self.world > 1:
            self.bytes_sent += tensor.nbytes if self.rank == 0 else 0
            self._run(lambda group: dist.broadcast(tensor, 0, group=group, async_op=True), tensor.device)

    def _gather(self, tensor: Tensor, patient: bool = False) -> list[Tensor]:
        self.bytes_sent += tensor.nbytes
        rows = [torch.empty_like(tensor) for _ in range(self.world)]
        self._run(
            lambda group: dist.all_gather(rows, tensor, group=group, async_op=True), tensor.device, patient=patient
        )
        return rows

    def _run(self, begin: Callable, device: torch.device, patient: bool = False) -> None:
        if self._failure is not None:
            raise self._failure
        if device.type != "cpu":
            # in the order of the device's stream; torch's own watchdog looks after it
            begin(dist.group.WORLD).wait()
            return
        # a process that ends waits for what is under way, so that has to end soon after we give up
        soon = NO_LIMIT if patient else timedelta(seconds=self.timeout + ANSWER)
        dist.distributed_c10d._set_pg_timeout(soon, self._group)
        work, limit = begin(self._group), math.inf if patient else time.monotonic() + self.timeout
        while not work.is_completed():
            with contextlib.suppress(RuntimeError):
                work.wait(timedelta(seconds=LOOK))
            late = time.monotonic() > limit
            if (late or self._called()) and not work.is_completed():
                self._fail(late)
        try:
            work.wait()
        except RuntimeError as error:
            self._fail(time.monotonic() > limit, error)

    def _called(self) -> bool:
        """Whether a rank calls the roll, or the store has gone."""
        try:
            return self._store.check([CALL])
        except RuntimeError:
            return True

    def _fail(self, late: bool = False, cause: RuntimeError | None = None) -> NoReturn:
        ended, silent = self._call_the_roll()
        missing = ended or silent
        if not missing:
            came = f"came later than {self.timeout:g} s" if late else "have lost a connection between them"
            told = f"the {self.world} ranks {came}"
        else:
            names = f"rank{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))}"
            came = "ended" if ended else f"did not come within {self.timeout:g} s" if late else "did not answer"
            told = f"{names} of {self.world} {came}"
        self._failure = MissingRanks(f"ranks: {told}; this is rank {self.rank}", missing)
        raise self._failure from cause

    def _call_the_roll(self) -> tuple[list[int], list[int]]:
        """(ranks that have ended, ranks that do not answer)."""
        ended, waiting = set(), set(range(self.world)) - {self.rank}
        limit = time.monotonic() + ANSWER
        try:
            self._store.set(CALL, b"1")
            self._store.set(f"here/{self.rank}", b"1")
            pause = FIRST_PAUSE
            while waiting and time.monotonic() < limit:
                waiting = self._silent(waiting)
                refusing = self._refusing(waiting)
                # a rank may have answered and ended in between
                ended |= self._silent(refusing)
                waiting -= refusing
                time.sleep(pause)
                # longer and longer: all ranks look at all that are silent
                pause = min(2 * pause, LAST_PAUSE)
        except RuntimeError:
            # without torchrun the store is in the process of rank 0, and ends with it
            return [0], []
        return sorted(ended), sorted(waiting)

    def _silent(self, ranks: set[int]) -> set[int]:
        """Those that have not answered a roll call."""
        return {rank for rank in ranks if not self._store.check([f"here/{rank}"])}

    def _refusing(self, ranks: set[int]) -> set[int]:
        """Those whose sign of life has gone."""
        addresses = {rank: self._addresses[rank] for rank in ranks & self._addresses.keys()}
        taken = _connect_to_all(addresses.values())
        return {rank for rank, address in addresses.items() if taken[address] is False}


class SignOfLife:
    """A port at which the kernel takes connections as long as this process lives, however busy it is.

    Attributes:
        port: which.
    """

    def __init__(self):
        self._listener = socket.create_server(("", 0), backlog=QUEUE)
        self.port = self._listener.getsockname()[1]
        self._closed = False
        threading.Thread(target=self._accept, name="sign of life", daemon=True).start()

    def close(self) -> None:
        """Refuse connections from now on."""
        self._closed = True
        # wakes the thread, without which the kernel would keep the port open
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        # the kernel takes no more than the queue of what nobody accepts
        while not self._closed:
            try:
                self._listener.accept()[0].close()
            except OSError:
                # such as too many open files: the queue holds meanwhile
                time.sleep(0.0 if self._closed else LOOK)


def _told(error: Exception, rank: int) -> ValueError | FailedRank:
    """What the other ranks raise of an error of this one."""
    if isinstance(error, ValueError):
        return ValueError(f"rank {rank}: {error}" if rank else str(error))
    return FailedRank(f"rank {rank}: {type(error).__name__}: {error}")


def _connect_to_all(addresses: Iterable[tuple[str, int]]) -> dict[tuple[str, int], bool | None]:
    """What ``_connects`` gives of each."""
    addresses = list(addresses)
    with ThreadPoolExecutor(TRIED) as pool:
        return dict(zip(addresses, pool.map(_connects, addresses), strict=True))


def _connects(address: tuple[str, int]) -> bool | None:
    """Whether somebody listens there; None where that cannot be told."""
    try:
        socket.create_connection(address, timeout=CONNECTION).close()
    except ConnectionRefusedError:
        return False
    except OSError:
        return None
    return True
