"""The FILE of `maskpro sweep`: sets of options of `maskpro learn`, each checked, and the folder that each run gets."""

from __future__ import annotations

import argparse
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ..checked_json import each_once, load_json
from ..digests import digest_of_bytes
from ..ranks import Ranks
from ..text.data import is_path
from ..text.mixture import parse_sources
from ..text.records import names_a_file
from .config_file import BESIDE_RESUME, TRUST, checked_options, merge, option_of
from .learn_options import add_learning
from .models import hub_id, is_path_of_model
from .one_line_parser import OneLineParser
from .run_settings import DATA, NO_SETTINGS, check_process, complete
from .start_mask import StartMask

BASE, GRID, LIST, SEED = "base", "grid", "list", "seed"
# Options of `learn` that are the sweep's own, or that one process has no use for
NOT_SWEPT = ("output", "quiet", "parallel")
# Of the options that shape no result, those that a run which goes on takes as they are now
PLACED = ("device", "device_map", "logits_device", "gradient_checkpointing", "report_to")
# Longest part of a folder's name that a value, and that all values take
VALUE_LENGTH, NAME_LENGTH = 24, 100


@dataclass(frozen=True)
class SweepRun:
    """A run of a sweep.

    Attributes:
        varied: its options of the list and the grid, by name; None where one is to have its default.
        given: all its options, those of the base too.
        args: those of ``learn``, as a command line would give them, without ``output`` and ``bars``.
        own: of those given, all that its result follows from and that are not at their defaults. Paths are as the FILE
            has them: what is there now, or is no more, makes it no other run.
        seed: given or not.
    """

    varied: Mapping[str, object]
    given: Mapping[str, object]
    args: argparse.Namespace
    own: Mapping[str, object]
    seed: int

    @cached_property
    def digest(self) -> str:
        """Tells it from all other runs, also of another FILE."""
        return _digest(self.own)

    @cached_property
    def row(self) -> str:
        """The same but for the seed: what runs have in common that are told as one row."""
        return _digest({name: value for name, value in self.own.items() if name != SEED})

    @cached_property
    def name(self) -> str:
        """Of its folder: what is varied, short, and the digest."""
        told = "_".join(f"{name}={_short(value)}" for name, value in self.varied.items())
        return f"{told[:NAME_LENGTH] or BASE}_{self.digest}"

    def arguments(self, output: Path, begun: bool, bars: bool) -> argparse.Namespace:
        """Those of ``learn`` for a run in a folder, or for one that goes on there."""
        if not begun:
            return argparse.Namespace(**vars(self.args) | {"output": str(output), "bars": bars})
        placed = {name: getattr(self.args, name) for name in PLACED if name in self.given and hasattr(self.args, name)}
        if "device_map" not in placed:
            # of this machine, which may be another one
            placed["device"] = self.args.device
        trust = {name: value for name, value in vars(self.args).items() if name == TRUST}
        options = frozenset(map(option_of, [*placed, *trust]))
        return argparse.Namespace(resume=str(output), given=options, bars=bars, **placed, **trust)


def read_sweep(path: Path, trust: Mapping[str, bool]) -> tuple[list[SweepRun], list[str]]:
    """(the runs of a FILE, what is to be told of it); each is checked as ``learn`` would, but for ``check_files``.

    Args:
        path: of the FILE.
        trust: {TRUST: True} where code of checkpoints may be run, else empty.

    Raises:
        ValueError, TypeError: if the FILE or a set of options is unfit.
        OSError: if it cannot be read.
    """
    parser = OneLineParser(prog="maskpro learn", allow_abbrev=False)
    add_learning(parser)
    base, sets = _read(path, parser)
    runs: dict[str, SweepRun] = {}
    notes: list[str] = []
    for varied in sets:
        args, note = _arguments(parser, base, varied, trust)
        given = {name: value for name, value in {**base, **varied}.items() if value is not None}
        # but for what the set replaces
        given = {name: value for name, value in given.items() if getattr(args, name, None) == value}
        seed = _check(args, varied, path)
        run = SweepRun(varied, given, args, _own(parser, given, varied), seed)
        if run.digest in runs:
            raise ValueError(
                f"file: expected sets of options in {str(path)!r} that give different runs, got "
                f"{json.dumps(runs[run.digest].varied)} and {json.dumps(varied)}; take one out"
            )
        runs[run.digest] = run
        if note is not None and note not in notes:
            notes.append(note)
    return list(runs.values()), notes


