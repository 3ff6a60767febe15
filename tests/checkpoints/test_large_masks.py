"""A mask file of a model of 7 billion parameters, written and applied a tensor at a time."""

from __future__ import annotations

import json

import pytest
from helpers.children import Child

SHAPES = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (4096, 4096),
    "self_attn.v_proj": (4096, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (11008, 4096),
    "mlp.up_proj": (11008, 4096),
    "mlp.down_proj": (4096, 11008),
}
MOST = 2e9

CODE = """
import json, struct
from pathlib import Path
import torch
from safetensors import safe_open
from maskpro_kernels import NMPattern, expand_mask
from maskpro_kernels.checkpoints.mask_file import MaskFile, save_masks
from maskpro_kernels.checkpoints.masked_copy import can_be_copied, copy_masked
from maskpro_kernels.checkpoints.subset_ranks import codes_of_ranks

folder, shapes, blocks = Path(arguments[0]), json.loads(arguments[1]), arguments[2]
pattern = NMPattern("2:4")
names = {f"model.layers.{block}.{name}": shape for block in range(blocks) for name, shape in shapes.items()}


def weight_of(index, shape):
    # zeros are what a file holds that nothing was written to
    return torch.full(shape, float(index == LAST), dtype=torch.bfloat16)


def peak():
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


before = peak()


def codes_of(index, shape):
    generator = torch.Generator().manual_seed(index)
    return codes_of_ranks(torch.randint(0, 6, (shape[0], shape[1] // 4), generator=generator), pattern)


LAST = len(names) - 1
layers = ((name, codes_of(index, shape), weight_of(index, shape)) for index, (name, shape) in enumerate(names.items()))
save_masks(folder / "mask", layers, pattern, model="7B").close()
tell([before, (folder / "mask").stat().st_size, peak()])
header, end = {}, 0
for name, (rows, k) in names.items():
    header[name + ".weight"] = {"dtype": "BF16", "shape": [rows, k], "data_offsets": [end, end + 2 * rows * k]}
    end += 2 * rows * k
text = json.dumps(header).encode()
(folder / "base").mkdir()
with open(folder / "base" / "model.safetensors", "wb") as file:
    file.write(struct.pack("<Q", len(text)) + text)
    file.truncate(file.tell() + end)
    last = list(names.values())[-1]
    file.seek(end - 2 * last[0] * last[1], 1)
    file.write(weight_of(LAST, last).view(torch.uint8).numpy().tobytes())
mask = MaskFile(folder / "mask")
assert can_be_copied(mask, folder / "base")
(folder / "out").mkdir()
copy_masked(mask, folder / "base", folder / "out")
tell(["applied", (folder / "out" / "model.safetensors").stat().st_size, peak()])
name = list(names)[-1]
codes = codes_of(LAST, last)
assert torch.equal(mask.codes(name), codes)
with safe_open(folder / "out" / "model.safetensors", framework="pt") as file:
    assert torch.equal(file.get_tensor(name + ".weight"), expand_mask(codes, pattern).to(torch.bfloat16))
    assert not file.get_tensor(list(names)[0] + ".weight").any()
"""


@pytest.mark.parametrize("blocks", [1, pytest.param(32, marks=pytest.mark.slow)])
def test_a_large_mask_takes_little_memory(tmp_path, blocks):
    shapes = SHAPES if blocks > 1 else {name: (rows // 16, k // 4) for name, (rows, k) in SHAPES.items()}
    with Child() as child:
        (before, size, written), (_, copied, applied) = child(CODE, str(tmp_path), json.dumps(shapes), blocks)
    weights = blocks * sum(rows * k for rows, k in shapes.values())
    print(f"{weights / 1e9:.2f}e9 weights: mask of {size / 1e6:.1f} MB, at most {written / 1e9:.2f} GB to write it, "
          f"{applied / 1e9:.2f} GB to apply it")  # fmt: skip
    # 8/3 bits a group
    assert weights / 12 <= size <= weights / 12 + 1e5
    assert copied >= 2 * weights
    assert max(written, applied) < MOST
    assert blocks > 1 or max(written, applied) < before + 100e6
