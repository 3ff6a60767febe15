"""What the kernels cost on GPUs, read from their compiled code on a machine without one.

A model, which ``cost_model`` explains: nothing in it is measured.

For each kernel and launch configuration: registers a thread, bytes spilled, shared memory, programs that a processor
holds, and for a block whose draws are determined by its logits alone and for one that computes noise, issue slots and
picoseconds a weight; of the first also the slots of the half-rate pipe, and the pipe that bounds it. Then what the
log-probability adds to a forward. Then, for the layers of LLaMA-2-7B, times of the kernels over groups by gap, of the
forward product and of a straight-through step; and for those of LLaMA-2-7B and 70B, of products with packed weights,
beside the dense layer's. NVIDIA targets only.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import triton
from aot import Built
from chips import CHIPS, seconds_by_pipe
from cost_model import (
    HEADINGS,
    busiest,
    dense_seconds,
    drawn_before_seconds,
    fused_launch,
    group_kernel,
    group_launch,
    library_seconds,
    packed_kernel,
    packed_launch,
    product_kernel,
    product_launch,
    step_launch,
    straight_through_launches,
)

from maskpro_kernels.ops.reference import EXACT_SCORE_MAX_N
from maskpro_kernels.ops.triton.packed import MULTIPLIED
from maskpro_kernels.ops.triton.tiles import (
    CONFIGURATIONS,
    DRAWN_TOKENS,
    INTERPRETED,
    PACKED_TILES,
    ROWS,
    TILES,
    Tiles,
    tiles_of,
)
from maskpro_kernels.pattern import NMPattern

PATTERNS = [(1, 4), (2, 4), (4, 8), (8, 16)]
# Kernels over groups, the dtypes of their logits, and the kinds of masks
GROUP_KERNELS = [
    ("sample_mask", "fp32", "drawn"),
    ("sample_masks", "fp32", "drawn"),
    ("masked_weight", "fp32", "drawn"),
    *(
        (kernel, logits, "drawn")
        for kernel in ("score_update", "score_update_of_layers")
        for logits in ("fp32", "bf16")
    ),
    ("score_update_of_layers", "fp32", "codes"),
]
SHAPES = [(4096, 4096), (11008, 4096), (4096, 11008)]
TOKENS = [1, 16, 128, 1024, 4096]
# About where one way gets faster than the other
WAYS_TOKENS = [16, 32, 64, 128, 256, 512, 1024]
# Of the linear layers of LLaMA-2-7B: how many have which shape
LAYERS = {(4096, 4096): 4 * 32, (11008, 4096): 2 * 32, (4096, 11008): 32}
# The keys and values of grouped queries
FEW_ROWS = (1024, 4096)
# Of LLaMA-2-7B and 70B
SERVED_SHAPES = [*SHAPES, (8192, 8192), (28672, 8192), (8192, 28672)]
SERVED_TOKENS = [1, 2, 16, 32, 64]
# The costs as of the last commit that changed them on purpose, by release of Triton
TABLE = Path(__file__).with_name("aot_table.json")
KEY = ("kernel", "pattern", "target")
TOLERANCE = 0.05
# Of logits: that of the paper, and about that of a flip rate of 1e-3 at 2:4
GAPS = [10.0, 8.0]


@dataclass(frozen=True)
class Cost:
    """What one entry of the launch tables costs on one target.

    Attributes:
        kernel: its name, with the tile and the warps where it has one.
        pattern, target: such as "2:4" and "sm_90".
        registers: a thread's.
        stack: bytes spilled and of stack, a thread's.
        shared: bytes of shared memory a block.
        resident: programs that a processor holds at a time.
        determined, drawn: issue slots a weight of a block whose draws are determined by its logits alone, and of one
            that computes noise; by codes, of one that keeps its largest logits, and of another.
        half: those of the half-rate pipe where draws are determined: comparisons, selections and integers.
        determined_ps, drawn_ps: picoseconds a weight by the busiest pipe.
        pipe: which one that is where draws are determined.
    """

    kernel: str
    pattern: str
    target: str
    registers: int
    stack: int
    shared: int
    resident: int
    determined: float
    drawn: float
    half: float
    determined_ps: float
    drawn_ps: float
    pipe: str

    @classmethod
    def of(cls, kernel: str, pattern: str, target: str, num_warps: int, built: Built, fewest: dict, most: dict):
        resident = CHIPS[target].resident(built.registers, built.shared, num_warps)
        (short, pipe), (long, _) = (busiest(seconds_by_pipe(target, counts)) for counts in (fewest, most))
        slots = fewest["issue"], most["issue"], fewest.get("half", 0.0)
        figures = (round(x, 3) for x in (*slots, 1e12 * short, 1e12 * long))
        stack = built.spills + built.stack
        return cls(kernel, pattern, target, built.registers, stack, built.shared, resident, *figures, pipe)

    @property
    def key(self) -> str:
        return f"{self.kernel}, {self.pattern}, {self.target}"

    def worse_than(self, before: dict) -> list[str]:
        """The figures that are worse than those ``before`` by more than TOLERANCE."""
        names = ("registers", "stack", "shared", "determined", "drawn", "half", "determined_ps", "drawn_ps")
        worse = [name for name in names if getattr(self, name) > (1 + TOLERANCE) * before[name]]
        return worse + ["resident"] * (self.resident < (1 - TOLERANCE) * before["resident"])


def named(kernel: str, logits: str, kind: str) -> str:
    return kernel + (" by codes" if kind == "codes" else "") + (f" of {logits}" if logits != "fp32" else "")


def size_of(product: str, tile: Tiles, m: int) -> str:
    return f"{product} {tile.out}x{tile.tokens}x{max(tile.k, m)}, {tile.num_warps} warps"


def group_kernels(n: int) -> list[tuple[str, str, str]]:
    """Of ``GROUP_KERNELS`` those for N of a group: above some N the score takes the noise, which codes do not tell."""
    return [of for of in GROUP_KERNELS if of[2] != "codes" or n <= EXACT_SCORE_MAX_N]


def group_costs(target: str, n: int, m: int) -> Iterator[Cost]:
    for kernel, *of in group_kernels(n):
        warps = CONFIGURATIONS[kernel, target, m].num_warps
        built = group_kernel(kernel, target, n, m, *of)
        yield Cost.of(named(kernel, *of), f"{n}:{m}", target, warps, *built)


def product_costs(target: str, n: int, m: int, ends: bool = False) -> Iterator[Cost]:
    """Of all tiles for operands of 16 bits, or of the first and the last of each product.

    Under drawn masks; those of a straight-through step also by codes, as in a step that draws its masks once.
    """
    for product, where, itemsize in TILES:
        if where != target or itemsize != 2:
            continue
        tiles = tiles_of(product, target, itemsize, m)
        for tile in dict.fromkeys((tiles[0], tiles[-1])) if ends else tiles:
            for kind in ("drawn", "codes") if product.startswith("straight_through") else ("drawn",):
                name = size_of(named(product, "fp32", kind), tile, m)
                built = product_kernel(product, target, n, m, tile, kind)
                yield Cost.of(name, f"{n}:{m}", target, tile.num_warps, *built)


def packed_costs(target: str, n: int, m: int) -> Iterator[Cost]:
    if (n, m) not in MULTIPLIED:
        return
    for config in ROWS["packed_vector", target]:
        name = f"packed_vector {config.rows}x{config.block}, {config.num_warps} warps"
        built = packed_kernel("packed_vector", target, n, m, config)
        yield Cost.of(name, f"{n}:{m}", target, config.num_warps, *built)
    for tile in PACKED_TILES["packed_linear", target, 2]:
        built = packed_kernel("packed_linear", target, n, m, tile)
        yield Cost.of(size_of("packed_linear", tile, m), f"{n}:{m}", target, tile.num_warps, *built)


def kept_costs() -> Iterator[Cost]:
    """What TABLE holds."""
    for target in CHIPS:
        yield from packed_costs(target, 2, 4)
        for n, m in PATTERNS:
            yield from group_costs(target, n, m)
        yield from product_costs(target, 2, 4)


def triton_release() -> str:
    """Costs are those of one release of the compiler: major and minor version."""
    return ".".join(triton.__version__.split(".")[:2])


def write_table() -> None:
    """Put the costs into TABLE, beside those of other releases of Triton."""
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    table[triton_release()] = {
        cost.key: {name: value for name, value in asdict(cost).items() if name not in KEY} for cost in kept_costs()
    }
    TABLE.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")


def report(targets: list[str], patterns: list[tuple[int, int]]) -> None:
    print(f"{'kernel':<47} {'N:M':>5} {'target':>6} {'regs':>5} {'spills':>6} {'KiB':>6} {'held':>5} ", end="")
    print(f"{'determined':>10} {'half':>5} {'drawn':>8}  {'ps':>6} {'drawn':>6}   (issue slots and ps a weight)")
    for target in targets:
        for n, m in patterns:
            costs = (group_costs(target, n, m), product_costs(target, n, m), packed_costs(target, n, m))
            for cost in itertools.chain(*costs):
                print(
                    f"{cost.kernel:<47} {cost.pattern:>5} {target:>6} {cost.registers:>5} {cost.stack:>6} "
                    f"{cost.shared / 1024:>6.1f} {cost.resident:>5} {cost.determined:>10.1f} "
                    f"{cost.half:>5.1f} {cost.drawn:>8.1f}  "
                    f"{cost.determined_ps:>6.2f} {cost.drawn_ps:>6.2f}   {cost.pipe}",
                    flush=True,
                )
    report_log_prob(targets, patterns)
    report_groups(targets, patterns)
    report_products(targets, patterns)
    report_packed(targets, patterns)
    report_straight_through(targets, patterns)
    report_ways(targets, patterns)


def report_log_prob(targets: list[str], patterns: list[tuple[int, int]]) -> None:
    """What a forward's tiles take without and with the log-probability of the draw, in blocks that compute noise."""
    columns = f"{'regs':>5} {'with':>5} {'slots':>6} {'with':>6} {'more':>6}"
    print(f"\n{'log-probability':<47} {'N:M':>5} {'target':>6} {columns}")
    exact = [(n, m) for n, m in patterns if n <= EXACT_SCORE_MAX_N]
    for target, (n, m) in itertools.product(targets, exact):
        for tile in tiles_of("masked_linear", target, 2, m):
            ways = [product_kernel("masked_linear", target, n, m, tile, "drawn", asked) for asked in (False, True)]
            registers = " ".join(f"{built.registers:>5}" for built, *_ in ways)
            slots = [most["issue"] for *_, most in ways]
            told = f"{registers} {slots[0]:>6.1f} {slots[1]:>6.1f} {slots[1] - slots[0]:>6.1f}"
            print(f"{size_of('masked_linear', tile, m):<47} {f'{n}:{m}':>5} {target:>6} {told}")


