"""A driver of Triton's whose device is an emulator: kernels are compiled for a GPU and executed on CPU tensors.

After ``install("sm_80")``, ``kernel[grid](*cpu_tensors)`` does what it does on that GPU: Triton specialises the
arguments, compiles down to PTX, or to AMDGCN for a GPU of AMD's, keeps the result in its cache on disk, and orders the
parameters. The emulator then executes that text on the tensors' own memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import re
import time
import weakref
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
import triton
from triton.backends import backends
from triton.backends.amd.compiler import HIPBackend
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.driver import driver as triton_driver

from .amdgcn import Program as GCNProgram
from .findings import Finding, Findings
from .ptx import Program as PTXProgram

# The most shared memory of a block that a kernel can ask for: CUDA C++ Programming Guide, table of compute
# capabilities; CDNA3 ISA, Local Data Share
SHARED_MEMORY = {"sm_80": 163 << 10, "sm_86": 99 << 10, "sm_89": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10}
SHARED_MEMORY["gfx942"] = 64 << 10
TARGETS = tuple(SHARED_MEMORY)
# Larger tensors are not filled: what nobody touches costs no memory
MOST_FILLED = 1 << 28
# Memory of a launch lies that many bytes apart on the emulator, further than a kernel's offsets reach. Of its address
# it keeps what CUDA's own allocations are multiples of, which vector accesses depend on
APART, ALIGNMENT = 1 << 40, 256


@dataclasses.dataclass(frozen=True)
class Known:
    """Findings that a release of Triton causes by itself, in right kernels.

    Attributes:
        kind: of the findings.
        backend: Triton's name for the maker of the GPUs.
        releases: the first two numbers of those that cause it.
        text: pattern that begins the instruction.
        where: pattern that begins the line of Python.
        reason: why kernels are right nonetheless, and how it is known.
    """

    kind: str
    backend: str
    releases: tuple[tuple[int, int], ...]
    text: str
    where: str
    reason: str

    def matches(self, finding: Finding) -> bool:
        found = finding.kind == self.kind
        return found and bool(re.match(self.text, finding.text) and re.match(self.where, finding.where))


KNOWN = (
    Known(
        "read of a register that some threads have not written",
        "cuda",
        ((3, 6), (3, 7)),
        text=r"(shfl\.sync\.bfly|min\.s32|add\.rn\.f32)\b",
        where=r"standard\.py",
        reason="a reduction over several warps: as many lanes as there are warps load (@%p ld.shared), all lanes "
        "exchange (shfl.sync.bfly), and lanes that have not loaded reach none that has; Triton's pull request 9219 "
        "replaced it, in 3.8",
    ),
    Known(
        "read of a register that a load of tensor memory still writes",
        "cuda",
        ((3, 9),),
        text="",
        where="",
        reason="tcgen05.ld is assembly whose registers LLVM packs (mov.b64) or stores (st.shared) ahead of "
        "tcgen05.wait::ld; ptxas has the reader wait for the register, as for that of any load",
    ),
    Known(
        "read of an unwritten register",
        "cuda",
        ((3, 6), (3, 7)),
        text=r"prmt\.b32 %r\d+, %r\d+, %r\d+, 0x3340U",
        where="",
        reason="LLVM builds <4 x i8> also of bytes that it has left undefined, and that are not used; its pull request "
        "224575 makes them zeros",
    ),
    Known(
        "two waves write the same value to LDS",
        "hip",
        ((3, 6), (3, 7), (3, 8), (3, 9)),
        text="ds_write",
        where="",
        reason="what has fewer elements than there are lanes is held more than once",
    ),
)
WARP, WAVE = 32, 64
MOST_THREADS = 1024
PROGRAMS = {"cuda": PTXProgram, "hip": GCNProgram}


class PTXBackend(CUDABackend):
    """Triton's compiler for NVIDIA's GPUs, which ends at PTX: its text is the binary."""

    def __init__(self, target: GPUTarget):
        super().__init__(target)
        self.binary_ext = "ptx"

    def add_stages(self, stages, options, language):
        super().add_stages(stages, options, language)
        del stages["cubin"]

    def hash(self) -> str:
        return f"{super().hash()}-ptx"


class GCNBackend(HIPBackend):
    """Triton's compiler for AMD's GPUs, which ends at AMDGCN: its text is the binary."""

    def __init__(self, target: GPUTarget):
        super().__init__(target)
        self.binary_ext = "amdgcn"

    def add_stages(self, stages, options, language):
        super().add_stages(stages, options, language)
        del stages["hsaco"]

    def hash(self) -> str:
        return f"{super().hash()}-amdgcn"


@dataclasses.dataclass
class Launch:
    """What a launch ran: the kernel, its grid, the seconds that the emulator took."""

    kernel: str
    grid: tuple[int, int, int]
    seconds: float


class Utilities:
    """What Triton asks a driver about its device, and has it do with what is compiled."""

    def __init__(self, emulator: EmulatorDriver):
        self.emulator = emulator

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_MEMORY[self.emulator.target]}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple:
        """(module, function, registers, spilled registers, most threads); the function is the text."""
        return object(), binary.decode(), 0, 0, MOST_THREADS

    def unload_module(self, module) -> None:
        pass


class Launcher:
    """Launches of a compiled kernel, which Triton calls with all arguments in the order of its signature."""

    def __init__(self, emulator: EmulatorDriver, source, metadata):
        scratch = [getattr(metadata, f"{kind}_scratch_size", 0) for kind in ("global", "profile")]
        if metadata.num_ctas != 1 or any(scratch):
            raise NotImplementedError(f"{metadata.name}: clusters and scratch memory are not modelled")
        self.emulator, self.shared, self.signature = emulator, metadata.shared, source.signature

    def __call__(self, x, y, z, stream, text, packed, launch_metadata, enter, leave, *arguments):
        given = [
            (name, kind, value)
            for (name, kind), value in zip(self.signature.items(), arguments, strict=True)
            if kind != "constexpr"
        ]
        self.emulator.launch(text, (x, y, z), given, self.shared)


class EmulatorDriver(DriverBase):
    """The driver, and what it has seen.

    Attributes:
        target: the GPU that kernels are compiled for, such as "sm_90" or "gfx942".
        findings: of all launches since it was last replaced.
        launches: what ran, in order.
        programs: by assembly text, with the basic blocks that have been executed.
        rewrite: what is done to a kernel's text before it runs; for planted faults.
        last: how many of a grid's last programs run; None: all of them.
        tables: names of arguments that hold addresses of other tensors, each with these; see ``reaching``.
        known: what Triton itself causes, for this target in this release.
        torch: torch that records which of its empty tensors no kernel has written, for code that allocates outputs.
    """

    def __init__(self, target: str):
        self.aim(target)
        self.findings, self.launches, self.programs = Findings(), [], {}
        self.rewrite: Callable[[str], str] = str
        self.last: int | None = None
        self.tables: dict[str, list[torch.Tensor]] = {}
        self.torch = RecordingTorch()
        self.utils = Utilities(self)

    def aim(self, target: str) -> None:
        """Compile for another GPU from here on."""
        if target not in TARGETS:
            raise ValueError(f"target: expected one of {', '.join(TARGETS)}, got {target}")
        self.target = target

    @property
    def known(self) -> list[Known]:
        release = tuple(map(int, triton.__version__.split(".")[:2]))
        return [known for known in KNOWN if known.backend == self.backend and release in known.releases]

    @contextlib.contextmanager
    def apart(self) -> Iterator[Findings]:
        """Findings of the launches inside, which then are none of the others."""
        outer, self.findings = self.findings, Findings()
        try:
            yield self.findings
        finally:
            self.findings = outer

    @contextlib.contextmanager
    def reaching(self, table: str, tensors: Iterable[torch.Tensor]) -> Iterator[None]:
        """Launches inside find the addresses of ``tensors`` in the int64 tensor that is their argument ``table``."""
        self.tables[table] = list(tensors)
        try:
            yield
        finally:
            del self.tables[table]

    def faults(self, findings: Findings) -> list[Finding]:
        """Those that are the kernel's own."""
        known = self.known
        return [finding for finding in findings if not any(each.matches(finding) for each in known)]

    def launch(self, text: str, grid: tuple[int, int, int], given: list[tuple], shared: int) -> None:
        """Execute a grid on arguments (name, type, value)."""
        text = self.rewrite(text)
        program = self.programs.get(text)
        if program is None:
            program = self.programs[text] = PROGRAMS[self.backend](text)
        memory, fresh, moved = program.memory(), {}, {}
        tensors = [argument for argument in given if isinstance(argument[2], torch.Tensor)]
        tables = [argument for argument in tensors if argument[0] in self.tables]
        tensors = [argument for argument in tensors if argument[0] not in self.tables]
        for table, reached in self.tables.items():
            tensors += [(f"{table}[{i}]", "*", tensor) for i, tensor in enumerate(reached)]
        for position, (start, data, name) in enumerate(spans(tensors), 1):
            unwritten = self.torch.unwritten(start, data.size)
            region = memory.register(position * APART + start % ALIGNMENT, data, name, initialised=not unwritten)
            moved[range(start, start + data.size)] = region.start
            if unwritten:
                fresh[start] = region
        for start, data, name in spans(tables):
            entries = [address(int(entry), moved) for entry in data.view(np.int64)]
            position += 1
            region = memory.register(position * APART, np.array(entries, np.int64).view(np.uint8), name)
            moved[range(start, start + data.size)] = region.start
        values = [number(kind, value, moved) for _, kind, value in given]
        # behind its own, Triton gives each kernel pointers to scratch memory, which those here don't use
        values += [0] * (program.parameters - len(values))
        started = time.perf_counter()
        try:
            program.launch(grid, values, shared, memory, self.findings, last=self.last)
        finally:
            for start in fresh:
                self.torch.written(start)
            self.launches.append(Launch(program.kernel.name, grid, time.perf_counter() - started))
        for region in fresh.values() if self.last is None else ():
            if missing := region.unwritten():
                detail = f"{region.name}: {missing} of {region.data.size} bytes"
                self.findings.note("output not wholly written", program.kernel.name, detail)

    @property
    def backend(self) -> str:
        """Triton's name for the maker's GPUs."""
        return "hip" if self.target.startswith("gfx") else "cuda"

    def get_current_target(self) -> GPUTarget:
        if self.backend == "hip":
            return GPUTarget("hip", self.target, WAVE)
        return GPUTarget("cuda", self.get_current_device(), WARP)

    def get_current_device(self) -> int:
        # Triton keeps what it has compiled by device, so each target is one
        return int(self.target.removeprefix("sm_").removeprefix("gfx"))

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def launcher_cls(self, source, metadata) -> Launcher:
        return Launcher(self, source, metadata)

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError

    def get_benchmarker(self):
        raise NotImplementedError


