"""Options of each command: dataclasses, which transformers' HfArgumentParser fills from words and option files."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NoReturn

import torch

from ..packed import KEEP, OUTPUT_LAYERS, VALUE_KINDS
from ..text.losses import KINDS

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
DTYPE = "bfloat16"
# Default texts of a run, and windows of a text to evaluate
DATA = "stdlib:0.5,self:0.5"
EVAL_WINDOWS = 24
EVAL_LENGTH = 512
# Tokens after each prompt of `maskpro eval`
NEW_TOKENS = 32
OPTION_FILES = (".yaml", ".yml", ".json")
SOURCES = (
    "pydoc, stdlib, a UTF-8 text file, a dataset in a file (.jsonl, .parquet) or folder, or a dataset of the hub as "
    "NAME or NAME:CONFIG; or several, separated by commas"
)
MODEL = "a local folder, a model id on the hub, or smollm2-135m"
DEVICE = "device, such as cuda:0 (default: cuda if there is a GPU, else cpu)"

Dtype = Literal[*DTYPES]


def _option(default: object, help: str, metavar: str | None = None, action: str | None = None):
    metadata = {"help": help, "metavar": metavar, "action": action}
    return field(default=default, metadata={name: value for name, value in metadata.items() if value is not None})


@dataclass
class Learn:
    """Learn an N:M mask of a causal language model and write a sparse checkpoint.

    The weights stay frozen unless --refit or --train-weights is given. Prints test perplexities of the dense model, of
    the initial masks and of the learned one, and writes a Hugging Face checkpoint with exact zeros, the logits, a
    report and a picture.
    """

    model: str | None = _option(None, MODEL)
    data: str = _option(
        DATA, f"texts to learn from: {SOURCES}, each with its share after a colon; self: samples of the dense model"
    )
    documents: int | None = _option(
        None, "read the first D documents of each split of a dataset, as a stream (default: all)", "D"
    )
    output: str | None = _option(None, "folder to write; must be new or empty", "DIR")
    resume: str | None = _option(
        None,
        "continue the interrupted run in DIR with its options; only options that do not change the result are allowed "
        "with it: --device, --gradient-checkpointing, --report-to",
        "DIR",
    )
    pattern: str = _option("2:4", "keep N of every M consecutive weights", "N:M")
    density: float | None = _option(
        None,
        "share of the maskable weights to keep, above the pattern's: the matrices whose masks raise the loss most for "
        "each weight stay dense (default: that of the pattern)",
        "D",
    )
    init: str | None = _option(
        None,
        "initial mask. magnitude: the largest weights; wanda: the largest weight times input norm; reconstruction: "
        "wanda with swaps that lower the error of each layer's outputs; sparsegpt; random; or the path of a mask file, "
        "a run or a sparse checkpoint (default: reconstruction; wanda for reinforce)",
        "MASK",
    )
    refit: Literal["none", "scales", "weights"] = _option(
        "none",
        "refit the weights under the initial mask layer by layer: a factor a row (scales) or the kept values (weights)",
    )
    train_weights: float | None = _option(
        None,
        "straight-through: let the kept weights learn in place of the mask, at this rate, falling to 0 over the steps",
        "LR",
    )
    estimator: Literal["straight-through", "reinforce"] = _option(
        "straight-through",
        "how to learn: by gradients through the drawn mask, or only by losses of drawn masks, as the paper does",
    )
    lr: float | None = _option(
        None,
        "learning rate of the logits, without --train-weights (default: 0.3, falling to 0 over the steps; 50 for "
        "reinforce)",
        "LR",
    )
    steps: int | None = _option(None, "training steps; 0: the initial mask (default: 200; 1000 for reinforce)", "S")
    gap: float | None = _option(
        None,
        "initial logit of a kept weight, 0 for a dropped one; larger explores less; no effect with --train-weights "
        "(default: 15; 10 for reinforce)",
        "G",
    )
    loss: Literal[*KINDS] = _option(
        "ce", "ce: cross-entropy with the text; kl: divergence from the dense model; ce+kl: the mean of the two"
    )
    batch_size: int = _option(32, "windows in a batch", "B")
    seq_len: int = _option(128, "tokens in a window, at most the context of the model", "L")
    calibration_batches: int | None = _option(
        None, "distinct batches to cycle through, at most (default: all; 16 for reinforce)", "C"
    )
    accumulate: int = _option(1, "batches a step; ranks of torchrun share them", "A")
    gradient_checkpointing: bool = _option(
        False, "compute activations again in backward: less memory, more time, the same bits"
    )
    seed: int = _option(0, "seed of the batches and of all draws", "S")
    dtype: Dtype | None = _option(None, f"dtype of weights and files (default: {DTYPE}, or float32 if that is faster)")
    device: str | None = _option(
        None, f"{DEVICE}; auto distributes the model over several, by transformers and accelerate"
    )
    eval_every: int | None = _option(None, "steps between validation perplexities (default: a fifth of the steps)", "E")
    eval_windows: int = _option(EVAL_WINDOWS, f"windows of {EVAL_LENGTH} tokens to evaluate, at most", "W")
    report_to: Literal["none", "tensorboard", "wandb", "all"] = _option(
        "none",
        "trackers of steps: tensorboard, into the output's folder of this name; wandb, by its environment; all: both",
    )


@dataclass
class Evaluate:
    """Print perplexities of runs and models, dense, packed or with masks, and how they continue prompts.

    The row of a run is below that of its dense model. Texts are those of the first run unless --data names others.
    """

    data: str | None = _option(
        None, f"texts to evaluate on: {SOURCES} (default: those of the first run, if there is one)"
    )
    protocol: Literal["held-out", "tokens", "word"] = _option(
        "held-out",
        "held-out: windows of the part of a text that runs do not learn from; tokens: windows of the whole text, as "
        "SparseGPT, Wanda and MaskLLM evaluate WikiText-2; word: perplexity by word, like lm-eval's task wikitext",
    )
    documents: int | None = _option(
        None, "held-out: read the first D documents of each split of a dataset, as a stream (default: all)", "D"
    )
    text_column: str = _option("text", "column of a dataset with its documents", "NAME")
    eval_windows: int | None = _option(
        None, f"held-out: windows of each text, at most (default: those of the first run, else {EVAL_WINDOWS})", "W"
    )
    eval_length: int | None = _option(
        None, f"tokens in a window (default: {EVAL_LENGTH}; for word the context of the model)", "T"
    )
    prompt: list[str] | None = _option(
        None, "a text that each model continues greedily; may be repeated", "TEXT", action="append"
    )
    new_tokens: int | None = _option(None, f"tokens that each model adds to each prompt (default: {NEW_TOKENS})", "T")
    device: str | None = _option(None, DEVICE)
    dtype: Dtype | None = _option(
        None, "dtype of the weights and activations (default: that of the first run, else as for `maskpro learn`)"
    )
    output: str | None = _option(None, "JSON file to write, with all figures; must not exist", "FILE")


@dataclass
class Export:
    """Write the checkpoint of a run again from its base model and its logits, or its mask alone as a small file.

    Any program loads a dense checkpoint; this package loads a packed one.
    """

    to: Literal["dense", "packed", "mask"] = _option(
        "dense", "exact zeros, packed weights, or the mask alone, which `maskpro import` applies to its base model"
    )
    values: Literal[*VALUE_KINDS] = _option(
        KEEP, "with --to packed: keep the values, or round them to int8, or by the data of the run to int4"
    )
    output_layer: Literal[*OUTPUT_LAYERS] = _option(
        KEEP, "with --to packed: keep the output layer, or round it to int8, as a layer that is not tied"
    )
    model: str | None = _option(None, f"base model, if it has moved: {MODEL} (default: that of the run)")
    dtype: Dtype | None = _option(None, "dtype of the weights (default: that of the run)")


@dataclass
class Import:
    """Write a checkpoint from files of another program or of `maskpro export --to mask`.

    SOURCE is a folder in compressed-tensors' format sparse-24-bitmask, marlin-24 or dense, or with zeros in its
    weights; or, with --model, masks: a mask file of this package, an .npz file of MaskLLM, or a .pt file or a folder of
    them, of MaskLLM or MaskPro. It may also be an id on the hub.
    """

    output: str | None = _option(None, "folder to write; must be new or empty", "DIR")
    model: str | None = _option(None, f"for masks: their base model, {MODEL}")
    pattern: str | None = _option(None, "pattern of the weights or masks (default: as stored, else 2:4)", "N:M")
    to: Literal["dense", "packed"] = _option("packed", "storage of the weights")
    values: Literal[*VALUE_KINDS] = _option(KEEP, "with --to packed: keep the values, or round them to int8 or int4")
    dtype: Dtype | None = _option(
        None, f"dtype of the weights (default: that of the source or the model, else {DTYPE})"
    )


@dataclass
class Speed:
    """Compare the speed of prefill and decoding, and whether models with equal weights generate the same tokens.

    The prompt is the documentation of Python. The exit code is 1 if models with equal weights differ by more than
    rounding.
    """

    prompt_tokens: int = _option(512, "tokens of each prompt", "T")
    new_tokens: int = _option(128, "new tokens after each prompt", "T")
    batch_size: int = _option(1, "prompts at once", "B")
    rounds: int = _option(5, "measured rounds; each runs all models in turn", "R")
    device: str | None = _option(None, DEVICE)
    dtype: Dtype = _option(DTYPE, "dtype of the weights and activations of all models")
    output: str | None = _option(None, "JSON file to write, with all figures; must not exist", "FILE")


# Options and positional arguments, each with its count and help
COMMANDS: dict[str, tuple[type, tuple[tuple[str, str | None, str], ...]]] = {
    "learn": (Learn, ()),
    "eval": (Evaluate, (("models", "+", f"a run's folder, or {MODEL}"),)),
    "export": (
        Export,
        (
            ("source", None, "folder written by `maskpro learn`"),
            ("output", None, "folder to write, new or empty; with --to mask a new file"),
        ),
    ),
    "import": (Import, (("source", None, "folder or file to read, or an id on the hub, owner/name"),)),
    "speed": (Speed, (("models", "+", f"a run's folder, or {MODEL}"),)),
}


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Show defaults, except those that depend on other options: their help explains them."""

    def _get_help_string(self, action: argparse.Action) -> str:
        return action.help if action.default is None else super()._get_help_string(action)


