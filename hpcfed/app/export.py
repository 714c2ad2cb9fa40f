"""`hpcfed export`: a run's adapter, or the model with it, for PEFT and transformers alone.

The folder holds what a PEFT folder holds, or a merged model; besides, the tokenizer, README.md (a
model card, with the metrics that the run has measured of just this model) and task.json: labels,
template, words, lengths, all that it takes to predict.
"""

import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hpcfed import model, registry
from hpcfed.adapters.layout import AdapterLayout
from hpcfed.adapters.residual import fold
from hpcfed.app.card import card
from hpcfed.checkpoints import resolve_name
from hpcfed.data.sources import Split, TaskData
from hpcfed.data.wordings import template_of
from hpcfed.errors import UserError
from hpcfed.model import Prepared
from hpcfed.objectives import heads
from hpcfed.objectives.completion import Completion
from hpcfed.policies.sharing import Sharing
from hpcfed.policies.updates import held
from hpcfed.settings import plugins
from hpcfed.settings.config import Config
from hpcfed.settings.resolve import stored
from hpcfed.state import PERSONAL, UPDATES, RunState
from hpcfed.storage.adapters import write_adapter
from hpcfed.storage.checks import DamageError, read_object
from hpcfed.storage.files import write_bytes, write_json, writing
from hpcfed.storage.paths import CONFIG, LIVES, PARTITION, PREDICTIONS, SUMMARY
from hpcfed.storage.run import RunDirectory

TASK = "task.json"


@dataclass(frozen=True)
class Chosen:
    """Which model of a run. client: None is the shared one. best: by validation, not the last."""

    client: int | None
    best: bool

    def words(self, rounds: int) -> str:
        """As a person says it."""
        whose = "the shared model" if self.client is None else f"client {self.client}'s own model"
        when = f"round {rounds}, the best by validation" if self.best else f"round {rounds}"
        return f"{whose} after {when}"


def export(
    run: Path, to: Path, client: str | None = None, best: bool = False, merge: bool = False
) -> str:
    """Write a model of a run to a folder that is not there yet; the run stays as it is. client: its
    number, or its name where the data name clients. What was written, in words.

    Raises UserError for a run, a client or a round that is not there, and for an adapter that
    cannot be merged.
    """
    if to.exists():
        raise UserError(f"{to} exists already; give another folder with --to, or remove it.")
    directory = RunDirectory(run)
    state, config = directory.look(), stored(run / CONFIG)
    if config.plugins:  # they may say where personal values belong
        began = read_object(run / LIVES).get("plugins")
        plugins.check(config.plugins, began if isinstance(began, dict) else {}, run)
    labels, chosen = _labels(run), Chosen(_number(run, client), best)
    if best and state.best is None:
        raise UserError(
            f"{run} has no best round: no round was validated (data.validation, "
            "evaluation.every); leave out --best for the last round."
        )
    if merge and config.adapter.kind not in ("lora", "adalora"):
        raise UserError(
            f"--merge: an adapter of the kind {config.adapter.kind} cannot be added to the weights "
            "of its model; only lora and adalora can. Leave out --merge."
        )
    tokenizer = model.load_tokenizer(config)
    head = heads.build(config, _outline(config, labels), tokenizer)
    # Whoever loads the folder has the base as it is published.
    whole = replace(config, model=replace(config.model, quantize="none"))
    prepared = model.prepare(whole, labels, tokenizer.pad_token_id, {}, head)
    directory.check_layout(prepared.adapted.layout)
    values = _vector(directory, state, config, prepared.adapted.layout, chosen)
    rounds = state.best.round + 1 if best and state.best is not None else state.rounds
    facts = _facts(config, prepared, labels, tokenizer, merge)
    if isinstance(head, Completion):
        tokenizer.chat_template = head.template.alone
        facts["ends"] = list(head.ends)
    facts["holds"] = f"{chosen.words(rounds)}, of the run {run.name}"
    text = card(facts, config, _measured(run, state, chosen))
    with writing(to):
        to.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(".new", f".{to.name}.", to.parent))
        try:
            if merge:
                _write_merged(made, prepared, values)
            else:
                base = str(facts["base"])
                write_adapter(
                    made, prepared.adapted, values, prepared.fresh, labels, base, head.model_class
                )
            tokenizer.save_pretrained(made)
            write_json(made / TASK, facts)
            write_bytes(made / "README.md", text.encode())
            made.chmod(0o755)
            made.rename(to)
        except BaseException:
            shutil.rmtree(made, ignore_errors=True)
            raise
    return chosen.words(rounds)


def _labels(run: Path) -> tuple[str, ...]:
    try:
        return tuple(map(str, read_object(run / LIVES).get("labels", [])))
    except DamageError as damage:
        raise UserError(f"{damage}; put back a copy that is whole.") from None


