"""The command `maskpro`: learn a mask, evaluate a checkpoint, compare and export runs."""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import torch

from . import convert, finalize, top_n_mask
from .checkpoints import decompress, read_masks, survey, weight_files
from .convert import INITIAL_MASKS, pack, unpack
from .data import batches, load_text, windows
from .estimators import Reinforce, StraightThrough
from .evaluation import causal_lm_loss, perplexity
from .export import check_output, load_logits, save_logits
from .masks import LARGEST_GAP, gap_for_flip_rate, initial_codes, initial_logits
from .modules import MaskedLinear, masked_layers
from .pattern import NMPattern
from .reconstruction import reconstruct
from .trainer import MaskTrainer

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
DTYPE = "bfloat16"
LOGITS, REPORT = "logits.safetensors", "report.json"
# What the commands read of a report
REPORTED = ("model", "pattern", "eval_tokens", "table", "validation", "converted")
SETTINGS = ("data", "dtype", "eval_length")
PERPLEXITY_PICTURE, RESIDUAL_PICTURE = "perplexity.png", "residual.png"
# What each estimator takes where the command line says nothing: learning rate, gap, distinct batches
DEFAULTS = {"reinforce": (50.0, 10.0, 16), "straight-through": (0.1, 15.0, None)}
SOURCES = "pydoc, stdlib, a UTF-8 text file, or a dataset as NAME or NAME:CONFIG"
# Held-out perplexities above that of the initial mask by this factor, twice in a row, end the run
DIVERGED = 1.1


