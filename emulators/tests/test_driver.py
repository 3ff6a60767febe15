"""The driver that has Triton launch on the emulators, and the plugin that fails tests by what the emulator finds."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hand_written.ptx import kernel

from gpu_emulators import driver, plugin
from gpu_emulators.driver import ALIGNMENT, MOST_FILLED, EmulatorDriver, RecordingTorch, number, spans
from gpu_emulators.findings import Fault, Finding
from gpu_emulators.ptx import Program

# -- arguments


def span(*tensors):
    """(offset from the first tensor, bytes, names) of the memory of tensors."""
    start = tensors[0].data_ptr()
    return [
        (at - start, data.size, name) for at, data, name in spans([(f"t{k}", "*i8", t) for k, t in enumerate(tensors)])
    ]


def test_tensors_that_share_memory_are_one_region():
    whole = torch.arange(64, dtype=torch.uint8)
    assert span(whole) == [(0, 64, "t0")]
    assert span(whole, whole[10:20]) == [(0, 64, "t0, t1")]
    assert span(whole[:40], whole[30:]) == [(0, 64, "t0, t1")]
    assert span(whole[:8], whole[8:16]) == [(0, 8, "t0"), (8, 8, "t1")]


def test_a_region_ends_where_the_last_element_of_a_view_does():
    whole = torch.zeros(8, 8, dtype=torch.int32)
    # what lies beside a column is the kernel's too, what lies behind its end is not
    assert span(whole[:, 2]) == [(0, (7 * 8 + 1) * 4, "t0")]
    assert span(whole.T) == [(0, 256, "t0")]
    assert span(whole, whole[:0]) == [(0, 256, "t0")]


def test_bytes_of_a_region_are_those_of_the_tensor():
    tensor = torch.arange(4, dtype=torch.int16)
    ((_, data, _),) = spans([("t", "*i16", tensor)])
    data[2] = 77
    assert tensor.tolist() == [0, 77, 2, 3]


def test_tensors_elsewhere_are_refused():
    with pytest.raises(ValueError, match="^t: expected a tensor on the CPU, got one on meta"):
        list(spans([("t", "*i8", torch.empty(3, device="meta"))]))


def test_arguments_are_addresses_integers_and_floats():
    whole = torch.zeros(8)
    moved = {range(whole.data_ptr(), whole.data_ptr() + whole.nbytes): 1 << 50}
    assert [number("*fp32", part, moved) for part in (whole, whole[3:], whole[3:3])] == [1 << 50, (1 << 50) + 12, 0]
    assert number("i32", True, {}) == 1
    assert isinstance(number("fp32", 3, {}), float) and isinstance(number("i64", 3, {}), int)


def stored(offset: int, into: int, *tensors: torch.Tensor) -> None:
    """A launch whose 32 threads each write 7 into a tensor of int32, so many bytes behind their place."""
    body = f"mul.wide.u32 %rd9, %r70, 4; add.s64 %rd9, %rd{into}, %rd9; st.global.b32 [%rd9+{offset}], 7; ret;"
    given = [(f"t{k}", "*i32", tensor) for k, tensor in enumerate(tensors)]
    EmulatorDriver("sm_80").launch(kernel(body, arrays=len(tensors)), (1, 1, 1), given, shared=0)


@pytest.mark.parametrize(("into", "offset", "beyond"), [(0, 4, "4 bytes beyond t0"), (1, -4, "")])
def test_a_tensor_is_not_reached_from_the_one_beside_it(into, offset, beyond):
    whole = torch.zeros(64, dtype=torch.int32)
    parts = whole[:32], whole[32:]
    stored(0, into, *parts)
    assert [part.sum() for part in parts] == [0 if k != into else 7 * 32 for k in range(2)]
    with pytest.raises(Fault, match=f"^out of bounds of global memory.*{beyond}"):
        stored(offset, into, *parts)


def test_a_tensor_is_reached_by_another_of_the_same_memory():
    whole = torch.zeros(40, dtype=torch.int32)
    stored(4 * 8, 1, whole, whole[:32])
    assert whole.nonzero().flatten().tolist() == list(range(8, 40))


def test_addresses_keep_their_alignment(monkeypatch):
    whole = torch.zeros(256, dtype=torch.uint8)
    found = []
    monkeypatch.setattr(Program, "launch", lambda self, grid, arguments, *_, **__: found.extend(arguments))
    stored(0, 1, whole[:100], whole[101:])
    assert [at % ALIGNMENT for at in found] == [(whole.data_ptr() + k) % ALIGNMENT for k in (0, 101)]


# -- outputs


def test_empty_tensors_are_known_until_a_kernel_has_written_them():
    own = RecordingTorch()
    tensor = own.empty(3, 5, dtype=torch.int16)
    assert tensor.eq(-1).all() and own.unwritten(tensor.data_ptr(), 30)
    # of a part nobody knows
    assert not own.unwritten(tensor.data_ptr(), 28)
    own.written(tensor.data_ptr())
    assert not own.unwritten(tensor.data_ptr(), 30)


def test_an_address_that_another_tensor_takes_is_forgotten():
    own = RecordingTorch()
    tensor = own.empty_like(torch.zeros(4))
    address = tensor.data_ptr()
    assert own.unwritten(address, 16)
    del tensor
    assert not own.unwritten(address, 16)


def test_large_tensors_take_no_memory():
    own = RecordingTorch()
    tensor = own.empty(MOST_FILLED + 1, dtype=torch.int8)
    assert not own.unwritten(tensor.data_ptr(), tensor.nbytes)
    assert own.zeros is torch.zeros


# -- findings


@pytest.fixture
def phase():
    """phase(): a phase of a test with an emulator of its own, and its report sections."""

    def begin():
        emulator, sections = EmulatorDriver("sm_80"), []
        item = SimpleNamespace(
            config=SimpleNamespace(stash={plugin.EMULATOR: emulator}),
            add_report_section=lambda *part: sections.append(part),
        )
        phase = plugin._watched(item)
        next(phase)
        return emulator, phase, sections

    return begin


def end(phase):
    with pytest.raises(StopIteration) as stopped:
        phase.send("result")
    return stopped.value.value


def test_a_phase_without_findings_passes(phase):
    emulator, running, _ = phase()
    assert end(running) == "result" and not emulator.findings


def test_what_is_found_fails_the_test_that_caused_it(phase):
    emulator, running, _ = phase()
    emulator.findings.note("shared race", "some_kernel")
    with pytest.raises(pytest.fail.Exception, match="the emulator has found:\nshared race: some_kernel"):
        running.send("result")
    # and no other one
    assert not emulator.findings


REDUCTION = Finding(
    "read of a register that some threads have not written",
    "some_kernel",
    7,
    "shfl.sync.bfly.b32 %r2, %r1, 2, 31, -1",
    "standard.py:293",
)
PACKING = Finding(
    "read of a register that a load of tensor memory still writes",
    "some_kernel",
    8,
    "mov.b64 %rd1, {%r1, %r2}",
    "kernel.py:3",
)
BUILD_OF_BYTES = Finding(
    "read of an unwritten register", "some_kernel", 9, "prmt.b32 %r24, %r25, %r26, 0x3340U", "kernel.py:4"
)


@pytest.mark.parametrize(
    ("finding", "passing", "failing"),
    [
        (REDUCTION, ("3.6.0", "3.7.1"), ("3.8.0", "3.9.0")),
        (PACKING, ("3.9.0",), ("3.6.0", "3.7.1", "3.8.0")),
        (BUILD_OF_BYTES, ("3.6.0", "3.7.1"), ("3.8.0", "3.9.0")),
    ],
    ids=["reduction", "packing", "build of bytes"],
)
def test_what_a_release_of_triton_causes_is_a_fault_in_others(finding, passing, failing, monkeypatch):
    emulator = EmulatorDriver("sm_90")
    for version in passing + failing:
        monkeypatch.setattr(driver.triton, "__version__", version)
        assert emulator.faults([finding]) == ([] if version in passing else [finding])
    monkeypatch.setattr(driver.triton, "__version__", passing[0])
    emulator.aim("gfx942")
    assert emulator.faults([finding]) == [finding]


@pytest.mark.parametrize("version", ["3.6.0", "3.7.1", "3.8.0", "3.9.0"])
@pytest.mark.parametrize(
    "finding",
    [
        replace(REDUCTION, where="kernel.py:3"),
        replace(REDUCTION, text="st.shared.b32 [%r3], %r1"),
        replace(BUILD_OF_BYTES, text="add.rn.f32 %r24, %r25, %r26"),
        replace(REDUCTION, kind="write of a register that a product still reads"),
        replace(REDUCTION, kind="product of memory written without a proxy fence"),
    ],
    ids=["line", "instruction", "sum", "wgmma", "fence"],
)
def test_other_findings_are_faults_in_every_release(version, finding, monkeypatch):
    monkeypatch.setattr(driver.triton, "__version__", version)
    assert EmulatorDriver("sm_90").faults([finding]) == [finding]


def test_an_error_of_the_test_is_shown_with_what_was_found(phase):
    emulator, running, sections = phase()
    emulator.findings.note("shared race", "some_kernel")
    with pytest.raises(KeyError):
        running.throw(KeyError("own"))
    ((_, name, told),) = sections
    assert name == "emulator" and "shared race: some_kernel" in told


def test_findings_apart_are_none_of_the_others():
    emulator = EmulatorDriver("sm_80")
    with emulator.apart() as findings:
        emulator.findings.note("shared race", "some_kernel")
    assert findings.kinds == {"shared race"} and not emulator.findings


def test_targets_are_checked():
    with pytest.raises(ValueError, match="^target: expected one of sm_80, .*, got sm_70"):
        EmulatorDriver("sm_70")
    config = SimpleNamespace(addinivalue_line=lambda *line: None, stash={}, getoption=lambda name: "sm_70")
    with pytest.raises(pytest.UsageError, match="^--compiled: expected one of sm_80, .*, got sm_70"):
        plugin.pytest_configure(config)