def parser_of(command: str) -> argparse.ArgumentParser:
    """Make the parser of a command, which raises ValueError for a wrong word."""
    # it takes a second to import
    from transformers import HfArgumentParser

    options, positional = COMMANDS[command]
    parser = HfArgumentParser(
        options,
        prog=f"maskpro {command}",
        description=options.__doc__,
        epilog="A first word that ends in .yaml or .json is a file of options by name; later options take precedence.",
        formatter_class=_Help,
        allow_abbrev=False,
    )
    for action in parser._actions:
        # the help prints the form with hyphens first
        action.option_strings.sort(key=lambda form: "_" in form)
        if isinstance(action, argparse._AppendAction):
            # transformers lets an option of a list take all words up to the next option, positional ones too
            action.nargs = None
    for name, count, help in positional:
        parser.add_argument(name, nargs=count, metavar=name.upper(), help=help)

    def refuse(message: str) -> NoReturn:
        raise ValueError(f"{message}; `{parser.prog} --help` lists the options")

    parser.error = refuse
    return parser


def parse(command: str, words: list[str]) -> tuple[object, dict[str, object]]:
    """Parse the words after a command into (options, positional arguments).

    Raises:
        ValueError: if a word or an option in a file is unknown or of another kind.
        OSError: if the file cannot be read.
        SystemExit: after --help.
    """
    parser = parser_of(command)
    options, positional = COMMANDS[command]
    if words and Path(words[0]).suffix in OPTION_FILES:
        words = [*_words_of(Path(words[0]), parser), *words[1:]]
    parsed = vars(parser.parse_args(words))
    arguments = {name: parsed.pop(name) for name, *_ in positional}
    for name in ("model", "models", "output", "resume", "init", "source"):
        argument = (parsed | arguments).get(name)
        try:
            for value in argument if isinstance(argument, list) else [argument or ""]:
                Path(value).exists()
        except OSError as error:
            raise ValueError(f"{name}: expected a path or a name, got {argument!r}: {error.strerror}") from error
    return options(**parsed), arguments