def report_groups(targets: list[str], patterns: list[tuple[int, int]]) -> None:
    """Kernels over groups, on a layer of LLaMA-2-7B."""
    print(f"\n{'ps a weight':<33} {'N:M':>5} {'on':>16} {'gap':>6} {HEADINGS}")
    rows, k = SHAPES[0]
    for target, (n, m) in itertools.product(targets, patterns):
        for (kernel, *of), gap in itertools.product(group_kernels(n), GAPS):
            line = group_launch(kernel, target, n, m, gap, rows, k, *of).line(1e12 / (rows * k))
            print(f"{named(kernel, *of):<33} {f'{n}:{m}':>5} {CHIPS[target].name:>16} {gap:>6} {line}")


def report_products(targets: list[str], patterns: list[tuple[int, int]]) -> None:
    """Forward products of 16-bit operands with float32 logits; of many tokens with a masked weight drawn before."""
    print(f"\n{'us, forward of':<20} {'N:M':>5} {'on':>16} {'tokens':>6} {HEADINGS}")
    for target, (n, m), (rows, k), tokens in itertools.product(targets, patterns, [*SHAPES, FEW_ROWS], TOKENS):
        if tokens <= DRAWN_TOKENS[target]:
            line = product_launch(target, n, m, GAPS[0], rows, k, tokens).line(1e6)
        else:
            line = f"{1e6 * drawn_before_seconds(target, n, m, GAPS[0], rows, k, tokens):>35.2f}  draw and product"
        print(f"{f'{rows}x{k}':<20} {f'{n}:{m}':>5} {CHIPS[target].name:>16} {tokens:>6} {line}")


