"""Where the time of a step goes: by the clock of the host, and by events of a GPU, which are emulated here."""

from __future__ import annotations

import json
import threading
import time

import pytest
import torch
from helpers.small_trainer import a_trainer, a_trainer_in, loss_fn, some_batches
from torch import nn

import maskpro_kernels as mk
from maskpro_kernels import ops
from maskpro_kernels.learn import reinforce, step_clock
from maskpro_kernels.learn.model_masks import ModelMasks
from maskpro_kernels.learn.step_clock import CudaTimeline, HostTimeline, StepClock, timeline_of

pytestmark = pytest.mark.usefixtures("eager_reference")

# Seconds that a planted delay takes
DELAY = 0.02


class SpentTime:
    """Time that passes where it is spent alone."""

    def __init__(self):
        self.now = 0.0

    def spend(self, seconds: float = DELAY) -> None:
        self.now += seconds

    def delayed(self, function, seconds: float = DELAY):
        def spending(*given, **named):
            self.spend(seconds)
            return function(*given, **named)

        return spending


@pytest.fixture
def clock(monkeypatch):
    clock = SpentTime()
    monkeypatch.setattr(HostTimeline, "mark", lambda _: clock.now)
    return clock


def taken(record) -> dict[str, float]:
    """The parts that have taken time, in delays."""
    return {part: round(seconds / DELAY, 3) for part, seconds in record.parts.items() if seconds}


class SlowBatches(list):
    def __init__(self, batches, clock):
        super().__init__(batches)
        self.clock = clock

    def __getitem__(self, index):
        self.clock.spend()
        return super().__getitem__(index)


class SlowBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, clock):
        ctx.clock = clock
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.clock.spend()
        return grad, None


def a_large_model() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(*(layer for _ in range(3) for layer in (nn.Linear(512, 512), nn.ReLU())))
    mk.convert(model, "2:4", gap=5.0)
    return model


LARGE = {
    "reinforce": lambda: mk.Reinforce(lr=1.0),
    "two draws": lambda: mk.Reinforce(lr=1.0, draws=2),
    "straight-through": lambda: mk.StraightThrough(lr=0.3),
}


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("how", LARGE)
def test_the_named_parts_add_up_to_the_wall_clock(how, accumulate):
    """On a busy machine the process may stand still between two parts: so the best of some steps is looked at."""
    batches = list(torch.randn(4, 256, 512, generator=torch.Generator().manual_seed(1)))
    trainer = a_trainer(a_large_model(), estimator=LARGE[how](), batches=batches, accumulate=accumulate)
    trainer.run(1, progress=False)
    shares = []
    for record in trainer.run(4, progress=False):
        assert record.seconds > 0.02
        assert sum(record.parts.values()) == pytest.approx(record.seconds, rel=0.05)
        shares.append(1 - record.parts["other"] / record.seconds)
        gradients = {"backward"} if how == "straight-through" else set()
        assert record.parts.keys() == {"data", "draw", "forward", "update", "checks", "other"} | gradients
    assert max(shares) > 0.95, shares


@pytest.mark.parametrize(
    ("part", "delays"),
    [
        ("data", {"reinforce": 1, "two draws": 1, "straight-through": 1}),
        ("draw", {"reinforce": 1, "two draws": 2, "straight-through": 1}),
        ("forward", {"reinforce": 1, "two draws": 2, "straight-through": 1}),
        ("backward", {"straight-through": 1}),
        # of two layers
        ("update", {"reinforce": 1, "two draws": 1, "straight-through": 2}),
        ("checks", {"reinforce": 1, "two draws": 1, "straight-through": 1}),
    ],
)
def test_a_delay_is_found_in_its_part(monkeypatch, clock, part, delays):
    for how, count in delays.items():
        loss, batches = loss_fn, some_batches()
        with monkeypatch.context() as patched:
            if part == "data":
                batches = SlowBatches(batches, clock)
            elif part == "draw":
                patched.setattr(ModelMasks, "_draw", clock.delayed(ModelMasks._draw))
            elif part == "forward":
                loss = clock.delayed(loss_fn)
            elif part == "backward":

                def loss(model, batch):
                    return SlowBackward.apply(loss_fn(model, batch), clock)

            elif part == "update":
                patched.setattr(reinforce, "replay", clock.delayed(reinforce.replay))
                update = clock.delayed(ops.straight_through_update_)
                patched.setattr(ops, "straight_through_update_", update)
            else:
                patched.setattr(ModelMasks, "flip_rate", clock.delayed(ModelMasks.flip_rate))
            trainer = a_trainer(how=how, loss_fn=loss, batches=batches)
            # the first step of straight-through looks twice: at a rate of 0, then at that of what it has seen
            _, *records = trainer.run(3, progress=False)
        assert [taken(record) for record in records] == [{part: count}] * 2, how


def test_accumulated_batches_count_together(clock, monkeypatch):
    """Behind them the logits move outside of backward."""
    monkeypatch.setattr(ops, "descend_", clock.delayed(ops.descend_))
    trainer = a_trainer(how="straight-through", loss_fn=clock.delayed(loss_fn), accumulate=3)
    _, record = trainer.run(2, progress=False)
    assert taken(record) == {"forward": 3, "update": 2}


def test_losses_of_initial_masks_stand_apart(clock):
    """Before the first step they are in none; those of refreshed masks are a part of their own."""
    losses = [1.0] * 3 + [0.1] + [1.0] * 50
    trainer = a_trainer(how="refreshed", loss_fn=clock.delayed(lambda *_: torch.tensor(losses.pop(0))))
    records = trainer.run(2, progress=False)
    assert [taken(record) for record in records] == [{"forward": 1}, {"forward": 1, "initial losses": 3}]


