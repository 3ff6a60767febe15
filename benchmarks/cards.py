"""Rates of NVIDIA's cards by the properties of a device: what good kernels reach, not the peaks of data sheets.

A card's name says nothing: an H100 is a PCIe or an SXM card, a 4090 is also in laptops, and a MIG slice has a part of
the processors and of the memory. Processors, clocks and the width of the memory are the device's, and what a processor
does in a clock is that of its compute capability.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Any, NamedTuple

from aot import Built

from maskpro_kernels.ops.triton.tiles import TARGET_OF

# Of the memory's bandwidth: BabelStream's triad, of three arrays of 268 MB, reaches 2.97 of 3.35 TB/s on an H100 SXM
# (Azure/AI-benchmarking-guide on GitHub, Azure_Results, H100 v5). Kernels, too, read more than they write
SHARE = 2.97 / 3.35
# Of a dense product's rate with 2:4 weights, of 2 at the peak: "up to 1.7x" on an A100, torchao's README of sparsity
SPARSE = 1.7


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What a processor of a compute capability has, by the tables of the CUDA Programming Guide, 5.1.

    Attributes:
        operations: in a clock, dense, of bfloat16 with sums in float32, by NVIDIA's white papers. Of 8.6, 8.9 and 12.x
            GeForce cards have half of the others.
        reached: of these at the highest clock, by large products of cuBLAS.
        warp: of what cuBLAS reaches, by instructions of a warp, ``mma.sync`` and ``mma.sp``.
        fp32: lanes.
        shared, warps: bytes of shared memory and resident warps.
        l2: bytes in a clock from the L2 cache; infinite where no figure is published.
    """

    operations: tuple[int, ...]
    reached: float
    warp: float = 1.0
    fp32: int = 128
    shared: int = 228 << 10
    warps: int = 64
    l2: float = inf


# Reached: TFLOPS of the MAMF table of stas00/ml-engineering, compute/accelerator, over processors * operations * clock:
# 271.2 of an A100's 312, 794 of an H100 SXM's 1,070 at 1.98 GHz, 1,745 of a B200's 2,382 at 1.965 GHz. 105 to 115 of an
# L20's 119: DefTruth/CUDA-Learn-Notes, hgemm; other cards that multiply by ``mma.sync`` alone are taken to be alike
_SMALL = {"operations": (512, 1024), "reached": 0.92, "shared": 100 << 10, "warps": 48}
# ``mma`` reaches 62.9% of a Hopper's peak, ``wgmma`` 96%: Luo et al., arXiv 2501.12084. Of 10.0 no figure is published:
# it is taken to do as much in a clock. L2: 5.5 TB/s of an H100 PCIe, Chips and Cheese, "Nvidia's H100", 2023; 5,120
# bytes a clock of an A100's 108 processors, NVIDIA's white paper
_BLACKWELL = Architecture(operations=(8192,), reached=0.73, warp=0.629 / 2)
ARCHITECTURES = {
    "8.0": Architecture(operations=(2048,), reached=0.87, fp32=64, shared=164 << 10, l2=5120 / 108),
    "8.6": Architecture(**_SMALL),
    "8.9": Architecture(**_SMALL),
    "9.0": Architecture(operations=(4096,), reached=0.74, warp=0.629, l2=5.5e12 / (114 * 1.755e9)),
    "10.0": _BLACKWELL,
    "10.3": _BLACKWELL,
    "12.0": Architecture(**_SMALL),
    "12.1": Architecture(**_SMALL),
}


class Properties(NamedTuple):
    """Of a device, with the names and units of ``torch.cuda.get_device_properties``: clocks in kHz."""

    major: int
    minor: int
    multi_processor_count: int
    clock_rate: int
    memory_clock_rate: int
    memory_bus_width: int


