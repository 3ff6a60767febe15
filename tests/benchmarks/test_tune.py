"""The tuner: it covers every kernel, checks before it times, replaces what is slower, and writes what it has found."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import triton
import tune
import tune_calls
import tune_cases
import tune_search
from helpers.cases import cases
from helpers.enumerated import KERNEL_DEVICE
from tune_search import Place, Search

from maskpro_kernels.ops.triton import launch, tiles, tuned

TARGET = "sm_90"
WORKER = "PYTEST_XDIST_WORKER"
# Kernels whose cases at all patterns take the interpreter no second, and others of which the first case does
QUICK = ("adamw", "descend", "metadata", "split_sum", "unpack")
FIRST_QUICK = ("masked_linear", "sample_masks", "score_update_of_layers", "straight_through_step")


@pytest.fixture
def small(monkeypatch):
    """Entries of the tables are launched in the interpreter too, on small matrices, and what changes is put back."""
    monkeypatch.setattr(tiles, "INTERPRETED", False)
    monkeypatch.setattr(tune_calls, "MATRIX", (8, 64))
    monkeypatch.setattr(tune_search, "ROUNDS", 2)
    monkeypatch.setattr(tune_calls, "LAYERS", 2)
    monkeypatch.setattr(tune_calls, "FEW_ROWS", (32, 256))
    monkeypatch.setattr(tune_cases, "SHAPES", [(32, 256)])
    monkeypatch.setattr(tune_cases, "PACKED_ROWS", [(16, 512)])
    monkeypatch.setattr(tune_cases, "TOKENS", {kernel: tokens[:1] for kernel, tokens in tune_cases.TOKENS.items()})
    tables = [dict(table) for table in tiles.TABLES]
    yield
    for table, before in zip(tiles.TABLES, tables, strict=True):
        table.update(before)
    tiles._from_table.cache_clear()


def place_of(kernel: str) -> Place:
    return tune.places(TARGET, [kernel])[0]


def search_of(kernel: str, cost, candidates=None, monkeypatch=None) -> Search:
    """Of the kernel's first entry, whose calls take cost(entry) seconds."""
    place = place_of(kernel)
    if candidates is not None:
        monkeypatch.setattr(tune_search, "neighbours", lambda *_: candidates(place.entry))

    def seconds(call):
        call()
        return cost(place.entry)

    return Search(place, KERNEL_DEVICE, seconds)


def record_of(path) -> tune.Record:
    return tune.Record(path, tuned.Run("a GPU", "2026-01-31", "c0ffee", "2.11", "3.6"))


def test_every_kernel_of_the_tables_is_covered():
    launched = {key[0] for table in tiles.TABLES for key in table}
    covered = [*tune_calls.OVER_GROUPS, *tune_calls.PRODUCTS, *tune_calls.OVER_ELEMENTS]
    assert sorted(launched) == sorted(covered) == sorted(tune_cases.ORDER)
    for target in tiles.PROCESSORS:
        entries = [entry for table in tiles.TABLES for key in table if key[1] == target
                   for entry in (table[key] if isinstance(table[key], tuple) else [table[key]])]  # fmt: skip
        assert len(tune.places(target)) == len(entries)
        assert [place.kernel for place in tune.places(target)[:2]] == list(tune_cases.ORDER[:2])


@pytest.mark.parametrize("target", tiles.PROCESSORS)
def test_every_entry_of_products_has_cases_and_its_candidates_have_the_same(target, monkeypatch):
    monkeypatch.setattr(tiles, "INTERPRETED", False)
    for place in tune.places(target, list(tune_calls.PRODUCTS)):

        def taken(place=place):
            found = tune_cases.products_of(place.kernel, place.size or 2, place.entry, target, KERNEL_DEVICE)
            return [(product.shape, product.tokens, product.kind) for product in found]

        cases = taken()
        assert cases, place
        for candidate in tune_search.neighbours(place, place.entry):
            with place.holding(candidate):
                own = taken()
                # where tokens are the table's own, the candidate has others
                assert own == cases or candidate.tokens != place.entry.tokens, (place, candidate)


@pytest.mark.parametrize("target", tiles.PROCESSORS)
def test_candidates_differ_from_an_entry_by_a_step(target):
    for place in tune.places(target):
        entry, candidates = place.entry, tune_search.neighbours(place, place.entry)
        assert len(candidates) >= 2 and entry not in candidates, place
        for candidate in candidates:
            changed = {name for name, value in place.fields.items() if getattr(candidate, name) != value}
            assert len(changed) == 1 or changed == {"block", "num_warps"}, (place, candidate)
            assert 1 <= candidate.num_warps <= 8 and (candidate.registers or 0) * 32 * candidate.num_warps <= 1 << 16
            # such a kernel would leave groups out
            assert getattr(entry, "steps", 1) > 1 or getattr(candidate, "steps", 1) == 1, place
            assert target.startswith("sm_") or candidate.registers == entry.registers


