"""``python benchmarks/verdict``: see ``verdict.command``."""

import sys
from pathlib import Path

# this file's folder is on the path, and is a package of the one above
BENCHMARKS = Path(__file__).resolve().parent.parent
sys.path[:1] = [str(BENCHMARKS), str(BENCHMARKS.parent), str(BENCHMARKS.parent / "emulators")]

from verdict import needs  # noqa: E402

if __name__ == "__main__":
    if lacking := needs.of_everything():
        print(f"not run: {lacking}")
        sys.exit(needs.INCOMPLETE)
    from verdict.command import main

    sys.exit(main())
