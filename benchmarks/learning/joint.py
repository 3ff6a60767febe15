"""Methods that learn masks and weights together, under one harness: the same model, batches and texts.

    python benchmarks/learning/joint.py --test stdlib pydoc book.txt --output runs/joint

Every method takes its settings and others with the fewest ``--steps``. The next number of steps takes the first and the
best of them, by the perplexity of validation text; from there on the best go on alone. Half of the default data is the
source code of Python's library, half are samples of the dense model, as for ``maskpro learn``; a step has 12 windows of
128 tokens, as that of the rows in docs/measurements.md.

``sr-ste`` and ``cast`` start from the dense weights, as in their papers. All others start from reconstruction's mask
with refitted weights, whose row has the seconds that it takes; "sr-ste, refitted" and "cast, refitted" with dropped
weights at 0, so that their first mask is that one. Seconds of other rows are those of their steps. Losses with a
teacher read its outputs from a cache; the row "teacher" has the seconds of its forwards, for all batches. The cache has
the 64 likeliest tokens of each place, so that the divergence is a lower bound.

An interrupted run continues when it is called again with the same arguments, as in ``long_run.py``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from compare import checked, metadata_of, options, weights_in_place
from harness import environment
from long_run import LongRun, Seconds
from magnitudes import CAST, SRSTE, Magnitudes
from masks_and_weights import CORRECTED, GRADIENT, STILL, MasksAndWeights
from methods import Learner
from rows import table
from safetensors import safe_open
from torch import Tensor

from maskpro_kernels.files import digest, write_tensors
from maskpro_kernels.functional.masks import expand_mask, top_n_mask
from maskpro_kernels.learn.estimator import Estimator, LossFn
from maskpro_kernels.prune.initial_masks import refitted_masks
from maskpro_kernels.prune.reconstruction import Reconstruction
from maskpro_kernels.text.losses import TeacherCache, distillation_loss

DENSE = "dense weights"
REFITTED = "reconstruction, refitted"
TEACHER = "teacher"


@dataclass(frozen=True)
class Joint(Learner):
    """A method that learns masks and weights.

    Attributes:
        start: name of the mask and weights that it starts from.
        loss: kind of the loss, see ``distillation_loss``.
    """

    start: str = REFITTED
    loss: str = "ce"


class RefittedSRSTE(SRSTE):
    """SR-STE from reconstruction's mask and weights."""

    name = "sr-ste, refitted"


class RefittedCAST(CAST):
    """CAST from reconstruction's mask and weights."""

    name = "cast, refitted"


FIXED = {"lr": 0.3, "train_weights": 6e-4, "masks_until": 0.0, "weights_from": 0.0, "dropped": STILL}
HALF = {"masks_until": 0.5, "weights_from": 0.5}
TOGETHER = {"masks_until": 1.0}
METHODS = {
    learner.kind.name: learner
    for learner in (
        # the rates of the authors' scripts are for many thousands of steps
        Joint(SRSTE, SRSTE.options | {"lr": 3e-4}, ({"lr": 1e-3}, {"lr": 1e-3, "decay": 2e-2}), start=DENSE),
        Joint(CAST, CAST.options, ({"decay": 1.0}, {"lr": 3e-3, "decay": 1.0}), start=DENSE, loss="ce+kl"),
        Joint(RefittedSRSTE, SRSTE.options | {"lr": 3e-4}, ({"lr": 1e-3},)),
        Joint(RefittedCAST, CAST.options | {"lr": 3e-4}, ({"decay": 1.0}, {"lr": 1e-3, "decay": 1.0}), loss="ce+kl"),
        Joint(
            MasksAndWeights,
            FIXED,
            (
                {"train_weights": 3e-4},
                HALF,
                TOGETHER | {"lr": 0.1},
                TOGETHER | {"lr": 1.0},
                TOGETHER | {"lr": 1.0, "dropped": GRADIENT},
                TOGETHER | {"lr": 1.0, "dropped": CORRECTED},
            ),
        ),
    )
}


