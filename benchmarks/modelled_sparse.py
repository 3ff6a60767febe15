"""Times of products with a 2:4 weight of 16 bits and with a dense one, by ``cost_model``: nothing is measured.

    python benchmarks/modelled_sparse.py --rows 11008 --k 4096

prints microseconds, those of the dense product second; (t) are torch's product on sparse tensor cores, (u) weights that
are unpacked for its dense one. Cards reach SHARE of the bandwidth of their data sheets, see ``cards``.
"""

from __future__ import annotations

import argparse

from cards import CARDS
from cost_model import dense, sparse

MARKS = {"sparse_mma": "", "torch": " (t)", "unpack": " (u)"}
SHOWN = ("A100", "RTX 4090", "RTX 5090", "H100")
TOKENS = (1, 8, 16, 64, 256, 1024, 4096)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=11008)
    parser.add_argument("--k", type=int, default=4096)
    options = parser.parse_args()
    print(f"| tokens | {' | '.join(SHOWN)} |\n|{'---:|' * (1 + len(SHOWN))}")
    for tokens in TOKENS:
        cells = []
        for card in map(CARDS.get, SHOWN):
            route, seconds = sparse(card, tokens, options.rows, options.k)
            dense_seconds = dense(card, tokens, options.rows, options.k)
            cells.append(f"{1e6 * seconds:.0f} against {1e6 * dense_seconds:.0f}{MARKS[route]}")
        print(f"| {tokens:,} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
