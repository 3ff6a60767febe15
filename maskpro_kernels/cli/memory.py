"""What memory a command will need, told before it starts, and what a run of `maskpro learn` has used at its end."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from ..learn.amounts import NOTHING, Amount
from ..learn.estimator import Estimator
from ..learn.memory import Activations, MemoryNeed, activation_bytes, memory_need
from ..prune.selection import layers_to_convert
from ..safetensors_files import weight_files
from ..text.losses import distillation_loss
from ..text.perplexity import EVALUATED_TOGETHER, causal_lm_loss
from ..text.teacher import bytes_a_token
from .arguments import DTYPES, device_of
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
    return memory_need(
        model,
        layers,
        estimator,
        pattern=args.pattern,
        logits_dtype=DTYPES[args.logits_dtype],
        alone=args.accumulate == world == 1,
        logits_device=device_of(args.logits_device) if hasattr(args, "logits_device") else None,
        **needed_by_batches(args, estimator, model, [layer.weight for layer in layers.values()]).of(args.batch_size),
    )


@dataclass(frozen=True)
class OfBatches:
    """What the batches of a run take.

    Attributes:
        step: of a batch that a step learns from.
        evaluation: of one that is evaluated.
        teacher: by row, what the dense model says of it.
        beside: by row, what of that is in ``step`` as well.
    """

    step: Activations
    evaluation: Amount
    teacher: Amount
    beside: int

    def of(self, rows: int) -> dict[str, Amount]:
        """The activations of steps and evaluations, and the teacher's part, where batches have so many rows."""
        own, teacher = self.step.of(rows), rows * self.beside
        if own > teacher > 0:
            own = Amount(own - teacher, f"{own.formula} - {teacher:,} bytes of the teacher")
        told = Amount(rows * self.teacher, f"{rows:,} rows x {self.teacher.formula}") if self.teacher else NOTHING
        return {"activations": max(own, self.evaluation), "teacher": told}


def needed_by_batches(
    args: argparse.Namespace,
    estimator: Estimator,
    model: torch.nn.Module,
    weights: Sequence[torch.nn.Parameter],
    rows: int | None = None,
) -> OfBatches:
    """What the batches of a run take.

    Args:
        args, estimator, model: as for ``needed_memory``.
        weights: of the layers that will get masks.
        rows: of the batches that are computed at most; by default those of the run.
    """
    device, rows = device_of_inputs(model), args.batch_size if rows is None else rows

    def windows(length: int):
        return lambda count: torch.zeros(count, length, dtype=torch.int64, device=device)

    # with a teacher that is asked, and not written down
    loss_fn = distillation_loss(args.loss, getattr(args, "loss_temperature", 1.0))
    of_step = activation_bytes(model, weights, loss_fn, windows(args.seq_len), rows, estimator.needs_gradients)
    evaluated = min(args.eval_windows, EVALUATED_TOGETHER)
    evaluation = activation_bytes(model, weights, causal_lm_loss, windows(args.eval_length), evaluated, False)
    teacher, of_logits = NOTHING, 0
    if args.loss != "ce":
        vocabulary, size = model.get_input_embeddings().num_embeddings, DTYPES[args.dtype].itemsize
        of_logits = args.seq_len * vocabulary * size
        teacher = Amount(of_logits, f"{args.seq_len:,} tokens x {vocabulary:,} logits x {size} bytes")
        if changes_weights(args):
            teacher = Amount.of(args.seq_len, "tokens", bytes_a_token())
    return OfBatches(of_step, evaluation.of(evaluated), teacher, of_logits)


def tell_need(args: argparse.Namespace, model: torch.nn.Module, need: MemoryNeed) -> None:
    """Tell what memory will be needed, with a warning where the devices of the weights have less."""
    parts = ", ".join(f"{name} {size / GB:.2f}" for name, size in asdict(need).items())
    tell(f"memory that a step needs, estimated: {need.total / GB:.2f} GB ({parts})")
    devices = {parameter.device for parameter in model.parameters()}
    there = sum(filter(None, map(_total, devices)))
    # they may live with the weights none the less
    elsewhere = hasattr(args, "logits_device") and device_of(args.logits_device) not in devices
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


def forget_used_memory() -> None:
    """Have ``used_memory`` tell what is held from now on, as far as the system can."""
    # Linux alone has the file, and some containers forbid it
    with suppress(OSError):
        # 5 lets the most that was resident begin anew: man proc_pid_clear_refs
        Path("/proc/self/clear_refs").write_text("5")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(index)


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
