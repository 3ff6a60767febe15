"""Lists of sources with shares, windows of tokens, and batches of them."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import pytest
import torch
from helpers.bits import assert_same_bits

from maskpro_kernels.text.batches import (
    MixedBatches,
    batches,
    other_kind,
    parse_sources,
    resolved,
    split_by_share,
    texts_of,
    turns,
    windows,
)


def shares_of(data):
    return dict(parse_sources(data))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("pydoc", {"pydoc": 1}),
        ("pydoc:0.5", {"pydoc": 1}),
        (" pydoc:0.5, self:0.5", {"pydoc": Fraction(1, 2), "self": Fraction(1, 2)}),
        ("pydoc:3,self:1", {"pydoc": Fraction(3, 4), "self": Fraction(1, 4)}),
        ("pydoc,stdlib,self", dict.fromkeys(("pydoc", "stdlib", "self"), Fraction(1, 3))),
        ("owner/name:config", {"owner/name:config": 1}),
        ("owner/name:config:1,pydoc:3", {"owner/name:config": Fraction(1, 4), "pydoc": Fraction(3, 4)}),
    ],
)
def test_sources_and_shares(data, expected):
    assert shares_of(data) == expected


def test_a_path_that_exists_is_taken_whole(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a,b:0.5", "c:7"):
        (tmp_path / name).touch()
    assert shares_of("a,b:0.5") == {"a,b:0.5": 1}
    assert shares_of("c:7,pydoc") == {"c:7": Fraction(1, 2), "pydoc": Fraction(1, 2)}
    elsewhere, expected = resolved("c:7:2,self:1"), shares_of("c:7:2,self:1")
    monkeypatch.chdir("/")
    assert shares_of(elsewhere) == {
        name if name == "self" else str(tmp_path / name): share for name, share in expected.items()
    }
    assert resolved("pydoc:1,self:3") == "pydoc:1,self:3"


def test_names_with_a_meaning_are_never_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("self", "pydoc", "stdlib", "text"):
        (tmp_path / name).touch()
    for data in ("pydoc:0.5,self:0.5", "self", "pydoc", "stdlib"):
        assert resolved(data) == data
    assert resolved("pydoc,self,text") == f"pydoc:1/3,self:1/3,{tmp_path / 'text'}:1/3"
    expected = {str(tmp_path / "self"): Fraction(1, 2), "self": Fraction(1, 2)}
    assert shares_of(resolved("./self,self")) == expected


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("pydoc,", "data: expected a source before and after each comma, got 'pydoc,'"),
        ("pydoc,pydoc", "data: expected each source once"),
        ("pydoc:1,self", "data: expected a share for all sources or for none"),
        ("pydoc:half,self:0.5", "data: expected a number after the colon of 'pydoc', got 'half'"),
        ("pydoc:1,self:-1", "data: expected a positive share after the last colon, got that of 'self'"),
        (3, "data: expected a str.*int"),
    ],
)
def test_lists_that_are_refused(data, message):
    with pytest.raises((ValueError, TypeError), match=message):
        parse_sources(data)


def test_texts_of_a_list_and_a_text_of_another_kind():
    assert texts_of("pydoc:1,stdlib:3,self:4") == (("pydoc", Fraction(1, 4)), ("stdlib", Fraction(3, 4)))
    assert texts_of("self") == ()
    for data, expected in (
        ("pydoc,self", "stdlib"),
        ("stdlib:1,self:1", "pydoc"),
        ("self", "pydoc"),
        ("stdlib,pydoc", None),
    ):
        assert other_kind(data) == expected


def characters(text, verbose=True):
    return {"input_ids": [ord(character) for character in text]}


def test_windows_do_not_overlap_and_drop_the_remainder():
    cut = windows("abcdefgh", characters, 3)
    assert cut.dtype == torch.int64
    assert cut.tolist() == [[97, 98, 99], [100, 101, 102]]
    with pytest.raises(ValueError, match="text: expected at least 9 tokens for one window, got 8"):
        windows("abcdefgh", characters, 9)
    with pytest.raises(ValueError, match="length: expected at least 2 tokens, got 1"):
        windows("abcdefgh", characters, 1)


def test_batches_hold_each_window_once_in_a_seeded_order():
    cut = torch.arange(22).view(11, 2)
    shuffled = batches(cut, 3, seed=5)
    assert [tuple(batch.shape) for batch in shuffled] == [(3, 2)] * 3
    rows = [tuple(row) for batch in shuffled for row in batch.tolist()]
    assert len(set(rows)) == 9 and set(rows) <= {tuple(row) for row in cut.tolist()}
    assert_same_bits(shuffled, batches(cut, 3, seed=5))
    assert rows != [tuple(row) for batch in batches(cut, 3, seed=6) for row in batch.tolist()]
    for size in (0, 12):
        with pytest.raises(ValueError, match=f"batch_size: expected 1 to 11, the number of windows, got {size}"):
            batches(cut, size, seed=0)


@pytest.mark.parametrize("weights", [(1, 1), (9, 1), (1, 2), (7, 5), (1, 1, 1), (90, 9, 1), (1, 2, 3, 4)])
def test_turns_keep_to_the_shares_all_along(weights):
    shares = [Fraction(weight, sum(weights)) for weight in weights]
    whose = turns(shares, 1000)
    for count in (1, 2, 5, 32, 64, 333, 1000):
        taken = Counter(whose[:count])
        assert all(abs(taken[index] - share * count) < 1 for index, share in enumerate(shares)), (count, taken)
    assert whose[: sum(weights)].count(0) == weights[0]


def test_windows_are_split_by_share_and_each_source_has_one():
    assert split_by_share(parse_sources("a:1,b:3"), 24) == [6, 18]
    assert split_by_share(parse_sources("a:1,b:98,c:1"), 24) == [1, 22, 1]
    assert split_by_share(parse_sources("a:1,b:98,c:1"), 3) == [1, 1, 1]
    assert split_by_share((), 3) == []
    with pytest.raises(ValueError, match="expected at least 3, one for each text of a, b, c, got 2"):
        split_by_share(parse_sources("a,b,c"), 2)


def mixed(sizes, data, batch_size, count, seed=0):
    """Batches of windows that hold the index of their source and their own in it."""
    windows = {
        name: torch.stack([torch.full((size,), source), torch.arange(size)], dim=1)
        for source, (name, size) in enumerate(sizes.items())
    }
    return MixedBatches(windows, parse_sources(data), batch_size, count, seed)


def test_batches_hold_the_shares():
    batches = mixed({"a": 50, "b": 9}, "a:3,b:1", 8, 40)
    assert len(batches) == 40 and batches[0].shape == (8, 2) and batches[0].dtype == torch.int64
    assert all((batch[:, 0] == 1).sum() == 2 for batch in batches)
    # 5 of 8 do not go into halves: now one more, now one less
    odd = mixed({"a": 50, "b": 50}, "a,b", 5, 40)
    assert {int(batch[:, 0].sum()) for batch in odd} == {2, 3}
    assert sum(int(batch[:, 0].sum()) for batch in odd) == 100


def test_the_order_is_the_one_that_runs_have_had():
    """Windows of runs do not change from one version to the next."""
    found = torch.cat(list(mixed({"a": 5, "b": 3}, "a:2,b:1", 4, 3, seed=3)))
    assert found[:, 0].tolist() == [0, 1, 0, 0, 1, 0, 0, 1, 0, 0, 1, 0]
    assert found[:, 1].tolist() == [1, 0, 3, 0, 2, 4, 2, 1, 4, 2, 1, 0]
    cut = torch.arange(14).view(7, 2)
    assert torch.cat(batches(cut, 2, seed=3))[:, 0].tolist() == [10, 6, 8, 12, 0, 4]


def test_each_source_comes_round_by_itself_and_in_another_order():
    rows = torch.cat(list(mixed({"a": 12, "b": 4}, "a,b", 4, 12)))
    of_a, of_b = (rows[rows[:, 0] == source, 1].tolist() for source in (0, 1))
    assert len(of_a) == len(of_b) == 24
    for rounds in ([of_a[:12], of_a[12:]], [of_b[at : at + 4] for at in range(0, 24, 4)]):
        assert all(sorted(one) == list(range(len(one))) for one in rounds)
        assert len({tuple(one) for one in rounds}) > 1


def test_batches_are_those_of_their_seed_and_a_longer_run_begins_like_a_shorter_one():
    sizes, data = {"a": 20, "b": 20}, "a:2,b:1"
    batches = mixed(sizes, data, 6, 20, seed=3)
    assert_same_bits(list(batches), list(mixed(sizes, data, 6, 20, seed=3)))
    assert_same_bits(list(batches[:7]), list(mixed(sizes, data, 6, 7, seed=3)))
    assert not torch.equal(batches[0], mixed(sizes, data, 6, 20, seed=4)[0])
    assert len(batches[5:]) == 15 and torch.equal(batches[5:][1], batches[6]) and torch.equal(batches[-1], batches[19])
    with pytest.raises(IndexError):
        batches[20]


def test_sources_of_one_length_have_orders_of_their_own():
    """In no round that of another source in whatever round, nor that of the next seed."""
    orders = []
    for seed in (0, 1):
        rows = torch.cat(list(mixed({"a": 12, "b": 12, "c": 12}, "a,b,c", 4, 36, seed)))
        for source in range(3):
            orders += rows[rows[:, 0] == source, 1].view(4, 12).tolist()
    assert len({tuple(order) for order in orders}) == len(orders) == 24


@pytest.mark.parametrize(
    ("batch_size", "count", "message"),
    [
        (0, 1, "batch_size: expected at least 1, got 0"),
        (4, 0, "count: expected at least 1, got 0"),
        (12, 1, "batch_size: expected at most 5 windows of 'b' in a batch, which is all of them, got a"),
    ],
)
def test_batches_that_are_refused(batch_size, count, message):
    with pytest.raises(ValueError, match=message):
        mixed({"a": 50, "b": 5}, "a,b", batch_size, count)
