"""The page of a report, and its two verdicts: whether all is right, and whether all is fast."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .cases import ALTERNATIVES
from .needs import INCOMPLETE
from .timing import FAIL, NOT_RUN, PASS

# Times as long as modelled that a case may take, and seconds beyond: the model leaves out the start of a kernel and
# its latencies, microseconds of a kernel of ten
SLOWEST = 1.5
STARTS = 3e-6
# Exit statuses besides INCOMPLETE
WRONG = 1
SLOW = 3
# Beginnings of lines about what few machines have
OPTIONAL = (
    "layers on a second GPU",
    "packed model in vLLM: vllm missing",
    "packed model in vLLM: vLLM has no emulator",
)


def fast(row: dict) -> str:
    """Verdict on the time of a case, "" where none is taken."""
    if not row["timed"]:
        return ""
    if "unjudged" in row:
        return f"not judged: {row['unjudged']}"
    if "ours" not in row or "modelled" not in row:
        return "not judged"
    return PASS if row["ours"] <= SLOWEST * row["modelled"] + STARTS else FAIL


def counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def wrong(report: dict) -> int:
    """Number of cases and tests with a wrong result."""
    cases = sum(row["right"].startswith(FAIL) for row in report["cases"])
    return cases + sum(len(row["failed"]) for row in report["tests"])


def left_out(report: dict) -> list[str]:
    """Cases and tests without a result."""
    found = []
    for row in report["tests"]:
        if "not run" in row:
            found.append(f"tests ({row['tests']}): {row['not run']}")
        elif row["cut off"]:
            found.append(f"tests ({row['tests']}): cut off after {row['seconds']:.0f} s")
    for row in report["cases"]:
        if row["right"].startswith(NOT_RUN):
            found.append(f"{row['case']}: {row['right'].partition(': ')[2]}")
    return found


def results(report: dict) -> tuple[int, int]:
    """Numbers of cases and of tests with a result."""
    cases = sum(not row["right"].startswith(NOT_RUN) for row in report["cases"])
    return cases, sum(row["passed"] + len(row["failed"]) for row in report["tests"])


def right_verdict(report: dict) -> str:
    cases, tests = results(report)
    of_all = f"{counted(cases, 'case')} and {counted(tests, 'test')}"
    if not report["finished"]:
        return f"not finished, {wrong(report)} wrong of {of_all}"
    if wrong(report):
        return f"{FAIL}, {wrong(report)} wrong of {of_all}"
    return f"INCOMPLETE, nothing wrong in {of_all}" if incomplete(report) else f"{PASS}, {of_all}"


def incomplete(report: dict) -> bool:
    """Whether nothing has a result, or something has none that most machines can run."""
    return not any(results(report)) or any(not line.startswith(OPTIONAL) for line in left_out(report))


def fast_verdict(report: dict) -> str:
    if report["emulated"]:
        return "not judged, emulated"
    if "unjudged" in report["seen"]:
        return report["seen"]["unjudged"]
    verdicts = [verdict for verdict in map(fast, report["cases"]) if verdict]
    judged = sum(verdict in (PASS, FAIL) for verdict in verdicts)
    slow = verdicts.count(FAIL)
    rest = f", {len(verdicts) - judged} not judged" if judged < len(verdicts) else ""
    limit = f"within {SLOWEST} times the model"
    if not report["finished"]:
        return f"not finished, {slow} slow of {counted(judged, 'case')}"
    if slow:
        return f"{FAIL}, {slow} of {counted(judged, 'case')} not {limit}{rest}"
    return f"{PASS}, {counted(judged, 'case')} {limit}{rest}" if judged else f"not judged{rest}"


def status(report: dict) -> int:
    """Exit status: wrong before slow before what has no verdict."""
    if wrong(report):
        return WRONG
    verdicts = [verdict for verdict in map(fast, report["cases"]) if verdict and not report["emulated"]]
    if FAIL in verdicts:
        return SLOW
    return INCOMPLETE if incomplete(report) or not all(verdict == PASS for verdict in verdicts) else 0


def table(header: str, rows: Sequence[Iterable]) -> list[str]:
    columns = header.count("|") + 1
    return [f"| {header} |", "|---" * columns + "|", *(f"| {' | '.join(map(str, row))} |" for row in rows), ""]


def cell(value: float | str | None) -> str:
    """Microseconds."""
    return value if isinstance(value, str) else "" if value is None else f"{1e6 * value:.1f}"


def times(row: dict, emulated: bool) -> list[str]:
    """Cells of the times of a case."""
    if emulated:
        cells = ["emulated" if name in row["alternatives"] else "" for name in ALTERNATIVES]
        return ["emulated"] * 3 + cells
    ours = row.get("ours")
    modelled = row.get("modelled")
    cells = [cell(ours), cell(modelled), f"{ours / modelled:.2f}" if ours and modelled else ""]
    for name in ALTERNATIVES:
        alternative = row.get("others", {}).get(name)
        compared = isinstance(alternative, float) and ours
        cells.append(cell(alternative) + (f" ({alternative / ours:.2f})" if compared else ""))
    return cells


def page(report: dict) -> str:
    """Markdown of a report: the verdicts first, then what has not run, then all the figures."""
    lines = ["# Verdict", "", f"- RIGHT: {right_verdict(report)}", f"- FAST: {fast_verdict(report)}"]
    lines += [f"- not run: {'; '.join([*report['not run'], *left_out(report)]) or 'nothing is left out'}"]
    lines += [*(f"- {key}: {value}" for key, value in report["environment"].items()), ""]
    tests = [
        (row["tests"], row["passed"], len(row["failed"]), round(row["seconds"]), "yes" if row["cut off"] else "no")
        for row in report["tests"]
    ]
    lines += table("tests | passed | failed | seconds | cut off", tests) if tests else []
    failed = [name for row in report["tests"] for name in row["failed"]]
    lines += [*(f"- {name}" for name in failed[:40]), ""] if failed else []
    untimed = [(row["case"], row["shape"], row["right"]) for row in report["cases"] if not row["timed"]]
    lines += table("checked | shape | right", untimed)
    timed = [
        (row["case"], row["shape"], *times(row, report["emulated"]), row["right"], fast(row))
        for row in report["cases"]
        if row["timed"]
    ]
    lines += ["Microseconds, of torch in brackets as a multiple of ours; modelled by benchmarks/cost_model.py.", ""]
    header = f"timed | shape | ours | modelled | ours / modelled | {' | '.join(ALTERNATIVES)} | right | fast"
    lines += table(header, timed)
    host = [(name, "emulated" if report["emulated"] else cell(value)) for name, value in report["host"].items()]
    lines += table("Python's part of a call | microseconds", host)
    return "\n".join(lines)