def test_what_stands_between_steps_is_in_none(clock):
    trainer = a_trainer()
    records = trainer.run(2, progress=False, after_step=lambda _: clock.spend())
    assert [taken(record) for record in records] == [{}, {}]


def test_a_step_that_breaks_off_is_in_no_other(clock):
    losses = iter([clock.delayed(loss_fn)] * 3 + [None] + [loss_fn] * 9)
    trainer = a_trainer(how="two draws", loss_fn=lambda *given: next(losses)(*given))
    (first,) = trainer.run(1, progress=False)
    with pytest.raises(TypeError):
        trainer.step()
    assert (taken(first), taken(trainer.step())) == ({"forward": 2}, {})


def test_records_on_disk_have_the_parts(tmp_path):
    trainer = a_trainer_in(tmp_path / "run")
    records = trainer.run(3, progress=False)
    assert [row["parts"] for row in trainer.metrics] == [record.parts for record in records]
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    trainer.close()
    resumed = a_trainer_in(tmp_path / "run")
    resumed.resume()
    assert [row["parts"] for row in resumed.metrics] == [json.loads(line)["parts"] for line in lines]


def test_parts_within_parts_have_their_own_time(clock):
    parts = StepClock(HostTimeline())
    with parts.part("outside"):
        clock.spend()
    with parts.step(), parts.part("outer"):
        clock.spend(2)
        with parts.part("inner"):
            clock.spend(3)
        with parts.part("outer"):
            clock.spend(4)
    assert parts.take() == {"outer": 6, "inner": 3, "other": 0}
    assert parts.take() == {}


def test_other_threads_are_in_what_waits_for_them(clock):
    def update():
        with parts.part("update"):
            clock.spend(1)

    parts = StepClock(HostTimeline())
    with parts.step(), parts.part("backward"):
        thread = threading.Thread(target=update)
        thread.start()
        thread.join()
    assert parts.take() == {"backward": 1, "other": 0}


class Gpu:
    """A GPU with one stream, which does what is queued behind the host's back, and events in it."""

    def __init__(self):
        # seconds of the host, and those up to which the stream is filled
        self.now, self.busy_until = 0.0, 0.0

    def queue(self, seconds: float) -> None:
        self.now += 1e-5
        self.busy_until = max(self.busy_until, self.now) + seconds

    def wait(self) -> None:
        self.now = max(self.now, self.busy_until)

    def event(gpu, enable_timing: bool):
        class Event:
            def record(self, stream):
                assert enable_timing and stream == "stream of cuda:0"
                self.at = max(gpu.busy_until, gpu.now)

            def query(self):
                return self.at <= gpu.now

            def elapsed_time(self, other):
                # as torch, which raises where an event has not come
                assert self.query() and other.query()
                return 1000 * (other.at - self.at)

        return Event()


@pytest.fixture
def gpu(monkeypatch):
    gpu = Gpu()
    monkeypatch.setattr(torch.cuda, "Event", gpu.event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    for name in ("synchronize", "current_device"):
        monkeypatch.setattr(torch.cuda, name, None)
    return gpu


def test_events_tell_the_time_of_the_device_and_wait_for_nothing(gpu):
    """As a step of REINFORCE does, whose forward is waited for, and whose update is not."""
    clock, found, walls = StepClock(CudaTimeline(torch.device("cuda:0"))), [], []
    for _ in range(4):
        began = gpu.now
        with clock.step():
            with clock.part("draw"):
                gpu.queue(0.01)
            with clock.part("forward"):
                gpu.queue(0.1)
                gpu.wait()
            with clock.part("update"):
                gpu.queue(0.03)
        walls.append(gpu.now - began)
        found.append(clock.take())
        # an evaluation between steps, which waits for the device
        gpu.queue(5.0)
        gpu.wait()
    first, *others = found
    assert "update" not in first and first["forward"] == pytest.approx(0.1, rel=1e-3)
    for parts in others:
        assert parts["update"] == pytest.approx(0.03, rel=1e-3) and parts["draw"] == pytest.approx(0.01, rel=1e-2)
        assert sum(parts.values()) == pytest.approx(0.14, rel=1e-2)
    # nothing of five seconds
    assert sum(sum(parts.values()) for parts in found) < 0.6


def test_steps_behind_each_other_add_up_to_the_wall_clock_of_a_device(gpu):
    clock, parts, walls = StepClock(CudaTimeline(torch.device("cuda:0"))), [], []
    for _ in range(5):
        began = gpu.now
        with clock.step():
            with clock.part("data"):
                # of the host alone
                gpu.now += 0.02
            with clock.part("forward"):
                gpu.queue(0.1)
                gpu.wait()
            with clock.part("update"):
                gpu.queue(0.05)
        walls.append(gpu.now - began)
        parts.append(sum(clock.take().values()))
    assert parts[1:] == pytest.approx(walls[1:], rel=0.05)


def test_events_are_taken_where_all_layers_are_on_one_gpu():
    class Layer:
        def __init__(self, device):
            self.weight = type("Weight", (), {"device": torch.device(device)})

    kinds = {("cpu",): HostTimeline, ("cuda:0", "cuda:0"): CudaTimeline, ("cuda:0", "cuda:1"): HostTimeline}
    for devices, kind in kinds.items():
        layers = {str(index): Layer(device) for index, device in enumerate(devices)}
        assert isinstance(timeline_of(layers), kind), devices


def test_a_part_costs_microseconds():
    """A step has some ten of them, and straight-through one for each layer."""
    clock, count = StepClock(HostTimeline()), 2000
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        with clock.step():
            for _ in range(count):
                with clock.part(step_clock.UPDATE):
                    pass
        clock.take()
        seconds.append((time.perf_counter() - began) / count)
    assert min(seconds) < 50e-6
