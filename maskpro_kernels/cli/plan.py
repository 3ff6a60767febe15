"""`maskpro plan`: what memory learning takes of a model, told from its config alone, and what makes it fit."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict

from ..files import write_whole
from ..learn.amounts import Amount, formula_of
from ..learn.memory import MemoryNeed
from ..pattern import NMPattern
from .arguments import check_least, new_file, telling
from .estimator_options import class_of, complete_options
from .memory import GB
from .planned import Choice, Planned, check_mesh
from .run_settings import check_checkpointing
from .step_seconds import Duration, check_gpu, step_at_least, step_seconds

# Of the names in tables
WIDTH = 18


def plan(args: argparse.Namespace) -> None:
    """Print what a run takes, by part and with formulas, what fits, and which options to take."""
    output = new_file(args, "output")
    NMPattern(args.pattern)
    check_least(args, batch_size=1, accumulate=1, seq_len=2, eval_windows=1, eval_length=2)
    check_checkpointing(args)
    check_mesh(args)
    args.steps = class_of(args).run_defaults.steps
    planned = Planned(args, complete_options(args))
    if hasattr(args, "gpu"):
        check_gpu(args, planned)
    given = Choice.of(args)
    need, tried = planned.need(given), _tried(planned, given)
    durations = step_seconds(planned, given) if hasattr(args, "gpu") else None
    _print_model(planned, given)
    _print_memory(planned, given, need, tried[0][1])
    _print_tried(planned, given, tried)
    if durations is not None:
        _print_seconds(args, durations)
    if output is not None:
        found = _figures(planned, given, need, tried, durations)
        with telling("output"):
            write_whole(output, (json.dumps(found, indent=2) + "\n").encode())


def _tried(planned: Planned, given: Choice) -> list[tuple[Choice, int]]:
    """What was looked at, with the bytes on a device: as given; if that is too much, ways up to the first that fits.

    And then more devices with the options as given.
    """
    room, tried = planned.args.device_memory, [(given, planned.on_device(given))]
    if tried[0][1] <= room:
        return tried
    for choice in planned.ways(given):
        tried.append((choice, planned.on_device(choice)))
        if tried[-1][1] <= room:
            break
    larger = planned.larger_mesh(given, room)
    return tried if larger is None else [*tried, (larger, planned.on_device(larger))]


def _figures(
    planned: Planned,
    given: Choice,
    need: MemoryNeed,
    tried: list[tuple[Choice, int]],
    durations: Mapping[str, Duration] | None,
) -> dict:
    """All figures, as JSON holds them."""
    args, (_, on_device) = planned.args, tried[0]
    names = "pattern estimator loss seq_len accumulate eval_windows eval_length dtype".split()
    names += [option.name for option in class_of(args).options if hasattr(args, option.name)]
    figures = {
        "model": args.model,
        "architecture": type(planned.model).__name__,
        "settings": {name: getattr(args, name) for name in names} | given._asdict() | {"mesh": str(given.mesh)},
        "masked_layers": len(planned.layers),
        "masked_weights": sum(weight.numel() for weight in planned.weights),
        "needed": {name: _told(amount) for name, amount in asdict(need).items()},
        "on_device": on_device,
        "device_memory": args.device_memory,
        "main_memory": {name: _told(amount) for name, amount in planned.main_memory(given).items()},
        "snapshots_on_disk": _told(planned.on_disk(given)),
        "tried": [
            {"options": choice.beside(given), "on_device": size, "fits": size <= args.device_memory}
            for choice, size in tried
        ],
    }
    if durations is not None:
        parts = {name: each._asdict() for name, each in durations.items()}
        figures["derived_seconds"] = {"gpu": args.gpu, "parts": parts, "step": step_at_least(durations)}
    return figures


def _told(amount: int) -> dict:
    return {"bytes": int(amount), "formula": formula_of(amount)}


def _print_model(planned: Planned, given: Choice) -> None:
    masked, mesh = sum(weight.numel() for weight in planned.weights), given.mesh
    print(
        f"{type(planned.model).__name__}, by its config alone: {planned.args.pattern} masks on {len(planned.layers)} "
        f"nn.Linear layers with {masked:,} weights"
    )
    for reason, count in Counter(planned.skipped.values()).items():
        first = next(name for name, its_reason in planned.skipped.items() if its_reason == reason)
        print(f"without a mask: {first}{f' and {count - 1} more' if count > 1 else ''}, {reason}")
    if mesh.shards > 1:
        replicas = f", {mesh.replicas} times over" if mesh.replicas > 1 else ""
        print(
            f"{mesh.devices} devices stand for sharding by torch's FSDP2, block by block: of each parameter a rank has "
            f"1 / {mesh.shards} of the rows, rounded up, with their logits and what is held for them{replicas}; "
            "`maskpro learn` itself shards nothing"
        )
    elif mesh.replicas > 1:
        print(f"{mesh.replicas} devices hold all of it each, as the ranks of `maskpro learn` under torchrun do")


def _print_memory(planned: Planned, given: Choice, need: MemoryNeed, size: int) -> None:
    amounts = asdict(need)
    if given.logits_on_cpu:
        del amounts["logits"]
    _print_amounts("on a device", amounts)
    room = planned.args.device_memory
    fits = "fits" if size <= room else "does not fit"
    print(f"{'all of it':<{WIDTH}} {size / GB:>8.2f}  the sum, which {fits} into {room / GB:.2f} GB")
    print()
    _print_amounts("in main memory", planned.main_memory(given))
    if given.logits_on_cpu:
        print("torch rounds page-locked memory up to a power of two, layer by layer")
    print()
    _print_amounts("on disk", {"snapshots": planned.on_disk(given)})


def _print_amounts(title: str, amounts: Mapping[str, Amount]) -> None:
    print(f"{title:<{WIDTH}} {'GB':>8}  formula")
    for name, amount in amounts.items():
        if amount:
            print(f"{name:<{WIDTH}} {amount / GB:>8.2f}  {formula_of(amount)}")


def _print_tried(planned: Planned, given: Choice, tried: list[tuple[Choice, int]]) -> None:
    room = planned.args.device_memory
    print()
    told = {choice: " ".join(choice.beside(given)) or "as given" for choice, _ in tried}
    width = max(map(len, told.values()))
    print(f"{'options':<{width}} {'GB':>8}")
    for choice, size in tried:
        print(f"{told[choice]:<{width}} {size / GB:>8.2f}  {'fits' if size <= room else 'does not fit'}")
    fitting = [told[choice] for choice, size in tried if size <= room]
    if not fitting:
        print("nothing fits: take devices with more memory, or smaller --seq-len and --eval-length")
    elif fitting[0] != "as given":
        print(f"take {', or '.join(fitting)}")


def _print_seconds(args: argparse.Namespace, durations: Mapping[str, Duration]) -> None:
    print()
    print(f"{'a step on ' + args.gpu:<{WIDTH}} {'seconds':>8}  formula: derived, not measured")
    for name, (seconds, formula) in durations.items():
        print(f"{name:<{WIDTH}} {seconds:>8.4f}  {formula}")
    told = "products + masks; what else there is runs beside them, and the longest counts"
    print(f"{'all of it':<{WIDTH}} {step_at_least(durations):>8.4f}  {told}")
