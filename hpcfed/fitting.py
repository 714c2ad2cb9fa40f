"""Whether tokenizer, texts and model fit each other: what can be seen without the model's weights.

What cannot be seen so, a trial step finds (hpcfed.rounds.trial).
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from torch import nn

from hpcfed.data.batches import Tokens
from hpcfed.data.sources import Split
from hpcfed.errors import UserError, reason
from hpcfed.policies.curriculum import cut_at
from hpcfed.settings.config import Config
from hpcfed.settings.counts import VIRTUAL

MOSTLY = 0.5  # of the training texts: more of them without a known token, and nothing is learnt


def check_tokenizer(tokenizer: Any, name: str) -> None:
    """Raises UserError for a tokenizer that knows no token of a text, as transformers makes one
    where a folder holds no tokenizer, and for one that cannot pad."""
    if not tokenizer.get_vocab().keys() - set(tokenizer.all_special_tokens):
        raise UserError(
            f"model.name: {name!r} holds no tokenizer (the one that transformers makes in its "
            "place knows special tokens only); save the model's tokenizer beside it, with "
            "tokenizer.save_pretrained(folder)."
        )
    if tokenizer.pad_token_id is None:
        raise UserError(
            f"model.name: the tokenizer of {name!r} has neither a padding token nor one that "
            "ends a text; set tokenizer.pad_token to a token that it has, and save it with "
            "tokenizer.save_pretrained(folder)."
        )


def encode(
    head: Any,
    splits: Sequence[Split],
    tokenizer: Any,
    config: Config,
    max_length: int | None = None,
) -> list[Tokens]:
    """Each split's tokens as the objective wants them, cut at max_length tokens, None: at
    task.max_length. The first split is that of training.

    Raises UserError for texts that the tokenizer fails on, or makes nothing of.
    """
    name = config.model.name
    longest = config.task.max_length if max_length is None else max_length
    try:
        encoded = [head.encode(split, tokenizer, longest) for split in splits]
    except UserError:
        raise
    except Exception as error:  # tokenizers raise many unrelated types
        raise UserError(
            f"model.name: the tokenizer of {name!r} cannot encode the texts ({reason(error)}); "
            "give a model whose tokenizer can."
        ) from None
    tokens = encoded[0]
    known = ~np.isin(tokens.ids, tokenizer.all_special_ids)
    empty = int((np.add.reduceat(known, tokens.offsets[:-1]) == 0).sum())
    if empty > MOSTLY * len(tokens):
        raise UserError(
            f"model.name: the tokenizer of {name!r} makes nothing but unknown and special tokens "
            f"of {empty:,} of the {len(tokens):,} training texts; give one whose tokenizer knows "
            "their language."
        )
    return encoded


def shortened(tokens: Sequence[Tokens], config: Config) -> list[str]:
    """What a person should know of rows that were too long: of the training split, and the test
    split."""
    return [
        f"{own.cut:,} of the {len(own):,} {name} rows are longer than "
        f"task.max_length={config.task.max_length}: their prompts have lost their beginning"
        for name, own in zip(("training", "test"), tokens, strict=True)
        if own.cut
    ]


class Cuts:
    """The training split's tokens, cut as a round has it; `whole` are those of task.max_length."""

    def __init__(
        self, whole: Tokens, head: Any, split: Split, tokenizer: Any, config: Config
    ) -> None:
        """Raises UserError if the objective's template does not fit into the shortest."""
        self.whole = whole
        self._config = config
        self._encode = partial(encode, head, (split,), tokenizer, config)
        self._last = (config.task.max_length, whole)
        first = self.length(0)
        try:
            self.at(0)
        except UserError as error:
            raise UserError(
                f"curriculum.shortest={config.curriculum.shortest} cuts texts at {first} tokens "
                f"in the first round, and then: {error}"
            ) from None

    def length(self, round_number: int) -> int:
        """The number of tokens at which texts are cut in a round, from 0."""
        spec = self._config.curriculum
        rounds, longest = self._config.federation.rounds, self._config.task.max_length
        return cut_at(spec.cut, spec.shortest, spec.full_at, round_number, rounds, longest)

    def at(self, round_number: int) -> Tokens:
        """The tokens of a round, the same rows as in `whole`."""
        length = self.length(round_number)
        if length == self._config.task.max_length:
            return self.whole
        if self._last[0] != length:
            self._last = (length, self._encode(length)[0])
        return self._last[1]


def check_ids(model: Any, tokens: Sequence[Tokens], tokenizer: Any, name: str) -> None:
    """Raises UserError for token ids, padding included, that the model has no embedding of."""
    try:
        rows = getattr(model.get_input_embeddings(), "num_embeddings", None)
    except (AttributeError, NotImplementedError):  # a model of characters or bytes
        return
    if rows is None:
        return
    largest = max(max(int(own.ids.max()), own.pad_id) for own in tokens)
    if largest >= rows:
        raise _beyond(largest, tokenizer.convert_ids_to_tokens(largest), rows, name)


def check_padding(hf_config: Any, pad_id: int, name: str) -> None:
    """The same of padding alone, before the model is built."""
    rows = getattr(hf_config.get_text_config(), "vocab_size", None)
    if isinstance(rows, int) and pad_id >= rows:
        raise _beyond(pad_id, "its padding", rows, name)


def _beyond(token: int, word: str, rows: int, name: str) -> UserError:
    return UserError(
        f"model.name: the tokenizer of {name!r} makes token {token} ({word!r}) and the model "
        f"embeds {rows:,} tokens only; give the tokenizer that belongs to it, or make room with "
        "model.resize_token_embeddings(len(tokenizer)), and save both."
    )


def check_length(config: Config, model: Any) -> None:
    """Raises UserError unless texts and virtual tokens fit the positions that the model knows."""
    known = _positions(model)
    if known is None:
        return
    prompts = config.adapter.kind in VIRTUAL
    virtual = config.adapter.virtual_tokens if prompts else 0
    written = config.evaluation.max_new_tokens or 0
    if config.task.max_length + virtual + written > known:
        more = f" and adapter.virtual_tokens={virtual}" if virtual else ""
        more += f" and evaluation.max_new_tokens={written}" if written else ""
        raise UserError(
            f"task.max_length={config.task.max_length}{more} exceed the {known} positions of "
            f"{config.model.name!r}."
        )


def _positions(model: Any) -> int | None:
    """Tokens that a text may have; None where the model has no limit, or does not tell."""
    for name, module in model.named_modules():
        # Those of RoBERTa and its kin stand behind the padding's.
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            first = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - first
    known = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return known if isinstance(known, int) and known > 0 else None
