"""Lay out the kernels as a repository of the Hugging Face hub of kernels, which the library ``kernels`` loads.

All code is Python and Triton, so a build depends on the backend alone: ``torch-cpu``, ``torch-cuda``, ``torch-rocm``,
which hold the same files. These are the part of the package that needs torch and Triton alone. The name of a build
has a digest of its files, so that a process can load several versions.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "maskpro_kernels"
# Functions, operations, layers, and what these import
PARTS = ("functional", "ops", "fsdp.py", "modules.py", "packed.py", "shards.py")
BACKENDS = ("cpu", "cuda", "rocm")
# Raised with a change that asks callers of ``interface.py`` to change theirs
HUB_VERSION = 1
# Read and not imported: torch takes seconds
VERSION = re.compile(r'^__version__ = "(.+)"$', re.MULTILINE)


def build(output: Path) -> list[Path]:
    """Write the repository to a folder that does not exist yet; returns the folders of its builds.

    Raises:
        FileExistsError: if it exists.
    """
    output.mkdir(parents=True)
    card = Path(__file__).with_name("card.md").read_text(encoding="utf-8")
    version = VERSION.search((PACKAGE / "__init__.py").read_text(encoding="utf-8"))[1]
    (output / "README.md").write_text(card.replace("@@version@@", version), encoding="utf-8")
    shutil.copy(ROOT / "LICENSE", output / "LICENSE")
    return [_build_for(backend, output / "build" / f"torch-{backend}") for backend in BACKENDS]


def _build_for(backend: str, folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name in PARTS:
        if (PACKAGE / name).is_dir():
            shutil.copytree(PACKAGE / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(PACKAGE / name, folder / name)
    shutil.copy(Path(__file__).with_name("interface.py"), folder / "__init__.py")
    metadata = {
        "name": "maskpro-kernels",
        "id": f"_maskpro_kernels_{backend}_{digest(folder)}",
        "version": HUB_VERSION,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": backend},
    }
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
    return folder


def digest(folder: Path) -> str:
    """12 hexadecimal digits of the names and contents of its files."""
    hashed = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        content = path.read_bytes()
        hashed.update(f"{path.relative_to(folder).as_posix()} {len(content)}\n".encode())
        hashed.update(content)
    return hashed.hexdigest()[:12]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="lay out the kernels for the hub of kernels", allow_abbrev=False)
    parser.add_argument("output", type=Path, help="folder of the repository, which must not exist yet")
    args = parser.parse_args(argv)
    if args.output.exists():
        parser.error(f"output: expected a folder that does not exist, got {args.output}")
    for folder in build(args.output):
        print(folder)


if __name__ == "__main__":
    main()