@dataclass(frozen=True, kw_only=True)
class Card:
    """Rates of a card.

    Attributes:
        target: row of the launch tables.
        bandwidth: bytes a second of its memory at the highest clock, of which a triad reaches SHARE.
        operations: a second that large dense products reach, with bfloat16 and sums in float32.
        torch_sparse: whether torch multiplies by CUTLASS on sparse tensor cores.
        warp, fp32, shared, warps: of its ``Architecture``.
        l2: bytes a second from the L2 cache.
    """

    target: str
    processors: int
    clock: float
    bandwidth: float
    operations: float
    torch_sparse: bool
    warp: float
    fp32: int
    shared: int
    warps: int
    l2: float = inf

    def move(self, moved: float) -> float:
        """Seconds of bytes from memory."""
        return moved / (SHARE * self.bandwidth)

    def resident(self, built: Built, num_warps: int) -> int:
        """Programs that a processor has at a time: by 65,536 registers, by shared memory, by warps."""
        registers = -(-max(built.registers, 1) * 32 // 256) * 256 * num_warps
        return min(65536 // registers, self.shared // (built.shared + 1024), self.warps // num_warps)


def capability(properties: Any) -> str:
    return f"{properties.major}.{properties.minor}"


def peaks(properties: Any) -> list[float]:
    """Dense operations a second at the highest clock: of each rate that cards of this capability may have.

    Raises:
        ValueError: if nothing is known of the capability.
    """
    name = capability(properties)
    if name not in ARCHITECTURES:
        raise ValueError(f"compute capability {name}: expected one of {', '.join(ARCHITECTURES)} (benchmarks/cards.py)")
    clocks = properties.multi_processor_count * properties.clock_rate * 1e3
    return [clocks * operations for operations in ARCHITECTURES[name].operations]


def card_of(properties: Any, reached: float | None = None) -> Card:
    """Card of a device.

    Args:
        properties: those that ``Properties`` names, 0 where the driver does not say them.
        reached: operations a second of a large product on it. If its capability has several rates, the lowest one is
            the card's whose peak is not below by more than a boost of the clock. None, without a measurement: the
            lowest one.

    Raises:
        ValueError: if nothing is known of the capability, or a clock or the width of the memory is not said, or a
            product reaches less than half of what is expected: some cards have slower tensor cores than others of
            their capability, such as an H20.
    """
    possible = peaks(properties)
    for name in ("clock_rate", "memory_clock_rate", "memory_bus_width"):
        if not getattr(properties, name, 0):
            raise ValueError(f"{name}: expected a number above 0 in the device's properties")
    architecture = ARCHITECTURES[capability(properties)]
    # a GeForce card boosts beyond the clock that it says
    peak = next((peak for peak in possible if (reached or 0.0) <= 1.25 * peak), possible[-1])
    operations = architecture.reached * peak
    if reached is not None and reached < operations / 2:
        raise ValueError(f"a product of torch reaches {reached / 1e12:.0f} of {operations / 1e12:.0f} Tflop/s")
    clock = properties.clock_rate * 1e3
    return Card(
        target=TARGET_OF[f"sm_{properties.major}{properties.minor}"],
        processors=properties.multi_processor_count,
        clock=clock,
        # two transfers a clock
        bandwidth=2 * properties.memory_clock_rate * 1e3 * properties.memory_bus_width / 8,
        operations=operations,
        l2=architecture.l2 * properties.multi_processor_count * clock,
        torch_sparse=properties.major == 8,
        warp=architecture.warp,
        fp32=architecture.fp32,
        shared=architecture.shared,
        warps=architecture.warps,
    )


# Properties of well-known cards, for the tables of the documents: A100 80 GB, H100 and H200 are SXM cards
KNOWN = {
    "A100": Properties(8, 0, 108, 1_410_000, 1_593_000, 5120),
    "RTX 4090": Properties(8, 9, 128, 2_520_000, 10_501_000, 384),
    "RTX 5090": Properties(12, 0, 170, 2_407_000, 14_001_000, 512),
    "H100": Properties(9, 0, 132, 1_980_000, 2_619_000, 5120),
    "H200": Properties(9, 0, 132, 1_980_000, 3_201_000, 6144),
    "B200": Properties(10, 0, 148, 1_965_000, 3_996_000, 8192),
}
CARDS = {name: card_of(properties) for name, properties in KNOWN.items()}
