"""`hpcfed predict`: labels and probabilities of texts, by an exported folder or a run."""

import csv
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hpcfed import registry
from hpcfed.adapters import bottleneck
from hpcfed.app.export import TASK, export
from hpcfed.data import files, rows
from hpcfed.data.batches import Floats, Ids, Tokens
from hpcfed.data.rows import Record
from hpcfed.data.sources import Split, TaskData
from hpcfed.errors import UserError, reason
from hpcfed.objectives import heads
from hpcfed.settings.config import Config, Model, Task
from hpcfed.storage.checks import DamageError, read_object
from hpcfed.storage.files import write_bytes
from hpcfed.storage.paths import MANIFEST

SUFFIXES = (".csv", ".jsonl", ".txt")


@dataclass(frozen=True)
class Predictor:
    """A model that was exported, ready to predict. exact: rows of a batch have the same length,
    since PEFT's prompts make a decoder read its answer where padding may stand."""

    facts: dict[str, Any]
    network: Any
    tokenizer: Any
    head: heads.Head
    device: torch.device
    exact: bool

    @staticmethod
    def load(folder: Path) -> "Predictor":
        """From an exported folder. Raises UserError if it is none, or cannot be loaded."""
        try:
            facts = read_object(folder / TASK)
        except DamageError as damage:
            raise UserError(
                f"{damage}; give a folder that `hpcfed export` has written, or a run directory."
            ) from None
        if facts["form"] not in ("peft", "merged", "bottleneck"):
            raise UserError(
                f"{folder} holds an adapter of the kind {facts['form']}, which PEFT does not load; "
                "load it as its README.md says."
            )
        if not facts["labels"]:
            raise UserError(
                f"{folder} holds a model that writes answers and knows no labels; use it as its "
                "README.md says, or with lm_eval (docs/export.md)."
            )
        config, tokenizer = _config(facts), _tokenizer(folder)
        pairs: list[str] | None = [] if "{b}" in facts.get("template", "") else None
        nothing = Split([], pairs, np.zeros(0, dtype=np.int64), None)
        task = TaskData(facts["task"], tuple(facts["labels"]), "accuracy", 0, nothing, nothing)
        head = heads.build(config, task, tokenizer)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            network = _network(facts, folder).eval().to(device)
        except Exception as error:  # transformers and PEFT raise many unrelated types here
            raise UserError(
                f"{folder} cannot be loaded ({reason(error)}); its base is {facts['base']}: see "
                "to it that it can be reached, and is the one that was trained."
            ) from None
        exact = getattr(network, "active_peft_config", None) is not None and (
            network.active_peft_config.peft_type == "PROMPT_TUNING"
        )
        return Predictor(facts, network, tokenizer, head, device, exact)

    def probabilities(self, texts: list[str], pairs: list[str] | None, batch: int) -> Floats:
        """(texts, labels): of each label, given that one of them is right."""
        split = Split(texts, pairs, np.zeros(len(texts), dtype=np.int64), None)
        tokens = self.head.encode(split, self.tokenizer, int(self.facts["max_length"]))
        found = np.zeros((len(texts), len(self.facts["labels"])))
        with torch.no_grad():
            for own in self._batches(tokens, batch):
                found[own] = self._of(tokens, own)
        return found

    def _batches(self, tokens: Tokens, size: int) -> Iterator[Ids]:
        order = np.argsort(tokens.lengths, kind="stable")
        start = 0
        while start < len(order):
            own = order[start : start + size]
            if self.exact:
                own = own[tokens.lengths[own] == tokens.lengths[own[0]]]
            yield own
            start += len(own)

    def _of(self, tokens: Tokens, own: Ids) -> Floats:
        """A label's probability is exp(-loss) of it, as if it were the true one."""
        once = _Once(self.network)
        losses = []
        for label in range(len(self.facts["labels"])):
            said = replace(tokens, labels=np.full(len(tokens), label, dtype=np.int64))
            losses.append(self.head.losses(once, said, own, self.device).double())
        whole: Floats = torch.stack(losses, dim=1).neg().softmax(1).cpu().numpy()
        return whole


class _Once:
    """The model as heads call it; the same inputs again give the logits of the first time."""

    def __init__(self, network: Any) -> None:
        self._network = network
        self._inputs: dict[str, torch.Tensor] = {}
        self._logits = torch.zeros(0)

    def __call__(self, positions: torch.Tensor | None = None, **inputs: torch.Tensor) -> Any:
        if not _same(inputs, self._inputs):
            self._logits, self._inputs = self._network(**inputs).logits, inputs
        if positions is None:
            return self._logits
        virtual = self._logits.shape[1] - inputs["input_ids"].shape[1]  # tokens in front
        index = (positions + virtual).unsqueeze(-1).expand(-1, -1, self._logits.shape[-1])
        return self._logits.gather(1, index)


def _same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(
        torch.equal(own, two[name]) for name, own in one.items()
    )