def main(argv: list[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: arguments without the program's name; those of the process by default.

    Returns:
        0, or 2 after a wrong argument, an unreadable file or a loss that is not finite, told in one line on stderr.
    """
    args = _parser().parse_args(argv)
    try:
        args.run(args)
    except (ValueError, TypeError, OSError, FloatingPointError) as error:
        print("maskpro: error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


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
    _add_model(learn)
    _add_data(learn)
    learn.add_argument(
        "--output",
        required=True,
        default=argparse.SUPPRESS,
        metavar="DIR",
        help="folder to write; must be new or empty",
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


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        required=True,
        default=argparse.SUPPRESS,
        help="a local folder, a model id on the hub, or smollm2-135m",
    )


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        required=True,
        default=argparse.SUPPRESS,
        help=SOURCES,
    )


def _add_dtype(parser: argparse.ArgumentParser, help: str, default: str) -> None:
    parser.add_argument("--dtype", choices=DTYPES, default=argparse.SUPPRESS, help=f"{help} (default: {default})")


def _add_evaluation(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--eval-windows", type=int, default=24, metavar="W", help="test windows to evaluate, at most")
    parser.add_argument("--eval-length", type=int, default=512, metavar="T", help="tokens in a test window")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where the model runs, such as cuda:0"
    )


def _learn(args: argparse.Namespace) -> None:
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
        gap_for_flip_rate(flip_rate, pattern)
    if args.seed >= 1 << 63:
        raise ValueError(f"seed: expected an int below 2**63, got {args.seed}")
    if args.estimator == "reinforce":
        if args.gap > LARGEST_GAP:
            raise ValueError(f"gap: expected at most {LARGEST_GAP:g}, which is as far as noise reaches, got {args.gap}")
        args.alpha = getattr(args, "alpha", 0.99)
        estimator = Reinforce(lr=args.lr, alpha=args.alpha)
    else:
        if hasattr(args, "alpha"):
            raise ValueError(f"alpha: expected none, since straight-through has no tracker, got {args.alpha}")
        estimator = StraightThrough(lr=args.lr, steps=args.steps)
    device = _device(args.device)
    output = Path(args.output)
    check_output(output)
    _needs_matplotlib("output")

    with _naming("data"):
        texts = load_text(args.data)
    other = None
    if hasattr(args, "other_data"):
        with _naming("other_data"):
            other = load_text(args.other_data)["test"]
    model, tokenizer = _load(args.model, args.dtype, device)

    def held_out_windows(text: str) -> torch.Tensor:
        return windows(text, tokenizer, args.eval_length)[: args.eval_windows]

    tests = {"perplexity": held_out_windows(texts["test"])}
    if other is not None:
        with _naming("other_data"):
            tests["other_perplexity"] = held_out_windows(other)
    validation = held_out_windows(texts["validation"])
    calibration = windows(texts["calibration"], tokenizer, args.seq_len).to(device)
    calibration = batches(calibration, args.batch_size, args.seed)
    initial_batches, calibration = calibration[: args.init_batches], calibration[: args.calibration_batches]

    table = [_row("dense", model, tests, 0.0)]
    codes, seconds = {}, {}
    began = time.perf_counter()
    gap = args.gap if flip_rate is None else gap_for_flip_rate(flip_rate, pattern)
    conversion = convert(model, pattern, init="wanda", gap=gap, calibration=initial_batches)
    masked = masked_layers(model)
    codes["wanda"], seconds["wanda"] = _codes(masked, pattern), time.perf_counter() - began
    for name, reason in conversion.skipped.items():
        print(f"left dense: {name} ({reason})", file=sys.stderr)
    began = time.perf_counter()
    codes["magnitude"] = initial_codes(masked, pattern, "magnitude")
    seconds["magnitude"] = time.perf_counter() - began
    if args.init == "reconstruction":
        began = time.perf_counter()
        codes["reconstruction"] = reconstruct(model, masked, codes["wanda"], pattern, initial_batches, progress=True)
        seconds["reconstruction"] = time.perf_counter() - began + seconds["wanda"]
    # The mask that learning starts from goes last, so that its logits stay.
    rows = {}
    for init in sorted(codes, key=lambda init: init == args.init):
        _set_logits(masked, codes[init], pattern, conversion.gap)
        rows[init] = _row(init, model, tests, seconds[init])
    table += [rows[init] for init in INITIAL_MASKS if init in rows]

    base = str(Path(args.model).resolve()) if Path(args.model).is_dir() else args.model
    metadata = {"model": base, "pattern": str(pattern), "dtype": args.dtype}
    trainer = MaskTrainer(model, causal_lm_loss, calibration, estimator, seed=args.seed)
    held_out = [{"step": 0, "tokens": 0, "perplexity": perplexity(model, validation, progress=True)}]
    tokens = 0
    checking = 0.0

    def check(record) -> bool:
        nonlocal tokens, checking
        tokens += record.tokens
        step = record.step + 1
        if step % args.eval_every and step < args.steps:
            return False
        began = time.perf_counter()
        held_out.append({"step": step, "tokens": tokens, "perplexity": perplexity(model, validation, progress=True)})
        checking += time.perf_counter() - began
        return len(held_out) > 2 and all(
            row["perplexity"] > DIVERGED * held_out[0]["perplexity"] for row in held_out[-2:]
        )

    began = time.perf_counter()
    try:
        records = trainer.run(args.steps, after_step=check)
    except (FloatingPointError, KeyboardInterrupt):
        output.mkdir(parents=True, exist_ok=True)
        save_logits(model, output / LOGITS, metadata)
        print(f"stopped after {trainer.steps_done} steps; the logits are in {output / LOGITS}", file=sys.stderr)
        raise
    if len(records) < args.steps:
        print(f"stopped after {len(records)} steps: the held-out perplexity rose", file=sys.stderr)
    seconds[args.estimator] = time.perf_counter() - began - checking + seconds[args.init]
    table.append(_row(args.estimator, model, tests, seconds[args.estimator]))
    learned = _codes(masked, pattern)
    flips = {name: int((learned[name] != codes[args.init][name]).sum()) for name in masked}
    groups = sum(code.numel() for code in learned.values())

    output.mkdir(parents=True, exist_ok=True)
    save_logits(model, output / LOGITS, metadata)
    _save(finalize(model), tokenizer, output)
    _draw_perplexity({args.estimator: held_out}, output / PERPLEXITY_PICTURE)
    if args.estimator == "reinforce":
        _draw_residual(records, output / RESIDUAL_PICTURE)
    report = {
        "model": base,
        "pattern": str(pattern),
        "settings": {name: value for name, value in vars(args).items() if name not in ("run", "gap")},
        # Not among the settings: with a flip rate it is not the one on the command line.
        "gap": conversion.gap,
        "versions": _versions(),
        "eval_tokens": tests["perplexity"].numel(),
        "table": table,
        "validation": held_out,
        "groups": groups,
        "flipped_groups": sum(flips.values()),
        "flipped_groups_by_layer": flips,
        "converted": list(conversion.converted),
        "skipped": dict(conversion.skipped),
        "steps": [asdict(record) for record in records],
    }
    # Last: a folder with a report is a run that ended.
    (output / REPORT).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")

    _print_table(table)
    print(f"{sum(flips.values())} of {groups} groups differ from the {args.init} mask; written to {output}")


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


def _draw_residual(records: list, path: Path) -> None:
    from matplotlib.figure import Figure

    steps = [record.step for record in records]
    figure = Figure(figsize=(8, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    above.plot(steps, [record.residual for record in records], ".", label="loss residual")
    above.plot(steps, [record.tracker for record in records], label="tracker")
    above.set_ylabel("nats a token")
    above.legend()
    below.plot(steps, [record.advantage for record in records], ".", label="advantage")
    below.axhline(0, color="gray", linewidth=0.8)
    below.set_ylabel("nats a token")
    below.set_xlabel("step")
    below.legend()
    figure.savefig(path, dpi=120)
