"""The other side of benchmarks/flower.py: a Flower app as its users write one.

    python benchmarks/flower_app.py FOLDER

Needs flwr[simulation], torch, transformers and peft, and nothing of hpcfed. FOLDER holds what
benchmarks/flower.py writes: job.json, start.safetensors and fresh.safetensors. A process loads
model and texts once and keeps them; what travels are the trained values. Leaves result.json and
end.safetensors there.
"""

import functools
import json
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"}

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from safetensors.torch import load_file, save_file

FOLDER = Path(os.environ.setdefault("HPCFED_FLOWER_JOB", sys.argv[-1]))
client_app, server_app = ClientApp(), ServerApp()


class App:
    """Model, texts, and what every client of this process does."""

    def __init__(self) -> None:
        import peft
        import transformers

        transformers.utils.logging.disable_progress_bar()
        torch.set_num_threads(1)
        self.job = job = json.loads((FOLDER / "job.json").read_text())
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(job["model"])
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            job["model"], num_labels=job["classes"], dtype=torch.float32, **job["model_options"]
        )
        lora = peft.LoraConfig(
            r=job["rank"], lora_alpha=job["alpha"], target_modules=job["targets"],
            modules_to_save=["classifier"],
        )  # fmt: skip
        self.model = peft.get_peft_model(model, lora)
        # Frozen weights that the checkpoint lacks are the same on both sides, too.
        fresh = load_file(FOLDER / "fresh.safetensors")
        named = {f"base_model.model.{name}": value for name, value in fresh.items()}
        missed = self.model.load_state_dict(named, strict=False)
        assert not missed.unexpected_keys, missed.unexpected_keys
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.ids: dict[str, Any] = {}

    def encoded(self, split: str) -> list[list[int]]:
        """Token ids of a split's texts, read and tokenized once."""
        if split not in self.ids:
            texts = self.job[split]["texts"]
            self.ids[split] = self.tokenizer(
                texts, truncation=True, max_length=self.job["max_length"]
            )["input_ids"]
        return self.ids[split]

    def batch(self, split: str, rows: list[int]) -> dict[str, torch.Tensor]:
        """Inputs of these rows, padded to the longest, and their labels."""
        ids = self.encoded(split)
        padded = self.tokenizer.pad(
            {"input_ids": [ids[row] for row in rows]},
            return_tensors="pt",
            return_attention_mask=True,
        )
        labels = self.job[split]["labels"]
        return {**padded, "labels": torch.tensor([labels[row] for row in rows])}

    def load(self, arrays: ArrayRecord) -> None:
        """Make the trained values equal these."""
        import peft

        state = arrays.to_torch_state_dict()
        assert len(state) == len(self.trained)
        peft.set_peft_model_state_dict(self.model, state)

    def arrays(self) -> ArrayRecord:
        """The trained values."""
        import peft

        return ArrayRecord(peft.get_peft_model_state_dict(self.model))

    def train(self, client: int, round_number: int) -> int:
        """A client's local epochs; returns the samples that they took."""
        job, samples = self.job, 0
        batches = job["batches"][round_number - 1][str(client)]
        if job["shuffled"]:  # as a DataLoader with shuffle=True deals them out
            rows = np.random.default_rng([round_number, client]).permutation(
                [row for batch in batches for row in batch]
            )
            size = job["batch_size"]
            batches = [rows[i : i + size].tolist() for i in range(0, len(rows), size)]
        torch.manual_seed(client)
        self.model.train()
        optimizer = torch.optim.AdamW(self.trained, lr=job["lr"], weight_decay=0.0)
        for rows in batches:
            loss = self.model(**self.batch("train", rows)).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.trained, job["clip"])
            optimizer.step()
            samples += len(rows)
        return samples

    @torch.no_grad()
    def right(self, part: int, parts: int) -> int:
        """How many of a part of the test texts, shortest first, are answered rightly."""
        self.model.eval()
        ids, size = self.encoded("test"), self.job["evaluation_batch_size"]
        order = sorted(range(len(ids)), key=lambda row: len(ids[row]))
        batches = [order[i : i + size] for i in range(0, len(order), size)][part::parts]
        right = 0
        for rows in batches:
            inputs = self.batch("test", rows)
            labels = inputs.pop("labels")
            right += int((self.model(**inputs).logits.argmax(-1) == labels).sum())
        return right


