"""The run directory: the only file that writes files.

config.yaml        the resolved configuration, each value with its source
run.json           versions of everything, ranks, slots, model, labels
partition.json     clients x classes
metrics.jsonl      one line per round
clients/           personal values of clients, where a method keeps some layers at home
adapter/           the shared adapter, as a PEFT folder
summary.json       the result
"""

import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from hpcfed.adapters.lora import Adapted
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

    def save_personal(self, client: int, round_number: int, values: torch.Tensor) -> None:
        """A client's personal values (packed, fp32) after a round."""
        target = self._personal(client, round_number)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_suffix(".tmp")
        save_file({"values": values.contiguous()}, temporary)
        temporary.replace(target)

    def load_personal(self, client: int, round_number: int) -> torch.Tensor:
        """The personal values that a client had after a round."""
        return load_file(self._personal(client, round_number))["values"]

    def drop_personal(self, client: int, round_number: int) -> None:
        """Remove personal values that nothing refers to any more."""
        self._personal(client, round_number).unlink(missing_ok=True)

    def _personal(self, client: int, round_number: int) -> Path:
        return self.path / "clients" / f"{client:06d}" / f"round-{round_number:05d}.safetensors"

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
        prefix = "base_model.model."
        tensors = {
            entry.name: values[entry.values].reshape(entry.shape).clone()
            for entry in adapted.layout.entries
        }
        tensors |= {prefix + name: value.float() for name, value in fresh.items()}
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        config = adapted.lora_config
        config.modules_to_save = sorted(
            {*config.modules_to_save, *(name.rpartition(".")[0] for name in fresh)}
        )
        config.base_model_name_or_path = source
        config.inference_mode = True
        config.save_pretrained(folder)
        _write_json(folder / "labels.json", list(labels))

    def save_summary(self, summary: dict[str, Any]) -> None:
        """The result of the run; its presence says that the run is complete."""
        _write_json(self.path / "summary.json", summary)


def _write_json(path: Path, content: Any) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(path)
