"""Tiny random models of five architectures, saved as the hub would serve them.

Two or three layers of a few thousand values beside a small vocabulary: for tests in which the
numbers matter, and not the model.
"""

import re
import string
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers

from hpcfed.data import corpus

HIDDEN = 32
ARCHITECTURES: dict[str, tuple[Any, Any, dict[str, Any], list[str]]] = {
    "bert": (
        transformers.BertConfig, transformers.BertModel,
        {"hidden_size": HIDDEN, "num_hidden_layers": 3, "num_attention_heads": 4,
         "intermediate_size": 48, "hidden_dropout_prob": 0.0,
         "attention_probs_dropout_prob": 0.0, "max_position_embeddings": 128},
        ["query", "value"],
    ),
    "roberta": (
        transformers.RobertaConfig, transformers.RobertaModel,
        {"hidden_size": HIDDEN, "num_hidden_layers": 3, "num_attention_heads": 4,
         "intermediate_size": 48, "hidden_dropout_prob": 0.0,
         "attention_probs_dropout_prob": 0.0, "max_position_embeddings": 130,
         "pad_token_id": 0},
        ["query", "value"],
    ),
    "gpt2": (
        transformers.GPT2Config, transformers.GPT2Model,
        {"n_embd": HIDDEN, "n_layer": 3, "n_head": 4, "n_positions": 128, "resid_pdrop": 0.0,
         "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 2, "eos_token_id": 3},
        ["c_attn"],
    ),
    "llama": (
        transformers.LlamaConfig, transformers.LlamaModel,
        {"hidden_size": HIDDEN, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 128},
        ["q_proj", "v_proj"],
    ),
    "qwen3": (
        transformers.Qwen3Config, transformers.Qwen3Model,
        {"hidden_size": HIDDEN, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48,
         "max_position_embeddings": 128, "tie_word_embeddings": True},
        ["q_proj", "v_proj"],
    ),
}  # fmt: skip
SPECIAL = {
    "pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}  # fmt: skip
# What a conversation is written with, if a tokenizer knows how.
TURNS = {"eos_token": "[END]", "extra_special_tokens": ["[USER]", "[BOT]", "[SYSTEM]"]}
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ {'user': '[USER]', 'assistant': '[BOT]', 'system': '[SYSTEM]'}[message.role] }} "
    "{{ message.content }} [END] {% endfor %}{% if add_generation_prompt %}[BOT] {% endif %}"
)
# Words beside those of the built-in corpus, so that few texts of the tests fall into letters.
WORDS = (
    "great terrible good bad green grey cat dog horse river forest mountain bird flower tree lake "
    "street train office bridge market station tower bus shop road it was"
)
VOCABULARY = 512


def tokenizer(chats: bool = False) -> transformers.PreTrainedTokenizerBase:
    """WordPiece over the words of the built-in corpus, with single letters for all others. chats:
    with a chat template."""
    texts = " ".join(text for split in corpus.generate() for text, _ in split)
    words = dict.fromkeys(re.findall(r"[a-z]+", f"{WORDS} {texts}".lower()))
    letters = string.ascii_lowercase + string.digits
    marks = [c for c in string.punctuation if c not in letters]
    pieces = [*SPECIAL.values(), *marks, *letters, *(f"##{c}" for c in letters)]
    pieces += [word for word in words if len(word) > 1]
    assert len(pieces) <= VOCABULARY, len(pieces)
    if chats:
        pieces += [TURNS["eos_token"], *TURNS["extra_special_tokens"]]
    pieces += [f"[unused{i}]" for i in range(VOCABULARY - len(pieces))]
    ids = {piece: index for index, piece in enumerate(pieces)}
    inner = tokenizers.Tokenizer(tokenizers.models.WordPiece(ids, unk_token="[UNK]"))
    inner.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    inner.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    inner.decoder = tokenizers.decoders.WordPiece()
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(name, ids[name]) for name in ("[CLS]", "[SEP]")],
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **SPECIAL,
        **({**TURNS, "chat_template": CHAT_TEMPLATE} if chats else {}),
    )


def save(architecture: str, folder: Path, head: str = "classifier", **changes: Any) -> Path:
    """A tiny random model with its tokenizer in `folder`; it has the language model head that
    `head` needs, if any."""
    config_class, model_class, settings, _ = ARCHITECTURES[architecture]
    torch.manual_seed(0)
    config = config_class(**{"vocab_size": VOCABULARY, **settings, **changes})
    if head == "cloze":
        model = transformers.AutoModelForMaskedLM.from_config(config)
    elif head in ("label_words", "completion", "dpo"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    else:
        model = model_class(config)
    model.save_pretrained(folder)
    tokenizer(chats=head in ("completion", "dpo")).save_pretrained(folder)
    return folder
