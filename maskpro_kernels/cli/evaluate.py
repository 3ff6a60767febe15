"""`maskpro eval`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch

from ..linear_form import as_linears
from ..pattern import NMPattern
from ..report import FROZEN
from ..text.mixture import parse_sources, shared_out, texts_of
from ..text.perplexity import perplexity
from .arguments import DTYPE, check_least, device_of, telling
from .models import load
from .run_files import REPORT, goes_on, how_to_go_on, read_report, stored_data
from .texts import Texts, check_sources, evaluation_windows


def evaluate(args: argparse.Namespace) -> None:
    """Print the perplexity of a run or a model; of a run also how many groups follow its pattern."""
    check_least(args, eval_windows=1, eval_length=2)
    device = device_of(args.device)
    folder = Path(args.model)
    if goes_on(folder) and not (folder / "config.json").is_file():
        raise ValueError(f"model: expected a model or a run that has ended, got {args.model!r}; {how_to_go_on(folder)}")
    report = folder / REPORT
    run = read_report(report) if report.is_file() else None
    dtype = getattr(args, "dtype", DTYPE if run is None else run["dtype"])
    if not hasattr(args, "data"):
        if run is None:
            found = "no run that has begun to learn" if folder.exists() else "no such folder"
            raise ValueError(
                f"data: expected --data, since only a run has a text of its own, got none; at {args.model!r} there is "
                f"{found}"
            )
        vars(args).update(stored_data(folder) | vars(args))
    with telling("eval_windows"):
        shared_out(texts_of(args.data), args.eval_windows)
    check_sources(args, [name for name, _ in parse_sources(args.data)])
    loaded = Texts(args)
    texts = loaded.of(args.data)
    if not texts:
        raise ValueError(
            f"data: expected a text, got {args.data!r}, and samples are no test of a mask; name a text by --data"
        )
    model, tokenizer = load(args.model, dtype, device, args.bars)
    test = evaluation_windows(args, texts, "test", model, tokenizer)
    loaded.tell_notes()
    follows = None if run is None else _follows(model, run)
    print(f"test perplexity {perplexity(model, test, progress=args.bars):.2f} over {test.numel()} tokens")
    if follows is not None:
        print(follows)
        if run["weights"] != FROZEN:
            print(f"not the dense model's weights under a mask: {run['weights']}")


def _follows(model: torch.nn.Module, run: Mapping) -> str:
    pattern = NMPattern(run["pattern"])
    as_linears(model)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    follow = total = 0
    for name in run["converted"]:
        if name not in linears or linears[name].in_features % pattern.m:
            raise ValueError(
                f"run: expected a linear layer {name!r} that {pattern} divides, as {REPORT} tells, got none in the "
                f"checkpoint; restore {REPORT} from a copy, or move it away"
            )
        kept = (linears[name].weight.reshape(-1, pattern.m) != 0).sum(1)
        follow += int((kept <= pattern.n).sum())
        total += len(kept)
    return f"{pattern} {follow / total:.2%} of {total} groups have at most {pattern.n} nonzeros"
