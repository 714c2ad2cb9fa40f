"""`hpcfed scripts`: the Slurm scripts, launch files, experiments and DeepSpeed JSON, to edit."""

import json
import re
import shlex
import sys
from pathlib import Path

from hpcfed.errors import UserError
from hpcfed.settings.shipped import folder

_PATTERNS = ("slurm/*.sh", "launch/*.py", "launch/experiments/*.yaml", "ds_configs/*.json")


def write(target: Path) -> list[Path]:
    """Copy slurm/, launch/ and ds_configs/ into the folder `target`; returns the files, relative
    to it.

    In the copies stands where they lie, and which python to use, so that they work from any folder.
    Raises UserError if they cannot be written, or if one is there already: then none is changed.
    """
    place = target.absolute()
    files = {}
    for pattern in _PATTERNS:
        name = pattern.partition("/")[0]
        for own in sorted(folder(name).parent.glob(pattern)):
            files[own.relative_to(folder(name).parent)] = own
    try:
        for relative in files:
            if (place / relative).exists():
                raise UserError(
                    f"{target / relative} exists already; remove it, or give another folder."
                )
        for relative, own in files.items():
            (place / relative).parent.mkdir(parents=True, exist_ok=True)
            (place / relative).write_text(_placed(own.read_text(), place))
            (place / relative).chmod(0o755 if own.suffix == ".sh" else 0o644)
    except OSError as error:
        raise UserError(f"{target} cannot be written ({error.strerror}).") from None
    return list(files)


def _placed(text: str, place: Path) -> str:
    """The text of a file that lies in `place`."""
    for name, value in {"PYTHON": sys.executable, "SCRIPTS": str(place / "slurm")}.items():
        line = f"{name}=${{{name}:-{shlex.quote(value)}}}"
        text = re.sub(rf"^{name}=\$\{{{name}:-.*?\}}", line.replace("\\", r"\\"), text, flags=re.M)
    return re.sub(
        r"\bdeepspeed: (ds_configs/[\w.-]+)",
        lambda found: f"deepspeed: {json.dumps(str(place / found[1]))}",
        text,
    )
