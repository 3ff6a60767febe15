"""Whether processes that wait for each other still live: each has a port at which a thread of it says so."""

from __future__ import annotations

import contextlib
import secrets
import socket
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

# Seconds: for one connection, between two tries
CONNECTION, PAUSE = 2.0, 1.0
# Connections that are tried at the same time, and that wait to be accepted at most, where the kernel allows as many
TRIED, QUEUE = 32, socket.SOMAXCONN
# Bytes
TOKEN = 16
# What is found at a port
ANSWERS, SILENT, REFUSES = "answers", "silent", "refuses"


class Address(NamedTuple):
    """Where the sign of life of a process is found, and by which bytes it is known."""

    host: str
    port: int
    token: bytes


class Lives:
    """The other ranks, asked now and then whether they still live.

    Args:
        addresses: by rank, of their signs of life.
        timeout: seconds of silence behind which a rank counts as lost.
    """

    def __init__(self, addresses: Mapping[int, Address], timeout: float):
        self._addresses, self._timeout = addresses, timeout
        # seldom enough for many ranks, often enough to notice soon
        self._pause = max(PAUSE, timeout / 10)
        self._next = time.monotonic() + self._pause
        self._silent_since: dict[int, float] = {}

    def lost(self) -> bool:
        """Whether a rank has ended, or been silent for too long."""
        now = time.monotonic()
        if now < self._next:
            return False
        signs = signs_of(self._addresses)
        self._silent_since = {
            rank: self._silent_since.get(rank, now) for rank, sign in signs.items() if sign != ANSWERS
        }
        self._next = time.monotonic() + self._pause
        return REFUSES in signs.values() or any(
            time.monotonic() - since >= self._timeout for since in self._silent_since.values()
        )


class SignOfLife:
    """A port at which the kernel takes connections as long as this process lives, and a thread answers while it runs.

    Attributes:
        port: which.
        token: bytes that are said there. Another process, which may have the port later, does not know them.
    """

    def __init__(self):
        self._listener = socket.create_server(("", 0), backlog=QUEUE)
        self.port = self._listener.getsockname()[1]
        self.token = secrets.token_bytes(TOKEN)
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
                connection, _ = self._listener.accept()
                with connection, contextlib.suppress(OSError):
                    connection.send(self.token)
            except OSError:
                # such as too many open files: the queue holds meanwhile
                time.sleep(0.0 if self._closed else PAUSE)


def reachable(addresses: Mapping[int, Address], seconds: float) -> dict[int, Address]:
    """Those whose process answers, of addresses by rank; one that is slow is asked again for so many seconds."""
    limit, found = time.monotonic() + seconds, {}
    while True:
        signs = signs_of({rank: address for rank, address in addresses.items() if rank not in found})
        found |= {rank: addresses[rank] for rank, sign in signs.items() if sign == ANSWERS}
        if len(found) == len(addresses) or time.monotonic() > limit:
            return found
        time.sleep(PAUSE)


def signs_of(addresses: Mapping[int, Address]) -> dict[int, str]:
    """What ``sign_at`` gives of each rank, of which one address is known."""
    with ThreadPoolExecutor(TRIED) as pool:
        return dict(zip(addresses, pool.map(sign_at, addresses.values()), strict=True))


def sign_at(address: Address) -> str:
    """ANSWERS where its process runs, REFUSES where it has ended, SILENT where it is frozen or cannot be reached."""
    try:
        with socket.create_connection((address.host, address.port), timeout=CONNECTION) as connection:
            said = _said(connection)
    except ConnectionRefusedError:
        return REFUSES
    except OSError:
        return SILENT
    if said == address.token:
        return ANSWERS
    # the port is another's now
    return REFUSES if len(said) == TOKEN else SILENT


def _said(connection: socket.socket) -> bytes:
    """Bytes of a token, fewer where no more come."""
    said = b""
    while len(said) < TOKEN and (part := connection.recv(TOKEN - len(said))):
        said += part
    return said