def test_tiles_that_are_the_only_ones_move_in_every_direction():
    """Also from one that the search has come to."""
    (place,) = (place for place in tune.places(TARGET, ["straight_through"]) if place.common)
    entry = replace(place.entry, tokens=2 * place.entry.tokens)
    moved = {name for other in tune_search.neighbours(place, entry) for name, value in dataclasses.asdict(entry).items()
             if getattr(other, name) != value}  # fmt: skip
    assert moved == {"out", "tokens", "k", "num_warps", "num_stages", "registers"}


@pytest.mark.parametrize("kernel", cases([(name,) for name in tune_cases.ORDER], lambda kernel: kernel not in QUICK))
def test_a_candidate_is_checked_timed_and_taken(kernel, small, monkeypatch):
    """One with more warps, which the interpreter computes alike; other patterns are checked as well."""
    if kernel == "metadata":
        # it takes rows in multiples of 32
        monkeypatch.setattr(tune_calls, "MATRIX", (32, 64))
    before = place_of(kernel).entry
    other = replace(before, num_warps=2 * before.num_warps)
    search = search_of(kernel, lambda entry: 1e-6 if entry == other else 2e-6, lambda entry: [other], monkeypatch)
    measured = search.measured()
    assert measured.changed and measured.entry == dataclasses.asdict(other) and not search.left_out
    assert measured.microseconds == pytest.approx(len(search.cases)) == measured.before / 2
    assert place_of(kernel).entry == before


@pytest.mark.parametrize("kernel", FIRST_QUICK)
def test_a_case_launches_its_kernel_and_gives_the_same_again(kernel, small, monkeypatch):
    """As ``_called`` asserts of each case; the slow cases above do it for every kernel."""
    monkeypatch.setattr(tune_cases, "SHAPES", [(16, 64)])
    search = search_of(kernel, lambda entry: 1.0)
    case = search.cases[0]
    (first, local), (second, _) = search._called(case), search._called(case)
    case.timed()
    assert local == 0 and tune_search._agree(second, first) and (first.exact or first.near)


def test_what_is_in_place_is_timed_on_tensors_that_stay(small):
    """Many calls on, a check gives the same bits, and what was timed is finite."""
    for kernel in ("descend", "adamw"):
        search = search_of(kernel, lambda entry: 1.0)
        for case in search.cases:
            first = case.check()
            for _ in range(8):
                last = case.timed()
            assert all(torch.equal(x, y) for x, y in zip(case.check().exact, first.exact, strict=True))
            assert all(tensor.isfinite().all() for tensor in last.exact)


def test_the_search_goes_on_from_the_fastest(small):
    """Down to the smallest block with one warp, several steps away."""
    search = search_of("split_sum", lambda entry: 1e-6 * (entry.block + 64 * entry.num_warps + (entry.registers or 0)))
    best = search.measured().entry
    assert (best["block"], best["num_warps"], best["registers"]) == (32, 1, None)


@pytest.mark.parametrize(
    "cost",
    [lambda entry, other: 0.98 if entry == other else 1.0, lambda entry, other: 1.01 if entry == other else 1.0],
    ids=["by less than noise", "slower"],
)
def test_nothing_is_taken_that_is_not_faster(cost, small, monkeypatch):
    entry = place_of("unpack").entry
    other = replace(entry, num_warps=8)
    search = search_of("unpack", lambda entry: cost(entry, other), lambda entry: [other], monkeypatch)
    measured = search.measured()
    assert not measured.changed and measured.before == measured.microseconds == 1e6


def test_nothing_is_taken_that_is_slower_in_one_case(small, monkeypatch):
    """Logits of 32 bits take half of the time, those of 16 bits 4% more."""
    place = place_of("descend")
    other = replace(place.entry, num_warps=8)
    monkeypatch.setattr(tune_search, "neighbours", lambda *_: [other])

    def seconds(call):
        (logits,) = call().exact
        return 1.0 if place.entry != other else 0.5 if logits.dtype == torch.float32 else 1.04

    assert not Search(place, KERNEL_DEVICE, seconds).measured().changed


def test_a_candidate_has_to_be_faster_in_turn_as_well(small, monkeypatch):
    """Fast once, as after the GPU's clock went up."""
    times = iter([1.0, 0.5, *[1.0] * 2 * tune_search.ROUNDS])
    candidates = [replace(place_of("unpack").entry, num_warps=8)]
    search = search_of("unpack", lambda entry: next(times), lambda entry: candidates, monkeypatch)
    assert not search.measured().changed
    assert next(times, None) is None


