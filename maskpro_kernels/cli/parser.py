"""The options of the command `maskpro`."""

from __future__ import annotations

import argparse

from .arguments import DTYPE, whole
from .compare import compare
from .estimator_options import journaled
from .evaluate import evaluate
from .export import export
from .import_checkpoint import import_
from .learn import learn
from .learn_options import add_learning
from .mask_files import apply
from .one_line_parser import OneLineParser, PrintVersions
from .plan_options import add_plan
from .replay import replay
from .shared_options import (
    LIST,
    add_against,
    add_data,
    add_device,
    add_digests,
    add_dtype,
    add_evaluation,
    add_form,
    add_quiet,
    add_saving,
    add_trust,
)
from .speed import FIGURES, PICTURE, speed
from .sweep import sweep
from .tasks import BATCH_SIZE, PAPER, PAPERS_TASKS
from .validate import validate

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
    _add_sweep(commands)
    _add_eval(commands)
    _add_compare(commands)
    _add_export(commands)
    _add_apply(commands)
    _add_replay(commands)
    _add_import(commands)
    _add_validate(commands)
    _add_speed(commands)
    add_plan(commands, SHOW)
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


def _add_sweep(commands) -> None:
    parser = commands.add_parser(
        "sweep",
        help="learn many masks over sets of options, and tell them side by side",
        description="Take runs of `maskpro learn` over a grid or a list of options, one after the other, and write one "
        "report of all. The same command goes on with what was broken off; finished runs are not repeated. The exit "
        "code is 1 where a run has failed.",
        formatter_class=SHOW,
        allow_abbrev=False,
    )
    parser.add_argument("file", metavar="FILE", help="JSON file with options by name: a base, a grid, a list")
    parser.add_argument(
        "--output",
        required=True,
        default=argparse.SUPPRESS,
        metavar="DIR",
        help="folder of the runs' folders; new, empty, or that of a sweep",
    )
    parser.add_argument("--dry-run", action="store_true", help="check all runs, and list them with their states")
    add_trust(parser)
    add_quiet(parser)
    parser.set_defaults(run=sweep)


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
        help="evaluate a whole text as others do: wikitext2@2048 or another length, as Wanda, SparseGPT and MaskLLM; "
        "word, as lm-eval's wikitext. Without --data the text is WikiText-2 (default: test parts, held out from runs)",
    )
    add_evaluation(parser, of_a_run=True)
    add_device(parser)
    _add_tasks(parser)
    parser.add_argument(
        "--output", default=argparse.SUPPRESS, metavar="FILE", help="JSON file of all figures to write; must not exist"
    )
    add_dtype(parser, "dtype of the weights and activations", f"that of the run, else {DTYPE}")
    add_digests(parser)
    add_trust(parser)
    add_quiet(parser)
    parser.set_defaults(run=evaluate)


def _add_tasks(parser: argparse.ArgumentParser) -> None:
    """What lm-eval is asked for."""
    parser.add_argument(
        "--tasks",
        default=argparse.SUPPRESS,
        metavar="TASK[,TASK]",
        help=f"tasks, groups or patterns of lm-eval, such as arc_easy,hellaswag; {PAPER}: the paper's zero-shot set, "
        f"{', '.join(PAPERS_TASKS)}; needs the extra eval",
    )
    parser.add_argument(
        "--include-path",
        default=argparse.SUPPRESS,
        metavar="DIR",
        help="folder with YAML files of more tasks, as lm-eval takes them",
    )
    parser.add_argument(
        "--limit", type=whole, default=argparse.SUPPRESS, metavar="D", help="documents of each task (default: all)"
    )
    parser.add_argument(
        "--batch-size",
        type=whole,
        default=argparse.SUPPRESS,
        metavar="B",
        help=f"requests of tasks that go through the model at once (default: {BATCH_SIZE})",
    )


def _add_compare(commands) -> None:
    parser = commands.add_parser(
        "compare",
        help="one table and picture of several runs, or of results of eval",
        description="Print the table of several runs of the same model, pattern and texts, and draw their validation "
        "perplexity over the tokens they learned from. Or print the figures of several files of `maskpro eval "
        "--output`, and draw them; those of two protocols or two texts are refused.",
        formatter_class=SHOW,
        allow_abbrev=False,
    )
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN|FILE",
        help="folder written by `maskpro learn`, or file by `maskpro eval --output`",
    )
    parser.add_argument("--picture", default=argparse.SUPPRESS, metavar="FILE", help="picture to write; must not exist")
    parser.set_defaults(run=compare)


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
    add_form(parser, "dense", {"mask": "the mask alone, as a small file that `maskpro apply` puts on the base model"})
    add_against(parser, "with --to mask: an initial mask, for a smaller file: magnitude, or a mask file")
    add_dtype(parser, "dtype of the weights", "that of the run")
    add_saving(parser)
    add_trust(parser)
    add_quiet(parser)
    parser.set_defaults(run=export)


def _add_apply(commands) -> None:
    parser = commands.add_parser(
        "apply",
        help="checkpoint from a mask file and its base model",
        description="Write the Hugging Face checkpoint, with exact zeros, that a mask file makes of its base model. "
        "Another base is refused.",
        formatter_class=SHOW,
        allow_abbrev=False,
    )
    parser.add_argument("mask", metavar="MASK", help="file written by `maskpro export --to mask`")
    parser.add_argument(
        "model", metavar="MODEL", help="the base: a local folder, a model id on the hub, or smollm2-135m"
    )
    parser.add_argument("output", metavar="OUTPUT", help="folder to write; must be new or empty")
    add_against(parser, "the file of the initial mask that MASK was written against, where it was")
    add_saving(parser)
    add_trust(parser)
    add_quiet(parser)
    parser.set_defaults(run=apply)


def _add_replay(commands) -> None:
    parser = commands.add_parser(
        "replay",
        help="rebuild a run's logits from its journal",
        description="Rebuild the logits of a run from its first snapshot and its journal, without a model, and print "
        "their digest. Runs have a journal by these estimators: " + journaled() + ".",
        formatter_class=SHOW,
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="RUN", help="folder written by `maskpro learn`, with a journal")
    parser.add_argument(
        "--steps", type=whole, default=argparse.SUPPRESS, metavar="S", help="steps to replay (default: all)"
    )
    parser.add_argument(
        "--output", default=argparse.SUPPRESS, metavar="FILE", help="safetensors file to write; must not exist"
    )
    add_device(parser)
    add_quiet(parser)
    parser.set_defaults(run=replay)


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
    add_digests(parser)
    add_trust(parser)
    add_quiet(parser)
    parser.set_defaults(run=import_)


def _add_validate(commands) -> None:
    parser = commands.add_parser(
        "validate",
        help="which N:M patterns a checkpoint holds, or what a mask file does",
        description="Print for every matrix of a checkpoint the N:M patterns that it follows, the share of values that "
        "are not zero, how many are -0.0, and the largest power of two that divides its rows. Of a mask file, print "
        "its pattern, its base model, the initial mask that it needs, and where it comes from.",
        formatter_class=SHOW,
        allow_abbrev=False,
    )
    parser.add_argument(
        "checkpoint", metavar="DIR|FILE", help="folder with safetensors files, one such file, or a mask file"
    )
    add_digests(parser)
    parser.set_defaults(run=validate)


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
    add_digests(parser)
    add_trust(parser)
    add_quiet(parser)
    parser.set_defaults(run=speed)
