"""What a run takes of a model that is known by its config alone, and which options make it fit."""

from __future__ import annotations

import argparse
import functools
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch

from ..learn.amounts import NOTHING, Amount
from ..learn.estimator import Estimator
from ..learn.memory import FEW, MemoryNeed, gathered_bytes, memory_need, shard, snapshot_bytes
from ..learn.snapshots import HELD, KEPT
from ..pattern import NMPattern
from ..prune.blocks import find_chain
from ..prune.selection import select_layers
from ..unfuse import as_linears
from .arguments import DTYPES, telling
from .memory import OfBatches, needed_by_batches
from .models import check_positions, trusts

# The most devices that are looked at
MOST_DEVICES = 1 << 12
CPU = torch.device("cpu")


class Mesh(NamedTuple):
    """Devices of a run, as torch's FSDP2 takes them.

    Attributes:
        shards: over how many each parameter is shared out, by rows.
        replicas: how many times all of it is there.
    """

    shards: int = 1
    replicas: int = 1

    @property
    def devices(self) -> int:
        return self.shards * self.replicas

    def __str__(self) -> str:
        return f"{self.replicas}x{self.shards}" if self.replicas > 1 else str(self.shards)


class Choice(NamedTuple):
    """The options that decide what a device holds."""

    mesh: Mesh
    batch_size: int
    accumulate: int
    checkpointing: bool
    logits_dtype: str
    logits_on_cpu: bool

    @classmethod
    def of(cls, args: argparse.Namespace) -> Choice:
        batches = args.batch_size, args.accumulate
        return cls(args.mesh, *batches, args.gradient_checkpointing, args.logits_dtype, hasattr(args, "logits_device"))

    def beside(self, given: Choice) -> list[str]:
        """The options in which it differs from what was given."""
        told = {
            "mesh": f"--mesh {self.mesh}",
            "batch_size": f"--batch-size {self.batch_size}",
            "accumulate": f"--accumulate {self.accumulate}",
            "checkpointing": "--gradient-checkpointing",
            "logits_dtype": f"--logits-dtype {self.logits_dtype}",
            "logits_on_cpu": "--logits-device cpu",
        }
        return [option for name, option in told.items() if getattr(self, name) != getattr(given, name)]


