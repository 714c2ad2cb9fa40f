"""A GGUF file of a tiny random LLaMA, as llama.cpp's converter writes them."""

from pathlib import Path

import gguf
import numpy as np

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
_NAMES = {
    "attn_q": (64, 64), "attn_k": (32, 64), "attn_v": (32, 64), "attn_output": (64, 64),
    "ffn_gate": (96, 64), "ffn_up": (96, 64), "ffn_down": (64, 96),
}  # fmt: skip


def save(path: Path, blocks: int = 2) -> dict[str, np.ndarray]:
    """Writes the file; returns each weight by its name there, after rounding."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_block_count(blocks)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(16)
    writer.add_layer_norm_rms_eps(1e-5)
    pieces = ["<unk>", "<s>", "</s>", *(chr(c) for c in range(33, 127)), "ab"]
    writer.add_vocab_size(len(pieces))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(pieces)
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * 95)
    writer.add_token_merges(["a b"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)
    kept = {}
    shapes = {"token_embd": (len(pieces), 64), "output_norm": (64,)}
    for block in range(blocks):
        shapes |= {f"blk.{block}.{name}": shape for name, shape in _NAMES.items()}
        shapes |= {f"blk.{block}.{name}": (64,) for name in ("attn_norm", "ffn_norm")}
    for name, shape in shapes.items():
        weight = rng.normal(0, 0.1, shape).astype(np.float32)
        if len(shape) > 1:
            kind = gguf.GGMLQuantizationType.Q8_0 if "embd" in name else (
                gguf.GGMLQuantizationType.Q4_1
            )  # fmt: skip
            rounded = gguf.quants.quantize(weight, kind)
            writer.add_tensor(f"{name}.weight", rounded, raw_dtype=kind)
            weight = gguf.quants.dequantize(rounded, kind)
        else:
            writer.add_tensor(f"{name}.weight", weight)
        kept[name] = weight
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return kept
