"""What a run had spent, from the lines of metrics.jsonl: all of it, validation and draws of clients
that came to nothing too."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any


def seconds(record: Mapping[str, Any]) -> float:
    """Of a round."""
    return sum(sum(own["seconds"].values()) for own in _draws(record))


def spent(records: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """After each round: samples, up, down (bytes), seconds."""
    total = {"samples": 0, "up": 0, "down": 0, "seconds": 0.0}
    for record in records:
        total["seconds"] += seconds(record)
        for own in _draws(record):
            total["samples"] += own["samples"]
            total["up"] += own["bytes"]["up"]
            total["down"] += own["bytes"]["down"]
        yield {**total, "seconds": round(total["seconds"], 3)}


def _draws(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [*record.get("redrawn", ()), record]
