"""Print whether the kernels are right on this machine's GPU, and as fast as ``cost_model`` says, within ten minutes.

    python benchmarks/verdict.py --output verdict     # or: make verdict
    python benchmarks/verdict.py --dry-run            # the same cases on an emulator, without times

writes a page, OUTPUT.md, and all figures, OUTPUT.json, after each part. Each case first compares its result: draws,
scores and updates with the bits of the CPU, products with the error budget of docs/verification.md. Then it is timed.
PASS: all tests and cases are right, and no case takes more than SLOWEST times as long as modelled. The exit status is 0
then, else 1, as where time has cut off tests, of which one may hang.

Minutes on 16 cores, estimated and not measured: 2 to 3 for the tests of 2:4, most of them compilation; half a minute
for the model, which compiles eight kernels; 2 for the cases, of which each compiles one, multiplies in float64 and
replays up to five graphs; a tenth for host time; what is left until DEADLINE for other tests.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from statistics import median

import cost_model
import harness
import host_time
import torch
import triton
import triton.language as tl
from cost_model import CARDS, Card
from torch import Tensor
from torch.nn.functional import linear
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS

import maskpro_kernels as mk
from maskpro_kernels import ops
from maskpro_kernels.ops.counter import Counter, MaskSource
from maskpro_kernels.ops.pattern import metadata_of
from maskpro_kernels.ops.triton import masked_gemm, tiles
from maskpro_kernels.ops.triton.device.arithmetic import scaled_reciprocal

ROOT = Path(__file__).resolve().parent.parent
PASS = "PASS"
FAIL = "FAIL"
SLOWEST = 1.5
# Seconds since the start after which nothing runs, and of the tests of 2:4
DEADLINE = 570
FIRST_TESTS = 200
PATTERN = "2:4"
N = 2
M = 4
GAP = 10.0
CALLS = 10
REPLAYS = 20
ALTERNATIVES = ("dense", "CUTLASS", "cuSPARSELt", "two passes")


@dataclass
class Work:
    """A case.

    Attributes:
        shape: of the page.
        ours: what is checked and timed.
        check: raises AssertionError where its result is wrong.
        model: seconds on a card; None: it is not timed.
        alternatives: routes of torch, of the columns ALTERNATIVES; each makes a call.
    """

    shape: str
    ours: Callable[[], object]
    check: Callable[[object], None]
    model: Callable[[Card], float] | None = None
    alternatives: dict[str, Callable[[], Callable]] = field(default_factory=dict)


class Run:
    """Where the cases run: on a GPU with a layer of LLaMA-2-7B, or on an emulator with a small one."""

    def __init__(self, emulator=None):
        self.emulator = emulator
        self.device = "cpu" if emulator else "cuda"
        self.rows, self.k = (96, 128) if emulator else (11008, 4096)
        names = () if emulator else (name for name in CARDS if name in torch.cuda.get_device_name())
        self.card = next((CARDS[name] for name in names), None)
        self.layer = cache(partial(Layer, self))

    def random(self, *shape: int, seed: int) -> Tensor:
        """bfloat16, with the same values on each device."""
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16().to(self.device)


class Layer:
    """A weight, logits with a gap, and the mask that the CPU draws."""

    def __init__(self, run: Run, gap: float):
        self.weight = run.random(run.rows, run.k, seed=1)
        mask = mk.expand_mask(on_cpu(mk.top_n_mask, self.weight.abs(), PATTERN), PATTERN).to(run.device)
        self.logits = gap * mask + 0.1 * run.random(run.rows, run.k, seed=2).float()
        numbers = (torch.tensor(number, device=run.device) for number in (0x123456789ABCDEF, 7, 3, 0))
        self.counter = Counter(*numbers, 0, run.k // M)
        self.codes = on_cpu(ops.sample_mask, self.logits, N, M, 1.0, self.counter).to(run.device)
        self.masked = torch.where(mk.expand_mask(self.codes, PATTERN), self.weight, 0)


@contextlib.contextmanager
def reference() -> Iterator[None]:
    """CPU tensors do not use the kernels of an emulator."""
    target = tiles.ON_CPU
    tiles.ON_CPU = None
    try:
        yield
    finally:
        tiles.ON_CPU = target


def on_cpu(call: Callable, *arguments: object):
    """Call the reference with copies of the arguments on the CPU."""
    with reference():
        return call(*map(copy_on_cpu, arguments))


def copy_on_cpu(argument: object):
    if isinstance(argument, Counter):
        return Counter(*map(copy_on_cpu, argument))
    return argument.cpu().clone() if isinstance(argument, Tensor) else argument


def assert_same_bits(result: Tensor, expected: Tensor) -> None:
    integers = {1: torch.uint8, 4: torch.int32}[expected.itemsize]
    differs = int((result.cpu().view(integers) != expected.view(integers)).sum())
    assert not differs, f"{differs} of {expected.numel()} have other bits than on the CPU"


def assert_product(result: Tensor, x: Tensor, weight: Tensor) -> None:
    """Within the error budget of x @ weight.T."""
    exact = x.double() @ weight.double().t()
    error, torch_error = (float((y.double() - exact).abs().max()) for y in (result, linear(x, weight)))
    limit = 2 * torch_error + 1e-6 * float(exact.abs().max())
    assert error <= limit, f"error {error:.3g}, expected at most {limit:.3g}"


@triton.jit
def reciprocal_kernel(x, out, total, SCALE: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < total
    tl.store(out + offsets, scaled_reciprocal(tl.load(x + offsets, mask=inside, other=1.0), SCALE), mask=inside)


def reciprocals(x: Tensor, scale: float) -> Tensor:
    """scale / x, by ``scaled_reciprocal``."""
    out = torch.empty_like(x)
    grid = (triton.cdiv(len(x), 1024),)
    reciprocal_kernel[grid](x, out, len(x), SCALE=scale, BLOCK=1024, enable_fp_fusion=False)
    return out


def all_reciprocals(run: Run) -> Work:
    """Of all 2^23 significands, or on an emulator of 4,096 with both ends."""
    count, exponents = (4096, [0]) if run.emulator else (1 << 23, [-60, -1, 0, 1, 59])
    significands = (torch.arange(count) * ((1 << 23) - 1) // (count - 1)).int()
    x = torch.cat([(significands | 127 + exponent << 23).view(torch.float32) for exponent in exponents])

    def check(results: list[Tensor]) -> None:
        for y, expected in zip(results, (4096.0 / x, 1 / 4096 / -x), strict=True):
            assert_same_bits(y, expected)

    x_on_device = x.to(run.device)
    return Work(f"{count:,}", lambda: [reciprocals(x_on_device, 4096.0), reciprocals(-x_on_device, 1 / 4096)], check)


def gradients(run: Run) -> Work:
    """Of x and of the weight. The gradient of x has its kernel, for rows are a multiple of 16, but of no tile."""
    tokens = 33
    rows = 304
    k = 64 if run.emulator else 528
    grad, x, weight = (run.random(*size, seed=7) for size in ((tokens, rows), (tokens, k), (rows, k)))
    codes = on_cpu(mk.top_n_mask, weight, PATTERN).to(run.device)
    mask = MaskSource(codes, "codes", N, M, 1.0)
    kept = mk.expand_mask(codes, PATTERN)

    def check(results: tuple[Tensor, Tensor]) -> None:
        x_grad, weight_grad = results
        assert_product(x_grad, grad, torch.where(kept, weight, 0).t())
        assert not weight_grad[~kept].any(), "gradients of dropped weights: expected zeros"
        dense_grad = linear(grad.t(), x.t())
        assert_product(torch.where(kept, weight_grad, dense_grad), grad.t(), x.t())

    def ours() -> tuple[Tensor, Tensor]:
        return ops.masked_linear_input_grad(grad, weight, mask), ops.masked_linear_weight_grad(grad, x, mask)

    return Work(f"{tokens} x {rows} x {k}", ours, check)


def over_groups(run: Run, kernel: str) -> Work:
    layer = run.layer(GAP)
    if kernel == "sample_mask":
        call = ops.sample_mask
        arguments = [layer.logits, N, M, 1.0, layer.counter]
    elif kernel == "mask_score":
        grad = run.random(run.rows, run.k // M, seed=3).float()
        call = ops.mask_score
        arguments = [layer.logits, layer.codes, grad, N, M, 1.0]
    else:
        coef = torch.tensor([0.37], device=run.device)
        counter = layer.counter._replace(draw=layer.counter.draw[None])
        arguments = [layer.logits.clone(), coef, N, M, 1.0, counter]

        def call(logits: Tensor, *arguments) -> Tensor:
            ops.score_update_(logits, *arguments)
            return logits

    check = partial(assert_same_bits, expected=on_cpu(call, *arguments))
    model = partial(cost_model.over_groups, kernel=kernel, rows=run.rows, k=run.k, gap=GAP)
    return Work(f"{run.rows} x {run.k}", partial(call, *arguments), check, model)


def masked(run: Run, tokens: int, gap: float, kind: str = "drawn") -> Work:
    """One pass, whatever the limit of the target; the two passes of torch mask the weight first."""
    layer = run.layer(gap)
    x = run.random(tokens, run.k, seed=4)
    mask = MaskSource(layer.codes if kind == "codes" else layer.logits, kind, N, M, 1.0, layer.counter)

    def call(max_tokens: int) -> Tensor:
        limit = masked_gemm.one_pass_tokens
        masked_gemm.one_pass_tokens = lambda *_: max_tokens
        try:
            return ops.masked_linear(x, layer.weight, None, False, mask)[0]
        finally:
            masked_gemm.one_pass_tokens = limit

    check = partial(assert_product, x=x, weight=layer.masked)
    model = partial(cost_model.masked, tokens=tokens, rows=run.rows, k=run.k, gap=gap, kind=kind)
    alternatives = {"dense": lambda: partial(linear, x, layer.weight), "two passes": lambda: partial(call, 0)}
    return Work(f"{tokens} x {run.rows} x {run.k}", partial(call, tokens), check, model, alternatives)


def packed(run: Run, tokens: int, stored: str) -> Work:
    """A product with a packed weight, by the route of its tokens, beside torch's on sparse tensor cores."""
    layer = run.layer(GAP)
    tokens = min(tokens, 72) if run.emulator else tokens
    x = run.random(tokens, run.k, seed=5)
    packed_weight = on_cpu(mk.pack_nm, layer.masked, PATTERN, stored)
    weight = on_cpu(packed_weight.unpack).to(run.device)
    bits = {"int8": 8, "int4": 4}.get(stored)
    bitmask = packed_weight.bitmask if bits else metadata_of(packed_weight.bitmask)
    tensors = [
        tensor if tensor is None else tensor.to(run.device)
        for tensor in (packed_weight.values, bitmask, packed_weight.scales)
    ]

    def model(card: Card) -> float:
        size = run.rows, run.k
        return cost_model.packed(card, *size, bits) if bits else cost_model.sparse(card, tokens, *size)[1]

    alternatives = {
        "dense": lambda: partial(linear, x, weight),
        "CUTLASS": lambda: partial(linear, x, SparseSemiStructuredTensorCUTLASS.from_dense(weight)),
        "cuSPARSELt": lambda: partial(linear, x, SparseSemiStructuredTensorCUSPARSELT.from_dense(weight)),
    }
    ours = partial(ops.nm_linear, x, *tensors, None, N, M)
    check = partial(assert_product, x=x, weight=weight)
    return Work(f"{tokens} x {run.rows} x {run.k}", ours, check, model, alternatives)


