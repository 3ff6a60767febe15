"""Methods that find N:M masks, under one harness: the same model, batches, initial mask and texts.

Every learner takes its paper's settings, and others that its search tries with the fewest steps. The paper's and the
best of all, by the perplexity of validation text, take the next number of steps, and the better of the two all further
ones. The test texts judge nothing.

Rows are kept as they come, in ``rows.jsonl`` of the output folder; called again with the same arguments, the command
continues where it was. ``table.md`` shows them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import torch
from methods import LEARNERS, METHODS, ONE_SHOT, FlipRate, Learner, state_bytes
from proxsparse import ProxSparse
from rows import WITH_WEIGHTS, Rows, best, score, table
from safetensors import safe_open
from torch import Tensor, nn

from maskpro_kernels.cli.config import DTYPES
from maskpro_kernels.cli.inputs import device_of
from maskpro_kernels.files import digest, write_tensors
from maskpro_kernels.functional.masks import expand_mask, top_n_mask
from maskpro_kernels.hf import load_model
from maskpro_kernels.learn.estimator import Estimator
from maskpro_kernels.learn.trainer import MaskTrainer
from maskpro_kernels.modules import MaskedLinear, initial_logits, masked_layers
from maskpro_kernels.ops.pattern import NMPattern
from maskpro_kernels.prune.convert import convert, gap_for_flip_rate
from maskpro_kernels.prune.initial_masks import initial_codes
from maskpro_kernels.prune.selection import layers_to_convert
from maskpro_kernels.prune.sparsegpt import sparsegpt
from maskpro_kernels.text.batches import MixedBatches, parse_sources, sample_windows, start_token, texts_of, windows
from maskpro_kernels.text.perplexity import causal_lm_loss, perplexity
from maskpro_kernels.text.sources import SELF, load_text

sys.path.append(str(Path(__file__).resolve().parent.parent))
from harness import environment  # noqa: E402

# What the rows in ``measured`` have learned from
DATA = "pydoc:0.5,self:0.5"


class Comparison:
    """A model, its texts, and the present rows.

    Seconds of a row are those of processor time, of all threads together; on a GPU they are of wall clock.

    Args:
        args: of the command.
        learners: by name.
    """

    # options that rows of one folder may differ in
    unshared = ("output", "steps", "methods")

    def __init__(self, args: argparse.Namespace, learners: Mapping[str, Learner] = LEARNERS):
        self.args = args
        self.learners = learners
        self.pattern = NMPattern(args.pattern)
        model, tokenizer = load_model(args.model, DTYPES[args.dtype])
        self.model = model.to(device_of(args.device))
        # other work on the machine lengthens a run, and not its processor time
        self.clock = time.process_time if self.model.device.type == "cpu" else time.perf_counter
        self.layers, _ = layers_to_convert(self.model, self.pattern)
        self.weights = sum(layer.weight.numel() for layer in self.layers.values())
        learned = [name for name, _ in texts_of(args.data)]
        texts = {name: load_text(name) for name in dict.fromkeys((*learned, *args.test))}
        # before the samples: those of other rows are not to be drawn over
        self.rows = Rows(args.output, self._shared(texts))

        def cut(names: Sequence[str], split: str, length: int) -> dict[str, Tensor]:
            return {name: windows(texts[name][split], tokenizer, length) for name in names}

        sources = parse_sources(args.data)
        learning = cut(learned, "calibration", args.seq_len)
        if SELF in dict(sources):
            learning[SELF] = self._samples(start_token(tokenizer))
        self.samples = digest([learning[SELF]]) if SELF in learning else None
        learning = {name: tokens.to(self.model.device) for name, tokens in learning.items()}
        count = max(*args.steps, args.init_batches)
        self.batches = MixedBatches(learning, sources, args.batch_size, count, args.seed)
        share = -(-args.eval_windows // len(learned))
        validation = cut(learned, "validation", args.eval_length)
        self.validation = torch.cat([tokens[:share] for tokens in validation.values()])
        tests = cut(args.test, "test", args.eval_length)
        self.tests = {Path(name).name: tokens[: args.eval_windows] for name, tokens in tests.items()}

    def _shared(self, texts: Mapping[str, Mapping[str, str]]) -> dict:
        """Common to all rows: the options, and the words after the names of model and texts."""
        options = {name: value for name, value in vars(self.args).items() if name not in self.unshared}
        content = json.dumps(texts, sort_keys=True).encode()
        return options | {
            "weights": digest(parameter for _, parameter in sorted(self.model.named_parameters())),
            "texts": hashlib.blake2b(content, digest_size=16).hexdigest(),
            "split": "test",
        }

    def _samples(self, start: int | None) -> Tensor:
        """int64 [--samples, --seq-len], of the dense model, drawn once."""
        path = self.args.output / "samples.safetensors"
        arguments = (start, self.args.samples, self.args.seq_len)
        metadata = {"of": json.dumps([*arguments, self.args.seed, self.rows.shared["weights"]])}
        if path.exists():
            with safe_open(path, framework="pt") as file:
                # a call that ended before it had a row may have been of another model or seed
                if file.metadata() == metadata:
                    return file.get_tensor(SELF)
        # as in measured/: a batch of another size has other draws
        drawn = sample_windows(self.model, *arguments, batch_size=128, seed=self.args.seed)
        write_tensors({SELF: drawn}, path, metadata)
        return drawn

    def row(
        self,
        method: str,
        settings: Mapping,
        steps: int,
        seconds: float,
        state: int = 0,
        weights: str = "dense",
        **learner_figures: object,
    ) -> dict:
        """A row of the current model; ``weights`` shows kept weights are the dense ones, or its own."""
        perplexities = {name: perplexity(self.model, test) for name, test in self.tests.items()}
        dense = perplexities if method == "dense" else self.dense["perplexity"]
        row = {
            "method": method,
            "settings": dict(settings),
            "steps": steps,
            "tokens": steps * self.args.batch_size * self.args.seq_len,
            "weights": weights,
            "validation": perplexity(self.model, self.validation),
            "perplexity": perplexities,
            "score": score(perplexities, dense),
            "changed_groups": 0,
            "state_bytes_per_weight": state / self.weights,
            "seconds": seconds,
            **learner_figures,
            **environment(),
        }
        print(f"{method}, {steps} steps, {settings}: score {row['score']:.3f}, {seconds:.0f} seconds", flush=True)
        return row

    @cached_property
    def dense(self) -> dict:
        """The row of the dense model, before any layer is converted."""
        if self.rows.find("dense", {}, 0) is None:
            self.rows.add([self.row("dense", {}, 0, 0.0)])
        return self.rows.find("dense", {}, 0)

    def initial(self, name: str) -> tuple[dict[str, Tensor], float]:
        """(group codes by layer, seconds that they took) of an initial mask of the package, found once."""
        path = self.args.output / f"{name}.safetensors"
        shared = json.dumps(self.rows.shared, sort_keys=True)
        if not path.exists() or metadata_of(path)["of"] != shared:
            began = self.clock()
            calibration = self.batches[: self.args.init_batches]
            codes = initial_codes(self.layers, self.pattern, name, self.model, calibration)
            write_tensors(codes, path, {"of": shared, "seconds": repr(self.clock() - began)})
        with safe_open(path, framework="pt", device=str(self.model.device)) as file:
            codes = {layer: file.get_tensor(layer) for layer in file.keys()}
        return codes, float(metadata_of(path)["seconds"])

    def one_shot(self, name: str) -> None:
        """The rows of a mask that takes no training steps."""
        if self.rows.find(name, {}, 0) is not None:
            return
        began = self.clock()
        weights = None
        if name == "sparsegpt":
            calibration = self.batches[: self.args.init_batches]
            codes, weights = sparsegpt(self.model, self.layers, self.pattern, calibration, keep_weights=True)
            seconds = self.clock() - began
        else:
            codes, seconds = self.initial(name)
        masked = {
            layer: module.weight.detach() * expand_mask(codes[layer], self.pattern)
            for layer, module in self.layers.items()
        }
        rows = []
        if weights is not None:
            with weights_in_place(self.layers, weights):
                rows.append(self.row(name + WITH_WEIGHTS, {}, 0, seconds, weights="own"))
        with weights_in_place(self.layers, masked):
            self.rows.add([*rows, self.row(name, {}, 0, seconds)])

    @cached_property
    def masked(self) -> dict[str, MaskedLinear]:
        """The layers once they are converted, from the first learner on."""
        convert(self.model, self.pattern)
        return masked_layers(self.model)

    def learner(self, name: str) -> None:
        """The rows of a learner: all candidates with the fewest steps, fewer of them with each greater number."""
        candidates = self.learners[name].candidates()
        for i, steps in enumerate(sorted(self.args.steps)):
            for settings in candidates:
                self.learn(name, settings, steps)
            candidates = self.remaining(name, candidates, steps, i == 0)

    def remaining(self, name: str, candidates: Sequence[Mapping], steps: int, is_first: bool) -> list[Mapping]:
        """Settings that take the next number of steps: the best after ``steps``, and after the first the defaults."""
        rows = [self.rows.find(name, settings, steps) for settings in candidates]
        chosen = best(rows, name, steps)["settings"]
        default = candidates[0]
        return [default, chosen] if is_first and chosen != default else [chosen]

    def batches_of(self, name: str, steps: int) -> Sequence:
        """Batches of a learner in so many steps, and no more: REINFORCE computes the initial loss of each batch."""
        return self.batches[:steps]

    def gap_of(self, estimator: Estimator) -> float:
        """Initial logit of a kept weight over a dropped one."""
        if isinstance(estimator, FlipRate):
            return gap_for_flip_rate(estimator.flips, self.pattern)
        return self.learners[estimator.name].gap

    def learn(self, name: str, settings: Mapping, steps: int) -> None:
        """The rows of a learner with these settings and as many steps, if there are none yet."""
        if self.rows.find(name, settings, steps) is not None:
            return
        codes, _ = self.initial(self.args.init)
        digests = self.initial_digests(codes)
        batches = self.batches_of(name, steps)
        layers = self.masked
        estimator = self.learners[name].kind(steps=len(batches), **settings)
        self.put_mask(codes, self.gap_of(estimator))
        trainer = MaskTrainer(self.model, causal_lm_loss, batches, estimator, seed=self.args.seed)
        began = self.clock()
        trainer.begin()
        seconds = self.clock() - began
        figures = {**digests, "changed_groups_at_start": self.changed(codes)}
        began = self.clock()
        trainer.run(len(batches))
        seconds += self.clock() - began
        trainer.close()
        rows = []
        state = state_bytes(estimator, layers)
        figures["changed_groups"] = self.changed(codes)
        if isinstance(estimator, ProxSparse):
            with weights_in_place(layers, estimator.sparse_weights(layers)):
                rows.append(self.row(name + WITH_WEIGHTS, settings, steps, seconds, state, "own", **figures))
        self.rows.add([*rows, self.row(name, settings, steps, seconds, state, **figures)])

    @torch.no_grad()
    def put_mask(self, codes: Mapping[str, Tensor], gap: float) -> None:
        """Set the logits to an initial mask."""
        for layer, module in self.masked.items():
            module.logits.copy_(initial_logits(codes[layer], self.pattern, gap))

    def initial_digests(self, codes: Mapping[str, Tensor]) -> dict[str, str]:
        """Digests of the samples and of an initial mask; ValueError if rows that are there began with others."""
        digests = {"samples": self.samples, "initial_mask": digest([codes[layer] for layer in sorted(codes)])}
        self.check_digests(digests)
        return digests

    def check_digests(self, digests: Mapping[str, str]) -> None:
        """Raise ValueError if rows that are there have others."""
        for name, value in digests.items():
            stored = {row[name] for row in self.rows.rows if name in row} - {value}
            if stored:
                raise ValueError(
                    f"output: expected rows that began with the {name} {value}, got those of {stored.pop()}: another "
                    "machine has rounded otherwise; give another folder"
                )

    def changed(self, codes: Mapping[str, Tensor]) -> int:
        """Number of groups whose mask, by their logits, differs from these."""
        learned = ((top_n_mask(self.masked[name].logits.detach(), self.pattern), codes[name]) for name in codes)
        return sum(int((mask != initial).sum()) for mask, initial in learned)


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return {"of": ""} | (file.metadata() or {})


@contextmanager
def weights_in_place(layers: Mapping[str, nn.Module], weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Give layers these weights for a while, then restore their own."""
    original = {name: layer.weight.detach().clone() for name, layer in layers.items()}

    def put(values: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, layer in layers.items():
                layer.weight.copy_(values[name])

    try:
        put(weights)
        yield
    finally:
        put(original)


def options(description: str) -> argparse.ArgumentParser:
    """The options of comparisons."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.add_argument("--model", default="smollm2-135m", help="as for maskpro learn (default: %(default)s)")
    parser.add_argument("--data", default=DATA, help="what to learn from (default: %(default)s)")
    parser.add_argument("--test", nargs="+", default=["pydoc", "stdlib"], help="texts that rows are scored on")
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--steps", nargs="+", type=int, default=[60, 200], help="the search takes the fewest")
    parser.add_argument("--init", choices=ONE_SHOT, default="reconstruction")
    for name, value in {"batch-size": 8, "seq-len": 128, "samples": 800, "init-batches": 16, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    for name, value in {"eval-windows": 24, "eval-length": 512}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, required=True, help="folder of the rows and the table")
    return parser


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options of a comparison that may leave methods out."""
    parser = options("compare methods that find N:M masks")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    return checked(parser, argv)


def checked(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse options: those of ``options``, and more; wrong ones end the process."""
    args = parser.parse_args(argv)
    if min(args.steps) < 1:
        parser.error(f"--steps: expected at least 1, got {min(args.steps)}")
    if len({Path(name).name for name in args.test}) < len(args.test):
        parser.error(f"--test: expected texts whose files have different names, got {', '.join(args.test)}")
    if not texts_of(args.data):
        parser.error(f"--data: expected a text, by which settings are chosen, got {args.data}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Fill in the rows of the methods that the command asks for, and print the table."""
    args = parsed(argv)
    try:
        comparison = Comparison(args)
        # before any conversion
        comparison.dense  # noqa: B018
        for name in (*ONE_SHOT, *comparison.learners):
            if name in args.methods:
                (comparison.one_shot if name in ONE_SHOT else comparison.learner)(name)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    print(table(comparison.rows.rows), end="")


if __name__ == "__main__":
    main()
