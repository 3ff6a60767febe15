"""The options of the command `maskpro`."""

from __future__ import annotations

import argparse

from ..training.sharing import PARALLEL
from .arguments import DEVICE_MAPS, DTYPE, device_map, number, whole
from .changed_weights import REFITTED
from .compare import compare
from .config_file import BESIDE_RESUME, ConfigFile
from .estimator_options import add_estimators, journaled, run_default
from .evaluate import evaluate
from .export import export
from .import_checkpoint import import_
from .learn import learn
from .mask_files import apply
from .one_line_parser import OneLineParser, PrintVersions
from .plan_options import add_plan
from .replay import replay
from .run_files import SETTINGS
from .run_settings import DATA, SAMPLES
from .shared_options import (
    add_accumulate,
    add_against,
    add_batches,
    add_checkpointing,
    add_data,
    add_device,
    add_digests,
    add_dtype,
    add_dtypes,
    add_evaluation,
    add_form,
    add_kind_of_loss,
    add_model,
    add_pattern,
    add_quiet,
    add_saving,
    add_trust,
)
from .speed import FIGURES, PICTURE, speed
from .tasks import BATCH_SIZE, PAPER, PAPERS_TASKS
from .trackers import NONE, TRACKERS
from .validate import validate

SHOW = argparse.ArgumentDefaultsHelpFormatter
SOURCE = (
    "pydoc, stdlib, a UTF-8 text file, a dataset in a file (.jsonl, .parquet) or folder, or one of the hub as NAME or "
    "NAME:CONFIG"
)
LIST = f"{SOURCE}; or several with a comma between them, each with its share behind a colon"


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
    parser.add_argument(
        "--config",
        action=ConfigFile,
        default=argparse.SUPPRESS,
        metavar="FILE",
        help=f"JSON file of options by name, such as {SETTINGS} of a run; options of the command line go before",
    )
    add_model(parser, required=False)
    add_data(parser, f"what to learn from: {LIST}; self: samples of the dense model (default: {DATA})")
    parser.add_argument(
        "--samples",
        type=whole,
        default=argparse.SUPPRESS,
        metavar="W",
        help=f"windows that the dense model draws for self, at most (default: {SAMPLES})",
    )
    parser.add_argument(
        "--output", default=argparse.SUPPRESS, metavar="DIR", help="folder to write; must be new or empty"
    )
    parser.add_argument(
        "--resume",
        default=argparse.SUPPRESS,
        metavar="DIR",
        help="continue the interrupted run in DIR with its settings; beside it may stand what does not change the "
        f"result: {', '.join(BESIDE_RESUME)}",
    )
    add_pattern(parser)
    _add_initial_mask(parser)
    add_estimators(parser)
    _add_loss(parser)
    _add_steps(parser)
    _add_watching(parser)
    add_evaluation(parser)
    _add_placement(parser)
    add_trust(parser)
    add_quiet(parser)
    parser.set_defaults(run=learn)


def _add_initial_mask(parser: argparse.ArgumentParser) -> None:
    """What a run of ``learn`` starts from."""
    parser.add_argument(
        "--init",
        default=argparse.SUPPRESS,
        metavar="MASK",
        help="initial mask. magnitude: the largest weights; wanda: the largest weight times input norm; "
        "reconstruction: swaps from there that lower the error of each layer's outputs; sparsegpt: that of SparseGPT; "
        f"random; or a path: a mask file, a run or a sparse checkpoint {run_default('init')}",
    )
    parser.add_argument(
        "--init-batches", type=whole, default=16, metavar="I", help="batches for the initial mask, at most"
    )
    parser.add_argument(
        "--refit",
        choices=REFITTED,
        default="none",
        help="refit the weights under the initial mask, layer by layer, on the batches of --init-batches: one factor a "
        "row (scales), or the kept values (weights). The run is then no longer one of frozen weights",
    )
    exploration = parser.add_mutually_exclusive_group()
    exploration.add_argument(
        "--gap",
        type=number,
        default=argparse.SUPPRESS,
        metavar="G",
        help="initial logit of a kept weight over a dropped one; larger explores less " + run_default("gap"),
    )
    exploration.add_argument(
        "--flip-rate",
        type=number,
        default=argparse.SUPPRESS,
        metavar="F",
        help="instead of --gap: fraction of the groups whose first draw leaves the initial mask",
    )