CASES: dict[str, Callable[[Run], Work]] = {
    "scaled_reciprocal": all_reciprocals,
    "gradients, 304 rows": gradients,
    "draw": partial(over_groups, kernel="sample_mask"),
    "score": partial(over_groups, kernel="mask_score"),
    "update": partial(over_groups, kernel="score_update"),
    "masked product, 32 tokens, gap 10": partial(masked, tokens=32, gap=GAP),
    "masked product, 128 tokens, gap 10": partial(masked, tokens=128, gap=GAP),
    "masked product, 128 tokens, gap 8": partial(masked, tokens=128, gap=8.0),
    "masked product, 128 tokens, gap 5.7": partial(masked, tokens=128, gap=5.7),
    "product by codes, 128 tokens": partial(masked, tokens=128, gap=GAP, kind="codes"),
    "packed product, int8, 1 token": partial(packed, tokens=1, stored="int8"),
    "packed product, int4, 1 token": partial(packed, tokens=1, stored="int4"),
    "2:4 product, 16 tokens": partial(packed, tokens=16, stored="keep"),
    "2:4 product, 1,024 tokens": partial(packed, tokens=1024, stored="keep"),
    "2:4 product, 4,096 tokens": partial(packed, tokens=4096, stored="keep"),
}


def seconds_of(call: Callable[[], object]) -> float:
    """Seconds of a call with a cold cache: of a graph that flushes before each of its calls, less one that flushes."""
    graphs = []
    seconds_of_graphs = ([], [])
    for functions in ((harness.flush, call), (harness.flush,)):
        for function in 2 * functions:
            function()
        torch.cuda.synchronize()
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            for function in CALLS * functions:
                function()
    for _ in range(REPLAYS):
        for graph, seconds in zip(graphs, seconds_of_graphs, strict=True):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            seconds.append(start.elapsed_time(end) / 1e3)
    return (median(seconds_of_graphs[0]) - median(seconds_of_graphs[1])) / CALLS