def number(kind: str, value, moved: dict[range, int]) -> int | float:
    """An argument as the emulator takes it: an address, an integer or a float.

    ``moved`` tells where ranges of addresses begin on the emulator. A tensor without elements is nowhere, at 0.
    """
    if isinstance(value, torch.Tensor):
        return address(value.data_ptr(), moved, 0) if value.numel() else 0
    return float(value) if kind.startswith(("fp", "bf")) else int(value)


def address(start: int, moved: dict[range, int], otherwise: int | None = None) -> int:
    """Where an address lies on the emulator; ``otherwise``, or as it is, where it is none of those that are moved."""
    found = (own + start - here.start for here, own in moved.items() if start in here)
    return next(found, start if otherwise is None else otherwise)


def spans(given: list[tuple]) -> Iterator[tuple[int, np.ndarray, str]]:
    """(address, bytes, names) of the memory of arguments (name, type, tensor); what overlaps is one."""
    ends = []
    for name, _, tensor in given:
        if tensor.device.type != "cpu":
            raise ValueError(f"{name}: expected a tensor on the CPU, got one on {tensor.device}")
        if tensor.numel():
            last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            start = tensor.data_ptr()
            ends.append((start, start + (last + 1) * tensor.element_size(), name))
    merged: list[tuple[int, int, str]] = []
    for start, end, name in sorted(ends):
        if merged and start < merged[-1][1]:
            first, last, names = merged[-1]
            merged[-1] = first, max(last, end), f"{names}, {name}"
        else:
            merged.append((start, end, name))
    for start, end, name in merged:
        yield start, np.ctypeslib.as_array((ctypes.c_uint8 * (end - start)).from_address(start)), name


