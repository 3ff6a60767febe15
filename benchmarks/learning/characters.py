"""Gain of REINFORCE if scalars are enough: masks of small character models, by forward passes alone.

    python benchmarks/learning/characters.py

A model of 16 characters of context (Bengio et al. 2003) is trained on the Python documentation, in less than a minute.
Its two hidden layers get Wanda's 2:4 mask, and the paper's update (MaskPro, arXiv 2506.12876, section 4) continues from
there: a draw a step, loss residual and tracker, frozen weights. Learning rate and flip rate are those with which
validation text has the lowest loss in the end; the test text judges nothing.

A row shows the loss of test text under the masks to keep, the N largest logits of each group, and what of the loss
that Wanda's mask has cost is regained. Forwards are those of one run: one a step, and one a batch under the initial
mask. Wanda's own, one a batch, and the other runs of the search come on top.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from pictures import picture
from rows import finite
from torch import Tensor, nn

from maskpro_kernels.learn.reinforce import Reinforce
from maskpro_kernels.learn.trainer import MaskTrainer
from maskpro_kernels.prune.convert import convert
from maskpro_kernels.text.sources import SPLITS, load_text

CONTEXT = 16
EMBEDDING = 16
MASKED = ("first", "second")
PATTERN = "2:4"
# Characters that are predicted in a batch to train on, in one to learn masks from, and of held-out text
TRAINED = 512
LEARNED = 1024
HELD_OUT = 16384
BATCHES = 64
# Of forwards, which rows show
COUNTS = [1000, 2000, 4000, 8000, 16000]


class CharacterModel(nn.Module):
    """The next character from the 16 before it: embeddings side by side, two hidden layers.

    Args:
        characters: how many there are.
        width: of the hidden layers.
    """

    def __init__(self, characters: int, width: int):
        super().__init__()
        self.embedding = nn.Embedding(characters, EMBEDDING)
        self.first = nn.Linear(CONTEXT * EMBEDDING, width)
        self.second = nn.Linear(width, width)
        self.head = nn.Linear(width, characters)

    def forward(self, context: Tensor) -> Tensor:
        """Logits [rows, characters] of contexts, int64 [rows, 16]."""
        hidden = F.gelu(self.first(self.embedding(context).flatten(1)))
        return self.head(F.gelu(self.second(hidden)))


def loss_of(model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    """Cross-entropy in nats a character, of a batch (contexts [rows, 16], next characters [rows])."""
    context, following = batch
    return F.cross_entropy(model(context), following)


class Text(NamedTuple):
    """The splits of a text as indices of characters; one that the calibration text lacks is 0."""

    characters: int
    splits: Mapping[str, Tensor]

    @classmethod
    def load(cls, source: str) -> Text:
        texts = load_text(source)
        indices = {character: i for i, character in enumerate(sorted(set(texts["calibration"])), start=1)}
        splits = {name: torch.tensor([indices.get(character, 0) for character in texts[name]]) for name in SPLITS}
        return cls(len(indices) + 1, splits)

    def batch(self, split: str, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(contexts [rows, 16], the characters after them [rows]) from positions drawn at random."""
        windows = self.splits[split].unfold(0, CONTEXT + 1, 1)
        drawn = windows[torch.randint(len(windows), (rows,), generator=generator)]
        return drawn[:, :CONTEXT], drawn[:, CONTEXT]


def trained(text: Text, width: int, steps: int, seed: int = 0) -> CharacterModel:
    """A dense model, trained on the calibration text."""
    torch.manual_seed(seed)
    model = CharacterModel(text.characters, width)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model, text.batch("calibration", TRAINED, generator)).backward()
        optimizer.step()
        schedule.step()
    return model.eval()


