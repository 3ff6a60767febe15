"""Child processes that import what tests import."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"


def search_path() -> str:
    """PYTHONPATH of a child: pytest's path, then the present value."""
    paths = [ROOT / "tests", BENCHMARKS, ROOT, os.environ.get("PYTHONPATH")]
    return os.pathsep.join(str(path) for path in paths if path)


def environment() -> dict[str, str]:
    """Environment of a child on the routes of users, without Triton's interpreter."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return inherited | {"PYTHONPATH": search_path()}


SERVING = """
import json, sys, traceback
for line in sys.stdin:
    code, arguments = json.loads(line)
    answer = {"rows": [], "error": None}
    try:
        exec(code, {"arguments": arguments, "emit": answer["rows"].append})
    except BaseException:
        answer["error"] = traceback.format_exc()
    print(json.dumps(answer), flush=True)
"""


class Child:
    """A process on the routes of users, which imports once and runs code at each call.

    Code uses ``arguments``, and returns a row by ``emit(row)``; both are JSON values.
    """

    def __enter__(self) -> Child:
        command = [sys.executable, "-c", SERVING]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment()
        )
        return self

    def __exit__(self, *_) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()

    def __call__(self, code: str, *arguments) -> list:
        self.process.stdin.write(json.dumps([code, arguments]) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, f"the child has ended with {self.process.wait()}"
        answer = json.loads(line)
        assert answer["error"] is None, answer["error"]
        return answer["rows"]