def _tokenizer(folder: Path) -> Any:
    """As a run has saved it; it has a token to pad with."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers raises many unrelated types here
        raise UserError(f"{folder} holds no tokenizer ({reason(error)}); export it anew.") from None
    tokenizer.padding_side = "right"
    return tokenizer


def _config(facts: dict[str, Any]) -> Config:
    """What heads read of a configuration."""
    words = facts.get("words")
    return Config(
        model=Model(head=facts["head"]),
        task=Task(
            name=facts["task"],
            max_length=facts["max_length"],
            template=facts.get("template"),
            verbalizer=words,
        ),
    )


def _network(facts: dict[str, Any], folder: Path) -> Any:
    import transformers

    auto = getattr(transformers, facts["model_class"])
    dtype = getattr(torch, facts["dtype"])
    if facts["form"] == "merged":
        return auto.from_pretrained(folder, dtype=dtype)
    options: dict[str, Any] = {"pad_token_id": facts["pad_token_id"]}
    if registry.OBJECTIVES[facts["head"]].trains_head:
        options["num_labels"] = len(facts["labels"])
    base = auto.from_pretrained(facts["base"], dtype=dtype, **options)
    if facts["form"] == "bottleneck":
        return bottleneck.load(base, folder)
    import peft

    return peft.PeftModel.from_pretrained(base, folder)


def read_texts(path: Path, columns: dict[str, str]) -> tuple[list[str], list[str] | None]:
    """Texts and, if there are some, second texts of a file. Raises UserError naming the line of the
    first fault."""
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path}: give texts as {', '.join(SUFFIXES)}.")
    if path.suffix == ".txt":
        texts = [line for line in _lines(path) if line.strip()]
        found: list[tuple[str, Record]] = [(str(path), {columns["text"]: text}) for text in texts]
    else:
        found = list(files.records(path, columns=1))
    if not found:
        raise UserError(f"{path} holds no text.")
    first, second = columns["text"], columns["text_pair"]
    for where, record in found:
        for name in (first, second):
            text = record.get(name, None if name == first else "")
            if not isinstance(text, str) or (name == first and not text.strip()):
                raise UserError(
                    f"{where}: {name!r} must be a text, and not empty (there are: "
                    f"{rows.listed(map(repr, record))})."
                )
    pairs = [str(record.get(second, "")) for _, record in found]
    return [str(record[first]) for _, record in found], pairs if any(pairs) else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; save it in that encoding.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}).") from None


def predict(
    folder: Path,
    texts: Path,
    to: Path | None = None,
    client: str | None = None,
    best: bool = False,
    batch: int = 32,
) -> int:
    """Write `predicted` and each label's probability beside each text, to a .csv or .jsonl file, or
    as CSV to standard output; the number of texts. folder: exported, or a run directory, then
    client and best say which of its models, see `export`.

    Raises UserError for a folder or a file that cannot be used.
    """
    if to is not None and to.suffix not in SUFFIXES[:2]:
        raise UserError(f"--to {to}: give a .csv or a .jsonl file.")
    if not (folder / MANIFEST).exists():
        if client is not None or best:
            raise UserError(f"--client and --best choose in a run directory, and {folder} is none.")
        predictor = Predictor.load(folder)
    else:
        with tempfile.TemporaryDirectory() as place:
            export(folder, Path(place) / "exported", client, best)
            predictor = Predictor.load(Path(place) / "exported")
    first, second = read_texts(texts, predictor.facts["columns"])
    found = predictor.probabilities(first, second, batch)
    _write(predictor.facts, first, second, found, to)
    return len(first)


def _write(
    facts: dict[str, Any], texts: list[str], pairs: list[str] | None, found: Floats, to: Path | None
) -> None:
    labels = facts["labels"]
    told = [labels[i] for i in found.argmax(1)]
    sides = [texts] if pairs is None else [texts, pairs]
    if to is not None and to.suffix == ".jsonl":
        names = [facts["columns"]["text"], facts["columns"]["text_pair"]]
        lines = [
            json.dumps(
                dict(zip(names, row, strict=False))
                | {"predicted": label, "probabilities": dict(zip(labels, own, strict=True))},
                ensure_ascii=False,
            )
            for row, label, own in zip(zip(*sides, strict=True), told, found.tolist(), strict=True)
        ]
        write_bytes(to, ("\n".join(lines) + "\n").encode())
        return
    names = [facts["columns"]["text"], facts["columns"]["text_pair"]][: len(sides)]
    table = [[*names, "predicted", *(f"p({label})" for label in labels)]]
    for row, label, own in zip(zip(*sides, strict=True), told, found.tolist(), strict=True):
        table.append([*row, label, *(f"{value:.6f}" for value in own)])
    if to is None:
        csv.writer(sys.stdout).writerows(table)
        return
    with tempfile.TemporaryFile("w+", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows(table)
        stream.seek(0)
        write_bytes(to, stream.read().encode())
