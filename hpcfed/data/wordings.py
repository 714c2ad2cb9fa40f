"""Templates and verbalizers: how a row becomes a text with a gap, and a label the word in it.

In a template {a} is the text, {b} the second text of pairs, <mask> the gap. Those of the ten tasks
are the published FedPepTAO code's for masked language models; for decoders, whose gap must stand at
the end, they are ours, with the same words.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from hpcfed.data.sources import TaskData
from hpcfed.errors import UserError
from hpcfed.settings.config import Config

GAP = "<mask>"
_Encoded = TypeVar("_Encoded", int, tuple[int, ...])
_FIELDS = re.compile(r"(\{a\}|\{b\}|<mask>)")
_SENTIMENT = {"positive": "great", "negative": "terrible"}
_ENTAILMENT = {"entailment": "Yes", "not_entailment": "No"}
_PAIR, _SINGLE = "{a} ? <mask> , {b}", "{a} . It was <mask> ."
_PAIR_END, _SINGLE_END = "{a} ? {b} . <mask>", "{a} . It was <mask>"


@dataclass(frozen=True)
class Shipped:
    """What comes with one of the ten tasks; `ending` is the template for decoders."""

    template: str
    ending: str
    verbalizer: Mapping[str, str]


SHIPPED: dict[str, Shipped] = {
    "rte": Shipped(_PAIR, _PAIR_END, _ENTAILMENT),
    "qnli": Shipped(_PAIR, _PAIR_END, _ENTAILMENT),
    "mrpc": Shipped(_PAIR, _PAIR_END, {"equivalent": "Yes", "not_equivalent": "No"}),
    "boolq": Shipped(_PAIR, "{b} {a} ? <mask>", {"yes": "Yes", "no": "No"}),
    "sst2": Shipped(_SINGLE, _SINGLE_END, _SENTIMENT),
    "mr": Shipped(_SINGLE, _SINGLE_END, _SENTIMENT),
    "mpqa": Shipped(_SINGLE, _SINGLE_END, _SENTIMENT),
    "cola": Shipped(
        _SINGLE, _SINGLE_END, {"acceptable": "acceptable", "unacceptable": "unacceptable"}
    ),
    "subj": Shipped(_SINGLE, _SINGLE_END, {"subjective": "subjective", "objective": "objective"}),
    "trec": Shipped(
        "<mask> : {a}", "{a} Answer type: <mask>",
        {"DESC": "Description", "ENTY": "Entity", "ABBR": "Expression", "HUM": "Human",
         "LOC": "Location", "NUM": "Number"},
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Wording:
    """A template, cut at its fields, and the word of each label, in the order of the labels."""

    parts: tuple[str, ...]
    words: tuple[str, ...]

    @property
    def space(self) -> str:
        """What stands between the gap and the text before it."""
        before = self.parts[self.parts.index(GAP) - 1] if self.parts[0] != GAP else ""
        return " " if before.endswith(" ") else ""

    def fill(self, a: str, b: str, gap: str) -> str:
        """The text of a row."""
        values = {"{a}": a, "{b}": b, GAP: gap}
        return "".join(values.get(part, part) for part in self.parts)


def template_of(config: Config, task: str) -> str | None:
    """The template that is configured, or the one that comes with the task; None: there is none."""
    shipped = SHIPPED.get(task)
    if config.task.template is not None or shipped is None:
        return config.task.template
    return shipped.ending if config.model.head == "label_words" else shipped.template


def wording(config: Config, task: TaskData) -> Wording:
    """The template and words of a task, for the head that is configured.

    Raises UserError if there are none, or if they do not fit the data or the head.
    """
    decoder = config.model.head == "label_words"
    shipped = SHIPPED.get(task.name)
    template = template_of(config, task.name)
    verbalizer = config.task.verbalizer or (shipped.verbalizer if shipped else None)
    missing = [
        *(["task.template, as " + repr(_SINGLE_END if decoder else _SINGLE)] * (template is None)),
        *(["task.verbalizer, as {" + f"{task.labels[0]}: word, ...}}"] * (verbalizer is None)),
    ]
    if template is None or verbalizer is None:
        raise UserError(
            f"model.head={config.model.head} needs a wording, and task {task.name!r} brings none: "
            f"set {' and '.join(missing)}."
        )
    parts = tuple(part for part in _FIELDS.split(template) if part)
    for field, wanted in ((GAP, True), ("{a}", True), ("{b}", task.train.pairs is not None)):
        if parts.count(field) != wanted:
            number = "exactly one" if wanted else "no"
            raise UserError(f"task.template {template!r} must hold {number} {field}.")
    if decoder and parts[-1] != GAP:
        raise UserError(
            f"task.template {template!r}: with model.head=label_words, {GAP} must stand at the "
            "end, since a decoder sees only what comes before."
        )
    if set(verbalizer) != set(task.labels):
        raise UserError(
            f"task.verbalizer names {', '.join(sorted(verbalizer))}; it must give a word for each "
            f"of the labels {', '.join(task.labels)}."
        )
    words = tuple(verbalizer[label] for label in task.labels)
    if len(set(words)) < len(words):
        raise UserError(f"task.verbalizer gives two labels the same word: {', '.join(words)}.")
    return Wording(parts, words)


def single_tokens(wording: Wording, tokenizer: Any) -> tuple[int, ...]:
    """The token of each label's word, as it would stand in the gap.

    Raises UserError for a word that is not one token, or a tokenizer without a mask.
    """
    if tokenizer.mask_token is None:
        raise UserError(
            "model.head=cloze needs a masked language model; this model's tokenizer has no mask "
            "token. Use model.head=label_words for a decoder."
        )
    tokens = []
    for word in wording.words:
        ids = tokenizer(wording.space + word, add_special_tokens=False)["input_ids"]
        if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
            pieces = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(ids)))
            raise UserError(
                f"task.verbalizer: {word!r} is not one token of this model ({pieces}); choose "
                "another word, or model.head=classifier."
            )
        tokens.append(int(ids[0]))
    return _all_different(tokens, wording)


def continuations(wording: Wording, tokenizer: Any) -> tuple[tuple[int, ...], ...]:
    """The tokens of each label's word where it goes on from a text.

    Raises UserError for a word of which nothing is left, or that another label has.
    """
    before = tokenizer("x", add_special_tokens=False)["input_ids"]
    tokens = []
    for word in wording.words:
        whole = tokenizer(f"x{wording.space}{word}", add_special_tokens=False)["input_ids"]
        if whole[: len(before)] != before or len(whole) == len(before):
            raise UserError(
                f"task.verbalizer: {word!r} melts into the text before it; let a space stand "
                f"before {GAP} in task.template."
            )
        tokens.append(tuple(int(i) for i in whole[len(before) :]))
    return _all_different(tokens, wording)


def _all_different(encoded: list[_Encoded], wording: Wording) -> tuple[_Encoded, ...]:
    """The labels' encoded words. Raises UserError if the model cannot tell two labels apart."""
    if len(set(encoded)) < len(encoded):
        raise UserError(
            "task.verbalizer: two labels' words are the same tokens of this model "
            f"({', '.join(wording.words)}); choose other words."
        )
    return tuple(encoded)