class Problem:
    """A trained model, batches to learn masks from, and held-out texts.

    Args:
        text: of the model.
        model: dense; it stays so, each run has a copy.
        seed: of the batches. Held-out text is always the same.
        batches: how many there are.
    """

    def __init__(self, text: Text, model: CharacterModel, seed: int = 0, batches: int = BATCHES):
        self.text = text
        self.model = model
        generator = torch.Generator().manual_seed(seed)
        held_out_generator = torch.Generator().manual_seed(0)
        self.batches = [text.batch("calibration", LEARNED, generator) for _ in range(batches)]
        self.held_out = {split: text.batch(split, HELD_OUT, held_out_generator) for split in ("validation", "test")}
        self.groups = sum(model.get_submodule(name).weight.numel() // 4 for name in MASKED)

    @torch.no_grad()
    def losses(self, model: nn.Module) -> dict[str, float]:
        """Losses of the held-out texts, in nats a character."""
        return {split: loss_of(model.eval(), batch).item() for split, batch in self.held_out.items()}

    def learned(
        self,
        lr: float,
        flip_rate: float,
        counts: Sequence[int],
        seed: int = 0,
        init: str = "wanda",
        pattern: str = PATTERN,
        **settings,
    ) -> Iterator[dict[str, float]]:
        """Losses under the initial mask, and then after each number of forwards, by the paper's update.

        Args:
            lr: of ``Reinforce``, as are ``settings``.
            flip_rate: share of the groups that leave the initial mask in the first draw.
            counts: of forwards, ascending, each above the number of batches.
            seed: of the draws, and of a random initial mask.
            init, pattern: as for ``convert``.
        """
        model = CharacterModel(self.text.characters, self.model.first.out_features)
        model.load_state_dict(self.model.state_dict())
        contexts = [context for context, _ in self.batches]
        convert(model, pattern, targets=list(MASKED), init=init, flip_rate=flip_rate, calibration=contexts, seed=seed)
        yield self.losses(model)
        estimator = Reinforce(lr=lr, **settings)
        trainer = MaskTrainer(model, loss_of, self.batches, estimator, seed=seed)
        initial_forwards = len(self.batches) if estimator.needs_initial_losses else 0
        for count in counts:
            trainer.run((count - initial_forwards) // estimator.draws - trainer.steps_done, progress=False)
            yield self.losses(model)


class Curve(NamedTuple):
    """Result of a run: test losses, and how they were measured.

    Attributes:
        groups: of the masked layers.
        dense, wanda: losses of test text in nats a character, without a mask and under Wanda's.
        learned: likewise, by the number of forwards.
        lr, flip_rate: with which validation text had the lowest loss.
        seconds: of the run.
    """

    groups: int
    dense: float
    wanda: float
    learned: dict[int, float]
    lr: float
    flip_rate: float
    seconds: float

    def regained(self, forwards: int) -> float:
        """Share of the loss that Wanda's mask has cost."""
        return (self.wanda - self.learned[forwards]) / (self.wanda - self.dense)


def best_curve(problem: Problem, counts: Sequence[int], lrs: Sequence[float], flip_rates: Sequence[float]) -> Curve:
    """The run of all learning rates and flip rates whose last mask is best on validation text."""
    runs = []
    for lr, flip_rate in itertools.product(lrs, flip_rates):
        began = time.perf_counter()
        wanda, *losses = problem.learned(lr, flip_rate, counts)
        seconds = time.perf_counter() - began
        learned = {count: loss["test"] for count, loss in zip(counts, losses, strict=True)}
        dense = problem.losses(problem.model)["test"]
        curve = Curve(problem.groups, dense, wanda["test"], learned, lr, flip_rate, seconds)
        runs.append((finite(losses[-1]["validation"]), curve))
    return min(runs, key=lambda run: run[0])[1]


def table(curves: Sequence[Curve]) -> str:
    """Markdown: a column for each number of forwards, the loss of test text and the share that is regained."""
    counts = list(curves[0].learned)
    heads = ["groups", "lr", "flip rate", "dense", "Wanda", *(f"{count:,} forwards" for count in counts), "seconds"]
    lines = [heads, ["---:"] * len(heads)]
    for curve in curves:
        losses = [f"{curve.learned[count]:.3f} ({curve.regained(count):.0%})" for count in counts]
        settings = [f"{curve.groups:,}", f"{curve.lr:g}", f"{curve.flip_rate:g}"]
        lines.append([*settings, f"{curve.dense:.3f}", f"{curve.wanda:.3f}", *losses, f"{curve.seconds:.0f}"])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def draw(curves: Sequence[Curve], path: Path) -> None:
    """A picture of the shares that are regained over the forwards, a curve for each size."""
    with picture(path) as axes:
        for curve in curves:
            shares = [100 * curve.regained(count) for count in curve.learned]
            axes.plot(list(curve.learned), shares, "o-", label=f"{curve.groups:,} groups")
        axes.set(xscale="log", xlabel="forward passes", ylabel="% of what Wanda's mask cost, regained")
        axes.axhline(0.0, color="gray", linewidth=0.8)
        axes.legend()


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="masks of character models by REINFORCE", allow_abbrev=False)
    parser.add_argument("--widths", nargs="+", type=int, default=[16, 64, 256], help="of the hidden layers")
    parser.add_argument("--forwards", nargs="+", type=int, default=COUNTS, help=f"to show, each above {BATCHES}")
    parser.add_argument("--lrs", nargs="+", type=float, default=[2.0, 6.0, 20.0], help="learning rates to try")
    parser.add_argument("--flip-rates", nargs="+", type=float, default=[0.01], help="to try")
    parser.add_argument("--train-steps", type=int, default=3000, help="of the dense model")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="picture to write")
    args = parser.parse_args(argv)
    if min(args.forwards) <= BATCHES:
        parser.error(f"--forwards: expected more than {BATCHES}, one a batch, got {min(args.forwards)}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parsed(argv)
    text = Text.load("pydoc")
    curves = []
    for width in args.widths:
        began = time.perf_counter()
        model = trained(text, width, args.train_steps)
        print(f"width {width}: trained in {time.perf_counter() - began:.0f} seconds", flush=True)
        curves.append(best_curve(Problem(text, model), sorted(set(args.forwards)), args.lrs, args.flip_rates))
    print("Loss of test text in nats a character; in brackets the share of what Wanda's mask cost that is regained:")
    print(table(curves), end="")
    if args.picture is not None:
        draw(curves, args.picture)
        print(f"curve: {args.picture}")


if __name__ == "__main__":
    main()
