"""What runs in worlds share: data, small models, and references, made once for all workers."""

import fcntl

import pytest
import torch

from tests import models
from tests.mpi.variants import write_data, write_talks

# Wide random weights: gradients of all blocks are then of a size that fp32 can show.
MODELS = [
    ("bert", "classifier", 0.2), ("bert", "cloze", 0.2), ("roberta", "classifier", 0.2),
    ("gpt2", "classifier", 0.2), ("llama", "classifier", 0.2), ("llama", "label_words", 0.04),
    ("gpt2", "label_words", 0.04), ("llama", "completion", 0.04), ("gpt2", "completion", 0.04),
    ("qwen3", "completion", 0.04), ("qwen3", "classifier", 0.2),
]  # fmt: skip


@pytest.fixture(scope="session")
def once(common):
    """once(name, make): what make() gives; made by the first worker that asks."""

    def get(name, make):
        file = common / f"once-{name}.pt"
        with (common / f"once-{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not file.exists():
                torch.save(make(), file)
        return torch.load(file, weights_only=False)

    return get


@pytest.fixture(scope="session")
def data(common, once):
    """A folder with the task `few`, and small models by architecture and head, as bert-cloze."""
    out = common / "data"

    def make():
        out.mkdir()
        write_data(out)
        write_talks(out)
        for architecture, head, width in MODELS:
            models.save(architecture, out / f"{architecture}-{head}", head, initializer_range=width)
        return True

    once("data", make)
    return out