def _add_loss(parser: argparse.ArgumentParser) -> None:
    """What a run of ``learn`` learns by."""
    add_kind_of_loss(parser)
    parser.add_argument(
        "--loss-temperature",
        type=number,
        default=argparse.SUPPRESS,
        metavar="T",
        help="kl and ce+kl: by which the logits of both are divided (default: 1)",
    )


def _add_steps(parser: argparse.ArgumentParser) -> None:
    """How many steps a run of ``learn`` takes, on which batches."""
    parser.add_argument(
        "--steps",
        type=whole,
        default=argparse.SUPPRESS,
        metavar="S",
        help="training steps " + run_default("steps"),
    )
    add_batches(parser)
    parser.add_argument(
        "--calibration-batches",
        type=whole,
        default=argparse.SUPPRESS,
        metavar="C",
        help="distinct batches to cycle through, at most " + run_default("calibration_batches"),
    )
    add_accumulate(parser)
    parser.add_argument(
        "--parallel",
        choices=PARALLEL,
        default=argparse.SUPPRESS,
        help="under torchrun: what the ranks share, the batches of a step (data) or its draws (draws) (default: "
        f"{PARALLEL[0]})",
    )
    parser.add_argument("--seed", type=whole, default=0, help="seed of the batches and of all draws")


def _add_watching(parser: argparse.ArgumentParser) -> None:
    """What a run of ``learn`` shows beside its table."""
    parser.add_argument(
        "--other-data",
        default=argparse.SUPPRESS,
        metavar="DATA",
        help=f"a text of another kind, whose perplexity the table shows too: {SOURCE} (default: stdlib; pydoc where "
        "stdlib is in the data)",
    )
    parser.add_argument(
        "--eval-every",
        type=whole,
        default=argparse.SUPPRESS,
        metavar="E",
        help="steps between validation perplexities (default: a fifth of the steps)",
    )
    parser.add_argument(
        "--report-to",
        nargs="+",
        choices=(*TRACKERS, NONE),
        default=argparse.SUPPRESS,
        help="where each step is reported, one or several: tensorboard, into the folder tensorboard of the output; "
        f"wandb, by its own environment variables; none (default: {NONE})",
    )


def _add_placement(parser: argparse.ArgumentParser) -> None:
    """Where a run of ``learn`` computes, in which dtypes, and how it saves memory."""
    devices = parser.add_mutually_exclusive_group()
    add_device(devices)
    devices.add_argument(
        "--device-map",
        type=device_map,
        default=argparse.SUPPRESS,
        metavar="MAP",
        help="instead of --device: spread the model over several, as transformers does: "
        f"{', '.join(DEVICE_MAPS)}, or a JSON object of devices by modules; needs accelerate",
    )
    add_dtypes(parser)
    parser.add_argument(
        "--logits-device",
        default=argparse.SUPPRESS,
        metavar="DEVICE",
        help="where the logits live, such as cpu if a GPU has no room for them (default: with their weights)",
    )
    add_checkpointing(parser)


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
    add_evaluation(parser)
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
        help="which N:M patterns a checkpoint holds",
        description="Print for every matrix of a checkpoint the N:M patterns that it follows, the share of values that "
        "are not zero, how many are -0.0, and the largest power of two that divides its rows.",
        formatter_class=SHOW,
        allow_abbrev=False,
    )
    parser.add_argument("checkpoint", metavar="DIR|FILE", help="folder with safetensors files, or one such file")
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
