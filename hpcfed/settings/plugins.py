"""A user's own parts: Python files that a configuration names and that register them."""

import hashlib
import importlib.util
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from hpcfed.errors import UserError

# What was read in this process: path -> digest.
_read: dict[str, str] = {}


def load(paths: Sequence[str]) -> None:
    """Run these files, each once unless it has changed.

    Raises UserError for one that cannot be read or run.
    """
    for path in paths:
        digest = _digest(path)
        if _read.get(path) == digest:
            continue
        name = f"hpcfed_plugin_{Path(path).stem}"
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            raise UserError(f"plugins: {path} is no Python file.")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            where = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
            line = f", line {where[-1].lineno}" if where else ""
            raise UserError(
                f"plugins: {path}{line} cannot be used ({type(error).__name__}: {error})."
            ) from None
        _read[path] = digest


def digests(paths: Sequence[str]) -> dict[str, str]:
    """Path -> SHA-256 of the file, which a run keeps and a resumed one compares."""
    return {path: _digest(path) for path in paths}


def _digest(path: str) -> str:
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"plugins: {path} cannot be read ({error.strerror}).") from None