class RecordingTorch:
    """torch that knows which of its empty tensors no kernel has written yet; they hold bytes of ones."""

    def __init__(self):
        self.sizes: dict[int, tuple[weakref.ref, int]] = {}

    def __getattr__(self, name):
        return getattr(torch, name)

    def empty(self, *size, **options) -> torch.Tensor:
        return self.record(torch.empty(*size, **options))

    def empty_like(self, tensor: torch.Tensor, **options) -> torch.Tensor:
        return self.record(torch.empty_like(tensor, **options))

    def mm(self, *operands: torch.Tensor, out: torch.Tensor, **options) -> torch.Tensor:
        """Torch's product, which writes all of ``out``."""
        self.written(out.data_ptr())
        return torch.mm(*operands, out=out, **options)

    def record(self, tensor: torch.Tensor) -> torch.Tensor:
        if type(tensor) is torch.Tensor and tensor.device.type == "cpu" and 0 < tensor.nbytes <= MOST_FILLED:
            tensor.view(torch.uint8).fill_(0xFF)
            self.sizes[tensor.data_ptr()] = weakref.ref(tensor), tensor.nbytes
        return tensor

    def unwritten(self, start: int, size: int) -> bool:
        """Whether there is such a tensor, whole, at this address."""
        reference, known = self.sizes.get(start, (None, None))
        return reference is not None and reference() is not None and known == size

    def written(self, start: int) -> None:
        self.sizes.pop(start, None)


def install(target: str) -> EmulatorDriver:
    """Have Triton compile for a GPU and launch on the emulator, from here on in this process."""
    emulator = EmulatorDriver(target)
    backends["nvidia"] = dataclasses.replace(backends["nvidia"], compiler=PTXBackend)
    backends["amd"] = dataclasses.replace(backends["amd"], compiler=GCNBackend)
    triton_driver.set_active(emulator)
    return emulator
