"""Small random models of four architectures, saved as the hub would serve them."""

from pathlib import Path
from typing import Any

import torch
import transformers

ARCHITECTURES: dict[str, tuple[Any, Any, dict[str, Any], list[str]]] = {
    "bert": (
        transformers.BertConfig, transformers.BertModel,
        {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
         "intermediate_size": 64, "hidden_dropout_prob": 0.0,
         "attention_probs_dropout_prob": 0.0},
        ["query", "value"],
    ),
    "roberta": (
        transformers.RobertaConfig, transformers.RobertaModel,
        {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
         "intermediate_size": 64, "hidden_dropout_prob": 0.0,
         "attention_probs_dropout_prob": 0.0, "max_position_embeddings": 130,
         "pad_token_id": 0},
        ["query", "value"],
    ),
    "gpt2": (
        transformers.GPT2Config, transformers.GPT2Model,
        {"n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 128, "resid_pdrop": 0.0,
         "embd_pdrop": 0.0, "attn_pdrop": 0.0},
        ["c_attn"],
    ),
    "llama": (
        transformers.LlamaConfig, transformers.LlamaModel,
        {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2, "intermediate_size": 64, "max_position_embeddings": 128},
        ["q_proj", "v_proj"],
    ),
}  # fmt: skip


def save(architecture: str, folder: Path, head: str = "classifier", **changes: Any) -> Path:
    """A small random model with MiniLM's tokenizer in `folder`; it has the language model head that
    `head` needs, if any."""
    from hpcfed.model import resolve_name
    from tests.support import MODEL

    tokenizer = transformers.AutoTokenizer.from_pretrained(resolve_name(MODEL))
    config_class, model_class, settings, _ = ARCHITECTURES[architecture]
    torch.manual_seed(0)
    config = config_class(vocab_size=len(tokenizer), **{**settings, **changes})
    if head == "cloze":
        model = transformers.AutoModelForMaskedLM.from_config(config)
    elif head == "label_words":
        model = transformers.AutoModelForCausalLM.from_config(config)
    else:
        model = model_class(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
