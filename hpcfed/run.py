"""The run directory: the only file that writes files.

config.yaml        the resolved configuration, each value with its source
run.json           versions of everything, ranks, slots, model, labels
partition.json     clients x classes
metrics.jsonl      one line per round
selection.json     how the shared layers were chosen
clients/           what clients keep: personal values, difficulties, and a history of their rounds
adapter/           the shared adapter, as a PEFT folder
predictions.json   the predicted class of each test row
summary.json       the result
"""

import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from hpcfed.adapters.base import Adapted
from hpcfed.data.batches import Ids
from hpcfed.evaluation import Evaluation
from hpcfed.resolve import Resolved, describe

_PACKAGES = ("hpcfed", "torch", "deepspeed", "transformers", "peft", "mpi4py", "numpy")


class RunDirectory:
    """Writes one run. `create` on rank 0 before training; the rest as the run goes."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def create(self, resolved: Resolved, facts: dict[str, Any], partition: dict[str, Any]) -> None:
        """Make the folder and write what is known before the first round."""
        self.path.mkdir(parents=True)
        (self.path / "config.yaml").write_text(describe(resolved) + "\n")
        versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
        versions |= {"python": platform.python_version(), "platform": platform.platform()}
        _write_json(self.path / "run.json", {**facts, "versions": versions})
        _write_json(self.path / "partition.json", partition)

    def record(self, line: dict[str, Any]) -> None:
        """Append one round to metrics.jsonl."""
        with (self.path / "metrics.jsonl").open("a") as stream:
            stream.write(json.dumps(line) + "\n")

    def save_state(
        self, kind: str, client: int, round_number: int, tensors: dict[str, torch.Tensor]
    ) -> None:
        """What a client keeps after a round."""
        target = self._state(kind, client, round_number)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_suffix(".tmp")
        save_file({name: value.contiguous() for name, value in tensors.items()}, temporary)
        temporary.replace(target)

    def load_state(self, kind: str, client: int, round_number: int) -> dict[str, torch.Tensor]:
        """What a client kept after a round."""
        return load_file(self._state(kind, client, round_number))

    def drop_state(self, kind: str, client: int, round_number: int) -> None:
        """Remove a state that nothing refers to any more."""
        self._state(kind, client, round_number).unlink(missing_ok=True)

    def _state(self, kind: str, client: int, round_number: int) -> Path:
        name = f"{kind}-{round_number:05d}.safetensors"
        return self._client(client) / name

    def _client(self, client: int) -> Path:
        return self.path / "clients" / f"{client:06d}"

    def note(self, client: int, line: dict[str, Any]) -> None:
        """Append a round to a client's own history; by one rank of the slot that ran it."""
        target = self._client(client) / "history.jsonl"
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("a") as stream:
            stream.write(json.dumps(line) + "\n")

    def save_selection(self, record: dict[str, Any]) -> None:
        """How the shared layers were chosen."""
        _write_json(self.path / "selection.json", record)

    def save_adapter(
        self,
        adapted: Adapted,
        values: torch.Tensor,
        fresh: dict[str, torch.Tensor],
        labels: tuple[str, ...],
        source: str,
    ) -> None:
        """The adapter as a folder that `PeftModel.from_pretrained` loads.

        values: (layout.size,) fp32. fresh: frozen weights that the checkpoint lacked; without them
        the adapter would be loaded over other random ones, so they are part of it.
        """
        folder = self.path / "adapter"
        folder.mkdir()
        tensors = adapted.saved(values)
        tensors |= {adapted.prefix + name: value.float() for name, value in fresh.items()}
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        config = adapted.peft_config
        whole = tuple(f"{name}." for name in config.modules_to_save)
        parts = {name.rpartition(".")[0] for name in fresh if not name.startswith(whole)}
        config.modules_to_save = sorted({*config.modules_to_save, *parts})
        config.base_model_name_or_path = source
        config.inference_mode = True
        config.save_pretrained(folder)
        _write_json(folder / "labels.json", list(labels))

    def save_predictions(
        self, labels: tuple[str, ...], truth: Ids, results: dict[str, Evaluation]
    ) -> None:
        """The predicted class of each test row, after the last round."""
        rows = results["personal"].rows
        _write_json(
            self.path / "predictions.json",
            {
                "labels": list(labels),
                "row": rows.tolist(),
                "label": truth[rows].tolist(),
                **{name: result.predicted.tolist() for name, result in results.items()},
            },
            indent=None,
        )

    def save_summary(self, summary: dict[str, Any]) -> None:
        """The result of the run; its presence says that the run is complete."""
        _write_json(self.path / "summary.json", summary)


def _write_json(path: Path, content: Any, indent: int | None = 1) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=indent) + "\n")
    temporary.replace(path)
