"""Token ids of a split, and batches formed so that little is padding.

A batch is an array of row numbers. How a client's batch is cut into micro-batches for its ranks
(`split_batch`) depends on nothing but the batch, the ranks and the micro-batch size, so all ranks
of a client agree without talking.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hpcfed.data.sources import Split
from hpcfed.errors import UserError
from hpcfed.rng import generator

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

# Batches are cut from pools of this many batches, sorted by length: rows of one batch have about
# the same length, and which rows meet still changes from epoch to epoch.
POOL = 16


@dataclass(frozen=True)
class Tokens:
    """All rows of a split, tokenized: `ids` and `types` flat (total,), row i at offsets[i:i+2]."""

    ids: npt.NDArray[np.int32]
    types: npt.NDArray[np.int8] | None
    offsets: Ids
    labels: Ids
    pad_id: int
    positions: Ids | None = None  # (n,) where a template has its gap, or the last answer begins
    answers: npt.NDArray[np.bool_] | None = None  # (total,) tokens of answers
    worse: "Tokens | None" = None  # of preferences: the same rows with the worse answer
    choices: "tuple[Choice, ...]" = ()  # the rows with the answers that they offer
    right: tuple[str, ...] = ()  # the last answers, as texts
    cut: int = 0  # rows that were too long and have lost a part

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def lengths(self) -> Ids:
        """(n,) tokens of each row, special tokens included."""
        return np.diff(self.offsets)

    def row(self, number: int) -> npt.NDArray[np.int32]:
        """The token ids of a row."""
        return self.ids[self.offsets[number] : self.offsets[number + 1]]

    def collate(self, rows: Ids, device: torch.device) -> dict[str, torch.Tensor]:
        """input_ids, attention_mask (and token_type_ids): (len(rows), longest row) int64, padded
        on the right. No mask where nothing is padding: attention is faster without, and
        transformers would have the host wait to find that out."""
        lengths = self.lengths[rows]
        mask = np.arange(int(lengths.max())) < lengths[:, None]
        ids = np.full(mask.shape, self.pad_id, dtype=np.int64)
        flat = np.concatenate([np.arange(self.offsets[r], self.offsets[r + 1]) for r in rows])
        ids[mask] = self.ids[flat]
        batch = {"input_ids": ids}
        if not mask.all():
            batch["attention_mask"] = mask.astype(np.int64)
        if self.types is not None:
            types = np.zeros(mask.shape, dtype=np.int64)
            types[mask] = self.types[flat]
            batch["token_type_ids"] = types
        return {name: torch.from_numpy(array).to(device) for name, array in batch.items()}


@dataclass(frozen=True)
class Choice:
    """A split with one of the answers that a row offers. characters: (n,) of that answer, 0 where a
    row offers fewer. right: (n,) whether it is the right one."""

    tokens: Tokens
    characters: Ids
    right: npt.NDArray[np.bool_]


def tokenize(split: Split, tokenizer: Any, max_length: int) -> Tokens:
    """Tokenize a split with a Hugging Face tokenizer; pairs are cut longest-first. What a text
    spells, `</s>` too, is text."""
    encoded = tokenizer(
        split.texts, split.pairs, truncation=True, max_length=max_length, split_special_tokens=True
    )
    tokens = flatten(encoded["input_ids"], split.labels, tokenizer.pad_token_id)
    if tokens.lengths.min() == 0:
        empty = split.texts[int(tokens.lengths.argmin())]
        raise UserError(f"The tokenizer makes no token of the text {empty!r}; remove that row.")
    types = encoded.get("token_type_ids") if split.pairs is not None else None
    if not types:
        return tokens
    flat = np.concatenate([np.asarray(row, dtype=np.int8) for row in types])
    return replace(tokens, types=flat)


def flatten(rows: Sequence[Sequence[int]], labels: Ids, pad_id: int) -> Tokens:
    """Tokens of rows of ids."""
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    return Tokens(
        ids=np.concatenate([np.asarray(row, dtype=np.int32) for row in rows]),
        types=None,
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        labels=labels,
        pad_id=pad_id,
    )


def form_batches(rows: Ids, lengths: Ids, size: int, rng: np.random.Generator) -> list[Ids]:
    """One epoch over `rows`: batches of `size` (one may be smaller) of rows of similar length, in
    random order. lengths: tokens per row of the split."""
    shuffled = rng.permutation(rows)
    batches: list[Ids] = []
    for start in range(0, len(shuffled), size * POOL):
        pool = shuffled[start : start + size * POOL]
        pool = pool[np.argsort(lengths[pool], kind="stable")]
        batches.extend(pool[i : i + size] for i in range(0, len(pool), size))
    return [batches[i] for i in rng.permutation(len(batches))]


def split_batch(batch: Ids, ranks: int, micro_batch: int | None) -> list[list[Ids]]:
    """Cut a batch into micro-steps; steps[s][r] are the rows of rank r in micro-step s.

    Every rank has the same number of micro-steps (ZeRO's collectives need it); a rank's part may
    be empty. Rows are dealt evenly: parts of one micro-step differ by one row at most.
    """
    per_step = len(batch) if micro_batch is None else micro_batch * ranks
    steps = -(-len(batch) // per_step)
    return [
        [np.asarray(rows, dtype=np.int64) for rows in np.array_split(step, ranks)]
        for step in np.array_split(batch, steps)
    ]


def padding(
    clients: Sequence[Ids], lengths: Ids, size: int, ranks: int, micro_batch: int | None, seed: int
) -> tuple[float, float]:
    """Share of padding in what ranks read in an epoch over the rows of all clients: in batches as
    they are formed, and in batches of rows in random order."""
    shares = []
    for known in (lengths, np.zeros_like(lengths)):  # of rows that are all alike
        read = 0
        for number, rows in enumerate(clients):
            for batch in form_batches(rows, known, size, generator(seed, "padding", number)):
                parts = [part for step in split_batch(batch, ranks, micro_batch) for part in step]
                read += sum(len(part) * int(lengths[part].max()) for part in parts if len(part))
        shares.append(1 - sum(int(lengths[rows].sum()) for rows in clients) / read)
    return shares[0], shares[1]
