"""Options that several commands have."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from types import MappingProxyType

import torch

from ..packed import KEEP, VALUE_KINDS
from ..text.losses import KINDS
from .arguments import DTYPE, DTYPES, whole

SOURCE = (
    "pydoc, stdlib, a UTF-8 text file, a dataset in a file (.jsonl, .parquet) or folder, or one of the hub as NAME or "
    "NAME:CONFIG"
)
# How much of a test text is evaluated, where nothing else is said
EVALUATION = MappingProxyType({"eval_windows": 24, "eval_length": 512})
LIST = f"{SOURCE}; or several with a comma between them, each with its share behind a colon"


def add_model(parser: argparse.ArgumentParser, required: bool = True) -> None:
    parser.add_argument(
        "--model",
        required=required,
        default=argparse.SUPPRESS,
        help="a local folder, a model id on the hub, or smollm2-135m",
    )


def add_data(parser: argparse.ArgumentParser, help: str) -> None:
    parser.add_argument("--data", default=argparse.SUPPRESS, metavar="DATA", help=help)
    parser.add_argument(
        "--text-column",
        default=argparse.SUPPRESS,
        metavar="NAME",
        help="of a dataset: column of its documents (default: text)",
    )
    parser.add_argument(
        "--documents",
        type=whole,
        default=argparse.SUPPRESS,
        metavar="D",
        help="read the first D documents of each split of a dataset, as a stream (default: all)",
    )


def add_dtype(parser: argparse.ArgumentParser, help: str, default: str) -> None:
    parser.add_argument("--dtype", choices=DTYPES, default=argparse.SUPPRESS, help=f"{help} (default: {default})")


def add_form(parser: argparse.ArgumentParser, default: str, others: Mapping[str, str] = MappingProxyType({})) -> None:
    """The options of how weights are stored.

    Args:
        others: further choices, each with its help.
    """
    told = "; ".join(["how the weights are stored", *(f"{name}: {help}" for name, help in others.items())])
    parser.add_argument("--to", choices=("dense", "packed", *others), default=default, help=told)
    parser.add_argument(
        "--values",
        choices=VALUE_KINDS,
        default=argparse.SUPPRESS,
        help=f"with --to packed: keep the values as they are, or round them to int8, about half the size (default: "
        f"{KEEP})",
    )


def add_saving(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-shard-size",
        default=argparse.SUPPRESS,
        metavar="SIZE",
        help="split weights into files of at most this size, such as 5GB (default: that of transformers, 50GB)",
    )
    parser.add_argument(
        "--push-to-hub", default=argparse.SUPPRESS, metavar="REPO", help="also upload the checkpoint, as owner/name"
    )
    parser.add_argument(
        "--private", action="store_true", default=argparse.SUPPRESS, help="with --push-to-hub: a private repository"
    )


def add_quiet(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--quiet",
        action="store_true",
        default=argparse.SUPPRESS,
        help="plain lines on stderr instead of bars; always so if stderr is not a terminal",
    )


def add_evaluation(parser: argparse.ArgumentParser, of_a_run: bool = False) -> None:
    """The options that EVALUATION names.

    Args:
        of_a_run: whether the defaults are those of a run where one is evaluated; what is not given is left out then.
    """
    told = {"eval_windows": ("W", "test windows to evaluate, at most"), "eval_length": ("T", "tokens in a test window")}
    for name, (metavar, help) in told.items():
        default = EVALUATION[name]
        if of_a_run:
            default, help = argparse.SUPPRESS, f"{help} (default: that of the run, else {default})"
        parser.add_argument(f"--{name.replace('_', '-')}", type=whole, default=default, metavar=metavar, help=help)


def add_device(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where it runs, such as cuda:0"
    )


def add_pattern(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pattern", default="2:4", metavar="N:M", help="keep N of every M consecutive weights")


def add_kind_of_loss(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--loss",
        choices=KINDS,
        default=KINDS[0],
        help="ce: cross-entropy with the text; kl: divergence from the dense model, which makes a forward of its own; "
        "ce+kl: the mean of the two",
    )


def add_batches(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch-size", type=whole, default=32, metavar="B", help="windows in a calibration batch")
    parser.add_argument("--seq-len", type=whole, default=128, metavar="L", help="tokens in a calibration window")


def add_accumulate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--accumulate", type=whole, default=1, metavar="A", help="batches a step")


def add_dtypes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPE, help="dtype of the weights and activations")
    parser.add_argument("--logits-dtype", choices=DTYPES, default="float32", help="dtype of the logits")


def add_checkpointing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--gradient-checkpointing",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="keep the activations between blocks alone, and compute the others anew in backward: less memory, more "
        "time, the same bits",
    )
