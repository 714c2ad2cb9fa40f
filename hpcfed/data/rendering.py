"""Conversations written out by a chat template, as token ids; which of them are answers.

Nothing is searched for: the template writes the conversation up to each answer, with the words that
ask for one, and the conversation through it. By tokens the first must be a prefix of the second,
and that of the whole; what lies between the two is the answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from hpcfed.data.batches import Tokens, flatten
from hpcfed.data.gaps import spelled
from hpcfed.data.instructions import Example, Message
from hpcfed.data.rows import shown
from hpcfed.data.sources import Split
from hpcfed.errors import UserError, reason

# Where the tokenizer has no template of its own, or is not to be asked.
PLAIN = (
    "{{ begin }}{% for message in messages %}"
    "{% if message.role == 'system' %}{{ message.content }}\n\n"
    "{% elif message.role == 'user' %}### Instruction:\n{{ message.content }}\n\n"
    "{% else %}### Response:\n{{ message.content }}{{ eos_token }}\n\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}### Response:\n{% endif %}"
)
# Some templates write today's date; a run must have the same tokens tomorrow. This is the date that
# LLaMA's falls back on.
_NO_CLOCK = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}"


@dataclass(frozen=True)
class Rendered:
    """ids: of a conversation. answers: (start, stop) of each answer in it."""

    ids: list[int]
    answers: list[tuple[int, int]]


class Template:
    """A tokenizer's chat template, or the plain one."""

    def __init__(self, tokenizer: Any, plain: bool, name: str) -> None:
        """name: of the model. Raises UserError for a tokenizer without an end of a text."""
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"model.name: the tokenizer of {name!r} has no token that ends a text, so that no "
                "answer could end; set tokenizer.eos_token to a token that it has, and save it "
                "with tokenizer.save_pretrained(folder)."
            )
        self._tokenizer, self._name = tokenizer, name
        self._plain = plain or not tokenizer.chat_template
        self._template = PLAIN if self._plain else _NO_CLOCK + tokenizer.get_chat_template()
        self._special = spelled(tokenizer)
        self._ends = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
        first = tokenizer("")["input_ids"][:1]
        self._begin = tokenizer.bos_token if first == [tokenizer.bos_token_id] else ""

    @property
    def ends(self) -> tuple[int, ...]:
        """Tokens that end an answer."""
        sample = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
        (found,) = self.render([sample])
        return tuple(sorted({found.ids[-1], self._tokenizer.eos_token_id}))

    @property
    def alone(self) -> str:
        """As a chat template that needs nothing besides; a tokenizer that has it writes the same
        prompts."""
        return self._template.replace("{{ begin }}", self._begin)

    def render(self, conversations: Sequence[Sequence[Message]]) -> list[Rendered]:
        """Each conversation, ending with its last answer and the token that ends it. What a text
        spells of special tokens is left out. Raises UserError naming the first that fails."""
        parts = [self._parts(conversation) for conversation in conversations]
        texts = list({text: None for own in parts for pair in own for text in pair})
        encoded = self._tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
        ids = dict(zip(texts, encoded, strict=True))
        found = []
        for conversation, pairs in zip(conversations, parts, strict=True):
            whole, answers = ids[pairs[-1][1]], []
            for asking, through in pairs:
                before, behind = ids[asking], ids[through]
                if behind[: len(before)] != before or whole[: len(behind)] != behind:
                    raise self._refused(
                        conversation,
                        "writes a prompt in other tokens than the prompt with its answer",
                    )
                answer = behind[len(before) :]
                ends = (place for place, token in enumerate(answer, 1) if token in self._ends)
                answers.append((len(before), len(before) + next(ends, len(answer))))
            whole = whole[: answers[-1][1]]
            if whole[-1] not in self._ends:
                whole = [*whole, self._tokenizer.eos_token_id]
                answers[-1] = (answers[-1][0], len(whole))
            found.append(Rendered(whole, answers))
        return found

    def text(self, ids: Sequence[int]) -> str:
        """What a written answer says."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=True)).strip()

    def _parts(self, conversation: Sequence[Message]) -> list[tuple[str, str]]:
        """For each answer the text that asks for it, and the text through it."""
        clean = [
            {"role": own["role"], "content": self._special.sub(" ", own["content"])}
            for own in conversation
        ]
        answers = [place for place, own in enumerate(clean) if own["role"] == "assistant"]
        try:
            return [(self._text(clean[:at], True), self._text(clean[: at + 1])) for at in answers]
        except Exception as error:  # templates raise their own, and jinja's
            raise self._refused(conversation, f"fails ({reason(error)})") from None

    def _text(self, messages: list[Message], asks: bool = False) -> str:
        return str(
            self._tokenizer.apply_chat_template(
                messages,
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=asks,
                begin=self._begin,
            )
        )

    def _refused(self, conversation: Sequence[Message], why: str) -> UserError:
        mend = "give another model" if self._plain else "use task.chat_template=plain"
        return UserError(
            f"task.chat_template: the template of {self._name!r} {why} in the row that begins "
            f"{shown(conversation[0]['content'])}; {mend}, or change the row."
        )


def encode(
    split: Split, template: Template, pad_id: int, room: int, answers: Sequence[str] | None = None
) -> Tokens:
    """Tokens of a split's conversations, at most `room` each. answers: to stand in the last one's
    place.

    A row that is too long loses its beginning, but of what stands before its last answer a quarter
    of the room is kept, and the answer loses its end instead.
    """
    examples = [Example.of(text) for text in split.texts]
    conversations = [
        own.messages if answers is None else own.answered(answers[number])
        for number, own in enumerate(examples)
    ]
    rendered = template.render(conversations)
    fitted = [_fit(own, room) for own in rendered]
    tokens = flatten([own.ids for own in fitted], split.labels, pad_id)
    marks = np.zeros(len(tokens.ids), dtype=np.bool_)
    for offset, own in zip(tokens.offsets, fitted, strict=False):
        for start, stop in own.answers:
            marks[offset + start : offset + stop] = True
    return replace(
        tokens,
        answers=marks,
        positions=np.array([own.answers[-1][0] for own in fitted], dtype=np.int64),
        cut=sum(len(own.ids) > room for own in rendered),
    )


def _fit(own: Rendered, room: int) -> Rendered:
    """Cut to `room` tokens; what begins with a token is not asked for it."""
    over = len(own.ids) - room
    first = max(0, min(over, own.answers[-1][0] - room // 4))
    stop = first + room
    spans = [(max(a - first, 1), min(b, stop) - first) for a, b in own.answers]
    return Rendered(own.ids[first:stop], [(a, b) for a, b in spans if a < b])


def targets(tokens: Tokens, row: int) -> npt.NDArray[np.int64]:
    """Places in a row of the tokens of its answers."""
    assert tokens.answers is not None
    return np.flatnonzero(tokens.answers[tokens.offsets[row] : tokens.offsets[row + 1]])
