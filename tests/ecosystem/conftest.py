"""These tests need libraries that `make test-ecosystem` installs."""

from __future__ import annotations

from importlib.util import find_spec

collect_ignore_glob = [f"test_{library}.py" for library in ("peft",) if find_spec(library) is None]
