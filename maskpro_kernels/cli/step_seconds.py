"""How long a step takes on a card, derived from its data sheet and what masks cost there. Nothing here is measured."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import NamedTuple

import torch

from ..ops.data_sheets import LIBRARY_SHARE, SHEETS
from ..ops.mask_costs import COSTS, Uses, picoseconds
from ..pattern import NMPattern
from ..unfuse import expert_groups
from .arguments import DTYPES
from .changed_weights import changes_weights
from .planned import Choice, Planned

GPUS = {"a100": "sm_80", "h100": "sm_90", "b200": "sm_100"}


class Duration(NamedTuple):
    """Seconds, and the formula that they follow from."""

    seconds: float
    formula: str


def check_gpu(args: argparse.Namespace, planned: Planned) -> None:
    """Raise ValueError unless the costs of a step are known."""
    if NMPattern(args.pattern) != NMPattern("2:4"):
        raise ValueError(f"gpu: expected --pattern 2:4, whose masks have known costs, got {args.pattern}; leave it out")
    if DTYPES[args.dtype].itemsize != 2:
        raise ValueError(f"gpu: expected --dtype bfloat16 or float16, got {args.dtype}; leave it out")
    if expert_groups(planned.model):
        raise ValueError(
            "gpu: expected a model whose tokens pass all layers, got a mixture of experts, whose products depend on "
            "where tokens go; leave it out"
        )


def step_seconds(planned: Planned, choice: Choice) -> Mapping[str, Duration]:
    """What a step takes, by what it is for. Attention itself, norms and the loss are left out."""
    sheet = SHEETS[GPUS[planned.args.gpu]]
    found = {"products": _products(planned, choice, sheet.flops_16_bit), "masks": _masks(planned, choice)}
    if choice.mesh.devices > 1:
        found["between devices"] = _between_devices(planned, choice, sheet.link_bytes_per_second)
    if choice.logits_on_cpu:
        found["copies of logits"] = _copies(planned, choice, sheet.host_bytes_per_second)
    return found


def step_at_least(durations: Mapping[str, Duration]) -> float:
    """Seconds of a step in which transfers run beside what is computed."""
    computed = durations["products"].seconds + durations["masks"].seconds
    return max(computed, *(each.seconds for name, each in durations.items() if name not in ("products", "masks")), 0.0)


def _counts(planned: Planned) -> tuple[int, int]:
    """Weights of nn.Linear layers: (with masks, without)."""
    linears = [module.weight for module in planned.model.modules() if isinstance(module, torch.nn.Linear)]
    masked = sum(weight.numel() for weight in planned.weights)
    return masked, sum(weight.numel() for weight in linears) - masked


def _passes(planned: Planned) -> int:
    """Forwards of a step on a rank."""
    return planned.args.accumulate * planned.estimator.draws


def _products(planned: Planned, choice: Choice, flops: float) -> Duration:
    masked, others = _counts(planned)
    tokens = _passes(planned) * choice.batch_size * planned.args.seq_len
    # of each product a multiplication and an addition; the gradient of inputs, and of masked weights, is one more each
    of_masked, of_others = (6, 4) if planned.estimator.needs_gradients else (2, 2)
    if choice.checkpointing:
        of_masked += 2
    if planned.args.loss != "ce" and not changes_weights(planned.args):
        # the dense model is asked in each forward; of weights that change it is asked beforehand
        of_masked, of_others = of_masked + 2, of_others + 2
    work = tokens * (of_masked * masked + of_others * others)
    told = (
        f"{tokens:,} tokens x ({of_masked} x {masked:,} weights with masks + {of_others} x {others:,} without) / "
        f"({LIBRARY_SHARE} x {flops:,.0f} of the data sheet)"
    )
    return Duration(work / (LIBRARY_SHARE * flops), told)


def _masks(planned: Planned, choice: Choice) -> Duration:
    args, row, n = planned.args, GPUS[planned.args.gpu], NMPattern(planned.args.pattern).n
    tokens, batches, draws = choice.batch_size * args.seq_len, args.accumulate, planned.estimator.draws
    if planned.estimator.needs_gradients:
        uses = Uses(tokens, (3 if choice.checkpointing else 2) * batches, slopes=batches)
    else:
        uses = Uses(tokens, batches, updates=int(draws == 1))
    each = draws * min(picoseconds(row, n, uses))
    if not planned.estimator.needs_gradients and draws > 1:
        each += draws * COSTS[row].update[0]
    masked, _ = _counts(planned)
    shards = choice.mesh.shards
    told = f"{masked:,} weights x {each:.2f} / 1,000,000,000,000"
    if shards > 1:
        told += f" / {shards} shards"
    return Duration(masked * round(each, 2) * 1e-12 / shards, told)


def _between_devices(planned: Planned, choice: Choice, rate: float) -> Duration:
    """Kept values and bitmasks come, forward and backward; slopes are summed up."""
    masked, _ = _counts(planned)
    shards, replicas = choice.mesh
    dense = sum(parameter.numel() for parameter in planned.model.parameters()) - masked
    gradients = planned.estimator.needs_gradients
    passes = _passes(planned) * (2 if gradients else 1)
    # 9 bits of a weight at 2:4, and 32 of a slope
    kept, slopes = f"{passes} x ({masked:,} weights x 9 / 8 + {dense:,} others x 2)", f"4 x {masked:,} slopes"
    moved = (passes * (masked * 9 / 8 + 2 * dense) + (4 * masked if gradients else 0)) * (shards - 1) / shards
    told = f"(({kept}{f' + {slopes}' if gradients else ''}) x {shards - 1} / {shards}"
    if gradients and replicas > 1:
        moved += 2 * 4 * masked / shards * (replicas - 1) / replicas
        told += f" + 2 x {slopes} / {shards} x {replicas - 1} / {replicas}"
    return Duration(moved / rate, f"{told}) bytes / {rate:,.0f} of NVLink")


def _copies(planned: Planned, choice: Choice, rate: float) -> Duration:
    masked, _ = _counts(planned)
    # for each draw and for the update; what goes back takes the other direction
    times, itemsize = planned.estimator.draws + 1, DTYPES[choice.logits_dtype].itemsize
    told = f"{times} x {masked:,} logits x {itemsize} bytes / {rate:,.0f} of PCIe"
    return Duration(times * masked * itemsize / rate, told)
