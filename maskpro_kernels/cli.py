"""The command `maskpro`: learn a mask, evaluate a checkpoint, compare and export runs."""

from __future__ import annotations

import argparse
import json
import math
import platform
import shlex
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import save
from tqdm import tqdm

from . import convert, finalize, top_n_mask
from .checkpoints import decompress, read_masks, survey, weight_files
from .convert import INITIAL_MASKS, pack, unpack
from .data import batches, load_text, windows
from .estimators import Reinforce, StraightThrough
from .evaluation import causal_lm_loss, perplexity
from .export import check_output, load_logits, save_logits
from .journal import read as read_journal
from .journal import write_whole
from .masks import LARGEST_GAP, gap_for_flip_rate, initial_codes, initial_logits
from .modules import MaskedLinear, masked_layers
from .pattern import NMPattern
from .reconstruction import reconstruct
from .report import write_html
from .scalars import Scalars
from .snapshots import newest_snapshot, snapshots_in
from .trainer import JOURNAL, METRICS, MaskTrainer, ReplayedLayer, digest, replay

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
DTYPE = "bfloat16"
LOGITS, REPORT, PAGE = "logits.safetensors", "report.json", "report.html"
# What a run leaves while it goes on
SETTINGS_FILE, PROGRESS, VALIDATION = "settings.json", "progress", "validation.jsonl"
# What the commands read of a report
REPORTED = ("model", "pattern", "eval_tokens", "table", "validation", "converted")
SETTINGS = ("data", "dtype", "eval_length")
PERPLEXITY_PICTURE, RESIDUAL_PICTURE = "perplexity.png", "residual.png"
TENSORBOARD = "tensorboard"
# What each estimator takes where the command line says nothing: learning rate, gap, distinct batches
DEFAULTS = {"reinforce": (50.0, 10.0, 16), "straight-through": (0.1, 15.0, None)}
SOURCES = "pydoc, stdlib, a UTF-8 text file, or a dataset as NAME or NAME:CONFIG"
# Held-out perplexities above that of the initial mask by this factor, twice in a row, end the run
DIVERGED = 1.1
# Steps in a row whose loss may be no number
MOST_SKIPPED = 9