def message(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200].replace("|", "/")


def case_row(run: Run, name: str) -> dict:
    """The row of a case. An error is its verdict, or one of torch's the time of that."""
    row = {"case": name, "shape": "", "timed": False, "others": {}, "verdict": PASS}
    try:
        work = CASES[name](run)
        row |= {"shape": work.shape, "timed": work.model is not None}
        with run.emulator.apart() if run.emulator else contextlib.nullcontext() as findings:
            work.check(work.ours())
        if run.emulator:
            faults = run.emulator.faults(findings)
            assert not faults, faults[0]
            return row | {"others": dict.fromkeys(work.alternatives)}
        if work.model is None:
            return row
        row["ours"] = seconds_of(work.ours)
        if run.card is not None:
            row["modelled"] = work.model(run.card)
            row["ratio"] = row["ours"] / row["modelled"]
            if row["ratio"] > SLOWEST:
                row["verdict"] = f"{FAIL}: more than {SLOWEST} times the model"
    except Exception as error:
        return row | {"verdict": f"{FAIL}: {message(error)}"}
    for name, make in work.alternatives.items():
        try:
            row["others"][name] = seconds_of(make())
        except Exception as error:
            row["others"][name] = message(error)
    return row


def test_row(selected: Sequence[str], limit: float) -> dict:
    """Results of the tests that pytest selects, of those that end within ``limit`` seconds."""
    command = [sys.executable, "-m", "pytest", "-v", *selected]
    plugins = importlib.metadata.entry_points(group="pytest11").names
    if "xdist" in plugins:
        command += ["-n", str(min(12, os.cpu_count() or 1)), "--dist", "worksteal"]
    if "gpu_emulators" not in plugins:
        command += ["-p", "gpu_emulators.plugin"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT / "emulators", ROOT)))}
    start = time.monotonic()
    with tempfile.TemporaryFile("w+") as log:
        child = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = child.wait(max(limit, 0.0))
        except subprocess.TimeoutExpired:
            # its workers too
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            code = None
        log.seek(0)
        text = log.read()
    passed = len(re.findall(r"\bPASSED\b", text))
    failed = re.findall(r"\b(?:FAILED|ERROR) (tests/.*)", text)
    # a summary repeats the names, with reasons
    failed = {name.partition(" - ")[0].strip(): name.strip() for name in failed}
    verdict = PASS if passed and not failed and code in (0, None) else FAIL
    row = {"tests": " ".join(selected), "passed": passed, "failed": list(failed.values()), "cut off": code is None}
    return row | {
        "seconds": time.monotonic() - start,
        "verdict": verdict,
        "end": [line[:200] for line in text.splitlines()[-5:]],
    }


