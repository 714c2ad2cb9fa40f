"""A user's own parts: Python files that a configuration names and that register them."""

import hashlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path

from hpcfed import registry
from hpcfed.errors import UserError
from hpcfed.storage.paths import home

# What was read in this process, and is registered: absolute path -> digest.
_read: dict[str, str] = {}


def load(paths: Sequence[str]) -> None:
    """Run these files, each once unless it has changed; from then on there are the parts that they
    register, and those of no other plug-in.

    Raises UserError for one that cannot be read or run.
    """
    files = {os.path.abspath(home(path)): path for path in paths}
    for file in set(_read) - set(files):
        registry.forget(file)
        del _read[file]
    for file, path in files.items():
        digest = _digest(path)
        if _read.get(file) != digest:
            _read[file] = ""  # some of its parts may be registered before it fails
            with registry.reading(file):
                _run(file, path)
            _read[file] = digest


def _run(file: str, path: str) -> None:
    name = f"hpcfed_plugin_{Path(path).stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise UserError(f"plugins: {path} is no Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == file]
        text = str(error)
        if isinstance(error, SyntaxError) and error.filename == file:
            lines, text = [error.lineno], error.msg
        line = f", line {lines[-1]}," if lines else ""
        raise UserError(
            f"plugins: {path}{line} cannot be used ({type(error).__name__}: {text})."
        ) from None


def check(paths: Sequence[str], began: Mapping[str, object], run: Path) -> None:
    """Raises UserError unless these are the files that a run began with. began: path -> digest."""
    for path, digest in digests(paths).items():
        if began.get(path) != digest:
            raise UserError(
                f"The plug-in {path} has changed since the run in {run} began; put it back, or "
                "give another output=..."
            )


def digests(paths: Sequence[str]) -> dict[str, str]:
    """Path -> SHA-256 of the file, which a run keeps and a resumed one compares."""
    return {path: _digest(path) for path in paths}


def _digest(path: str) -> str:
    try:
        return hashlib.sha256(home(path).read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"plugins: {path} cannot be read ({error.strerror}).") from None
