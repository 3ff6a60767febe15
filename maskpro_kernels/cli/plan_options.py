"""The options of `maskpro plan`, and what may stand in them."""

from __future__ import annotations

import argparse
import re

from .estimator_options import add_estimators
from .plan import plan
from .planned import Mesh
from .shared_options import (
    add_accumulate,
    add_batches,
    add_checkpointing,
    add_dtypes,
    add_evaluation,
    add_kind_of_loss,
    add_pattern,
    add_trust,
)
from .step_seconds import GPUS

# Of a thousand and of 1,024
UNITS = {f"{prefix}{suffix}": base**power for power, prefix in enumerate("KMGT", 1) for suffix, base in
         (("B", 1000), ("iB", 1024))}  # fmt: skip


def add_plan(commands, formatter_class: type) -> None:
    parser = commands.add_parser(
        "plan",
        help="what memory learning takes, from a config alone",
        description="Tell what memory `maskpro learn` will take of a model and what fits into a device, from the "
        "model's config.json: no weights are read. Each number stands with its formula. Options of the same name are "
        "those of `maskpro learn`.",
        formatter_class=formatter_class,
        allow_abbrev=False,
    )
    parser.add_argument(
        "model", metavar="MODEL", help="a folder with a config.json, a model id on the hub, or smollm2-135m"
    )
    parser.add_argument(
        "--device-memory",
        type=size,
        required=True,
        default=argparse.SUPPRESS,
        metavar="SIZE",
        help="memory of each device, such as 80GiB",
    )
    parser.add_argument(
        "--mesh",
        type=mesh,
        default="1",
        metavar="N|RxN",
        help="devices over which weights and logits are sharded, as by torch's FSDP2, or R replicas of so many",
    )
    parser.add_argument(
        "--gpu",
        choices=GPUS,
        default=argparse.SUPPRESS,
        help="also tell seconds a step on such cards, derived from data sheets and a model of costs, not measured",
    )
    add_pattern(parser)
    add_estimators(parser)
    add_kind_of_loss(parser)
    add_batches(parser)
    add_accumulate(parser)
    add_evaluation(parser)
    add_dtypes(parser)
    parser.add_argument(
        "--logits-device",
        choices=("cpu",),
        default=argparse.SUPPRESS,
        help="cpu: the logits live in main memory (default: with their weights)",
    )
    add_checkpointing(parser)
    parser.add_argument(
        "--output", default=argparse.SUPPRESS, metavar="FILE", help="JSON file of all figures to write; must not exist"
    )
    add_trust(parser)
    # what weights were refitted to takes no memory of its own
    parser.set_defaults(run=plan, refit="none")


def size(text: str) -> int:
    """Bytes of a text such as 80GiB."""
    # more digits are no memory of any device, and may be more than a float holds
    found = re.fullmatch(r"(\d{1,15}(?:\.\d+)?) ?([KMGT]i?B)", text)
    bytes_ = int(float(found[1]) * UNITS[found[2]]) if found else 0
    if bytes_ < 1:
        raise argparse.ArgumentTypeError(f"expected a size above 0 in {', '.join(UNITS)}, such as 80GiB, got {text!r}")
    return bytes_


def mesh(text: str) -> Mesh:
    """A mesh of a text such as 8 or 2x4."""
    if not re.fullmatch(r"[1-9]\d{0,5}(x[1-9]\d{0,5})?", text):
        raise argparse.ArgumentTypeError(
            f"expected a number of devices, such as 8, or replicas of so many, such as 2x4, got {text!r}"
        )
    *replicas, shards = map(int, text.split("x"))
    return Mesh(shards, *replicas)