def host_times(run: Run) -> dict[str, float | str | None]:
    """Seconds of Python by call, apart from the GPU's."""
    try:
        if run.emulator:
            with reference():
                return dict.fromkeys(host_time.calls())
        return {name: 1e-6 * microseconds for name, microseconds in host_time.measured().items()}
    except Exception as error:
        return {"none": message(error)}


def environment(run: Run) -> dict:
    def printed(*command: str | Path) -> str:
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError) as error:
            return message(error)

    blackwell = not run.emulator and torch.cuda.get_device_capability() >= (10, 0)
    ptxas = Path(triton.__file__).parent / "backends/nvidia/bin" / ("ptxas-blackwell" if blackwell else "ptxas")
    driver = printed("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "card": f"emulator of PTX for {run.emulator.target}" if run.emulator else torch.cuda.get_device_name(),
        "driver": "none" if run.emulator else driver,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "ptxas": "".join(re.findall(r"V[\d.]+", printed(ptxas, "--version"))),
        "commit": harness.commit(),
    }


def page(report: dict) -> str:
    """Markdown of a report."""

    def cell(value: float | str | None) -> str:
        return value if isinstance(value, str) else "" if value is None else f"{1e6 * value:.1f}"

    def table(header: str, rows: Sequence[tuple]) -> list[str]:
        columns = header.count("|") + 1
        return [f"| {header} |", "|---" * columns + "|", *(f"| {' | '.join(map(str, row))} |" for row in rows), ""]

    lines = [f"# Verdict: {report['verdict']}", ""]
    lines += [*(f"- {key}: {value}" for key, value in report["environment"].items()), ""]
    tests = [
        (row["tests"], row["passed"], len(row["failed"]), round(row["seconds"]), row["verdict"], row["cut off"])
        for row in report["tests"]
    ]
    lines += table("tests | passed | failed | seconds | verdict | cut off", tests) if tests else []
    lines += [f"- {name}" for row in report["tests"] for name in row["failed"][:20]]
    checked = [(row["case"], row["shape"], row["verdict"]) for row in report["cases"] if not row["timed"]]
    lines += table("checked | shape | verdict", checked)
    timed = []
    for row in (row for row in report["cases"] if row["timed"]):
        times = [row.get("ours"), row.get("modelled")]
        alternatives = [row["others"].get(key) for key in ALTERNATIVES]
        ratio = f"{row['ratio']:.2f}" if "ratio" in row else ""
        cells = [cell(time) + (f" ({time / times[0]:.2f})" if isinstance(time, float) else "") for time in alternatives]
        if report["emulated"]:
            times = ["emulated"] * 2
            ratio = "emulated"
            cells = ["emulated" if key in row["others"] else "" for key in ALTERNATIVES]
        timed.append((row["case"], row["shape"], *map(cell, times), ratio, *cells, row["verdict"]))
    lines += ["Microseconds, of torch in brackets as a multiple of ours; modelled by benchmarks/cost_model.py.", ""]
    lines += table(f"timed | shape | ours | modelled | ours / modelled | {' | '.join(ALTERNATIVES)} | verdict", timed)
    host = [(name, "emulated" if report["emulated"] else cell(value)) for name, value in report["host"].items()]
    lines += table("Python's part of a call | microseconds", host)
    return "\n".join(lines)


