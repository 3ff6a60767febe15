"""A dense model in three bits, by GPTQ without a mask: the peer of packed 2:4 with int4 values.

    maskpro learn --model smollm2-135m --output runs/mine --batch-size 8 --refit weights --train-weights 1e-4
    maskpro export runs/mine int4-checkpoint --to packed --values int4 --dtype bfloat16
    python benchmarks/learning/dense_gptq.py runs/mine dense-3-bits
    maskpro eval runs/mine int4-checkpoint dense-3-bits --data stdlib,pydoc

Values are 0 to 7 scales above a lower end. Each 64 of a row have their own scale and end in bfloat16, of 20 such pairs
the one with the least squared error. This makes 3.5 bits a weight, 3.25 with ``--group 128``; the export has 3.13.
Layers are rounded in turn, by the inputs of the rounded model on the windows that the export takes. The export then
fits scales and integers once more, and its weights have learned under the mask; the dense weights have done neither.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from maskpro_kernels.cli.export import calibration_of
from maskpro_kernels.cli.inputs import SETTINGS, read_json
from maskpro_kernels.hf import load_model
from maskpro_kernels.prune.calibration import calls_of, layer_by_layer
from maskpro_kernels.prune.selection import layers_to_convert
from maskpro_kernels.prune.sparsegpt import WeightsOfBlock, column_by_column, inverse_factor

LARGEST = 7
CLIPS = [1 - 0.03 * i for i in range(20)]


def nearest(w: Tensor, scale: Tensor, low: Tensor) -> Tensor:
    return ((w - low) / scale).round().clamp(0, LARGEST) * scale + low


def range_of(w: Tensor) -> tuple[Tensor, Tensor]:
    """(scale, lower end), each [rows, 1] in numbers of bfloat16, of columns w [rows, group]."""
    low = w.amin(1, keepdim=True)
    high = w.amax(1, keepdim=True)
    tried = [
        (((high - low) * clip / LARGEST).clamp(min=1e-8).bfloat16().float(), (low * clip).bfloat16().float())
        for clip in CLIPS
    ]
    errors = torch.stack([(nearest(w, *pair) - w).square().sum(1, keepdim=True) for pair in tried])
    best = errors.argmin(0, keepdim=True)
    return tuple(torch.stack(candidates).gather(0, best)[0] for candidates in zip(*tried, strict=True))


@torch.no_grad()
def round_model(model: torch.nn.Module, calibration, group: int) -> None:
    """Round the layers that a mask would get."""
    layers, _ = layers_to_convert(model, "2:4")
    masks = WeightsOfBlock(layers, {}, {})
    rounded = {}

    def visit(names, moments):
        upper = inverse_factor(moments.gram)
        for name in names:
            pair = None

            def choose(i: int, w: Tensor) -> Tensor:
                nonlocal pair
                if i % group == 0:
                    pair = range_of(w[:, i : i + group])
                return nearest(w[:, i : i + 1], *pair)[:, 0]

            weight = layers[name].weight
            rounded[name] = masks.weights[name] = column_by_column(weight.float().clone(), upper, choose)
            yield

    layer_by_layer(model, layers, calls_of(calibration), masks, visit, "stay as they are", None)
    for name, weight in rounded.items():
        layers[name].weight.copy_(weight)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run of `maskpro learn`")
    parser.add_argument("output", help="folder to write")
    # each divides the columns that ``column_by_column`` updates together
    parser.add_argument("--group", type=int, choices=(16, 32, 64, 128), default=64, help="values with one scale")
    options = parser.parse_args()
    model, tokenizer = load_model(read_json(options.run / SETTINGS)["options"]["model"], torch.float32)
    round_model(model, calibration_of(options.run, model, tokenizer), options.group)
    model.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)


if __name__ == "__main__":
    main()
