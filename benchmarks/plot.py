"""A picture of each operation in a file of rows: time by shape, one colour a provider.

python benchmarks/plot.py ROWS FOLDER
"""

from __future__ import annotations

import argparse
from pathlib import Path

import harness


def pictures(rows: list[dict], folder: Path) -> list[Path]:
    """Draw one picture an operation and device into ``folder``; of rows alike the last counts."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    by_picture: dict[tuple, dict] = {}
    for row in rows:
        cases = by_picture.setdefault((row["op"], row["device"]), {})
        cases.setdefault(harness.case_of(row), {})[row["provider"]] = row
    paths = []
    for (op, device), cases in by_picture.items():
        providers = list(dict.fromkeys(provider for case in cases.values() for provider in case))
        figure, axes = plt.subplots(figsize=(2 + 1.6 * len(cases), 4), layout="constrained")
        width = 0.8 / len(providers)
        for i, provider in enumerate(providers):
            found = [(at, case[provider]) for at, case in enumerate(cases.values()) if provider in case]
            places = [at + width * (i - (len(providers) - 1) / 2) for at, _ in found]
            medians = [1e3 * row["median"] for _, row in found]
            spread = [[1e3 * (row["median"] - row["q20"]) for _, row in found],
                      [1e3 * (row["q80"] - row["median"]) for _, row in found]]  # fmt: skip
            axes.bar(places, medians, width, yerr=spread, label=provider)
        axes.set_xticks(range(len(cases)), ["x".join(map(str, shape)) for _, _, shape, _ in cases])
        axes.set(yscale="log", ylabel="milliseconds", title=f"{op}, {device}")
        axes.legend(fontsize="small")
        name = "".join(c if c.isalnum() else "-" for c in f"{op} {device}".lower())
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], dpi=120)
        plt.close(figure)
    return paths


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, metavar="ROWS")
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    arguments = parser.parse_args()
    for path in pictures(harness.read(arguments.rows), arguments.folder):
        print(path)
