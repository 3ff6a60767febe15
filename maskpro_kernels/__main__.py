"""`python -m maskpro_kernels`, or `torchrun -m maskpro_kernels` for several ranks: the command `maskpro`."""

import sys

from .cli.main import main

if __name__ == "__main__":
    sys.exit(main())
