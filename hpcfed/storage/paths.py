"""Where things lie in a run directory, and elsewhere."""

import os
from pathlib import Path

CONFIG, PARTITION, SUMMARY = "config.yaml", "partition.json", "summary.json"
METRICS, SELECTION, LIVES = "metrics.jsonl", "selection.json", "run.json"
PREDICTIONS, ADAPTER, LOCK = "predictions.json", "adapter", "lock"
CHECKPOINT = "checkpoint"
MANIFEST, PREVIOUS = "checkpoint/manifest.json", "checkpoint/previous.json"
CLIENTS, HISTORY = "clients", "history.jsonl"

FILES = (CONFIG, PARTITION, SUMMARY, METRICS, SELECTION, LIVES, PREDICTIONS, LOCK)
FOLDERS = (CHECKPOINT, CLIENTS, ADAPTER)


def home(name: str) -> Path:
    """A path that the user gives; `~` in front is a home folder, as to a shell."""
    return Path(os.path.expanduser(name))


def tensors_of(rounds: int) -> str:
    """The tensors of the commit after so many rounds."""
    return f"{CHECKPOINT}/round-{rounds:05d}.safetensors"