def test_a_wrong_candidate_is_an_error_that_names_it(small, monkeypatch):
    """A kernel of a single step, launched for two, leaves groups out."""
    monkeypatch.setattr(tiles, "PROGRAMS_A_PROCESSOR", 0)
    search = search_of("top_n_mask", lambda entry: 1.0, lambda entry: [replace(entry, block=32, steps=2)], monkeypatch)
    before = place_of("top_n_mask").entry
    with pytest.raises(
        tune_search.WrongResult, match=r"^top_n_mask, M = 4: Configuration\(.*block=32, steps=2\).* 2:4"
    ):
        search.measured()
    assert place_of("top_n_mask").entry == before


def test_sums_may_be_of_another_order_and_no_more():
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    for expected, error in ((x, 1e-5), (x.bfloat16(), 2.0**-8 * x)):
        right, wrong = (expected.float() + error).to(expected.dtype), expected.clone()
        wrong[3, 5] += 0.1
        assert tune_search._agree(tune_calls.Results(near=(right,)), tune_calls.Results(near=(expected,)))
        for found in (wrong, torch.full_like(expected, torch.nan)):
            assert not tune_search._agree(tune_calls.Results(near=(found,)), tune_calls.Results(near=(expected,)))
        assert not tune_search._agree(tune_calls.Results((wrong,)), tune_calls.Results((expected,)))


def failing(error):
    def compiled(*_, **__):
        raise error

    return compiled


def compiled_with(local=0, shared=0):
    return lambda *_, **__: SimpleNamespace(n_spills=local, metadata=SimpleNamespace(shared=shared))


@pytest.mark.parametrize(
    ("target", "instead", "reason"),
    [
        (TARGET, failing(triton.runtime.errors.OutOfResources(1, 0, "shared memory")), "OutOfResources"),
        (TARGET, failing(RuntimeError("PassManager::run failed")), "PassManager"),
        (TARGET, compiled_with(local=1), "local memory"),
        ("sm_80", compiled_with(shared=(99 << 10) + 1), "shared memory"),
    ],
    ids=["launch", "compilation", "local memory", "shared memory"],
)
def test_a_candidate_that_does_not_fit_is_left_out_and_told(target, instead, reason, small, monkeypatch):
    monkeypatch.setattr(tiles, "ON_CPU", target)
    tiles.architecture.cache_clear()
    place = tune.places(target, ["unpack"])[0]
    other, own = replace(place.entry, num_warps=8), launch._launch
    monkeypatch.setattr(tune_search, "neighbours", lambda *_: [other])
    monkeypatch.setattr(
        launch, "_launch", lambda *args, **how: (instead if place.entry == other else own)(*args, **how)
    )
    told = []
    tune.tune([place], SimpleNamespace(add=lambda _: None), KERNEL_DEVICE, lambda call: 1.0, say=told.append)
    tiles.architecture.cache_clear()
    assert told == [f"unpack, M = 4: 1000000.0 us, nothing is faster; left out: 1 {reason}"]


def test_other_faults_of_a_candidate_are_not_hidden(small, monkeypatch):
    candidates = [replace(place_of("unpack").entry, num_warps=8)]
    search = search_of("unpack", lambda entry: 1.0, lambda entry: candidates, monkeypatch)
    own = launch._launch
    broken = failing(RuntimeError("an illegal memory access was encountered"))
    monkeypatch.setattr(
        launch, "_launch", lambda *args, **how: (broken if search.place.entry in candidates else own)(*args, **how)
    )
    with pytest.raises(RuntimeError, match="illegal memory access") as found:
        search.measured()
    assert "num_warps=8" in found.value.__notes__[0]


def tuned_file(path, monkeypatch, ends=float("inf"), kernels=("unpack", "adamw")):
    """What the tuner says of two kernels at M = 4, of which the first is faster with 8 warps."""
    monkeypatch.setattr(tune_search, "neighbours", lambda place, entry: [replace(entry, num_warps=8)])
    entries = [place for kernel in kernels for place in tune.places(TARGET, [kernel])[:1]]
    record, told = record_of(path), []
    entries = [place for place in entries if not record.has(place)]

    def seconds(_):
        return 1e-6 if tiles.CONFIGURATIONS["unpack", TARGET, 4].num_warps == 8 else 2e-6

    tune.tune(entries, record, KERNEL_DEVICE, seconds, ends, told.append)
    return told, record


