"""Logits that live elsewhere: their copies come, are used, and go back at any time that the waits allow."""

from __future__ import annotations

import collections
import weakref

import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.small_trainer import a_trainer, logits_of
from torch import nn

import maskpro_kernels as mk
from maskpro_kernels.learn import model_masks, offload
from maskpro_kernels.learn.offload import OffloadedLogits, Transfers
from maskpro_kernels.modules import masked_layers

pytestmark = pytest.mark.usefixtures("eager_reference")


class LateTransfers(Transfers):
    """A device whose copies start as late as they may: where something waits for them."""

    def __init__(self):
        super().__init__(torch.device("cpu"))
        self.incoming, self.outgoing = collections.deque(), collections.deque()
        self.copies, self.most = weakref.WeakSet(), 0
        self.reported, self.numbers = [], {}

    def emit(self, what, logits):
        """With the layer's number, in the order in which they came."""
        self.reported.append((what, self.numbers.setdefault(logits.data_ptr(), len(self.numbers))))

    @staticmethod
    def until(queue, action):
        while action in queue:
            queue.popleft()()

    def fetch(self, source):
        logits = torch.full_like(source, torch.nan)
        self.copies.add(logits)
        self.most = max(self.most, len(self.copies))
        self.emit("fetch", source)

        def copy():
            logits.copy_(source)

        self.incoming.append(copy)
        return logits, lambda: self.until(self.incoming, copy)

    def used(self, logits):
        self.reported.append("used")
        # what is read later than its end is reported
        return lambda: logits.fill_(torch.nan)

    def put_back(self, logits, target):
        self.emit("put back", target)

        def copy():
            target.copy_(logits)

        self.outgoing.append(copy)
        return lambda: self.until(self.outgoing, copy)


@pytest.fixture
def late(monkeypatch):
    """All logits pass as those of another device."""
    transfers = LateTransfers()
    monkeypatch.setattr(offload, "transfers_of", lambda device: transfers)
    for module in (offload, model_masks):
        monkeypatch.setattr(module, "offloaded", lambda layer: isinstance(layer, mk.MaskedLinear))
    yield transfers
    assert not transfers.outgoing
    assert transfers.most <= 3


def some_layers(count: int) -> list[mk.MaskedLinear]:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(8, 4) for _ in range(count)))
    mk.convert(model, "2:4", gap=1.0)
    return list(masked_layers(model).values())


def test_the_next_copy_is_on_its_way_while_a_layer_computes(late):
    layers = some_layers(5)
    expected = [layer.logits.detach() + i for i, layer in enumerate(layers)]
    with OffloadedLogits(layers) as copies:
        for i, layer in enumerate(layers):
            with copies.moving(layer) as logits:
                logits += i
    ahead = [reported for i in range(1, 5) for reported in (("fetch", i), ("put back", i - 1))]
    assert late.reported == [("fetch", 0), *ahead, ("put back", 4)]
    assert_same_bits([layer.logits.detach() for layer in layers], expected)


@pytest.mark.parametrize("order", [(3, 2, 1, 0), (1, 3, 0, 2), (0, 0, 1, 0, 3, 3, 2)], ids=str)
def test_layers_may_come_in_another_order_and_again(late, order):
    layers = some_layers(4)
    expected = [layer.logits.detach() + order.count(i) for i, layer in enumerate(layers)]
    with OffloadedLogits(layers) as copies:
        for i in order:
            with copies.moving(layers[i]) as logits:
                logits += 1
    assert_same_bits([layer.logits.detach() for layer in layers], expected)


def test_layers_that_do_not_come_stop_nothing(late):
    """As experts that no token takes."""
    layers = some_layers(7)
    with OffloadedLogits(layers) as copies:
        for i in (0, 1, 3, 4, 6):
            with copies.moving(layers[i]):
                pass
    fetched = [number for what, number in late.reported if what == "fetch"]
    # 2 and 5 are awaited in vain
    assert [late.numbers[layer.logits.data_ptr()] for layer in layers] == fetched[:7]
    assert len(fetched) == 7
    at = {reported: i for i, reported in enumerate(late.reported)}
    for before, after in ((0, 1), (3, 4)):
        one, other = (late.numbers[layers[i].logits.data_ptr()] for i in (before, after))
        assert at["fetch", other] < at["put back", one]


def test_an_error_loses_no_layer_that_has_moved(late):
    layers = some_layers(4)
    expected = [layer.logits.detach() + (i < 2) for i, layer in enumerate(layers)]
    with pytest.raises(KeyboardInterrupt), OffloadedLogits(layers) as copies:
        for i, layer in enumerate(layers):
            with copies.moving(layer) as logits:
                if i == 2:
                    raise KeyboardInterrupt
                logits += 1
    assert_same_bits([layer.logits.detach() for layer in layers], expected)


def test_layers_on_one_device_move_in_place():
    (layer,) = some_layers(1)
    with OffloadedLogits([layer]) as copies, copies.moving(layer) as logits:
        assert logits.data_ptr() == layer.logits.data_ptr()


ESTIMATORS = {
    "reinforce": lambda: mk.Reinforce(lr=2.0, draws=2),
    "straight-through": lambda: mk.StraightThrough(lr=0.3),
    "trained weights": lambda: mk.StraightThrough(lr=0.3, train_weights=0.01, masks_until=1.0),
    "fixed masks": lambda: mk.StraightThrough(train_weights=0.01),
}


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("how", ESTIMATORS)
def test_a_trainer_learns_the_same(how, accumulate, request):
    plain = a_trainer(estimator=ESTIMATORS[how](), accumulate=accumulate)
    plain.run(4, progress=False)
    late = request.getfixturevalue("late")
    trainer = a_trainer(estimator=ESTIMATORS[how](), accumulate=accumulate)
    trainer.run(4, progress=False)
    # of both layers, that of the second one comes while the first computes
    kinds = [reported if isinstance(reported, str) else reported[0] for reported in late.reported]
    walks = {tuple(kinds[i : i + 4]) for i in range(0, len(kinds), 4)}
    expected = {("fetch", "fetch", "used", "used"), ("fetch", "fetch", "put back", "put back")}
    assert walks == (set() if how == "fixed masks" else expected)
    assert_same_bits(logits_of(trainer.model), logits_of(plain.model))
    for one, other in zip(masked_layers(trainer.model).values(), masked_layers(plain.model).values(), strict=True):
        assert_same_bits(one.weight.detach(), other.weight.detach())


def test_an_optimizer_moves_the_same(request):
    moved = []
    for late in (False, True):
        if late:
            request.getfixturevalue("late")
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 4))
        mk.convert(model, "2:4", gap=1.0)
        model.train()
        optimizer = mk.MaskOptimizer(model, lr=0.5)
        x = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
        for _ in range(3):
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        moved.append(logits_of(model))
    assert_same_bits(*moved)
