"""Cells of a comparison: of a finished run, what tables need, small enough to keep for ever.

A cell is a JSON file whose name is a digest of the run's configuration, so that it is found again
by whoever asks for the same run, and stays right when options are added to hpcfed: what it does not
know must have its default.
"""

import base64
import functools
import hashlib
import json
import zlib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hpcfed.app import spending
from hpcfed.data.tasks import TASKS
from hpcfed.rounds.preflight import MAY_CHANGE
from hpcfed.settings.config import Config
from hpcfed.settings.resolve import leaves, options
from hpcfed.storage.checks import DamageError, read_bytes, read_object
from hpcfed.storage.files import write_json, writing
from hpcfed.storage.paths import MANIFEST, METRICS, PREDICTIONS, SUMMARY

FORMAT = 1
# Not part of a cell's identity: what changes no bit of the result but threads, and where the data
# lie; what they are is compared by their digest.
_APART = (*MAY_CHANGE, "data.root")

Bits = npt.NDArray[np.bool_]
Settings = dict[str, Any]


def settings_of(config: Config) -> Settings:
    """A configuration, flat, without what is not part of a cell's identity."""
    plain = json.loads(json.dumps(dict(leaves(config.to_dict()))))
    return {key: value for key, value in plain.items() if key not in _APART}


def identity(settings: Settings) -> str:
    """A digest of what differs from the defaults, so that new options do not change it."""
    defaults = _defaults()
    own = {k: v for k, v in settings.items() if k not in defaults or v != defaults[k]}
    return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()[:16]


@functools.cache
def _defaults() -> Settings:
    found = {key: spec.default for key, spec in options() if spec.default is not MISSING}
    return json.loads(json.dumps(found))


@dataclass(frozen=True)
class Cell:
    """A finished run. content: as the file has it."""

    content: Mapping[str, Any]

    @property
    def curve(self) -> list[dict[str, Any]]:
        """At each validation its `round` and `score`, and what had been spent: samples, up, down
        (bytes), seconds."""
        return self.content["curve"]

    @property
    def spent(self) -> dict[str, Any]:
        """In all rounds: samples, scored, up, down, wire, seconds; and `total` seconds, with
        start-up and the test."""
        return self.content["spent"]

    def score(self, which: str, whose: str = "personal") -> float | None:
        """The score on the test split after the last round, or at the best by validation."""
        return self.content["test"][which][whose]

    def rows(self, which: str) -> "Rows | None":
        """What each test row was answered; None if there are no classes."""
        packed = self.content["test"][which].get("rows")
        return None if packed is None else Rows.unpack(packed, self.content["metric"])


@dataclass(frozen=True)
class Rows:
    """Test rows, personal results. right: (n,) whether it is; hit, truth: (n,) whether the positive
    class was predicted, and is the label, where the metric is of one class. same: a digest of row
    numbers and labels."""

    metric: str
    same: str
    right: Bits
    hit: Bits | None
    truth: Bits | None

    def pack(self) -> dict[str, Any]:
        """For JSON."""
        bits = {"right": self.right, "hit": self.hit, "truth": self.truth}
        return {
            "same": self.same,
            "number": len(self.right),
            **{name: _pack(own) for name, own in bits.items() if own is not None},
        }

    @staticmethod
    def unpack(packed: Mapping[str, Any], metric: str) -> "Rows":
        """What `pack` made."""
        number = packed["number"]
        right, hit, truth = (
            _unpack(packed[name], number) if name in packed else None
            for name in ("right", "hit", "truth")
        )
        assert right is not None
        return Rows(metric, packed["same"], right, hit, truth)


def _pack(bits: Bits) -> str:
    return base64.b64encode(zlib.compress(np.packbits(bits).tobytes(), 9)).decode()


def _unpack(text: str, number: int) -> Bits:
    raw = np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype=np.uint8)
    return np.unpackbits(raw, count=number).astype(bool)


def of_run(folder: Path, settings: Settings) -> Cell:
    """The cell of a complete run. Raises DamageError if its files are not as they were written."""
    summary, began = read_object(folder / SUMMARY), read_object(folder / MANIFEST)["began"]
    lines = read_bytes(folder / METRICS).splitlines()
    try:
        records = [json.loads(line) for line in lines]
        spent = list(spending.spent(records))
        return Cell(
            {
                "format": FORMAT,
                "settings": settings,
                "data": began["data"],
                "metric": summary["metric"],
                "majority": summary.get("majority"),
                "test": _test(folder, summary, settings["task.name"]),
                "curve": [
                    {"round": r["round"], "score": r["validation"]["personal"]["score"], **own}
                    for r, own in zip(records, spent, strict=True)
                    if "validation" in r
                ],
                "spent": {
                    **spent[-1],
                    "scored": summary["scored"],
                    "wire": summary["bytes"]["wire"],
                    "total": round(summary["seconds"]["total"], 3),
                },
                "failures": summary["failures"],
            }
        )
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise DamageError(folder, f"holds no result that can be read ({error!r})") from None


def _test(folder: Path, summary: dict[str, Any], task: str) -> dict[str, Any] | None:
    """What the test split says, after the last round and at the best; None if it was not used."""
    if summary["test"] is None:
        return None
    told = read_object(folder / PREDICTIONS)
    classes = "accuracy" in summary
    own = {"rows": _rows(told, told, summary["metric"], task).pack()} if classes else {}
    last = {**{who: own_["score"] for who, own_ in summary["test"].items()}, **own}
    best = summary["best"]
    if best is None or "best" not in told:  # the last round is the best, or none was validated
        return {"last": last, "best": {**last, "round": summary["rounds"]}}
    rows = {"rows": _rows(told["best"], told, summary["metric"], task).pack()} if classes else {}
    scores = {who: best[who]["score"] for who in summary["test"]}
    return {"last": last, "best": {**scores, **rows, "round": best["round"]}}


def _rows(found: dict[str, Any], told: dict[str, Any], metric: str, task: str) -> Rows:
    label, predicted = np.array(found["label"]), np.array(found["personal"])
    same = hashlib.sha256(json.dumps([found["row"], found["label"]]).encode()).hexdigest()[:16]
    hit = truth = None
    if metric != "accuracy":
        names = told["labels"]
        spec = TASKS.get(task)
        positive = spec.positive if spec and spec.positive in names else names[-1]
        number = names.index(positive)
        hit, truth = predicted == number, label == number
    return Rows(metric, same, predicted == label, hit, truth)


class Store:
    """A folder of cells."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._read: dict[str, Cell] = {}

    def find(self, name: str, settings: Settings) -> Cell | None:
        """The cell of this configuration, if it is there and whole. name: its identity."""
        if name not in self._read:
            file = self._folder / f"{name}.json"
            try:
                content = read_object(file) if file.is_file() else {}
            except DamageError:
                return None
            if content.get("format") != FORMAT or not _same(content["settings"], settings):
                return None
            self._read[name] = Cell(content)
        return self._read[name]

    def keep(self, name: str, cell: Cell) -> None:
        """On disk."""
        with writing(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
        write_json(self._folder / f"{name}.json", cell.content, indent=None)
        self._read[name] = cell


def _same(then: Settings, now: Settings) -> bool:
    """Whether a configuration is this one; an option that was not known then must have its
    default."""
    defaults = _defaults()
    return all(then.get(key, defaults.get(key)) == value for key, value in now.items())