def _number(run: Path, client: str | None) -> int | None:
    """The number of a client that is named, or numbered."""
    if client is None:
        return None
    table = read_object(run / PARTITION)  # it was checked with the commit
    names, clients = table.get("clients", []), len(table["train"])
    if client in names:
        return int(names.index(client))
    if client.isdecimal() and int(client) < clients:
        return int(client)
    known = f", by number or name ({', '.join(names[:3])}, ...)" if names else ""
    raise UserError(
        f"--client {client}: {run} has no such client; give one of 0 to {clients - 1}{known}."
    )


def _outline(config: Config, labels: tuple[str, ...]) -> TaskData:
    """What heads want to know of a task, without its rows: whether they are pairs, for one, which
    the template tells that the run was checked with."""
    template = template_of(config, config.task.name) or ""
    nothing = np.zeros(0, dtype=np.int64)
    rows = Split([], [] if "{b}" in template else None, nothing, None)
    return TaskData(config.task.name, labels, "accuracy", 0, rows, rows)


def _vector(
    directory: RunDirectory,
    state: RunState,
    config: Config,
    layout: AdapterLayout,
    chosen: Chosen,
) -> torch.Tensor:
    """(layout.size,): the shared values and, of a client, its personal ones, or those everyone
    starts from; zero where it has none. As the run evaluates them."""
    best = state.best if chosen.best else None
    vector = (state.values if best is None else best.values).clone()
    client = chosen.client
    if client is None:
        return vector
    own = state.clients[PERSONAL]
    number = (own.current if best is None else own.pinned).get(client)
    if number is not None:
        packed = directory.clients.load(PERSONAL, client, number)["values"]
        sharing = Sharing(registry.SHARING[config.sharing.rule], layout)
        sharing.personal(state.chosen).unpack(packed, vector)
    transforms = [registry.UPDATES[name](config, layout) for name in config.updates.transforms]
    kept = state.clients[UPDATES].current.get(client)
    memo = {} if kept is None else directory.clients.load(UPDATES, client, kept)
    has = held(transforms, client, memo)
    return vector if has is None else torch.where(has, vector, 0.0)


def _facts(
    config: Config, prepared: Prepared, labels: tuple[str, ...], tokenizer: Any, merge: bool
) -> dict[str, Any]:
    """task.json."""
    base = resolve_name(config.model.name)
    head: Any = prepared.head
    facts = {
        "task": config.task.name,
        "head": config.model.head,
        "model_class": head.model_class,
        "form": "merged" if merge else config.adapter.kind
        if isinstance(prepared.adapted.description, dict) else "peft",
        "base": str(Path(base).resolve()) if Path(base).is_dir() else base,
        "dtype": {"fp32": "float32", "bf16": "bfloat16"}[config.model.dtype],
        "labels": list(labels),
        "max_length": config.task.max_length,
        "pad_token_id": int(tokenizer.pad_token_id),
        "columns": {
            "text": config.data.columns.text, "text_pair": config.data.columns.text_pair
        },
    }  # fmt: skip
    if hasattr(head, "wording"):
        facts["template"] = "".join(head.wording.parts)
        facts["words"] = dict(zip(labels, head.wording.words, strict=True))
        facts["word_ids"] = dict(zip(labels, head.words, strict=True))
    return facts


def _write_merged(folder: Path, prepared: Prepared, values: torch.Tensor) -> None:
    adapted = prepared.adapted
    with torch.no_grad():
        for parameter, entry in zip(adapted.parameters, adapted.layout.entries, strict=True):
            parameter.copy_(values[entry.values].view(entry.shape))
    backbone: Any = adapted.network.backbone
    fold(backbone, adapted.gain)
    merged = backbone.merge_and_unload()
    merged.config.use_cache = True
    merged.save_pretrained(folder)


def _measured(run: Path, state: RunState, chosen: Chosen) -> list[str]:
    """What the run has measured of just this model, line by line."""
    lines = []
    if chosen.best and state.best is not None:
        lines.append(
            f"validation, personal: {state.best.score:.4f}, the best of the rounds that were "
            "validated; it was chosen by this figure"
        )
    try:
        summary = read_object(run / SUMMARY)
        told = read_object(run / PREDICTIONS)
    except DamageError:
        return [*lines, "the run is not complete: its test split has not been used"]
    if summary["rounds"] != state.rounds:
        return lines
    if "rounded" in summary:
        lines.append(f"of its base: {summary['rounded']}")
    if chosen.client is None:
        tests = summary["test"] if not chosen.best else summary["best"]
        lines += [
            f"test {name}: {value:.4f}" for name, value in tests["global"].items()
            if isinstance(value, float)
        ]  # fmt: skip
    elif not chosen.best and "client" in told and "accuracy" in summary:
        own = [i for i, k in enumerate(told["client"]) if k == chosen.client]
        right = sum(told["personal"][i] == told["label"][i] for i in own)
        lines.append(f"test accuracy on the client's own {len(own)} rows: {right} right")
    else:
        lines.append("its own test figure was not measured by itself")
    if "majority" in summary:
        lines.append(f"always the most frequent class: {summary['majority']:.4f} of all test rows")
    return lines
