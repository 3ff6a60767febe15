"""The parser of the command, which tells an error in one line."""

from __future__ import annotations

import argparse

from .progress import tell_as
from .versions import versions


class OneLineParser(argparse.ArgumentParser):
    """Tells an error in one line, where argparse's usage of all options would bury it."""

    def parse_known_args(self, args=None, namespace=None):
        # here, or the parser of all commands would tell it, and point to its own help
        found, others = super().parse_known_args(args, namespace)
        if others:
            self.error(f"unrecognized arguments: {' '.join(others)}")
        return found, others

    def error(self, message: str) -> None:
        tell_as("error", f"{message}; `{self.prog} --help` tells what it takes")
        self.exit(2)


class PrintVersions(argparse.Action):
    """Prints the versions, a line each, and ends."""

    def __call__(self, parser: argparse.ArgumentParser, *_) -> None:
        for name, value in versions().items():
            print(name, value)
        parser.exit()
