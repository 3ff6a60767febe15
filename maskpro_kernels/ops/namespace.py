"""The namespace of torch's operations that this package registers; a process has each of them once."""

import re

ROOT = __name__.removesuffix(".ops.namespace")
# A copy of the package under another name, as the hub of kernels loads it, registers its own beside these
NAMESPACE = "maskpro" if ROOT == "maskpro_kernels" else re.sub(r"\W", "_", ROOT)
