"""What a mask costs a step: drawn at each use, and drawn once into codes; what ``ops/mask_costs.py`` should hold.

Of GPUs by the model of ``cost_model``, on a layer of LLaMA-2-7B at 2:4 and a gap of 10, with float32 logits and weights
of 16 bits. Of this CPU measured, on layers of SmolLM2-135M: seconds that the process has had a processor for, the least
of some rounds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import nn

from maskpro_kernels import MaskedLinear, ModelMasks
from maskpro_kernels.modules import CounterState
from maskpro_kernels.ops.mask_costs import COSTS, Costs
from maskpro_kernels.ops.triton.tiles import INTERPRETED

GAP, ROUNDS = 10.0, 10
SHAPES = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)]


def modelled(target: str) -> Costs:
    """The costs on an NVIDIA GPU."""
    # here, for without Triton's interpreter it compiles
    from aot import build, build_product
    from chips import CHIPS, seconds_by_pipe
    from cost_model import busiest, each, expected, weights_a_thread
    from sass import disassembled, instructions

    from maskpro_kernels.ops.triton.tiles import CONFIGURATIONS, tiles_for

    def picoseconds(built, weights: float, groups: int, moved: float, looping: bool = True) -> float:
        fewest, most = (each(x, weights) for x in instructions(disassembled(built.asm["cubin"]), looping))
        pipes = seconds_by_pipe(target, expected(fewest, most, groups, GAP, 2, 4))
        return 1e12 * max(busiest(pipes)[0], moved / CHIPS[target].bytes_per_second)

    def over_groups(kernel: str, moved: float, **how) -> float:
        config = CONFIGURATIONS[kernel, target, 4]
        weights = weights_a_thread(config.block, 4, config.num_warps)
        return picoseconds(build(kernel, target, 2, 4, **how), weights, config.block, moved)

    tile = tiles_for("masked_linear", 4, torch.bfloat16, 16, 4096, 4096, target)

    def product(kind: str, moved: float) -> float:
        built = build_product("masked_linear", target, 2, 4, tile, KIND=kind)
        return picoseconds(built, tile.out * tile.k / (32 * tile.num_warps), tile.out * tile.k // 4, moved)

    # bytes: logits 4, weights 2, codes 1/4
    draw = over_groups("sample_masks", 4.25)
    return Costs(
        draw=draw,
        one_pass=(product("drawn", 6), product("codes", 2.25)),
        weight=(over_groups("masked_weight", 8), over_groups("masked_weight", 4.25, KIND="codes")),
        # in the epilogue of a product: what a draw takes of the pipes, and what codes take of memory
        slope=(draw, 1e12 * 0.25 / CHIPS[target].bytes_per_second),
        update=(over_groups("score_update_of_layers", 8), over_groups("score_update_of_layers", 8.25, KIND="codes")),
    )


def measured() -> Costs:
    """The costs on this CPU, one thread."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    state, layers = CounterState(7), []
    for i, (rows, k) in enumerate(SHAPES * 4):
        linear = nn.Linear(k, rows, bias=False, dtype=torch.bfloat16)
        layers.append(MaskedLinear.from_linear(linear, "2:4", gap=GAP, layer=i, counter_state=state))
    masks = ModelMasks(nn.ModuleList(layers).train())
    weights = sum(layer.weight.numel() for layer in layers)

    def least(action: Callable[[], object]) -> float:
        times = []
        for _ in range(ROUNDS + 1):
            start = time.process_time()
            action()
            times.append(time.process_time() - start)
        return 1e12 * min(times[1:]) / weights

    def draw() -> None:
        with masks.drawn(0):
            pass

    def update(draw: int) -> None:
        masks.score_update_((1e-6,), draw=(draw,))

    def masked() -> None:
        for layer in layers:
            layer.masked_weight()

    with torch.inference_mode():
        drawn = least(draw)
        by_draw = least(masked), least(lambda: update(1))
        with masks.drawn():
            weight = least(masked)
        # each update is of a new draw
        updated = least(lambda: (draw(), update(0))) - drawn
    return Costs(drawn, (by_draw[0], weight), (by_draw[0], weight), (drawn, 0.0), (by_draw[1], updated))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    rows = [row for row in COSTS if not row.startswith("gfx")]
    parser.add_argument("--rows", nargs="+", choices=rows, default=rows)
    rows = parser.parse_args().rows
    if INTERPRETED:
        parser.error("TRITON_INTERPRET: expected to be unset, for what is interpreted is not compiled")
    for row in rows:
        found = measured() if row == "cpu" else modelled(row)
        rounded = {
            name: tuple(round(x, 1) for x in cost) if isinstance(cost, tuple) else round(cost, 1)
            for name, cost in found._asdict().items()
        }
        told = ", ".join(f"{name}={cost}" for name, cost in rounded.items())
        print(f'"{row}": Costs({told}),', flush=True)


if __name__ == "__main__":
    main()
