"""The estimators on the command line: those that packages offer, their options, and an estimator made of its options.

What the command knows of them stands in ``learn.estimator`` and in the classes themselves.
"""

from __future__ import annotations

import argparse
from importlib import import_module
from pkgutil import iter_modules

from .. import learn as learn_package
from ..learn.estimator import Estimator, Option, estimators
from .arguments import number, whole

DEFAULT = "straight-through"


def load_estimators() -> None:
    """Import those of this package."""
    for file in iter_modules(learn_package.__path__):
        import_module(f"{learn_package.__name__}.{file.name}")


def add_estimators(parser: argparse.ArgumentParser) -> None:
    """Add ``--estimator``, and the options of all estimators."""
    parser.add_argument(
        "--estimator",
        choices=estimators(),
        default=DEFAULT,
        help="how to learn: " + _escaped("; ".join(f"{name}: {of.summary}" for name, of in estimators().items())),
    )
    for name, by_estimator in _options().items():
        first = next(iter(by_estimator.values()))
        told = [f"{of}: {option.help}{_default_of(option)}" for of, option in by_estimator.items()]
        parser.add_argument(
            "--" + name.replace("_", "-"),
            type={int: whole, float: number}.get(first.kind, first.kind),
            default=argparse.SUPPRESS,
            metavar=first.metavar,
            help=_escaped("; ".join(told)),
        )


def _options() -> dict[str, dict[str, Option]]:
    """The options of all estimators by name, each by the estimators that have it."""
    found: dict[str, dict[str, Option]] = {}
    for estimator, of in estimators().items():
        for option in of.options:
            found.setdefault(option.name, {})[estimator] = option
    return found


def _default_of(option: Option) -> str:
    """For --help; nothing where the option is one to leave out."""
    return "" if option.default is None else f" (default: {_shown(option.default)})"


def run_default(name: str) -> str:
    """For --help: the default that each estimator has of an option that all runs have."""
    told = [f"{_shown(getattr(of.run_defaults, name))} for {estimator}" for estimator, of in estimators().items()]
    return _escaped(f"(default: {', '.join(told)})")


def _shown(value: object) -> str:
    """A default as --help shows it."""
    if value is None:
        return "all"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _escaped(text: str) -> str:
    """What argparse is not to take for a format."""
    return text.replace("%", "%%")


def class_of(args: argparse.Namespace) -> type[Estimator]:
    """The class that ``--estimator`` names; ValueError if there is none."""
    if args.estimator not in estimators():
        raise ValueError(f"estimator: expected one of {', '.join(estimators())}, got {args.estimator!r}")
    return estimators()[args.estimator]


def complete_options(args: argparse.Namespace) -> Estimator:
    """The estimator of a run, whose options are put in where the command line left them out.

    Raises:
        ValueError: if an option is out of its range, or of another estimator.
        TypeError: if an option is of another type, as settings in a file may be.
    """
    own, given = class_of(args), {}
    for name, by_estimator in _options().items():
        if not hasattr(args, name):
            continue
        given[name] = getattr(args, name)
        if args.estimator not in by_estimator:
            holders = " and ".join(by_estimator)
            raise ValueError(f"{name}: expected none, for it is of {holders} alone, got {given[name]}; leave it out")
    options = own.complete(given)
    vars(args).update(options)
    return own.for_run(args.steps, options)
