from __future__ import annotations

import os
from collections import Counter
from fractions import Fraction

import pytest
import torch
from helpers.bits import assert_same_bits

from maskpro_kernels.text.mixture import (
    MixedBatches,
    other_kind,
    parse_sources,
    resolved,
    shared_out,
    texts_of,
    turns,
)


def shares_of(data):
    return {name: share for name, share in parse_sources(data)}


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("pydoc", {"pydoc": 1}),
        ("pydoc:0.5", {"pydoc": 1}),
        ("pydoc:0.5,self:0.5", {"pydoc": Fraction(1, 2), "self": Fraction(1, 2)}),
        ("pydoc:3,self:1", {"pydoc": Fraction(3, 4), "self": Fraction(1, 4)}),
        ("pydoc,stdlib,self", dict.fromkeys(("pydoc", "stdlib", "self"), Fraction(1, 3))),
        ("owner/name:config", {"owner/name:config": 1}),
        ("owner/name:config,pydoc", {"owner/name:config": Fraction(1, 2), "pydoc": Fraction(1, 2)}),
        ("owner/name:config:1,pydoc:3", {"owner/name:config": Fraction(1, 4), "pydoc": Fraction(3, 4)}),
    ],
)
def test_sources_and_shares(data, expected):
    assert shares_of(data) == expected


def test_a_path_that_exists_is_taken_whole(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a,b:0.5", "a", "c:7"):
        (tmp_path / name).touch()
    assert shares_of("a,b:0.5") == {"a,b:0.5": 1}
    assert shares_of("a,b:0.5:3,a:1") == {"a,b:0.5": Fraction(3, 4), "a": Fraction(1, 4)}
    assert shares_of("c:7,pydoc") == {"c:7": Fraction(1, 2), "pydoc": Fraction(1, 2)}
    elsewhere = resolved("a,b:0.5:3,c:7:2,self:1")
    expected = shares_of("a,b:0.5:3,c:7:2,self:1")
    monkeypatch.chdir("/")
    assert shares_of(elsewhere) == {
        name if name == "self" else str(tmp_path / name): share for name, share in expected.items()
    }
    assert resolved("pydoc:1,self:3") == "pydoc:1,self:3" and not os.path.exists("a,b:0.5")


def test_names_with_a_meaning_are_never_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("self", "pydoc", "stdlib", "text"):
        (tmp_path / name).touch()
    for data in ("pydoc:0.5,self:0.5", "self", "pydoc", "stdlib"):
        assert resolved(data) == data
    assert resolved("pydoc,self,text") == f"pydoc:1/3,self:1/3,{tmp_path / 'text'}:1/3"
    expected = {str(tmp_path / "self"): Fraction(1, 2), "self": Fraction(1, 2)}
    assert shares_of(resolved("./self,self")) == expected


def test_a_long_list_of_short_names():
    names = [f"name-{index}" for index in range(60)]
    assert shares_of(",".join(names)) == dict.fromkeys(names, Fraction(1, 60))
    assert resolved(",".join(names)) == ",".join(names)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("", "data: expected a source in front of and behind each comma, got ''"),
        ("pydoc,", "data: expected a source in front of and behind each comma"),
        (":1,pydoc:1", "data: expected a source in front of and behind each comma"),
        ("pydoc,pydoc", "data: expected each source once"),
        ("pydoc:1,self", "data: expected a share behind all sources or behind none"),
        ("pydoc:half,self:0.5", "data: expected a number behind the colon of 'pydoc', got 'half'"),
        ("pydoc:nan,self", "data: expected a number behind the colon of 'pydoc', got 'nan'"),
        ("pydoc:1,self:-1", "data: expected a positive share behind the last colon, got that of 'self'"),
        ("pydoc:0", "data: expected a positive share"),
    ],
)
def test_lists_that_are_refused(data, message):
    with pytest.raises(ValueError, match=message):
        parse_sources(data)


def test_data_of_another_type():
    with pytest.raises(TypeError, match="data: expected a str.*int"):
        parse_sources(3)


def test_texts_have_shares_of_their_own():
    assert texts_of("pydoc:1,stdlib:3,self:4") == (("pydoc", Fraction(1, 4)), ("stdlib", Fraction(3, 4)))
    assert texts_of("self") == ()


@pytest.mark.parametrize(
    ("data", "expected"),
    [("pydoc,self", "stdlib"), ("a.txt", "stdlib"), ("stdlib:1,self:1", "pydoc"), ("stdlib,pydoc", None)],
)
def test_the_other_text_is_of_another_kind(data, expected):
    assert other_kind(data) == expected


@pytest.mark.parametrize(
    "weights", [(1, 1), (9, 1), (1, 9), (1, 2), (7, 5), (1, 1, 1), (5, 3, 2), (90, 9, 1), (1, 2, 3, 4)]
)
def test_turns_keep_to_the_shares_all_along(weights):
    shares = [Fraction(weight, sum(weights)) for weight in weights]
    found = turns(shares, 1000)
    for count in (1, 2, 5, 32, 64, 333, 1000):
        taken = Counter(found[:count])
        assert all(abs(taken[index] - share * count) < 1 for index, share in enumerate(shares)), (count, taken)
    assert found[: sum(weights)].count(0) == weights[0]


def test_windows_are_shared_out_and_each_source_has_one():
    assert shared_out(parse_sources("a:1,b:3"), 24) == [6, 18]
    assert shared_out(parse_sources("a:1,b:98,c:1"), 24) == [1, 22, 1]
    assert shared_out(parse_sources("a:1,b:98,c:1"), 3) == [1, 1, 1]
    assert shared_out((), 3) == []
    with pytest.raises(ValueError, match="expected at least 3, one for each text of a, b, c, got 2"):
        shared_out(parse_sources("a,b,c"), 2)


def mixed(sizes, data, batch_size, count, seed=0):
    """Batches of windows that tell their source and their index in it."""
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


def test_each_source_comes_round_by_itself_and_in_another_order():
    batches = mixed({"a": 12, "b": 4}, "a,b", 4, 12)
    rows = torch.cat(list(batches))
    of_a, of_b = (rows[rows[:, 0] == source, 1].tolist() for source in (0, 1))
    assert len(of_a) == len(of_b) == 24
    rounds = [of_a[:12], of_a[12:]], [of_b[at : at + 4] for at in range(0, 24, 4)]
    for found in rounds:
        assert all(sorted(one) == list(range(len(one))) for one in found)
        assert len({tuple(one) for one in found}) > 1


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
        (
            12,
            1,
            "batch_size: expected at most 5 windows of 'b' in a batch, as many as there are, got a",
        ),
    ],
)
def test_batches_that_are_refused(batch_size, count, message):
    with pytest.raises(ValueError, match=message):
        mixed({"a": 50, "b": 5}, "a,b", batch_size, count)


def test_spaces_around_a_source_are_none_of_its_name(tmp_path, monkeypatch):
    assert [name for name, _ in parse_sources(" pydoc:1, self:3")] == ["pydoc", "self"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / " a").write_text("x", encoding="utf-8")
    assert [name for name, _ in parse_sources("pydoc, a")] == ["pydoc", " a"]
