"""``--config FILE``: options of `maskpro learn` from a JSON file; and what the command line gives beside others."""

from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Mapping
from pathlib import Path

from ..learn.estimator import RunDefaults, estimators
from .arguments import number, whole
from .progress import tell

# Of a run's settings.json, beside the settings
START = ("table", "dense_weights")
# Options that no file holds
NOT_IN_A_FILE = ("help", "config", "resume")
# Options that shape no result: a run may go on with others
BESIDE_RESUME = (
    "--device",
    "--device-map",
    "--logits-device",
    "--gradient-checkpointing",
    "--no-gradient-checkpointing",
    "--report-to",
    "--quiet",
)
# Where the command line gives one with another value, these of the file no longer hold
BELONGING = {
    "data": ("samples", "other_data"),
    "loss": ("loss_temperature",),
    "gap": ("flip_rate",),
    "flip_rate": ("gap",),
    "device": ("device_map",),
    "device_map": ("device",),
}


class ConfigFile(argparse.Action):
    """Reads the file, whose options ``take_config`` puts in once the whole command line is known."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: str, *_) -> None:
        try:
            namespace.config = _read(Path(values), parser)
        except (OSError, ValueError) as error:
            raise argparse.ArgumentError(self, str(error)) from error


def eval_every_of(steps: int) -> int:
    """How many steps lie between two evaluations of a run with that many, where ``--eval-every`` is not given."""
    return max(steps // 5, 1)


def _read(path: Path, parser: argparse.ArgumentParser) -> dict[str, object]:
    """Options by name; ValueError unless each is one of the parser's, with a value of its kind."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"expected a JSON file, got {str(path)!r}: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"expected a JSON object of options by name in {str(path)!r}, got {type(found).__name__}")
    of_a_run = isinstance(found.get("settings"), dict) and all(name in found for name in START)
    if of_a_run:
        found = dict(found["settings"])
        # computed from others, which the command line may replace
        if "flip_rate" in found:
            found.pop("gap", None)
        if isinstance(found.get("steps"), int) and found.get("eval_every") == eval_every_of(found["steps"]):
            found.pop("eval_every")
    # a run writes null where it leaves an option out
    return {name: value for name, value in checked_options(found, parser, repr(str(path))).items() if value is not None}


def checked_options(found: Mapping[str, object], parser: argparse.ArgumentParser, where: str) -> dict[str, object]:
    """Options by name, each of the type that the command line gives it; None where it is to have its default.

    Args:
        found: as a file has them.
        parser: whose options they are.
        where: they stand, for errors.

    Raises:
        ValueError: if one is unknown, of another kind, or beside one that it excludes.
    """
    actions = {action.dest: action for action in parser._actions if action.dest not in NOT_IN_A_FILE}
    options = {}
    for name, value in found.items():
        if name not in actions:
            raise ValueError(
                f"expected names of options of `{parser.prog}` in {where}, such as batch_size, got {name!r}"
                + _meant(name, actions)
            )
        options[name] = None if value is None else _checked(name, value, actions[name], where)
    for name, other in (("gap", "flip_rate"), ("device", "device_map")):
        if options.get(name) is not None and options.get(other) is not None:
            raise ValueError(f"expected {name} or {other} in {where}, got both; take one out")
    return options


def _meant(name: str, actions: Mapping[str, argparse.Action]) -> str:
    near = difflib.get_close_matches(name.lstrip("-").replace("-", "_"), actions, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _checked(name: str, value: object, action: argparse.Action, where: str) -> object:
    """The value of an option, of the type that the command line gives it; ValueError if it is of another kind."""

    def refused(expected: str) -> ValueError:
        return ValueError(f"{name} in {where}: expected {expected}, got {json.dumps(value)}")

    if action.nargs == 0:
        if not isinstance(value, bool):
            raise refused("true or false")
        # one that is there counts as given, whatever it holds
        return None if not value and action.default is argparse.SUPPRESS else value
    if action.nargs == "+":
        given = [value] if isinstance(value, str) else value
        if not isinstance(given, list) or not given or not all(word in action.choices for word in given):
            raise refused(f"one or several of {', '.join(action.choices)}")
        return given
    if action.type in (whole, number):
        kinds = (int,) if action.type is whole else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds):
            raise refused("a whole number" if action.type is whole else "a number")
        return action.type(value)
    if action.choices is not None and value not in list(action.choices):
        raise refused(f"one of {', '.join(action.choices)}")
    if action.type is None and not isinstance(value, str):
        raise refused("a text")
    if action.type is None or not isinstance(value, str):
        # what stands for a text of another kind is checked as it would be there
        return value
    try:
        return action.type(value)
    except (argparse.ArgumentTypeError, ValueError) as error:
        raise ValueError(f"{name} in {where}: {error}") from error


def options_given(argv: list[str]) -> frozenset[str]:
    """The options of a command line."""
    return frozenset(option.split("=")[0] for option in argv if option.startswith("--"))


def option_of(name: str) -> str:
    """An option as the command line has it."""
    return f"--{name.replace('_', '-')}"


def _given_names(args: argparse.Namespace) -> set[str]:
    """The options of the command line by name."""
    return {option.removeprefix("--").removeprefix("no-").replace("-", "_") for option in args.given}


def take_config(args: argparse.Namespace) -> None:
    """Put in the options of ``--config``; those of the command line go before.

    Of the file it leaves out what belongs to a value that the command line replaces, and tells so.
    """
    if hasattr(args, "config"):
        told = merge(args, args.config)
        if told is not None:
            tell(f"config: {told}")


def merge(args: argparse.Namespace, config: Mapping[str, object]) -> str | None:
    """Put in options that those given go before; gives what of them was left out, and why, if anything was."""
    given = _given_names(args)
    replaced = {name for name in given & vars(args).keys() if name in config and config[name] != getattr(args, name)}
    replaced |= given & {"gap", "flip_rate", "device", "device_map"}
    belonging = {other for name in replaced for other in BELONGING.get(name, ())}
    if "estimator" in replaced:
        belonging |= {*RunDefaults._fields, "flip_rate", "eval_every"}
        belonging |= {option.name for of in estimators().values() for option in of.options}
    left_out = sorted(belonging & config.keys() - given)
    vars(args).update({name: value for name, value in config.items() if name not in given | set(left_out)})
    if not left_out:
        return None
    return f"left out {', '.join(left_out)}, which go with what {', '.join(map(option_of, sorted(replaced)))} replaces"


def given_beside_resume(args: argparse.Namespace, settings: Mapping) -> dict:
    """The settings of a run with what the command line gives beside ``--resume``."""
    given = {name: getattr(args, name) for name in _given_names(args) - {"resume", "quiet"}}
    for name, other in (("device", "device_map"), ("device_map", "device")):
        if name in given:
            settings = {key: value for key, value in settings.items() if key != other}
    return {**settings, **given}