def cases_of(run: Run, names: Sequence[str]) -> Iterator[dict]:
    """Rows of cases. After an error that leaves the GPU unusable for this process, another one runs the others."""
    rows = {}
    remaining = list(names)
    with contextlib.suppress(RuntimeError):
        while remaining:
            yield case_row(run, remaining.pop(0))
            torch.cuda.synchronize() if not run.emulator else None
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "rest.json"
        command = [sys.executable, __file__, "--output", output, "--cases", *remaining]
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(command, timeout=FIRST_TESTS) if remaining else None
        if output.exists():
            rows = {row["case"]: row for row in json.loads(output.read_text())["cases"]}
    missing = {"shape": "", "timed": False, "others": {}, "verdict": f"{FAIL}: its process has ended"}
    yield from (rows.get(name, {"case": name, **missing}) for name in remaining)


def report_of(run: Run, names: Sequence[str] = (), save: Callable[[dict], None] = lambda report: None) -> dict:
    """The report of some cases, or of all; on a GPU also of tests. ``save`` gets it after each part."""
    start = time.monotonic()
    report = {"verdict": "not finished", "emulated": run.emulator is not None, "environment": environment(run)}
    report |= {"tests": [], "cases": [], "host": {}}
    tests = not names and not run.emulator
    if tests:
        paths = ROOT.glob("tests/**/test_*.py")
        files = [str(path.relative_to(ROOT)) for path in paths if "mark.gpu" in path.read_text()]
        report["tests"].append(test_row([*files, "-m", "gpu", "-k", "2:4"], FIRST_TESTS))
        save(report)
    with torch.no_grad():
        for row in cases_of(run, names or list(CASES)):
            report["cases"].append(row)
            save(report)
    report["host"] = host_times(run)
    if tests:
        seconds_left = DEADLINE - (time.monotonic() - start)
        report["tests"].append(test_row([*files, "-m", "gpu", "-k", "not 2:4"], seconds_left))
    passed = all(row["verdict"] == PASS for row in (*report["tests"], *report["cases"]))
    cut_off = any(row["cut off"] for row in report["tests"])
    report["verdict"] = FAIL if not passed else f"{PASS}, but tests were cut off" if cut_off else PASS
    save(report)
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("verdict"), help="of OUTPUT.md and OUTPUT.json")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=[], help="these alone, without tests")
    parser.add_argument("--dry-run", action="store_true", help="on an emulator, without times and tests")
    options = parser.parse_args()
    emulator = None
    if options.dry_run:
        from gpu_emulators import driver

        emulator = driver.install("sm_80")
        tiles.ON_CPU = "sm_80"
    elif not torch.cuda.is_available():
        parser.error("no CUDA device; --dry-run runs the cases on an emulator")
    else:
        # a kernel may never end: what has been saved remains
        signal.alarm(DEADLINE + 20)

    def save(report: dict) -> None:
        options.output.with_suffix(".json").write_text(json.dumps(report, indent=1))
        options.output.with_suffix(".md").write_text(page(report))

    report = report_of(Run(emulator), options.cases, save)
    print(page(report))
    return 0 if report["verdict"] == PASS else 1


if __name__ == "__main__":
    sys.exit(main())
