"""Rows filled into a template and tokenized, the gap never cut away."""

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from hpcfed.data.batches import Tokens, flatten
from hpcfed.data.sources import Split
from hpcfed.data.wordings import Wording
from hpcfed.errors import UserError


def encode(split: Split, wording: Wording, tokenizer: Any, room: int, ends: bool) -> Tokens:
    """Fill in and tokenize a split; no row is longer than `room` tokens.

    A text that is too long loses its end, never the template or the gap. ends: the rows end where
    the gap stands, and nothing closes them; else `positions` says where it stands.
    Raises UserError if not even the template fits.
    """
    gap = "" if ends else tokenizer.mask_token
    rows = [_row(a, b, wording, tokenizer, gap, room) for a, b in _texts(split, tokenizer)]
    tokens = flatten(rows, split.labels, tokenizer.pad_token_id)
    if ends:
        return tokens
    positions = np.array([row.index(tokenizer.mask_token_id) for row in rows], dtype=np.int64)
    return replace(tokens, positions=positions)


def _texts(split: Split, tokenizer: Any) -> Iterator[tuple[str, str]]:
    """Texts in pairs; one that spells a special token must not be taken for the gap, or an end."""
    special = spelled(tokenizer)
    pairs = split.pairs or [""] * len(split)
    for pair in zip(split.texts, pairs, strict=True):
        a, b = (special.sub(" ", text) for text in pair)
        yield a, b


def spelled(tokenizer: Any) -> re.Pattern[str]:
    """Finds the special tokens that a text spells."""
    # A mark, as "!", may serve as padding, and is no harm.
    tokens = sorted((own for own in tokenizer.all_special_tokens if len(own) > 2), reverse=True)
    return re.compile("|".join(map(re.escape, tokens)) or r"(?!)")


def _row(a: str, b: str, wording: Wording, tokenizer: Any, gap: str, room: int) -> list[int]:
    """The ids of a row, its longer text cut until it fits."""
    while True:
        text = wording.fill(a, b, gap)
        ids: list[int] = tokenizer(text if gap else text.rstrip())["input_ids"]
        while not gap and len(ids) > 1 and ids[-1] in tokenizer.all_special_ids:
            ids = ids[:-1]
        over = len(ids) - room
        if over <= 0:
            return ids
        sizes = [len(tokenizer(side, add_special_tokens=False)["input_ids"]) for side in (a, b)]
        if not any(sizes):
            raise UserError(
                f"task.max_length is too short for the template: without any text it takes "
                f"{len(ids)} tokens and there is room for {room}."
            )
        drop = min(over, max(abs(sizes[0] - sizes[1]), -(-over // 2)))
        if sizes[0] >= sizes[1]:
            a = _cut(a, sizes[0] - drop, tokenizer)
        else:
            b = _cut(b, sizes[1] - drop, tokenizer)


def _cut(text: str, keep: int, tokenizer: Any) -> str:
    """The first `keep` tokens of a text."""
    if keep <= 0:
        return ""
    spans = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return text[: spans["offset_mapping"][keep - 1][1]]