class Planned:
    """Runs on a model of shapes alone.

    Args:
        args: of the command, complete.
        estimator: of the runs.

    Attributes:
        model: on the meta device, taken apart into nn.Linear layers.
        layers: that will get masks, by name.
        skipped: the reasons of the nn.Linear layers that will get none, by name.

    Raises:
        ValueError, OSError: if there is no such model, no mask fits it, or it has fewer positions than windows.
    """

    def __init__(self, args: argparse.Namespace, estimator: Estimator):
        from ..hf import model_on_meta, read_config

        self.args, self.estimator = args, estimator
        self._config = read_config(args.model, DTYPES[args.dtype], trust_remote_code=trusts(args))
        self.model = model_on_meta(self._config, trust_remote_code=trusts(args))
        check_positions(self.model, seq_len=args.seq_len, eval_length=args.eval_length)
        # as a run does, before it looks for layers
        self.skipped = as_linears(self.model)
        with telling("model", "take another --pattern or model"):
            self.layers, skipped = select_layers(self.model, NMPattern(args.pattern))
        self.skipped |= skipped
        self.weights = [layer.weight for layer in self.layers.values()]
        self._known: dict[bool, OfBatches] = {}

    def need(self, choice: Choice) -> MemoryNeed:
        """What a rank takes; of logits that live in main memory, there."""
        mesh = choice.mesh
        return memory_need(
            self.model,
            self.layers,
            self.estimator,
            pattern=self.args.pattern,
            logits_dtype=DTYPES[choice.logits_dtype],
            alone=choice.accumulate == mesh.devices == 1,
            logits_device=CPU if choice.logits_on_cpu else None,
            shards=mesh.shards,
            gathered=gathered_bytes(self.model, self._blocks) if mesh.shards > 1 else NOTHING,
            **self._batches(choice.checkpointing).of(choice.batch_size),
        )

    def on_device(self, choice: Choice) -> int:
        """Bytes of that on the rank's device."""
        need = self.need(choice)
        return need.total - (need.logits if choice.logits_on_cpu else 0)

    @functools.cached_property
    def _blocks(self) -> list[torch.nn.Module]:
        return find_chain(self.model, self.layers)

    def _batches(self, checkpointing: bool) -> OfBatches:
        """What batches of any size take."""
        from ..hf import checkpoint_activations, model_of_fake_tensors

        if checkpointing not in self._known:
            rows = max(self.args.batch_size, FEW + 1)
            with model_of_fake_tensors(self._config, trust_remote_code=trusts(self.args)) as model:
                if checkpointing:
                    checkpoint_activations(model)
                found = needed_by_batches(self.args, self.estimator, model, _behind(model, self.layers), rows)
            self._known[checkpointing] = found
        return self._known[checkpointing]

    def main_memory(self, choice: Choice) -> dict[str, Amount]:
        """What a process takes there, by what it is for."""
        # each rank writes its own rows
        stored = self._snapshot(choice, choice.mesh.shards)
        # and a copy of what is on the device
        times = HELD + 1
        found = {"writing a snapshot": Amount(times * stored, f"{times} x ({stored.formula})")}
        if choice.logits_on_cpu:
            itemsize = DTYPES[choice.logits_dtype].itemsize
            sizes = Counter(1 << (weight.numel() * itemsize - 1).bit_length() for weight in self.weights)
            told = " + ".join(f"{count:,} layers x {size:,} bytes" for size, count in sorted(sizes.items()))
            found["logits"] = Amount(sum(size * count for size, count in sizes.items()), told)
        return found

    def on_disk(self, choice: Choice) -> Amount:
        """The snapshots of a run: the first, the newest ones, and one that is being written."""
        stored, count = self._snapshot(choice), KEPT + 2
        return Amount(count * stored, f"{count} x ({stored.formula})")

    def _snapshot(self, choice: Choice, shards: int = 1) -> Amount:
        own = [shard(weight, shards) for weight in self.weights]
        return snapshot_bytes(own, self.estimator, DTYPES[choice.logits_dtype])

    def can_checkpoint(self) -> bool:
        """Whether activations can be computed anew in backward."""
        return self.estimator.needs_gradients and getattr(self.model, "supports_gradient_checkpointing", False)

    def ways(self, given: Choice) -> Iterator[Choice]:
        """What to try where it does not fit as given: first what gives the same bits, then what costs least.

        Smaller batches come last, and more of them a step, which has as many windows as given or a few more.
        """
        checkpointing = [False, True] if self.can_checkpoint() and not given.checkpointing else [given.checkpointing]
        # sharded logits lie with their weights
        offloaded = [given.logits_on_cpu] if given.logits_on_cpu or given.mesh.shards > 1 else [False, True]
        dtypes = [given.logits_dtype, "bfloat16"] if given.logits_dtype == "float32" else [given.logits_dtype]
        last = given
        for dtype in dtypes:
            for on_cpu in offloaded:
                for checkpointed in checkpointing:
                    last = given._replace(checkpointing=checkpointed, logits_dtype=dtype, logits_on_cpu=on_cpu)
                    if last != given:
                        yield last
        while last.batch_size > 1:
            size = last.batch_size // 2
            last = last._replace(batch_size=size, accumulate=-(-given.batch_size * given.accumulate // size))
            yield last

    def larger_mesh(self, given: Choice, room: int) -> Choice | None:
        """The fewest devices over which it fits, by doubling: as given, else with activations computed anew.

        None where no number of devices is of use, since activations are not shared out, or sharded layers refuse an
        option.
        """
        if refused_by_shards(self.args) is not None:
            return None
        for choice in (given, given._replace(checkpointing=True)) if self.can_checkpoint() else (given,):
            shards = given.mesh.shards
            while (shards := 2 * shards) <= MOST_DEVICES:
                larger = choice._replace(mesh=given.mesh._replace(shards=shards))
                if self.on_device(larger) <= room:
                    return larger
        return None


def check_mesh(args: argparse.Namespace) -> None:
    """Raise ValueError where sharded layers refuse an option, as ``MaskTrainer`` does."""
    option = refused_by_shards(args)
    if args.mesh.shards > 1 and option is not None:
        raise ValueError(
            f"mesh: expected no shards beside {option}, which sharded layers refuse, got {args.mesh}; take "
            f"{args.mesh.devices}x1, whole models, or leave {option.split()[0]} out"
        )


def refused_by_shards(args: argparse.Namespace) -> str | None:
    """What of the options no model takes that FSDP2 has cut.

    That are weights that learn, a loss that asks the dense model, and logits elsewhere than their weights.
    """
    # of an estimator that has the option, or given
    if getattr(args, "train_weights", None) is not None:
        return f"--train-weights {args.train_weights:g}"
    if hasattr(args, "logits_device"):
        return f"--logits-device {args.logits_device}"
    return f"--loss {args.loss}" if "kl" in args.loss else None


def _behind(model: torch.nn.Module, names: Iterable[str]) -> list[torch.nn.Parameter]:
    """The matrices of a model that the layers of the same one, taken apart, are made of."""
    modules, found = dict(model.named_modules()), {}
    for name in names:
        while name not in modules:
            name = name.rpartition(".")[0]
        found |= {id(x): x for x in modules[name].parameters(recurse=False) if x.dim() > 1}
    return list(found.values())