def test_the_file_is_written_after_each_entry_and_a_later_call_goes_on(small, tmp_path, monkeypatch):
    path, before = tmp_path / "sm_90.json", tiles.CONFIGURATIONS["unpack", TARGET, 4]
    told, record = tuned_file(path, monkeypatch, kernels=["unpack"])
    assert told == ["unpack, M = 4: 2.0 -> 1.0 us (50% less): num_warps 4 -> 8"]
    assert tiles.CONFIGURATIONS["unpack", TARGET, 4] == replace(before, num_warps=8)
    told, record = tuned_file(path, monkeypatch)
    assert [line.partition(":")[0] for line in told] == ["adamw, M = 4"]
    first, second = tuned.read(path)
    assert [measured.kernel for run in (first, second) for measured in run.entries] == ["unpack", "adamw"]
    assert first.entries[0].changed and not second.entries[0].changed
    assert (first.device, first.date, first.commit, first.torch, first.triton) == dataclasses.astuple(record.run)[:5]
    # a line for each entry, so that a change can be read
    assert sum('"kernel"' in line for line in path.read_text().splitlines()) == 2
    # other versions measure anew
    other = replace(record.run, triton="3.7", entries=())
    assert tune.Record(path, record.run).has(place_of("unpack"))
    assert not tune.Record(path, other).has(place_of("unpack"))


def test_it_ends_in_time_and_keeps_what_it_has(small, tmp_path, monkeypatch):
    told, record = tuned_file(tmp_path / "sm_90.json", monkeypatch, ends=0.0)
    assert told == ["unpack, M = 4: the time is over; the next call goes on here"]
    assert record.run.entries == () and not (tmp_path / "sm_90.json").exists()


def test_what_has_changed_is_told_at_the_end(capsys):
    fields = {"block": 256, "num_warps": 4}
    kept = tuned.Measured("unpack", 4, fields, fields, 5.0, 5.0)
    faster = replace(kept, entry={**fields, "block": 128}, microseconds=4.0)
    tune.summarize(tuned.Run("a GPU", "2026-01-31", None, "2.11", "3.6", (kept, faster)))
    assert capsys.readouterr().out.splitlines() == [
        "2 entries measured, 1 changed",
        "  unpack 4: 5.0 -> 4.0 us (20% less): block 256 -> 128",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "this machine has no GPU to time on"),
        (["--kernels", "conv"], "argument --kernels: invalid choice: 'conv'"),
        (["--within", "soon"], "argument --within: invalid time_limit value: 'soon'"),
        (["--within", "nan"], "argument --within: expected seconds above 0, got nan"),
    ],
)
def test_refused_in_one_line(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(tiles, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as end:
        tune.main(arguments)
    assert end.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]


def test_the_interpreter_is_not_timed(capsys, monkeypatch):
    monkeypatch.setattr(tiles, "INTERPRETED", True)
    with pytest.raises(SystemExit):
        tune.main([])
    assert "TRITON_INTERPRET: expected to be unset" in capsys.readouterr().err


@pytest.fixture
def card(monkeypatch):
    """card(name): a GPU of that architecture, with nothing left to measure."""

    def make(name):
        monkeypatch.setattr(tiles, "own_architecture", lambda device: name)

    monkeypatch.setattr(tiles, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(tune, "tune", lambda places, *_, **__: list(places))
    tiles.architecture.cache_clear()
    yield make
    tiles.architecture.cache_clear()


def test_a_card_that_borrows_entries_does_not_change_them_by_default(card, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tuned, "FOLDER", tmp_path / "tuned")
    card("sm_86")
    with pytest.raises(SystemExit):
        tune.main([])
    assert "this GPU, sm_86, takes the entries of sm_80" in capsys.readouterr().err
    assert not (tmp_path / "tuned").exists()
    tune.main(["--output", str(tmp_path / "sm_86.json")])
    assert f"target sm_80: {len(tune.places('sm_80'))} entries to measure" in capsys.readouterr().out


def test_a_card_with_entries_of_its_own_writes_the_file_of_the_package(card, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tuned, "FOLDER", tmp_path / "tuned")
    card(TARGET)
    tune.main(["--kernels", "adamw"])
    assert f"5 entries to measure, into {tmp_path / 'tuned' / 'sm_90.json'}" in capsys.readouterr().out
    damaged = tmp_path / "damaged.json"
    damaged.write_text("{")
    for output, message in ((damaged, "expected JSON"), (tmp_path / "none" / "x.json", "in a folder that exists")):
        with pytest.raises(SystemExit):
            tune.main(["--output", str(output)])
        assert message in capsys.readouterr().err
    assert damaged.read_text() == "{"


def test_a_package_that_cannot_be_written_is_refused_before_anything_is_timed(card, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tuned, "FOLDER", tmp_path / "none" / "tuned")
    card(TARGET)
    with pytest.raises(SystemExit) as end:
        tune.main([])
    assert end.value.code == 2 and "--output: expected a file that can be written" in capsys.readouterr().err


def test_a_file_in_a_folder_with_a_conftest_runs_alone():
    """Triton interprets its own functions too, though that conftest.py imports it before pytest is configured."""
    environment = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", WORKER)}
    test = f"{__file__}::{test_what_is_in_place_is_timed_on_tensors_that_stay.__name__}"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", test]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
