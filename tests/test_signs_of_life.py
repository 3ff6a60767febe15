"""Processes that wait for each other see whether the others live."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import contextmanager

import pytest

from maskpro_kernels import signs_of_life
from maskpro_kernels.signs_of_life import ANSWERS, REFUSES, SILENT, Address, Lives, SignOfLife, reachable, sign_at

HERE = "127.0.0.1"


@pytest.fixture
def sign():
    sign = SignOfLife()
    yield sign
    sign.close()


def address_of(sign: SignOfLife) -> Address:
    return Address(HERE, sign.port, sign.token)


def at_once(lives: Lives) -> Lives:
    lives._pause = lives._next = 0.0
    return lives


def test_more_processes_than_fit_a_queue_see_it(monkeypatch):
    monkeypatch.setattr(signs_of_life, "QUEUE", 64)
    sign = SignOfLife()
    assert [sign_at(address_of(sign)) for _ in range(400)] == [ANSWERS] * 400
    sign.close()
    assert sign_at(address_of(sign)) == REFUSES


def test_a_port_at_which_nothing_is_said_is_none(monkeypatch, sign):
    """The kernel of a frozen process takes connections."""
    monkeypatch.setattr(signs_of_life, "CONNECTION", 0.2)
    with socket.create_server((HERE, 0)) as frozen:
        address = Address(HERE, frozen.getsockname()[1], bytes(16))
        assert sign_at(address) == SILENT
        lives = at_once(Lives({1: address}, timeout=0.3))
        assert not lives.lost()
        time.sleep(0.2)
        assert lives.lost()
    lives = at_once(Lives({1: address_of(sign)}, timeout=0.0))
    assert not lives.lost()
    sign.close()
    assert lives.lost()


def test_another_process_at_the_port_of_one_that_has_ended_is_none(sign):
    """Such as the rank of another run, to which the kernel has given the same port."""
    ended = address_of(sign)._replace(token=bytes(16))
    assert sign_at(ended) == REFUSES
    assert at_once(Lives({1: ended}, timeout=600.0)).lost()


@contextmanager
def that_answers_after(seconds: float):
    """The address of a process that is busy at first: the kernel takes connections, and nobody answers them."""
    listener, late = socket.create_server((HERE, 0)), threading.Event()

    def answer():
        late.wait(seconds)
        while True:
            try:
                with listener.accept()[0] as connection:
                    connection.send(b"t" * 16)
            except OSError:
                return

    thread = threading.Thread(target=answer)
    thread.start()
    yield Address(HERE, listener.getsockname()[1], b"t" * 16)
    late.set()
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join()


def test_who_is_slow_at_first_is_asked_again(monkeypatch, sign):
    monkeypatch.setattr(signs_of_life, "CONNECTION", 0.1)
    monkeypatch.setattr(signs_of_life, "PAUSE", 0.05)
    with that_answers_after(0.3) as slow, that_answers_after(60.0) as never:
        assert set(reachable({1: address_of(sign), 2: slow, 3: never}, 1.0)) == {1, 2}