def _read(path: Path, parser: argparse.ArgumentParser) -> tuple[dict, list[dict]]:
    """(the base, the sets of the list with each point of the grid); ValueError unless they are well formed."""
    try:
        found = load_json(path.read_text(encoding="utf-8"), each_once)
    except ValueError as error:
        raise ValueError(f"file: expected a JSON file, got {str(path)!r}: {error}") from error
    whole = f"file: expected a JSON object with {BASE}, and with {GRID}, {LIST} or both, in {str(path)!r}, got"
    if not isinstance(found, dict):
        raise ValueError(f"{whole} {json.dumps(found)[:80]}")
    others = [name for name in found if name not in (BASE, GRID, LIST)]
    if others or not {GRID, LIST} & found.keys():
        cure = f"; put them into {BASE}" if len(others) == len(found) > 0 else ""
        raise ValueError(f"{whole} {', '.join(map(repr, others or found)) or 'an empty one'}{cure}")

    def checked(options: object, part: str) -> dict:
        where = f"{part} of {str(path)!r}"
        if not isinstance(options, dict):
            raise ValueError(f"file: expected an object of options by name as {where}, got {json.dumps(options)[:80]}")
        for name in options.keys() & set(NOT_SWEPT):
            raise ValueError(f"file: expected no {name} in {where}, got {json.dumps(options[name])}; leave it out")
        try:
            return checked_options(options, parser, where)
        except ValueError as error:
            raise ValueError(f"file: {error}") from error

    def several(value: object, part: str) -> list:
        if not isinstance(value, list) or not value:
            got = json.dumps(value)[:80]
            raise ValueError(f"file: expected a list with at least one entry as {part} of {str(path)!r}, got {got}")
        return value

    base, grid = checked(found.get(BASE, {}), BASE), found.get(GRID, {})
    if not isinstance(grid, dict):
        raise ValueError(
            f"file: expected an object of lists by option as {GRID} of {str(path)!r}, got {json.dumps(grid)[:80]}"
        )
    listed = [checked(options, LIST) for options in several(found.get(LIST, [{}]), LIST)]
    axes = [
        [checked({name: value}, GRID) for value in several(values, f"{name} in {GRID}")]
        for name, values in grid.items()
    ]
    twice = sorted(grid.keys() & {name for options in listed for name in options})
    if twice:
        raise ValueError(
            f"file: expected each option in {GRID} or in {LIST} of {str(path)!r}, got {', '.join(twice)} in both; "
            "take it out of one"
        )
    return base, list(_sets(listed, axes))


def _sets(listed: Sequence[dict], axes: Sequence[Sequence[dict]]) -> Iterator[dict]:
    for parts in itertools.product(listed, *axes):
        yield {name: value for part in parts for name, value in part.items()}


def _arguments(
    parser: argparse.ArgumentParser, base: Mapping, varied: Mapping, trust: Mapping[str, bool]
) -> tuple[argparse.Namespace, str | None]:
    """(the arguments of a run, what of the base is left out for them): varied ones go before the base."""
    args = parser.parse_args([])
    options = {name: value for name, value in varied.items() if value is not None}
    vars(args).update({**options, **trust})
    args.given = frozenset(map(option_of, options))
    defaults = {name for name, value in varied.items() if value is None}
    note = merge(args, {name: value for name, value in base.items() if value is not None and name not in defaults})
    return args, note


def check_files(run: SweepRun, path: Path) -> None:
    """Raise ValueError where a run that is new names a model, a text or a mask by a path at which there is none."""
    args = run.args
    try:
        if hub_id(args.model) is None and not is_path_of_model(args.model):
            raise ValueError(f"model: expected a folder, or a name on the hub, got {args.model!r}, which is not there")
        texts = {"data": [name for name, _ in parse_sources(getattr(args, "data", DATA))]}
        texts["other_data"] = [args.other_data] if hasattr(args, "other_data") else []
        for option, names in texts.items():
            for name in names:
                if not is_path(name) and names_a_file(name):
                    raise ValueError(f"{option}: expected a text, got {name!r}, and there is no such file or folder")
        args = _without_output(args)
        complete(args)
        StartMask(args)
    except ValueError as error:
        raise ValueError(f"{error}; {_where(run.varied, path)}") from error


def _check(args: argparse.Namespace, varied: Mapping, path: Path) -> int:
    """The seed of a run; ValueError or TypeError if ``learn`` would refuse its arguments."""
    args = _without_output(args)
    try:
        check_process(args, Ranks(), complete(args).draws)
    except (ValueError, TypeError) as error:
        raise type(error)(f"{error}; {_where(varied, path)}") from error
    return args.seed


def _where(varied: Mapping, path: Path) -> str:
    return f"it stands in the set {json.dumps(varied)} of {str(path)!r}"


def _own(parser: argparse.ArgumentParser, given: Mapping, varied: Mapping) -> dict:
    """See ``SweepRun``. An option at its default is one without which the settings are the same."""
    placed = {option.removeprefix("--").replace("-", "_") for option in BESIDE_RESUME}
    # what shapes no result tells runs apart only where it is what the sweep is about
    own = {name: value for name, value in given.items() if name in varied or name not in placed}
    whole = _completed(parser, own)
    for name in sorted(own.keys() - placed):
        others = {other: value for other, value in own.items() if other != name}
        # an option may need another one, whatever that holds
        with suppress(ValueError, TypeError):
            if _completed(parser, others) == whole:
                own = others
    return own


def _completed(parser: argparse.ArgumentParser, options: Mapping) -> dict:
    args = _without_output(parser.parse_args([]))
    vars(args).update(options)
    complete(args)
    return {name: value for name, value in vars(args).items() if name not in NO_SETTINGS}


def _without_output(args: argparse.Namespace) -> argparse.Namespace:
    return argparse.Namespace(**vars(args) | {"output": "", "bars": False})


def _digest(settings: Mapping) -> str:
    return digest_of_bytes(json.dumps(settings, sort_keys=True).encode()).hex()[:8]


def _short(value: object) -> str:
    told = "default" if value is None else value if isinstance(value, str) else json.dumps(value)
    # of a path what is at its end
    return re.sub(r"[^A-Za-z0-9.+]+", "-", told).strip("-.")[-VALUE_LENGTH:]
