"""The most memory that a process holds while one model reads a prompt and writes behind it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ..stored_digests import digests_are_checked, without_digests
from .agreement import greedy, plain_generation
from .loading import load_model, show_bars
from .speed import prefill

# What the fresh process runs: a module of a package that is imported already cannot be run by -m without a warning
RUN = f"from {__name__} import main; main()"
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class PeakMemory:
    """Bytes of main memory that were resident in a process of one model.

    Attributes:
        before: once torch and transformers were imported, and no model was there yet.
        peak: the most while the model ran, with all that stands in ``before``.
        loading_included: whether ``peak`` is that of loading too, since the system cannot forget it.
    """

    before: int
    peak: int
    loading_included: bool


def peak_memory(
    name: str,
    dtype: torch.dtype,
    prompt: torch.Tensor,
    new_tokens: int,
    threads: int | None = None,
    *,
    trust_remote_code: bool = False,
) -> PeakMemory | None:
    """Load a model in a fresh process on the CPU, let it read a prompt and write behind it, and see what that takes.

    A process of its own: what is resident cannot be told apart by models. It is read from ``VmHWM`` of Linux, which is
    of this process alone, where ``ru_maxrss`` begins with what the process that started it holds.

    Args:
        name, dtype, trust_remote_code: as ``load_model`` takes them.
        prompt: int64 [rows, tokens].
        new_tokens: that are written.
        threads: of torch; None: as many as here.

    Returns:
        None where the system is not Linux.

    Raises:
        ValueError: if the process fails, with the last line of what it said.
    """
    if not STATUS.exists():
        return None
    asked = {
        "name": name,
        "dtype": str(dtype).removeprefix("torch."),
        "prompt": prompt.tolist(),
        "new_tokens": new_tokens,
        "threads": threads or torch.get_num_threads(),
        "trust_remote_code": trust_remote_code,
        "digests": digests_are_checked(),
    }
    # this package wherever it was found, and nothing of the current folder
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, "-P", "-c", RUN]
    done = subprocess.run(command, input=json.dumps(asked), capture_output=True, text=True, env=environment)
    if done.returncode:
        told = done.stderr.strip().rpartition("\n")[2] or f"it ended with {done.returncode}"
        raise ValueError(f"the process that measures the memory of {name!r} failed: {told}")
    return PeakMemory(**json.loads(done.stdout.strip().rpartition("\n")[2]))


def main() -> None:
    """The fresh process: what is asked comes as JSON from stdin, what was found goes as the last line to stdout."""
    asked = json.load(sys.stdin)
    torch.set_num_threads(asked["threads"])
    show_bars(False)
    dtype, prompt = getattr(torch, asked["dtype"]), torch.tensor(asked["prompt"])
    with nullcontext() if asked["digests"] else without_digests():
        found = resident(asked["name"], dtype, prompt, asked["new_tokens"], asked["trust_remote_code"])
    print(json.dumps(asdict(found)))


@torch.inference_mode()
def resident(
    name: str, dtype: torch.dtype, prompt: torch.Tensor, new_tokens: int, trust_remote_code: bool = False
) -> PeakMemory:
    """``peak_memory`` of this very process, with all that it holds."""
    before = _bytes_of_status("VmRSS")
    model, _ = load_model(name, dtype, trust_remote_code=trust_remote_code)
    forgotten = False
    # some containers forbid it
    with suppress(OSError):
        # 5 lets VmHWM begin anew: man proc_pid_clear_refs
        CLEAR.write_text("5")
        forgotten = True
    with plain_generation(model):
        prefill(model, prompt)
        greedy(model, prompt, new_tokens)
    return PeakMemory(before, _bytes_of_status("VmHWM"), not forgotten)


def _bytes_of_status(name: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024