@functools.cache
def app() -> App:
    """This process's own."""
    return App()


@client_app.train()
def train(message: Message, context: Any) -> Message:
    """One client's part of a round."""
    config: Any = message.content["config"]
    arrays: Any = message.content["arrays"]
    app().load(arrays)
    samples = app().train(int(config["client"]), int(config["server-round"]))
    told = MetricRecord({"num-examples": samples})
    return Message(RecordDict({"arrays": app().arrays(), "metrics": told}), reply_to=message)


@client_app.evaluate()
def evaluate(message: Message, context: Any) -> Message:
    """A part of the test texts."""
    config: Any = message.content["config"]
    arrays: Any = message.content["arrays"]
    app().load(arrays)
    right = app().right(int(config["part"]), int(config["parts"]))
    told = MetricRecord({"num-examples": 1, "right": right})
    return Message(RecordDict({"metrics": told}), reply_to=message)


class SameClients(FedAvg):
    """FedAvg over the clients that the job names, and the test split after the last round, halved
    between the processes."""

    def __init__(self, job: dict[str, Any]) -> None:
        super().__init__(fraction_train=1.0, fraction_evaluate=1.0)
        self.job, self.right, self.samples = job, 0, 0
        self.seconds: list[float] = []
        self.began = 0.0

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Any
    ) -> Iterable[Message]:
        """A message to each client of the round."""
        clients = self.job["batches"][server_round - 1]
        told = [{"client": int(k), "server-round": server_round} for k in clients]
        self.began = time.monotonic()
        return self._messages("train", arrays, told, grid)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Any
    ) -> Iterable[Message]:
        """A message to each process, after the last round."""
        self.seconds.append(time.monotonic() - self.began)
        parts = self.job["processes"] if server_round == self.job["rounds"] else 0
        told = [{"part": part, "parts": parts} for part in range(parts)]
        return self._messages("evaluate", arrays, told, grid)

    def _messages(
        self, kind: str, arrays: ArrayRecord, told: list[dict[str, int]], grid: Any
    ) -> list[Message]:
        nodes = list(grid.get_node_ids())
        while len(nodes) < len(told):
            time.sleep(0.05)
            nodes = list(grid.get_node_ids())
        return [
            Message(
                content=RecordDict({"arrays": arrays, "config": ConfigRecord(dict(own))}),
                message_type=kind,
                dst_node_id=node,
            )
            for node, own in zip(nodes, told, strict=False)
        ]

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
        """FedAvg's; counts samples."""
        kept = list(replies)
        for reply in kept:
            if reply.has_error():
                raise RuntimeError(reply.error.reason)
        contents: list[Any] = [reply.content for reply in kept]
        self.samples += sum(int(own["metrics"]["num-examples"]) for own in contents)
        return super().aggregate_train(server_round, kept)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> Any:
        """How many texts are answered rightly."""
        contents: list[Any] = [reply.content for reply in replies]
        self.right += sum(int(own["metrics"]["right"]) for own in contents)


@server_app.main()
def serve(grid: Any, context: Any) -> None:
    """All rounds."""
    job = json.loads((FOLDER / "job.json").read_text())
    start = load_file(FOLDER / "start.safetensors")
    strategy = SameClients(job)
    result = strategy.start(grid, ArrayRecord(start), num_rounds=job["rounds"])
    save_file(result.arrays.to_torch_state_dict(), FOLDER / "end.safetensors")
    told = {
        "seconds": strategy.seconds,
        "samples": strategy.samples,
        "accuracy": strategy.right / len(job["test"]["labels"]),
    }
    (FOLDER / "result.json").write_text(json.dumps(told))


def main() -> None:
    """Run it in this process and as many workers as the job says."""
    job = json.loads((FOLDER / "job.json").read_text())
    backend: Any = {
        "init_args": {"num_cpus": job["processes"], "include_dashboard": False},
        "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
    }
    run_simulation(server_app, client_app, job["clients"], backend_config=backend)


if __name__ == "__main__":
    import flower_app  # by its name workers import it once; what is in __main__ they get anew

    flower_app.main()
