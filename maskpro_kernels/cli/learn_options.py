"""The options of `maskpro learn`."""

from __future__ import annotations

import argparse

from .arguments import DEVICE_MAPS, device_map, number, whole
from .changed_weights import REFITTED
from .config_file import BESIDE_RESUME, ConfigFile
from .estimator_options import add_estimators, run_default
from .run_files import SETTINGS
from .run_settings import DATA, SAMPLES
from .shared_options import (
    LIST,
    SOURCE,
    add_accumulate,
    add_batches,
    add_checkpointing,
    add_data,
    add_device,
    add_dtypes,
    add_evaluation,
    add_kind_of_loss,
    add_model,
    add_pattern,
    add_quiet,
)
from .trackers import NONE, TRACKERS


def add_learning(parser: argparse.ArgumentParser) -> None:
    """Add all options of ``learn``."""
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
    add_quiet(parser)


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