def main(argv: list[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: arguments without the program's name; those of the process by default.

    Returns:
        0, or 2 after a wrong argument, an unreadable file or a loss that is not finite, told in one line on stderr.
    """
    argv = sys.argv[1:] if argv is None else argv
    args = _parser().parse_args(argv)
    try:
        _check_resume(args, argv)
        args.run(args)
    except (ValueError, TypeError, OSError, FloatingPointError) as error:
        print("maskpro: error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


def _check_resume(args: argparse.Namespace, argv: list[str]) -> None:
    """A run goes on with its own settings: others beside --resume would be without effect."""
    given = {option.split("=")[0] for option in argv if option.startswith("--")}
    others, args.device_given = given - {"--resume", "--device"}, "--device" in given
    if hasattr(args, "resume") and others:
        raise ValueError(f"resume: expected no other option but --device, got {', '.join(sorted(others))}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="maskpro", description="Learn N:M sparsity masks of frozen language models.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    show = argparse.ArgumentDefaultsHelpFormatter

    learn = commands.add_parser(
        "learn",
        help="learn a mask and write a masked checkpoint",
        description="Learn an N:M mask of a causal language model whose weights stay frozen. Prints held-out "
        "perplexities and writes a Hugging Face checkpoint with exact zeros, the logits, a report and a picture.",
        formatter_class=show,
    )
    _add_model(learn, required=False)
    _add_data(learn, required=False)
    learn.add_argument(
        "--output",
        default=argparse.SUPPRESS,
        metavar="DIR",
        help="folder to write; must be new or empty",
    )
    learn.add_argument(
        "--resume",
        default=argparse.SUPPRESS,
        metavar="DIR",
        help="go on with the run in DIR that was broken off, with its settings; alone, or with --device",
    )
    learn.add_argument("--pattern", default="2:4", metavar="N:M", help="keep N of every M consecutive weights")
    learn.add_argument(
        "--init",
        choices=INITIAL_MASKS,
        default="wanda",
        help="mask to start from: largest weights; largest weight times activation norm; or, from that, swaps that "
        "lower the error of each layer's outputs",
    )
    learn.add_argument(
        "--estimator",
        choices=DEFAULTS,
        default="reinforce",
        help="how to learn: from losses of forward passes alone, as the paper does, or by the gradient of the weights",
    )
    learn.add_argument("--steps", type=int, default=1000, metavar="S", help="training steps")
    learn.add_argument("--batch-size", type=int, default=32, metavar="B", help="windows in a calibration batch")
    learn.add_argument("--seq-len", type=int, default=128, metavar="L", help="tokens in a calibration window")
    learn.add_argument(
        "--init-batches", type=int, default=16, metavar="I", help="batches for the initial mask, at most"
    )
    learn.add_argument(
        "--calibration-batches",
        type=int,
        default=argparse.SUPPRESS,
        metavar="C",
        help="distinct batches to cycle through, at most (default: 16 for reinforce, else all of the text)",
    )
    learn.add_argument(
        "--lr",
        type=float,
        default=argparse.SUPPRESS,
        help="learning rate of the logits (default: 50 for reinforce; 0.1 for straight-through, falling to 0)",
    )
    learn.add_argument(
        "--alpha",
        type=float,
        default=argparse.SUPPRESS,
        metavar="A",
        help="memory of the tracker of reinforce, in [0, 1] (default: 0.99)",
    )
    learn.add_argument(
        "--draws",
        type=int,
        default=argparse.SUPPRESS,
        metavar="K",
        help="masks that a step of reinforce draws and compares, a forward pass each (default: 1, with a tracker)",
    )
    exploration = learn.add_mutually_exclusive_group()
    exploration.add_argument(
        "--gap",
        type=float,
        default=argparse.SUPPRESS,
        metavar="G",
        help="initial logit of a kept weight over a dropped one; larger explores less (default: 10 for reinforce, "
        "15 for straight-through)",
    )
    exploration.add_argument(
        "--flip-rate",
        type=float,
        default=argparse.SUPPRESS,
        metavar="F",
        help="instead of --gap: fraction of the groups whose first draw leaves the initial mask",
    )
    learn.add_argument(
        "--other-data",
        default=argparse.SUPPRESS,
        metavar="DATA",
        help=f"a text of another kind, whose test part the table shows too: {SOURCES}",
    )
    learn.add_argument("--seed", type=int, default=0, help="of the batches and of all draws")
    learn.add_argument(
        "--eval-every",
        type=int,
        default=argparse.SUPPRESS,
        metavar="E",
        help="steps between perplexities of the validation text (default: a fifth of the steps)",
    )
    learn.add_argument(
        "--tensorboard",
        action="store_true",
        default=argparse.SUPPRESS,
        help=f"write what each step sees for TensorBoard, into the folder {TENSORBOARD} of the output",
    )
    _add_evaluation(learn)
    learn.add_argument("--dtype", choices=DTYPES, default=DTYPE, help="dtype of the weights and activations")
    learn.set_defaults(run=_learn)

    evaluate = commands.add_parser(
        "eval",
        help="perplexity of a run or a model",
        description="Print the held-out perplexity of a run's folder or of any causal language model; for a run, "
        "also the fraction of groups that follow its pattern.",
        formatter_class=show,
    )
    evaluate.add_argument("model", metavar="DIR|MODEL", help="a run's folder, or a model as in `maskpro learn --model`")
    _add_data(evaluate)
    _add_evaluation(evaluate)
    _add_dtype(evaluate, "dtype of the weights and activations", f"that of the run, else {DTYPE}")
    evaluate.set_defaults(run=_evaluate)

    compare = commands.add_parser(
        "compare",
        help="one table and picture of several runs",
        description="Print the table of several runs of the same model, pattern and texts, and draw the perplexity of "
        "their validation text over the tokens they learned from.",
        formatter_class=show,
    )
    compare.add_argument("runs", nargs="+", metavar="RUN", help="folder written by `maskpro learn`")
    compare.add_argument(
        "--picture", default=argparse.SUPPRESS, metavar="FILE", help="picture to write; must not exist"
    )
    compare.set_defaults(run=_compare)

    export = commands.add_parser(
        "export",
        help="masked checkpoint from a run's logits",
        description="Rebuild the Hugging Face checkpoint of a run from its base model and its logits: with exact "
        "zeros, which any program loads, or with packed weights, smaller, which this package loads.",
        formatter_class=show,
    )
    export.add_argument("source", metavar="RUN", help="folder written by `maskpro learn`")
    export.add_argument("output", metavar="OUTPUT", help="folder to write; must be new or empty")
    export.add_argument("--to", choices=("dense", "packed"), default="dense", help="how the weights are stored")
    _add_dtype(export, "dtype of the weights", "that of the run")
    export.set_defaults(run=_export)

    replaying = commands.add_parser(
        "replay",
        help="rebuild a run's logits from its journal",
        description="Rebuild the logits of a run by reinforce from its first snapshot and its journal, without a "
        "model, and print their digest.",
        formatter_class=show,
    )
    replaying.add_argument("source", metavar="RUN", help="folder written by `maskpro learn --estimator reinforce`")
    replaying.add_argument("--steps", type=int, default=argparse.SUPPRESS, metavar="S", help="how many (default: all)")
    replaying.add_argument(
        "--output", default=argparse.SUPPRESS, metavar="FILE", help="safetensors file to write; must not exist"
    )
    _add_device(replaying)
    replaying.set_defaults(run=_replay)

    importing = commands.add_parser(
        "import",
        help="checkpoint from what other programs store",
        description="Write a checkpoint with exact zeros or with packed weights from: a folder in compressed-tensors' "
        "sparse-24-bitmask format; a folder whose weights hold zeros in the pattern; or, with --model, learned masks: "
        "an .npz file of MaskLLM, or bool masks of MaskPro in a .pt file or a folder of them.",
        formatter_class=show,
    )
    importing.add_argument("source", metavar="SOURCE", help="folder or file to read")
    importing.add_argument("output", metavar="OUTPUT", help="folder to write; must be new or empty")
    importing.add_argument(
        "--model", default=argparse.SUPPRESS, help="for masks: the model they are of, as in `maskpro learn --model`"
    )
    importing.add_argument("--pattern", default="2:4", metavar="N:M", help="that the weights or masks follow")
    importing.add_argument("--to", choices=("dense", "packed"), default="packed", help="how the weights are stored")
    _add_dtype(importing, "dtype of the weights", f"that of the source or the model, else {DTYPE}")
    importing.set_defaults(run=_import)

    validate = commands.add_parser(
        "validate",
        help="which N:M patterns a checkpoint holds",
        description="Print for every matrix of a checkpoint the N:M patterns that it follows, the share of values that "
        "are not zero, how many are -0.0, and the largest power of two that divides its rows.",
        formatter_class=show,
    )
    validate.add_argument("checkpoint", metavar="DIR|FILE", help="folder with safetensors files, or one such file")
    validate.set_defaults(run=_validate)
    return parser


def _add_model(parser: argparse.ArgumentParser, required: bool = True) -> None:
    parser.add_argument(
        "--model",
        required=required,
        default=argparse.SUPPRESS,
        help="a local folder, a model id on the hub, or smollm2-135m",
    )


def _add_data(parser: argparse.ArgumentParser, required: bool = True) -> None:
    parser.add_argument(
        "--data",
        required=required,
        default=argparse.SUPPRESS,
        help=SOURCES,
    )


def _add_dtype(parser: argparse.ArgumentParser, help: str, default: str) -> None:
    parser.add_argument("--dtype", choices=DTYPES, default=argparse.SUPPRESS, help=f"{help} (default: {default})")


def _add_evaluation(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--eval-windows", type=int, default=24, metavar="W", help="test windows to evaluate, at most")
    parser.add_argument("--eval-length", type=int, default=512, metavar="T", help="tokens in a test window")
    _add_device(parser)


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where the model runs, such as cuda:0"
    )


def _learn(args: argparse.Namespace) -> None:
    if hasattr(args, "resume"):
        _resume(args)
        return
    for name in ("model", "data", "output"):
        if not hasattr(args, name):
            raise ValueError(f"{name}: expected --{name}, or --resume alone, got none")
    pattern = NMPattern(args.pattern)
    flip_rate = getattr(args, "flip_rate", None)
    lr, gap, distinct = DEFAULTS[args.estimator]
    args.lr = getattr(args, "lr", lr)
    args.gap = getattr(args, "gap", gap)
    args.calibration_batches = getattr(args, "calibration_batches", distinct)
    args.eval_every = getattr(args, "eval_every", max(args.steps // 5, 1))
    _at_least(
        args, steps=1, batch_size=1, seq_len=2, init_batches=1, eval_windows=1, eval_length=2, eval_every=1, seed=0
    )
    if args.calibration_batches is not None:
        _at_least(args, calibration_batches=1)
    if not (math.isfinite(args.gap) and args.gap > 0):
        raise ValueError(f"gap: expected a positive number, got {args.gap}")
    if flip_rate is not None:
        # Its range is told now, not after the model has been loaded
        args.gap = gap_for_flip_rate(flip_rate, pattern)
    if args.seed >= 1 << 63:
        raise ValueError(f"seed: expected an int below 2**63, got {args.seed}")
    if args.estimator == "reinforce":
        if args.gap > LARGEST_GAP:
            raise ValueError(f"gap: expected at most {LARGEST_GAP:g}, which is as far as noise reaches, got {args.gap}")
        if getattr(args, "draws", 1) != 1 and hasattr(args, "alpha"):
            raise ValueError(f"alpha: expected none beside several draws, which need no tracker, got {args.alpha}")
        args.alpha, args.draws = getattr(args, "alpha", 0.99), getattr(args, "draws", 1)
    else:
        for name in ("alpha", "draws"):
            if hasattr(args, name):
                raise ValueError(f"{name}: expected none, for it is of reinforce alone, got {getattr(args, name)}")
    _estimator(args)
    _device(args.device)
    output = Path(args.output)
    check_output(output)
    _needs_matplotlib("output")
    _needs_tensorboard(args)

    inputs = _inputs(args)
    _train(args, inputs, _initial_masks(args, inputs), resumed=False)


def _resume(args: argparse.Namespace) -> None:
    """Go on with a run of ``learn`` that was broken off."""
    output = Path(args.resume)
    if (output / REPORT).exists():
        raise ValueError(f"resume: expected a run that has not ended, got {str(output)!r}, which has a report")
    try:
        start = json.loads((output / SETTINGS_FILE).read_text(encoding="utf-8"))
        settings = start["settings"]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"resume: expected a folder in which `maskpro learn` had begun to learn, got {str(output)!r}: {error!r}"
        ) from error
    given = {"device": args.device} if args.device_given else {}
    args = argparse.Namespace(**settings | given | {"output": str(output)})
    _needs_matplotlib("resume")
    _needs_tensorboard(args)
    inputs = _inputs(args)
    # the masks come from a snapshot
    convert(inputs.model, args.pattern, init="magnitude", gap=args.gap)
    _train(args, inputs, start, resumed=True)


def _estimator(args: argparse.Namespace) -> Reinforce | StraightThrough:
    if args.estimator == "reinforce":
        return Reinforce(lr=args.lr, alpha=args.alpha, draws=args.draws)
    return StraightThrough(lr=args.lr, steps=args.steps)


@dataclass
class _Inputs:
    """What a run learns from: windows of tokens of its texts, by use, and the model."""

    model: torch.nn.Module
    tokenizer: object
    tests: dict[str, torch.Tensor]
    validation: torch.Tensor
    initial_batches: list[torch.Tensor]
    calibration: list[torch.Tensor]


def _inputs(args: argparse.Namespace) -> _Inputs:
    with _naming("data"):
        texts = load_text(args.data)
    other = None
    if hasattr(args, "other_data"):
        with _naming("other_data"):
            other = load_text(args.other_data)["test"]
    device = _device(args.device)
    model, tokenizer = _load(args.model, args.dtype, device)

    def held_out_windows(text: str) -> torch.Tensor:
        return windows(text, tokenizer, args.eval_length)[: args.eval_windows]

    tests = {"perplexity": held_out_windows(texts["test"])}
    if other is not None:
        with _naming("other_data"):
            tests["other_perplexity"] = held_out_windows(other)
    calibration = windows(texts["calibration"], tokenizer, args.seq_len).to(device)
    calibration = batches(calibration, args.batch_size, args.seed)
    return _Inputs(
        model,
        tokenizer,
        tests,
        held_out_windows(texts["validation"]),
        calibration[: args.init_batches],
        calibration[: args.calibration_batches],
    )


def _initial_masks(args: argparse.Namespace, inputs: _Inputs) -> dict:
    """Convert the model, evaluate the initial masks and leave that of ``--init``: the rows of the table, and more."""
    pattern, model, tests = NMPattern(args.pattern), inputs.model, inputs.tests
    table = [_row("dense", model, tests, 0.0)]
    codes, seconds = {}, {}
    began = time.perf_counter()
    conversion = convert(model, pattern, init="wanda", gap=args.gap, calibration=inputs.initial_batches)
    masked = masked_layers(model)
    codes["wanda"], seconds["wanda"] = _codes(masked, pattern), time.perf_counter() - began
    for name, reason in conversion.skipped.items():
        print(f"left dense: {name} ({reason})", file=sys.stderr)
    began = time.perf_counter()
    codes["magnitude"] = initial_codes(masked, pattern, "magnitude")
    seconds["magnitude"] = time.perf_counter() - began
    if args.init == "reconstruction":
        began = time.perf_counter()
        codes["reconstruction"] = reconstruct(
            model, masked, codes["wanda"], pattern, inputs.initial_batches, progress=True
        )
        seconds["reconstruction"] = time.perf_counter() - began + seconds["wanda"]
    # The mask that learning starts from goes last, so that its logits stay.
    rows = {}
    for init in sorted(codes, key=lambda init: init == args.init):
        _set_logits(masked, codes[init], pattern, conversion.gap)
        rows[init] = _row(init, model, tests, seconds[init])
    table += [rows[init] for init in INITIAL_MASKS if init in rows]
    return {
        "table": table,
        "seconds": seconds[args.init],
        "converted": list(conversion.converted),
        "skipped": dict(conversion.skipped),
    }


class _HeldOut:
    """Perplexities of the validation text by step, each written down as soon as it is known."""

    def __init__(self, path: Path, model: torch.nn.Module, validation: torch.Tensor, every: int, steps: int):
        self.path, self.model, self.validation, self.every, self.steps = path, model, validation, every, steps
        self.rows: list[dict] = []
        self.seconds = 0.0

    def restore(self, steps_done: int) -> None:
        """Take up the rows of another process, up to a step."""
        if self.path.exists():
            rows = [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]
            self.rows = [row for row in rows if row["step"] <= steps_done]

    def due(self, step: int) -> bool:
        known = bool(self.rows) and self.rows[-1]["step"] == step
        return not known and (step % self.every == 0 or step >= self.steps)

    def add(self, step: int, tokens: int) -> None:
        began = time.perf_counter()
        value = perplexity(self.model, self.validation, progress=True)
        self.rows.append({"step": step, "tokens": tokens, "perplexity": value})
        write_whole(self.path, "".join(json.dumps(row) + "\n" for row in self.rows).encode())
        self.seconds += time.perf_counter() - began

    def risen(self) -> bool:
        """Whether it was twice in a row far above that of the initial mask."""
        return len(self.rows) > 2 and all(
            row["perplexity"] > DIVERGED * self.rows[0]["perplexity"] for row in self.rows[-2:]
        )


class _Signals:
    """SIGINT and SIGTERM, noted so that a step can end first; a second one takes its usual way."""

    def __init__(self):
        self.came = False
        self.before: dict[int, object] = {}

    def __enter__(self) -> _Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                # a job in the background is not to end by what is meant for the foreground
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self.before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame) -> None:
        self.came = True
        print(f"{signal.Signals(number).name}: the run stops after this step", file=sys.stderr)
        self.__exit__()

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


def _train(args: argparse.Namespace, inputs: _Inputs, start: dict, resumed: bool) -> None:
    """Learn, from the first step or from where a run was broken off, and write what was learned."""
    model, output, pattern = inputs.model, Path(args.output), NMPattern(args.pattern)
    progress = output / PROGRESS
    masked = masked_layers(model)
    trainer = MaskTrainer(
        model,
        causal_lm_loss,
        inputs.calibration,
        _estimator(args),
        seed=args.seed,
        output_dir=progress,
        most_skipped=MOST_SKIPPED,
    )
    if not resumed:
        trainer.begin(progress=True)
        settings = {name: value for name, value in vars(args).items() if name not in ("run", "output", "device_given")}
        for name in ("model", "data", "other_data"):
            # from wherever it is gone on with
            if name in settings and Path(settings[name]).exists():
                settings[name] = str(Path(settings[name]).resolve())
        # Behind the first snapshot: a folder with settings can be gone on with.
        write_whole(output / SETTINGS_FILE, json.dumps({"settings": settings, **start}, indent=1).encode())
    base = str(Path(args.model).resolve()) if Path(args.model).is_dir() else args.model
    metadata = {"model": base, "pattern": str(pattern), "dtype": args.dtype}
    held_out = _HeldOut(progress / VALIDATION, model, inputs.validation, args.eval_every, args.steps)
    earlier = 0.0
    if resumed:
        trainer.resume()
        held_out.restore(trainer.steps_done)
        earlier = sum(record["seconds"] for record in _metrics(progress))
        print(f"{trainer.steps_done} steps were taken before", file=sys.stderr)

    def tokens_done() -> int:
        return sum(record["tokens"] for record in _metrics(progress))

    if held_out.due(trainer.steps_done):
        held_out.add(trainer.steps_done, tokens_done())
    began, checked = time.perf_counter(), held_out.seconds
    board = nullcontext()
    if hasattr(args, "tensorboard"):
        board = closing(Scalars(output / TENSORBOARD, trainer.steps_done, held_out.rows))
    with _Signals() as signals, board as scalars:

        def check(record) -> bool:
            step = record.step + 1
            if held_out.due(step):
                held_out.add(step, tokens_done())
            if scalars is not None:
                scalars.add(record, held_out.rows)
            return held_out.risen() or signals.came

        try:
            if trainer.steps_done < args.steps and not held_out.risen():
                trainer.run(args.steps - trainer.steps_done, after_step=check)
        except (FloatingPointError, KeyboardInterrupt):
            save_logits(model, output / LOGITS, metadata)
            print(
                f"stopped after {trainer.steps_done} steps; the logits are in {output / LOGITS}; "
                f"{_how_to_go_on(output)}",
                file=sys.stderr,
            )
            raise
    if signals.came and trainer.steps_done < args.steps:
        save_logits(model, output / LOGITS, metadata)
        print(f"stopped after {trainer.steps_done} steps; {_how_to_go_on(output)}", file=sys.stderr)
        return
    if trainer.steps_done < args.steps:
        print(f"stopped after {trainer.steps_done} steps: the held-out perplexity rose", file=sys.stderr)
    seconds = time.perf_counter() - began - (held_out.seconds - checked) + earlier + start["seconds"]
    table = [*start["table"], _row(args.estimator, model, inputs.tests, seconds)]
    save_logits(model, output / LOGITS, metadata)
    learned = _codes(masked, pattern)
    flips = _flips(progress, learned, pattern)
    groups = sum(code.numel() for code in learned.values())
    records = _metrics(progress)
    logits = {name: layer.logits for name, layer in masked.items()}

    _save(finalize(model), inputs.tokenizer, output)
    _draw_perplexity({args.estimator: held_out.rows}, output / PERPLEXITY_PICTURE)
    if args.estimator == "reinforce" and args.draws == 1:
        _draw_residual(records, output / RESIDUAL_PICTURE)
    report = {
        "model": base,
        "pattern": str(pattern),
        "settings": {name: value for name, value in vars(args).items() if name not in ("run", "gap", "device_given")},
        # Not among the settings: with a flip rate it is not the one on the command line.
        "gap": args.gap,
        "versions": _versions(),
        "eval_tokens": inputs.tests["perplexity"].numel(),
        "table": table,
        "validation": held_out.rows,
        "groups": groups,
        "groups_by_layer": {name: code.numel() for name, code in learned.items()},
        "flipped_groups": sum(flips.values()),
        "flipped_groups_by_layer": flips,
        # What a replay prints
        "logits": digest(logits[name] for name in sorted(logits)),
        "converted": start["converted"],
        "skipped": start["skipped"],
        "steps": records,
    }
    write_html(report, output / PAGE)
    # Last: a folder with a report is a run that ended.
    write_whole(output / REPORT, (json.dumps(report, indent=1) + "\n").encode())
    # What is learned is in the logits; what a replay starts from stays
    for old in snapshots_in(progress)[1 if args.estimator == "reinforce" else 0 :]:
        old.unlink()
    trainer.close()

    _print_table(table)
    print(f"{sum(flips.values())} of {groups} groups differ from the {args.init} mask; written to {output}")


def _flips(progress: Path, learned: dict[str, torch.Tensor], pattern: NMPattern) -> dict[str, int]:
    """How many groups of each layer differ from the mask that learning began with."""
    try:
        _, initial, _, _ = newest_snapshot(progress, at_most=0)
    except ValueError as error:
        print(f"how many groups differ from the initial mask is not known: {error}", file=sys.stderr)
        return {}
    return {name: int((codes.cpu() != top_n_mask(initial[name], pattern)).sum()) for name, codes in learned.items()}


def _how_to_go_on(output: Path) -> str:
    return f"go on with: maskpro learn --resume {shlex.quote(str(output))}"


def _metrics(progress: Path) -> list[dict]:
    path = progress / METRICS
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def _replay(args: argparse.Namespace) -> None:
    progress = Path(args.source) / PROGRESS
    if not (progress / JOURNAL).exists():
        raise ValueError(
            f"run: expected a folder of `maskpro learn --estimator reinforce`, got {args.source!r}, without a journal; "
            "runs by straight-through cannot be replayed"
        )
    header, entries, torn = read_journal(progress / JOURNAL)
    run = header["run"]
    if torn:
        print(f"the last record is cut short by a crash: {torn} bytes are left out", file=sys.stderr)
    steps = getattr(args, "steps", len(entries))
    if not 0 <= steps <= len(entries):
        raise ValueError(f"steps: expected at most the {len(entries)} of the journal, got {steps}")
    output = Path(args.output) if hasattr(args, "output") else None
    if output is not None and (output.exists() or not output.parent.is_dir()):
        raise ValueError(f"output: expected a new file in a folder that exists, got {args.output!r}")
    device = _device(args.device)
    _, tensors, _, _ = newest_snapshot(progress, at_most=0, run=run)
    layers = {
        name: ReplayedLayer(tensors[name].to(device), NMPattern(pattern), layer)
        for name, (layer, pattern, _, _) in run["layers"].items()
    }
    for entry in tqdm(entries[:steps], desc="replaying", unit="step"):
        replay(layers, run["seed"], entry)
    logits = {name: layer.logits.cpu() for name, layer in layers.items()}
    if output is not None:
        write_whole(output, save(logits))
    print(f"{steps} steps of {len(entries)}, logits {digest(logits[name] for name in sorted(logits))}")


def _print_table(table: list[dict]) -> None:
    width = max(16, *(len(row["method"]) for row in table))
    columns = {"perplexity": ("perplexity", 2), "other_perplexity": ("other text", 2), "seconds": ("seconds", 1)}
    columns = {name: column for name, column in columns.items() if all(name in row for row in table)}
    print(f"{'method':<{width}}" + "".join(f"{title:>12}" for title, _ in columns.values()))
    for row in table:
        print(f"{row['method']:<{width}}" + "".join(f"{row[name]:>12.{n}f}" for name, (_, n) in columns.items()))


def _evaluate(args: argparse.Namespace) -> None:
    _at_least(args, eval_windows=1, eval_length=2)
    device = _device(args.device)
    report = Path(args.model) / REPORT
    run = _read_report(report) if report.is_file() else None
    dtype = getattr(args, "dtype", DTYPE if run is None else run["dtype"])
    with _naming("data"):
        texts = load_text(args.data)
    model, tokenizer = _load(args.model, dtype, device)
    test = windows(texts["test"], tokenizer, args.eval_length)[: args.eval_windows]
    print(f"perplexity {perplexity(model, test, progress=True):.2f} over {test.numel()} tokens")
    if run is not None:
        pattern = NMPattern(run["pattern"])
        follow = total = 0
        for name in run["converted"]:
            kept = (model.get_submodule(name).weight.reshape(-1, pattern.m) != 0).sum(1)
            follow += int((kept <= pattern.n).sum())
            total += len(kept)
        print(f"{pattern} {follow / total:.2%} of {total} groups have at most {pattern.n} nonzeros")


def _compare(args: argparse.Namespace) -> None:
    picture = Path(args.picture) if hasattr(args, "picture") else None
    if picture is not None and (picture.exists() or not picture.parent.is_dir()):
        raise ValueError(f"picture: expected a new file in a folder that exists, got {str(picture)!r}")
    reports = {str(Path(run)): _read_report(Path(run) / REPORT) for run in args.runs}
    if picture is not None:
        _needs_matplotlib("picture")
    first = next(iter(reports.values()))
    # the same source may be another text elsewhere
    others = {(report["other_data"], report["table"][0].get("other_perplexity")) for report in reports.values()}
    initial, learned, curves = {}, [], {}
    for run, report in reports.items():
        for name in ("model", "data", "pattern", "dtype", "eval_length", "eval_tokens"):
            if report[name] != first[name]:
                raise ValueError(f"run: expected the same {name} in all, got {first[name]} and {report[name]} in {run}")
        table = report["table"]
        if len(others) > 1:
            table = [{name: value for name, value in row.items() if name != "other_perplexity"} for row in table]
        *before, last = table
        for row in before:
            known = initial.setdefault(row["method"], row)
            if any(known[name] != row[name] for name in row if name != "seconds"):
                # from other calibration batches
                name = f"{row['method']}: {run}"
                initial[name] = row | {"method": name}
        learned.append(last | {"method": f"{last['method']}: {run}"})
        curves[run] = report["validation"]
    _print_table([*initial.values(), *learned])
    if picture is not None:
        _draw_perplexity(curves, picture)


def _export(args: argparse.Namespace) -> None:
    output = Path(args.output)
    check_output(output)
    source = Path(args.source) / LOGITS
    if not source.is_file():
        raise ValueError(f"run: expected a folder written by `maskpro learn`, got {args.source!r}, without {LOGITS}")
    logits, metadata = load_logits(source)
    missing = {"model", "pattern", "dtype"} - metadata.keys()
    if missing:
        raise ValueError(f"run: expected logits of `maskpro learn`, got a file without {sorted(missing)}")
    pattern = NMPattern(metadata["pattern"])
    codes = {name: top_n_mask(tensor, pattern) for name, tensor in logits.items()}
    model, tokenizer = _load(metadata["model"], getattr(args, "dtype", metadata["dtype"]), torch.device("cpu"))
    convert(model, pattern, targets=list(codes), init=codes)
    _save(finalize(model, to=args.to), tokenizer, output)
    print(f"{args.to} {pattern} checkpoint of {metadata['model']} written to {output}")


def _import(args: argparse.Namespace) -> None:
    output, source, pattern = Path(args.output), Path(args.source), NMPattern(args.pattern)
    check_output(output)
    if not source.exists():
        raise ValueError(f"source: expected a file or folder, got {args.source!r}: there is none")
    dtype = getattr(args, "dtype", None) or _stored_dtype(getattr(args, "model", args.source))
    if hasattr(args, "model"):
        model, tokenizer = _load(args.model, dtype, torch.device("cpu"))
        layers = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
        masks = read_masks(source, layers, pattern)
        for name, mask in masks.items():
            # a group may keep fewer than N: what it drops is zero, whether or not it is stored
            layers[name].weight.data.mul_(mask).add_(0.0)
        codes = {name: top_n_mask(mask.float(), pattern) for name, mask in masks.items()}
        convert(model, pattern, targets=list(codes), init=codes)
        _save(finalize(model, to=args.to), tokenizer, output)
        print(f"{args.to} {pattern} checkpoint of {args.model} with {len(codes)} masks written to {output}")
        return
    if not source.is_dir():
        raise ValueError(f"model: expected the model that the masks in {args.source!r} are of, got none")
    with tempfile.TemporaryDirectory(
        dir=output.absolute().parent if output.absolute().parent.is_dir() else None
    ) as tmp:
        decompressed = decompress(source, Path(tmp))
        model, tokenizer = _load(tmp if decompressed else args.source, dtype, torch.device("cpu"))
    conversion = pack(model, pattern)
    for name, reason in conversion.skipped.items():
        print(f"left dense: {name} ({reason})", file=sys.stderr)
    if args.to == "dense":
        unpack(model)
    _save(model, tokenizer, output)
    print(f"{args.to} {pattern} checkpoint with {len(conversion.converted)} sparse layers written to {output}")


def _stored_dtype(folder: str) -> str:
    """The dtype that a checkpoint's config tells, else DTYPE."""
    config = Path(folder) / "config.json"
    try:
        settings = json.loads(config.read_text(encoding="utf-8"))
        stored = str(settings.get("dtype", settings.get("torch_dtype", DTYPE))).removeprefix("torch.")
    except (OSError, ValueError, AttributeError):
        return DTYPE
    return stored if stored in DTYPES else DTYPE


def _validate(args: argparse.Namespace) -> None:
    rows = list(survey(weight_files(args.checkpoint)))
    if not rows:
        raise ValueError(f"checkpoint: expected matrices, got none in {args.checkpoint!r}")
    width = max(len(row.name) for row in rows)
    print(f"{'weight':<{width}}  {'shape':>14}  {'density':>8}  {'-0.0':>6}  {'aligned':>7}  follows")
    for row in rows:
        shape = f"{row.shape[0]}x{row.shape[1]}"
        follows = ", ".join(row.patterns) or "none"
        stored = " (packed)" if row.packed else ""
        print(
            f"{row.name:<{width}}  {shape:>14}  {row.density:>8.2%}  {row.negative_zeros:>6}  {row.alignment:>7}  "
            f"{follows}{stored}"
        )


def _needs_matplotlib(name: str) -> None:
    if find_spec("matplotlib") is None:
        raise ValueError(
            f"{name}: pictures need the package matplotlib, which is not installed "
            "(pip install 'maskpro-kernels[demo]')"
        )


def _needs_tensorboard(args: argparse.Namespace) -> None:
    if hasattr(args, "tensorboard") and find_spec("tensorboard") is None:
        raise ValueError(
            "tensorboard: expected the package tensorboard, which is not installed "
            "(pip install 'maskpro-kernels[tensorboard]')"
        )


@contextmanager
def _naming(argument: str) -> Iterator[None]:
    """Errors of what is made of an argument begin with its name."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{argument}: {error}") from error


def _at_least(args: argparse.Namespace, **least: int) -> None:
    for name, low in least.items():
        if getattr(args, name) < low:
            raise ValueError(f"{name}: expected at least {low}, got {getattr(args, name)}")


def _device(name: str) -> torch.device:
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: expected a device of this machine, got {name!r}: {error}") from error


def _load(name: str, dtype: str, device: torch.device):
    # transformers takes seconds to import: a wrong argument or --help does not wait for it.
    from .hf import load_model

    model, tokenizer = load_model(name, DTYPES[dtype])
    return model.to(device), tokenizer


def _save(model: torch.nn.Module, tokenizer, folder: Path) -> None:
    from .hf import save_model

    save_model(model, tokenizer, folder)


def _row(method: str, model: torch.nn.Module, tests: dict[str, torch.Tensor], seconds: float) -> dict:
    """A row of the table: the perplexity of each test; seconds from the dense model to the mask."""
    perplexities = {name: perplexity(model, test, progress=True) for name, test in tests.items()}
    return {"method": method, **perplexities, "seconds": seconds}


def _codes(masked: dict[str, MaskedLinear], pattern: NMPattern) -> dict[str, torch.Tensor]:
    return {name: top_n_mask(module.logits.detach(), pattern) for name, module in masked.items()}


@torch.no_grad()
def _set_logits(
    masked: dict[str, MaskedLinear], codes: dict[str, torch.Tensor], pattern: NMPattern, gap: float
) -> None:
    for name, module in masked.items():
        module.logits.copy_(initial_logits(codes[name], pattern, gap))


def _read_report(path: Path) -> dict:
    if not path.is_file():
        raise ValueError(
            f"run: expected a folder written by `maskpro learn`, got {str(path.parent)!r}, without {REPORT}"
        )
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        settings = report["settings"]
        read = {name: report[name] for name in REPORTED} | {name: settings[name] for name in SETTINGS}
        return read | {"other_data": settings.get("other_data")}
    except (json.JSONDecodeError, KeyError) as error:
        raise ValueError(f"run: expected a report of `maskpro learn`, got {str(path)!r}: {error!r}") from error


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in ("maskpro-kernels", "torch", "triton", "transformers", "safetensors"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def _draw_perplexity(curves: dict[str, list[dict]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for name, held_out in curves.items():
        axes.plot([row["tokens"] for row in held_out], [row["perplexity"] for row in held_out], "o-", label=name)
    axes.set_xlabel("tokens")
    axes.set_ylabel("perplexity of the validation text")
    axes.legend()
    figure.savefig(path, dpi=120)


def _draw_residual(records: list[dict], path: Path) -> None:
    from matplotlib.figure import Figure

    steps = [record["step"] for record in records]
    figure = Figure(figsize=(8, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    above.plot(steps, [record["residual"] for record in records], ".", label="loss residual")
    above.plot(steps, [record["tracker"] for record in records], label="tracker")
    above.set_ylabel("nats a token")
    above.legend()
    below.plot(steps, [record["advantage"] for record in records], ".", label="advantage")
    below.axhline(0, color="gray", linewidth=0.8)
    below.set_ylabel("nats a token")
    below.set_xlabel("step")
    below.legend()
    figure.savefig(path, dpi=120)
