"""What the data sheets of NVIDIA's cards promise, by architecture. Nothing here is measured."""

from __future__ import annotations

from dataclasses import dataclass

# Of the matrix units' rate by the data sheet, what a large product of the GPU's library reaches: an assumption
LIBRARY_SHARE = 0.7


@dataclass(frozen=True)
class DataSheet:
    """Rates of one GPU.

    Attributes:
        name: of the card.
        bytes_per_second: of its memory.
        flops_16_bit: dense, of matrix units.
        link_bytes_per_second: of NVLink, in one direction: half of what the sheet adds up.
        host_bytes_per_second: of PCIe, in one direction.
    """

    name: str
    bytes_per_second: float
    flops_16_bit: float
    link_bytes_per_second: float
    host_bytes_per_second: float


SHEETS = {
    "sm_80": DataSheet("A100 SXM 80 GB", 2.039e12, 312e12, 300e9, 32e9),
    "sm_90": DataSheet("H100 SXM", 3.35e12, 989e12, 450e9, 64e9),
    # PCIe of generation 5, which its hosts have
    "sm_100": DataSheet("B200", 8.0e12, 2250e12, 900e9, 64e9),
}
