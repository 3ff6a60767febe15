"""The options of the command `maskpro`."""

from __future__ import annotations

import argparse

from .arguments import DTYPE, whole
from .evaluate import evaluate
from .export import export
from .import_checkpoint import import_
from .learn import learn
from .learn_options import add_learning
from .one_line_parser import OneLineParser, PrintVersions
from .shared_options import (
    LIST,
    add_data,
    add_device,
    add_dtype,
    add_evaluation,
    add_form,
    add_quiet,
    add_saving,
)
from .speed import FIGURES, PICTURE, speed

SHOW = argparse.ArgumentDefaultsHelpFormatter


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command, with the options of all estimators that are registered."""
    parser = OneLineParser(prog="maskpro", description="Learn N:M sparsity masks of frozen language models.")
    parser.add_argument(
        "--version",
        action=PrintVersions,
        nargs=0,
        default=argparse.SUPPRESS,
        help="print the versions of this package and of what it runs on",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_learn(commands)
    _add_eval(commands)
    _add_export(commands)
    _add_import(commands)
    _add_speed(commands)
    return parser


def _add_learn(commands) -> None:
    parser = commands.add_parser(
        "learn",
        help="learn a mask and write a masked checkpoint",
        description="Learn an N:M mask of a causal language model whose weights stay frozen: by straight-through "
        "gradients from the reconstruction mask, unless options say otherwise; --estimator reinforce is the paper's "
        "way. Prints test perplexities and writes a Hugging Face checkpoint with exact zeros, the logits, a report and "
        "pictures.",
        formatter_class=SHOW,
        allow_abbrev=False,
    )
    add_learning(parser)
    parser.set_defaults(run=learn)


def _add_eval(commands) -> None:
    parser = commands.add_parser(
        "eval",
        help="perplexity of a run or a model, and tasks of lm-eval",
        description="Print the test perplexity of a run's folder or of any causal language model, dense, packed or "
        "still with its masks; with --tasks what lm-eval finds; for a run, also the fraction of groups that follow its "
        "pattern.",
        formatter_class=SHOW,
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="DIR|MODEL", help="a run's folder, or a model as in `maskpro learn --model`")
    add_data(
        parser, f"text whose test part is evaluated: {LIST} (default: that of the run; of a model with --tasks none)"
    )
    parser.add_argument(
        "--protocol",
        default=argparse.SUPPRESS,
        metavar="NAME",
        help="evaluate a whole text as others do: tokens@2048 or another length, as Wanda, SparseGPT and MaskLLM; "
        "word, as lm-eval's wikitext. Without --data the text is WikiText-2 (default: test parts, held out from runs)",
    )
    add_evaluation(parser, of_a_run=True)
    add_device(parser)
    parser.add_argument(
        "--output", default=argparse.SUPPRESS, metavar="FILE", help="JSON file of all figures to write; must not exist"
    )
    add_dtype(parser, "dtype of the weights and activations", f"that of the run, else {DTYPE}")
    add_quiet(parser)
    parser.set_defaults(run=evaluate)


def _add_export(commands) -> None:
    parser = commands.add_parser(
        "export",
        help="masked checkpoint from a run's logits",
        description="Rebuild the Hugging Face checkpoint of a run from its base model and its logits: with exact "
        "zeros, which any program loads, or with packed weights, smaller, which this package loads. Or write its mask "
        "alone, as a small file.",
        formatter_class=SHOW,
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="RUN", help="folder written by `maskpro learn`")
    parser.add_argument("output", metavar="OUTPUT", help="folder to write, new or empty; with --to mask a new file")
    parser.add_argument(
        "--model",
        default=argparse.SUPPRESS,
        help="the base model where it is now: a local folder, or a model id on the hub (default: that of the run)",
    )
    add_form(parser, "dense", {"mask": "the mask alone, as a small file that `maskpro import` puts on the base model"})
    add_dtype(parser, "dtype of the weights", "that of the run")
    add_saving(parser)
    add_quiet(parser)
    parser.set_defaults(run=export)


def _add_import(commands) -> None:
    parser = commands.add_parser(
        "import",
        help="checkpoint from another program's files",
        description="Write a checkpoint with exact zeros or with packed weights from: a folder in compressed-tensors' "
        "formats sparse-24-bitmask or dense; a folder whose weights hold zeros in the pattern; or, with --model, "
        "learned masks: an .npz file of MaskLLM, or masks in a .pt file or a folder of them, as MaskLLM and MaskPro "
        "write them. Each may also be an id on the hub.",
        formatter_class=SHOW,
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="SOURCE", help="folder or file to read, or an id on the hub, owner/name")
    parser.add_argument(
        "--output", default=argparse.SUPPRESS, metavar="DIR", help="folder to write; must be new or empty"
    )
    parser.add_argument(
        "--model", default=argparse.SUPPRESS, help="for masks: the model they belong to, as in `maskpro learn --model`"
    )
    parser.add_argument("--pattern", default="2:4", metavar="N:M", help="pattern of the weights or masks")
    add_form(parser, "packed")
    add_dtype(parser, "dtype of the weights", f"that of the source or the model, else {DTYPE}")
    add_saving(parser)
    add_quiet(parser)
    parser.set_defaults(run=import_)


def _add_speed(commands) -> None:
    parser = commands.add_parser(
        "speed",
        help="how fast models read and write, side by side",
        description="Check that models with the same weights write the same greedy tokens, then measure how many "
        "tokens a second each reads and writes, and its memory. The prompt is the documentation of Python. The exit "
        "code is 1 where models with the same weights differ by more than rounding.",
        formatter_class=SHOW,
        allow_abbrev=False,
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help="a model as in `maskpro learn --model`, or a run")
    parser.add_argument("--prompt-tokens", type=whole, default=512, metavar="T", help="tokens of each prompt")
    parser.add_argument("--new-tokens", type=whole, default=128, metavar="T", help="tokens written behind each prompt")
    parser.add_argument("--batch-size", type=whole, default=1, metavar="B", help="prompts at once")
    parser.add_argument("--rounds", type=whole, default=5, metavar="R", help="rounds, of all models in turn, to count")
    parser.add_argument(
        "--threads",
        type=whole,
        default=argparse.SUPPRESS,
        metavar="C",
        help="threads of torch on a CPU (default: as many as torch takes)",
    )
    parser.add_argument(
        "--output",
        default=argparse.SUPPRESS,
        metavar="DIR",
        help=f"folder for {FIGURES} and {PICTURE}; must be new or empty",
    )
    add_device(parser)
    add_dtype(parser, "dtype of the weights and activations, of all models", DTYPE)
    add_quiet(parser)
    parser.set_defaults(run=speed)