def report_packed(targets: list[str], patterns: list[tuple[int, int]]) -> None:
    """Products with packed weights of 16 bits, and how much longer the dense layer takes."""
    print(f"\n{'us, packed':<20} {'N:M':>5} {'on':>16} {'tokens':>6} {HEADINGS}  dense")
    multiplied = [pattern for pattern in patterns if pattern in MULTIPLIED]
    for target, (n, m), (rows, k), tokens in itertools.product(targets, multiplied, SERVED_SHAPES, SERVED_TOKENS):
        launch = packed_launch(target, n, m, rows, k, tokens)
        line = f"{launch.line(1e6)}  {dense_seconds(target, rows, k, tokens) / launch.bound[0]:>4.2f}x"
        print(f"{f'{rows}x{k}':<20} {f'{n}:{m}':>5} {CHIPS[target].name:>16} {tokens:>6} {line}")


def report_straight_through(targets: list[str], patterns: list[tuple[int, int]]) -> None:
    """The step of float32 logits by a gradient of many tokens: the library's product, and the kernel behind it.

    By codes, as in the steps of a trainer, which draws its masks once.
    """
    print(f"\n{'us, straight-through':<20} {'N:M':>5} {'on':>16} {'tokens':>6} {'library':>8} {HEADINGS}")
    tokens = TOKENS[-1]
    for target, (n, m) in itertools.product(targets, patterns):
        products = whole = 0.0
        for (rows, k), count in LAYERS.items():
            library, step = straight_through_launches(target, n, m, GAPS[0], rows, k, tokens, "codes")
            products += count * library
            whole += count * (library + step.bound[0])
            times = f"{1e6 * library:>8.2f} {step.line(1e6)}"
            print(f"{f'{rows}x{k}':<20} {f'{n}:{m}':>5} {CHIPS[target].name:>16} {tokens:>6} {times}")
        print(f"all of LLaMA-2-7B, {n}:{m}, {CHIPS[target].name}: {1e3 * whole:.0f} ms", end=", ")
        print(f"of which the library's products take {1e3 * products:.0f} ms")