def _words_of(path: Path, parser: argparse.ArgumentParser) -> list[str]:
    """Read options from a file as words, for the same checks; ``settings.json`` of a run is such a file."""
    import yaml

    try:
        content = path.read_text(encoding="utf-8")
        # the base loader keeps values as text: others read 2:4 as a number in base 60
        options = json.loads(content) if path.suffix == ".json" else yaml.load(content, yaml.BaseLoader)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"options: expected a YAML or JSON file, got {str(path)!r}: {error}") from error
    if isinstance(options, dict) and isinstance(options.get("options"), dict):
        options = options["options"]
    if not isinstance(options, dict):
        raise ValueError(f"options: expected options by name in {str(path)!r}, got {type(options).__name__}")
    words = []
    for name, value in options.items():
        if f"--{name}" not in parser._option_string_actions or name in ("help", "resume"):
            raise ValueError(f"options: expected names of options of `{parser.prog}` in {str(path)!r}, got {name!r}")
        may_repeat = isinstance(parser._option_string_actions[f"--{name}"], argparse._AppendAction)
        if value is None or value == "null":
            continue
        if may_repeat and isinstance(value, (str, list)):
            items = value if isinstance(value, list) else [value]
            if not all(isinstance(item, str) for item in items):
                raise ValueError(f"{name}: expected texts in {str(path)!r}, got {value!r}")
            words += [f"--{name}={item}" for item in items]
            continue
        if isinstance(value, (dict, list)):
            raise ValueError(f"{name}: expected one value in {str(path)!r}, got {value!r}")
        if value != "":
            words.append(f"--{name}={value}")
    return words
