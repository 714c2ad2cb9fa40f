"""Rows that hold prompts and answers: read from any of the usual shapes into one.

messages          [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]
prompt, completion    texts, or lists of messages; with `choices`, a list of texts, the completion
                  is one of them, or its number
Alpaca            instruction, input, output
Dolly             instruction, context, response
ShareGPT          conversations: [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}]
preferences       prompt, chosen, rejected (for model.head=dpo)
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from hpcfed.data.rows import Record, Row, check_encodable, listed, named, shown, with_owner
from hpcfed.errors import UserError
from hpcfed.settings.config import Columns

Message = dict[str, str]  # role: system, user or assistant; content

_ROLES = {
    "system": "system", "user": "user", "human": "user", "assistant": "assistant",
    "gpt": "assistant", "model": "assistant",
}  # fmt: skip
# instruction, what it is about, answer
_SHAPES = (("instruction", "input", "output"), ("instruction", "context", "response"))


@dataclass(frozen=True)
class Example:
    """messages: a conversation, the assistant's answer last. choices: the answers that it is one
    of, if it has some. rejected: of a preference, the answer that is worse than the last one."""

    messages: tuple[Message, ...]
    choices: tuple[str, ...] = ()
    rejected: str | None = None

    @property
    def answer(self) -> str:
        """The last message."""
        return self.messages[-1]["content"]

    def answered(self, text: str) -> tuple[Message, ...]:
        """The conversation with another last answer."""
        return (*self.messages[:-1], {"role": "assistant", "content": text})

    def text(self) -> str:
        """As JSON, as which a split keeps it."""
        own = {"messages": self.messages, "choices": self.choices, "rejected": self.rejected}
        return json.dumps({key: value for key, value in own.items() if value})

    @classmethod
    def of(cls, text: str) -> "Example":
        """From what `text` gave."""
        own = json.loads(text)
        choices = tuple(own.get("choices", ()))
        return cls(tuple(own["messages"]), choices, own.get("rejected"))


@dataclass(frozen=True)
class Instructions:
    """Rows of prompts and answers: their text is an Example's, their label what the column `kind`
    says, "" without one. owner: the column that names the client. preferences: with a better and a
    worse answer."""

    columns: Columns
    owner: str | None = None
    kind: str | None = None
    preferences: bool = False

    @property
    def named(self) -> Sequence[tuple[str, str]]:
        """As of Reader."""
        names = ["prompt", "chosen", "rejected"]
        if not self.preferences:
            names = ["messages", "prompt", "completion", "choices"]
        return [(name, getattr(self.columns, name)) for name in names]

    def read(self, records: Iterable[tuple[str, Record]], owned: bool = True) -> list[Row]:
        """As of Reader."""
        return [self._row(*each) for each in with_owner(records, self.owner, owned)]

    def _row(self, where: str, record: Record, owner: str | None) -> Row:
        for column in filter(None, (self.kind, owner)):
            if column not in record:
                raise UserError(
                    f"{where}: no {column!r} (there are: {listed(map(repr, record))}), which "
                    "data.partition.column names."
                )
        label = "" if self.kind is None else named(where, self.kind, record[self.kind])
        own = None if owner is None else named(where, owner, record[owner])
        example = _preference if self.preferences else _conversation
        return Row(example(where, record, self.columns).text(), None, label, own, where)


def _conversation(where: str, record: Record, columns: Columns) -> Example:
    has = {name for name, value in record.items() if value is not None}
    if columns.messages in has:
        return Example(_messages(where, columns.messages, record[columns.messages]))
    if {columns.prompt, columns.completion} <= has:
        return _completed(where, record, columns)
    if "conversations" in has:
        return Example(_messages(where, "conversations", record["conversations"]))
    for instruction, context, answer in _SHAPES:
        if {instruction, answer} <= has:
            asked = _text(where, instruction, record[instruction])
            more = record.get(context)
            if more is not None and not isinstance(more, str):
                raise UserError(f"{where}: {context!r} must be a text, not {shown(more)}.")
            asked = f"{asked}\n\n{more}" if more and more.strip() else asked
            return Example(_turns(asked, _text(where, answer, record[answer])))
    raise UserError(
        f"{where}: neither {columns.messages!r} nor {columns.prompt!r} and {columns.completion!r} "
        f"(there are: {listed(map(repr, record))}); data.columns says which column is which."
    )


def _completed(where: str, record: Record, columns: Columns) -> Example:
    asked = _prompt(where, columns.prompt, record[columns.prompt])
    answer, given = record[columns.completion], record.get(columns.choices)
    if given is None:
        return Example((*asked, *_answer(where, columns.completion, answer)))
    if not isinstance(given, list) or len(given) < 2:
        raise UserError(
            f"{where}: {columns.choices!r} must be a list of at least two texts, not "
            f"{shown(given)}."
        )
    choices = tuple(_text(where, columns.choices, choice) for choice in given)
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        answer = choices[answer]
    if answer not in choices or len(set(choices)) < len(choices):
        raise UserError(
            f"{where}: {columns.completion!r} must be one of {columns.choices!r}, which differ, or "
            f"the number of one, from 0, not {shown(answer)}."
        )
    return Example((*asked, {"role": "assistant", "content": answer}), choices)


def _preference(where: str, record: Record, columns: Columns) -> Example:
    for column in (columns.prompt, columns.chosen, columns.rejected):
        if record.get(column) is None:
            raise UserError(
                f"{where}: no {column!r} (there are: {listed(map(repr, record))}); data.columns "
                "says which column is which."
            )
    asked = _prompt(where, columns.prompt, record[columns.prompt])
    answers = []
    for column in (columns.chosen, columns.rejected):
        messages = _answer(where, column, record[column])
        if messages[: len(asked)] == asked:  # as TRL writes them, with the prompt in front
            messages = messages[len(asked) :]
        if len(messages) != 1:
            raise UserError(f"{where}: {column!r} must be one answer to {columns.prompt!r}.")
        answers.append(messages[0]["content"])
    if answers[0] == answers[1]:
        raise UserError(f"{where}: {columns.chosen!r} and {columns.rejected!r} are the same.")
    last = {"role": "assistant", "content": answers[0]}
    return Example((*asked, last), rejected=answers[1])


def _turns(asked: str, answer: str) -> tuple[Message, ...]:
    return ({"role": "user", "content": asked}, {"role": "assistant", "content": answer})


def _prompt(where: str, column: str, value: Any) -> tuple[Message, ...]:
    if isinstance(value, list):
        return _messages(where, column, value, last="user")
    return ({"role": "user", "content": _text(where, column, value)},)


def _answer(where: str, column: str, value: Any) -> tuple[Message, ...]:
    if isinstance(value, list):
        return _messages(where, column, value, first=None)
    return ({"role": "assistant", "content": _text(where, column, value)},)


def _messages(
    where: str, column: str, value: Any, first: str | None = "user", last: str = "assistant"
) -> tuple[Message, ...]:
    """A list of messages. first: the role that begins, after the system's; None: any."""
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: {column!r} must be a list of messages, not {shown(value)}.")
    found = tuple(_message(where, column, message) for message in value)
    roles = [message["role"] for message in found]
    if roles[-1] != last or (first and next((r for r in roles if r != "system"), "") != first):
        whose = {"assistant": "an answer of the assistant", "user": "a message of the user"}
        begin = f"begin with {whose['user']}, or of the system, and " if first else ""
        raise UserError(
            f"{where}: {column!r} must {begin}end with {whose[last]}, and its roles are "
            f"{listed(roles)}."
        )
    return found


def _message(where: str, column: str, message: Any) -> Message:
    keys = ("role", "content")
    if isinstance(message, dict) and "from" in message:
        keys = ("from", "value")
    if not isinstance(message, dict) or any(key not in message for key in keys):
        raise UserError(
            f"{where}: each message in {column!r} must have a role and a content (or, as in "
            f"ShareGPT, from and value), not {shown(message)}."
        )
    role, content = (message[key] for key in keys)
    if not isinstance(role, str) or role not in _ROLES:
        raise UserError(
            f"{where}: a message in {column!r} is of the role {shown(role)}; there are system, "
            "user and assistant, which ShareGPT calls human and gpt."
        )
    return {"role": _ROLES[role], "content": _text(where, column, content)}


def _text(where: str, column: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: {column!r} must be a non-empty text, not {shown(value)}.")
    check_encodable(where, column, value)
    return value