def report_ways(targets: list[str], patterns: list[tuple[int, int]]) -> None:
    """Microseconds by either way where there are two, which ``tiles.py`` chooses between by the number of tokens.

    Of a forward whose mask is drawn, and of a straight-through step by codes, and drawn in its kernel.
    """
    ways = "drawn inside, before", "fused, library's", "drawn: fused, library's"
    print(f"\n{'us by either way':<20} {'N:M':>5} {'on':>16} {'tokens':>6} {ways[0]:>21} {ways[1]:>19} {ways[2]:>25}")
    for target, (n, m), (rows, k), tokens in itertools.product(targets, patterns, [*SHAPES, FEW_ROWS], WAYS_TOKENS):
        of = target, n, m, GAPS[0], rows, k, tokens
        inside, before = product_launch(*of).bound[0], drawn_before_seconds(*of)
        times = f"{1e6 * inside:>10.1f} {1e6 * before:>10.1f}"
        for kind, width in (("codes", 9), ("drawn", 12)):
            fused = fused_launch(*of, kind).bound[0]
            behind = library_seconds(target, rows, k, tokens) + step_launch(*of, kind).bound[0]
            times += f" {1e6 * fused:>{width}.1f} {1e6 * behind:>{width}.1f}"
        print(f"{f'{rows}x{k}':<20} {f'{n}:{m}':>5} {CHIPS[target].name:>16} {tokens:>6} {times}")


def pattern_of(text: str) -> NMPattern:
    try:
        return NMPattern(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", choices=CHIPS, default=list(CHIPS))
    parser.add_argument("--patterns", nargs="+", type=pattern_of, default=[NMPattern("2:4")], metavar="N:M")
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name} instead, which the tests hold to")
    arguments = parser.parse_args()
    if INTERPRETED:
        parser.error("TRITON_INTERPRET: expected to be unset, for what is interpreted is not compiled")
    if arguments.write:
        write_table()
    else:
        report(arguments.targets, [(pattern.n, pattern.m) for pattern in arguments.patterns])