class Comparison(LongRun):
    """The rows of methods that learn masks and weights."""

    unshared = (*LongRun.unshared, "every")

    def __init__(self, args: argparse.Namespace):
        super().__init__(args, METHODS)
        self.teacher = TeacherCache(folder=args.output / TEACHER)
        self.dense_weights = {name: layer.weight.detach().clone() for name, layer in self.layers.items()}

    def initial_rows(self) -> None:
        """The rows of the dense model and of the starts, before any conversion."""
        self.dense  # noqa: B018
        for name in dict.fromkeys(learner.start for learner in self.learners.values()):
            start, seconds = self.start(name)
            started = digest([tensors[layer] for tensors in start for layer in sorted(tensors)])
            row = self.rows.find(name, {}, 0)
            if row is None:
                self.rows.add([self._row_of_start(name, start, seconds) | {"start": started}])
            elif row["start"] != started:
                raise ValueError(
                    f"output: expected rows that began with the start {started} of {name}, got those of "
                    f"{row['start']}: another machine has rounded otherwise; give another folder"
                )
        if any(self.learners[name].loss != "ce" for name in self.args.methods):
            self.fill_teacher()

    def fill_teacher(self) -> None:
        """Cache the dense model's outputs for all batches, before its weights change."""
        steps = len(self.batches)
        has_row = any(row["method"] == TEACHER and row["steps"] >= steps for row in self.rows.rows)
        if not has_row:
            # the row has the seconds of all forwards
            shutil.rmtree(self.args.output / TEACHER, ignore_errors=True)
        began = self.clock()
        distillation_loss("kl", cache=self.teacher).fill(self.model, self.batches)
        if not has_row:
            figures = {"method": TEACHER, "steps": steps, "seconds": self.clock() - began}
            self.rows.add([self.dense | figures | environment()])

    def _row_of_start(self, name: str, start: Reconstruction, seconds: float) -> dict:
        weights = {
            layer: start.weights[layer] * expand_mask(codes, self.pattern) for layer, codes in start.codes.items()
        }
        with weights_in_place(self.layers, weights):
            return self.row(name, {}, 0, seconds, weights="own")

    def initial_digests(self, codes: Mapping[str, Tensor]) -> dict[str, str]:
        """Digest of the samples; ``initial_rows`` has compared the masks, in which methods differ."""
        digests = {"samples": self.samples}
        self.check_digests(digests)
        return digests

    def start(self, name: str) -> tuple[Reconstruction, float]:
        """Codes and weights that methods start from, and the seconds that they took."""
        if name == DENSE:
            codes = {
                layer: top_n_mask(weight.float().abs(), self.pattern) for layer, weight in self.dense_weights.items()
            }
            return Reconstruction(codes, self.dense_weights), 0.0
        path = self.args.output / "refitted.safetensors"
        of = json.dumps(self.rows.shared, sort_keys=True)
        if not path.exists() or metadata_of(path)["of"] != of:
            began = self.clock()
            calibration = self.batches[: self.args.init_batches]
            start = refitted_masks(self.layers, self.pattern, "reconstruction", "weights", self.model, calibration)
            tensors = {f"codes/{layer}": codes for layer, codes in start.codes.items()}
            tensors |= {f"weights/{layer}": weight for layer, weight in start.weights.items()}
            write_tensors(tensors, path, {"of": of, "seconds": repr(self.clock() - began)})
        with safe_open(path, framework="pt", device=str(self.model.device)) as file:
            start = Reconstruction(
                {layer: file.get_tensor(f"codes/{layer}") for layer in self.dense_weights},
                {layer: file.get_tensor(f"weights/{layer}") for layer in self.dense_weights},
            )
        return start, float(metadata_of(path)["seconds"])

    def run(self, name: str) -> bool:
        """The rows of a method; return whether it has ended, without a signal."""
        candidates = self.learners[name].candidates()
        for steps in sorted(self.args.steps):
            for settings in candidates:
                folder = self.args.output / folder_name(name, settings, steps)
                try:
                    if self.rows.find(name, settings, steps) is None and not self.take_steps(
                        name, settings, steps, folder
                    ):
                        return False
                except FloatingPointError as error:
                    print(f"{name}, {steps} steps, {settings}: {error}", flush=True)
                    seconds = Seconds(folder / "seconds.txt", self.clock)
                    seconds.resume(steps)
                    self.rows.add([self._row_of_divergence(name, settings, steps, seconds.total)])
                # its snapshots are large
                shutil.rmtree(folder, ignore_errors=True)
            candidates = self.remaining(name, candidates, steps, is_first=steps == min(self.args.steps))
        return True

    def _row_of_divergence(self, name: str, settings: Mapping, steps: int, seconds: float) -> dict:
        """A row without a result; it has the steps that were to be taken, and the seconds of those that were."""
        return self.dense | {
            "method": name,
            "settings": dict(settings),
            "steps": steps,
            "tokens": steps * self.args.batch_size * self.args.seq_len,
            "weights": "own",
            "validation": math.inf,
            "perplexity": dict.fromkeys(self.dense["perplexity"], math.inf),
            "score": math.inf,
            "changed_groups": math.nan,
            "state_bytes_per_weight": math.nan,
            "seconds": seconds,
            "samples": self.samples,
            **environment(),
        }

    def batches_of(self, name: str, steps: int) -> Sequence:
        return self.batches[:steps]

    def estimator_of(self, name: str, settings: Mapping, steps: int) -> Estimator:
        return self.learners[name].kind(steps, **settings)

    @torch.no_grad()
    def put_start(self, estimator: Estimator) -> dict[str, Tensor]:
        name = self.learners[estimator.name].start
        start, _ = self.start(name)
        for layer, module in self.masked.items():
            module.weight.copy_(start.weights[layer])
            if name == REFITTED and isinstance(estimator, Magnitudes):
                # a dropped weight has its dense value, which may be larger than a kept one
                module.weight.mul_(expand_mask(start.codes[layer], self.pattern))
            module.weight_changed = name != DENSE
        self.put_mask(start.codes, self.gap_of(estimator))
        return start.codes

    def loss_of(self, name: str) -> LossFn:
        kind = self.learners[name].loss
        return distillation_loss(kind, cache=None if kind == "ce" else self.teacher)

    def row_of(self, estimator: Estimator, settings: Mapping, *figures: float, **learner_figures: object) -> dict:
        own = nullcontext()
        if isinstance(estimator, Magnitudes):
            own = weights_in_place(self.masked, estimator.sparse_weights(self.masked))
        with own:
            return self.row(estimator.name, settings, *figures, weights="own", **learner_figures)


def folder_name(*values: object) -> str:
    """A name for the folder of an interrupted run."""
    return hashlib.blake2b(json.dumps(values).encode(), digest_size=8).hexdigest()


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = options("compare methods that learn masks and weights")
    parser.set_defaults(data="stdlib:0.5,self:0.5", batch_size=12, samples=1200)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    args = checked(parser, argv)
    if args.init != "reconstruction":
        parser.error(f"--init: expected reconstruction, which is refitted, got {args.init}")
    # a row at the end of each run alone
    args.every = max(args.steps)
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parsed(argv)
    try:
        comparison = Comparison(args)
        comparison.initial_rows()
        has_ended = all(comparison.run(name) for name in args.methods)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    print(table(comparison.rows.rows), end="")
    if not has_ended:
        raise SystemExit("stopped by a signal; the same command continues")


if __name__ == "__main__":
    main()
