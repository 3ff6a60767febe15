"""What bounds a kernel on one GPU, by architecture. Each figure names its source.

Guide: NVIDIA's CUDA C++ Programming Guide, the tables of compute capabilities and of the throughput of arithmetic
instructions. Pipes: which instructions share one is told by engineers of NVIDIA's in its forum for developers, threads
108729 (an integer multiplication goes where FP32 goes, other integers, comparisons and selections elsewhere) and 302018
(GA100 has one FP32 pipe, GH100 two, of which one multiplies integers too), and in the guide of Nsight Compute.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from maskpro_kernels.ops.data_sheets import SHEETS, DataSheet
from maskpro_kernels.ops.triton.tiles import PROCESSORS


@dataclass(frozen=True, kw_only=True)
class Chip(DataSheet):
    """Rates of one GPU, beside those of its data sheet. Lanes are threads whose instruction a processor starts in a
    clock.

    Attributes:
        clock: Hz, at which it multiplies matrices at the rate of its data sheet, or a lower one that it holds.
        l2_bytes_per_second: that its processors read from the L2 cache.
        shared_bytes: of shared memory a processor; a block takes 1 KiB more than it asks for. Guide.
        lanes: by pipe, see ``sass.PIPES``. "fp32" takes integer multiplications as well.
        registers, warps, blocks: that are resident on a processor. Guide; the same for all three.
        issue: lanes of all pipes together: four schedulers, one warp a clock each. Guide.
    """

    clock: float
    l2_bytes_per_second: float
    shared_bytes: int
    lanes: dict[str, int]
    registers: int = 65536
    warps: int = 64
    blocks: int = 32
    issue: int = 128

    def resident(self, registers: int, shared: int, num_warps: int) -> int:
        """Programs that a processor holds at a time."""
        # registers go to warps in units of 256
        registers_a_warp = -(-max(registers, 1) * 32 // 256) * 256
        by_registers = self.registers // (registers_a_warp * num_warps)
        by_shared = self.shared_bytes // (shared + 1024)
        return min(by_registers, by_shared, self.blocks, self.warps // num_warps)


# Guide, of compute capability 8.0: FP32 at half the rate of 9.0. Conversions of integers and floats go to "xu" there,
# on 9.0 and 10.0 to the pipe of integers, as their instructions I2F and I2FP tell.
_LANES = {"fp32": 64, "multiply": 64, "half": 64, "fp64": 32, "xu": 16, "lsu": 32}
# Of 9.0. The guide lists 10.0 with the same figures
_LANES_90 = _LANES | {"fp32": 128, "fp64": 64}

RATES = {
    # Second cache: A100's white paper, 5,120 bytes a clock
    "sm_80": {"clock": 1.41e9, "l2_bytes_per_second": 5120 * 1.41e9, "shared_bytes": 164 << 10, "lanes": _LANES},
    # The clock is that of the PCIe card: an SXM one boosts to 1.83 GHz, and falls below under load. Second cache: no
    # figure of NVIDIA's; 5.5 to 5.7 TB/s are measured (Chips and Cheese, "Nvidia's H100", 2023)
    "sm_90": {"clock": 1.755e9, "l2_bytes_per_second": 5.5e12, "shared_bytes": 228 << 10, "lanes": _LANES_90},
    # Second cache: no figure is known, so that of the H100 by processor and clock
    "sm_100": {
        "clock": 1.85e9,
        "l2_bytes_per_second": 5.5e12 * (148 * 1.85) / (132 * 1.755),
        "shared_bytes": 228 << 10,
        "lanes": _LANES_90,
    },
}
CHIPS = {target: Chip(**asdict(SHEETS[target]), **rates) for target, rates in RATES.items()}


def seconds_by_pipe(target: str, counts: dict[str, float]) -> dict[str, float]:
    """Seconds by pipe, and by "issue", of instructions of all threads, spread over all processors."""
    chip = CHIPS[target]
    clocks = {pipe: counts.get(pipe, 0) / lanes for pipe, lanes in chip.lanes.items()}
    clocks["fp32"] = (counts.get("fp32", 0) + counts.get("multiply", 0)) / chip.lanes["fp32"]
    clocks["issue"] = counts.get("issue", 0) / chip.issue
    return {pipe: each / (PROCESSORS[target] * chip.clock) for pipe, each in clocks.items()}
