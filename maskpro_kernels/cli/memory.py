"""What memory a command will need, told before it starts, and what a run of `maskpro learn` has used at its end."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import safe_open

from ..pruning.selection import layers_to_convert
from ..safetensors_files import weight_files
from ..text.losses import distillation_loss
from ..text.perplexity import EVALUATED_TOGETHER, causal_lm_loss
from ..text.teacher import bytes_a_token
from ..training.estimator import Estimator
from ..training.memory import MemoryNeed, activation_bytes, memory_need
from .arguments import DTYPES
from .changed_weights import changes_weights
from .models import device_of_inputs
from .progress import tell, tell_as
from .run_files import LOGITS

GB = 1e9
# Of safetensors files: what is cast to the dtype that a model is loaded in
FLOATS = ("F64", "F32", "F16", "BF16")


def needed_memory(args: argparse.Namespace, estimator: Estimator, world: int, model: torch.nn.Module) -> MemoryNeed:
    """What the steps and evaluations of a run take in a process.

    Args:
        args: the settings, complete.
        estimator: of the run.
        world: how many ranks there are.
        model: not converted yet.
    """
    layers, _ = layers_to_convert(model, args.pattern)
    device = device_of_inputs(model)

    def windows(length: int):
        return lambda rows: torch.zeros(rows, length, dtype=torch.int64, device=device)

    # with a teacher that is asked, and not written down
    loss_fn = distillation_loss(args.loss, getattr(args, "loss_temperature", 1.0))
    rows, gradients = args.batch_size, estimator.needs_gradients
    of_step = activation_bytes(model, layers, loss_fn, windows(args.seq_len), rows, gradients)
    evaluated = min(args.eval_windows, EVALUATED_TOGETHER)
    of_evaluation = activation_bytes(model, layers, causal_lm_loss, windows(args.eval_length), evaluated, False)
    teacher = 0
    if args.loss != "ce":
        vocabulary = model.get_input_embeddings().num_embeddings
        of_logits = rows * args.seq_len * vocabulary * DTYPES[args.dtype].itemsize
        of_step = max(of_step - of_logits, 0)
        teacher = rows * args.seq_len * bytes_a_token() if changes_weights(args) else of_logits
    return memory_need(
        model,
        layers,
        estimator,
        pattern=args.pattern,
        logits_dtype=DTYPES[args.logits_dtype],
        alone=args.accumulate == world == 1,
        activations=max(of_step, of_evaluation),
        teacher=teacher,
    )


def tell_need(args: argparse.Namespace, model: torch.nn.Module, need: MemoryNeed) -> None:
    """Tell what memory will be needed, with a warning where the devices of the weights have less."""
    parts = ", ".join(f"{name} {size / GB:.2f}" for name, size in asdict(need).items())
    tell(f"memory that a step needs, estimated: {need.total / GB:.2f} GB ({parts})")
    devices = {parameter.device for parameter in model.parameters()}
    there = sum(filter(None, map(_total, devices)))
    # they may live with the weights none the less
    elsewhere = hasattr(args, "logits_device") and torch.device(args.logits_device) not in devices
    on_devices = need.total - (need.logits if elsewhere else 0)
    if on_devices > there > 0:
        names = ", ".join(sorted(map(str, devices)))
        tell_as(
            "warning",
            f"{names} {'have' if len(devices) > 1 else 'has'} {there / GB:.2f} GB of memory, and about "
            f"{on_devices / GB:.2f} GB are needed; take a smaller --batch-size or --seq-len, --gradient-checkpointing, "
            "--logits-dtype bfloat16, --logits-device or --device-map",
        )


def _total(device: torch.device) -> int:
    """Bytes of memory of a device; 0 where that is not known."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    with suppress(ValueError, OSError, AttributeError):
        if device.type == "cpu":
            return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 0


def check_fit(names: Sequence[str], dtype: torch.dtype, device: torch.device) -> None:
    """Tell what the weights of models take that are to be in memory together, as far as they lie in folders here.

    Raises:
        ValueError: if the device has less that is free.
    """
    need, free = sum(_bytes_in(Path(name), dtype) for name in names), _free(device)
    if need > free > 0:
        raise ValueError(
            f"models: expected models that fit into memory together, got {need / GB:.2f} GB of weights where {device} "
            f"has {free / GB:.2f} GB free; give fewer at once, or a smaller --dtype"
        )
    if need:
        room = f"; {device} has {free / GB:.2f} GB free" if free else ""
        tell(f"weights in the folders, in memory together: {need / GB:.2f} GB{room}")


def _bytes_in(folder: Path, dtype: torch.dtype) -> int:
    """What the weights of a checkpoint take once they are loaded; 0 where that is told by no safetensors file here."""
    try:
        files = weight_files(folder)
    except ValueError:
        return 0
    total = 0
    # in the folder of a run the logits stand beside the checkpoint
    for file in [file for file in files if file.name != LOGITS] or files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():
                stored = opened.get_slice(name)
                size = dtype.itemsize if stored.get_dtype() in FLOATS else 1
                total += size * torch.Size(stored.get_shape()).numel()
    return total


def _free(device: torch.device) -> int:
    """Bytes of memory of a device that are free; 0 where that is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with suppress(OSError, StopIteration):
        if device.type == "cpu":
            lines = Path("/proc/meminfo").read_text().splitlines()
            # with what the system would give up for it
            return 1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1])
    return _total(device)


def used_memory() -> dict[str, int]:
    """The most bytes that this process has held: ``process``, what was resident in main memory, and by GPU."""
    used = {}
    # there is none on Windows
    with suppress(ImportError):
        import resource

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        used["process"] = most if sys.platform == "darwin" else 1024 * most
    if torch.cuda.is_available():
        used |= {f"cuda:{index}": torch.cuda.max_memory_allocated(index) for index in range(torch.cuda.device_count())}
    return used
