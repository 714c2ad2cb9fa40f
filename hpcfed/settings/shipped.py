"""Files that hpcfed brings besides code: ds_configs/, launch/, slurm/."""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent.parent


def folder(name: str) -> Path:
    """The folder of that name: a wheel holds it inside the package, a clone has it beside it."""
    inside = _PACKAGE / "shipped" / name
    return inside if inside.is_dir() else _PACKAGE.parent / name
