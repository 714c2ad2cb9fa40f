"""transformers' text classifiers, made tiny: what can be put on each, and whether PEFT reloads it.

    python -m tests.architectures            the table of docs/models.md, measured, to stdout

Every model has random weights and a tokenizer of its own (tests.models); each adapter gets random
values, is saved as a run saves it, and is loaded by PEFT in a fresh process, which must predict the
same logits.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

from hpcfed import model
from hpcfed.errors import UserError, reason
from hpcfed.settings.config import Adapter, Config, Model, Task
from hpcfed.storage.run import RunDirectory
from tests import models
from tests.support import ROOT

LABELS = ("a", "b", "c")
TOLERANCE = 1e-5
COMMON: dict[str, Any] = {
    "vocab_size": models.VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "intermediate_size": 48, "max_position_embeddings": 130,
    "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "decoder_start_token_id": 3,
}  # fmt: skip
_QV, _PROJ = ["query", "value"], ["q_proj", "v_proj"]
_BART = {"num_hidden_layers": None,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "encoder_layers": 3, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4,
}  # fmt: skip
_KV = {"num_key_value_heads": 2, "head_dim": 8}
# Name in transformers -> what its configuration needs besides COMMON (None: not that of COMMON),
# and LoRA's targets.
ARCHITECTURES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "albert": ({"embedding_size": 16}, _QV),
    "bart": (_BART, _PROJ),
    "bert": ({}, _QV),
    "big_bird": ({"attention_type": "original_full"}, _QV),
    "biogpt": ({}, _PROJ),
    "bloom": ({}, ["query_key_value"]),
    "camembert": ({}, _QV),
    "data2vec-text": ({}, _QV),
    "deberta": ({"pooler_hidden_size": 32}, ["in_proj"]),
    "deberta-v2": ({"pooler_hidden_size": 32}, ["query_proj", "value_proj"]),
    "distilbert": ({}, ["q_lin", "v_lin"]),
    "electra": ({"embedding_size": 16}, _QV),
    "ernie": ({}, _QV),
    "esm": ({"position_embedding_type": "absolute", "mask_token_id": 4}, _QV),
    "falcon": ({"num_kv_heads": 4}, ["query_key_value"]),
    "funnel": ({"block_sizes": [1, 1], "d_head": 8, "d_inner": 48, "num_decoder_layers": 1,
                "num_hidden_layers": None}, ["q_head", "v_head"]),
    "gemma2": (_KV, _PROJ),
    "gemma3_text": (_KV, _PROJ),
    "gpt2": ({}, ["c_attn"]),
    "gpt_neo": ({"attention_types": [[["global", "local"], 1]], "num_layers": 2}, _PROJ),
    "gpt_neox": ({}, ["query_key_value"]),
    "gpt_oss": ({**_KV, "num_local_experts": 4, "num_experts_per_tok": 2}, _PROJ),
    "gptj": ({"rotary_dim": 4}, _PROJ),
    "llama": (_KV, _PROJ),
    "mbart": (_BART, _PROJ),
    "megatron-bert": ({}, _QV),
    "mistral": (_KV, _PROJ),
    "mixtral": ({**_KV, "num_local_experts": 4}, _PROJ),
    "mobilebert": ({"embedding_size": 16, "intra_bottleneck_size": 16}, _QV),
    "modernbert": ({}, ["Wqkv"]),
    "mpnet": ({}, ["q", "v"]),
    "nystromformer": ({"num_landmarks": 4, "segment_means_seq_len": 4}, _QV),
    "olmo2": (_KV, _PROJ),
    "opt": ({"ffn_dim": 48, "word_embed_proj_dim": 32}, _PROJ),
    "phi": ({}, _PROJ),
    "phi3": ({"num_key_value_heads": 2}, ["qkv_proj"]),
    "qwen2": (_KV, _PROJ),
    "qwen3": (_KV, _PROJ),
    "rembert": ({"input_embedding_size": 16, "output_embedding_size": 16}, _QV),
    "roberta": ({}, _QV),
    "roformer": ({"embedding_size": 32}, _QV),
    "squeezebert": ({"embedding_size": 32}, _QV),
    "t5": ({"num_hidden_layers": None, "d_kv": 8, "d_ff": 48, "num_layers": 3,
            "num_decoder_layers": 2, "num_heads": 4}, ["q", "v"]),
    "xlm": ({"emb_dim": 32, "n_layers": 2, "n_heads": 4}, ["q_lin", "v_lin"]),
    "xlm-roberta": ({}, _QV),
    "xlnet": ({"d_head": 8, "d_inner": 48, "max_position_embeddings": None}, ["layer_1"]),
}  # fmt: skip
# Of each way to find blocks, positions and heads one; the others are run by the command.
QUICK = ("albert", "bart", "deberta-v2", "funnel", "mpnet", "mixtral", "opt", "roberta", "t5",
         "xlnet")  # fmt: skip


def save(name: str, folder: Path, **changes: Any) -> Path:
    """A tiny random classifier with its tokenizer."""
    extra, _ = ARCHITECTURES[name]
    torch.manual_seed(0)
    settings = {**COMMON, **extra, "num_labels": len(LABELS), **changes}
    config = transformers.CONFIG_MAPPING[name](
        **{option: value for option, value in settings.items() if value is not None}
    )
    transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    models.tokenizer().save_pretrained(folder)
    return folder


def batch() -> dict[str, torch.Tensor]:
    """Two texts, one of them padded."""
    found = models.tokenizer()(
        ["the cat and the dog sat by the river", "a green bird"], padding=True, return_tensors="pt"
    )
    return {name: found[name] for name in ("input_ids", "attention_mask")}


def put(name: str, kind: str, folder: Path) -> tuple[str, str]:
    """Put an adapter on a model in folder/model, and save it and its logits in folder/kind. What
    came of it ("yes", or why not), and a note of its blocks."""
    config = Config(
        model=Model(name=str(folder / "model"), dropout=0.0),
        adapter=Adapter(kind=kind, virtual_tokens=4, targets=tuple(ARCHITECTURES[name][1])),
        task=Task(max_length=32),
    )
    try:
        prepared = model.prepare(config, LABELS, 0, {})
        adapted = prepared.adapted
        torch.manual_seed(1)
        values = prepared.initial + 0.2 * torch.randn(adapted.layout.size)
        for parameter, entry in zip(adapted.parameters, adapted.layout.entries, strict=True):
            parameter.data.copy_(values[entry.values].view(entry.shape))
        logits = adapted.network.eval()(**batch())
        logits.sum().backward()
    except UserError as error:
        return str(error), ""
    except Exception as error:  # as the trial step of a run would say it
        return reason(error), ""
    ours = [p for p, e in zip(adapted.parameters, adapted.layout.entries, strict=True)
            if e.block != "head"]  # fmt: skip
    if not any(p.grad is not None and p.grad.any() for p in ours):
        return "no gradient reaches the adapter", ""
    target = folder / kind
    target.mkdir()
    run = RunDirectory(target)
    run.save_adapter(adapted, values, prepared.fresh, LABELS, prepared.source)
    (target / "logits.json").write_text(json.dumps(logits.detach().tolist()))
    return "yes", f"{len(adapted.layout.layers)}"


def reload(folder: Path) -> dict[str, str]:
    """model/kind -> "" if PEFT's logits are those that were saved, else what is wrong."""
    from peft import PeftModel

    found = {}
    for file in sorted(folder.glob("*/*/logits.json")):
        torch.manual_seed(99)
        key = f"{file.parent.parent.name}/{file.parent.name}"
        try:
            base = transformers.AutoModelForSequenceClassification.from_pretrained(
                file.parent.parent / "model", num_labels=len(LABELS), dtype=torch.float32
            )
            loaded = PeftModel.from_pretrained(base, file.parent / "adapter").eval()
            with torch.no_grad():
                logits = loaded(**batch()).logits
        except Exception as error:  # what PEFT raises, it raises in the table
            found[key] = reason(error)
            continue
        difference = float((logits - torch.tensor(json.loads(file.read_text()))).abs().max())
        found[key] = "" if difference < TOLERANCE else f"another function, by {difference:.1e}"
    return found


def measure(names: tuple[str, ...], folder: Path) -> dict[str, dict[str, str]]:
    """name -> adapter -> "yes", or why not; with the number of blocks under "blocks"."""
    rows: dict[str, dict[str, str]] = {}
    for name in names:
        save(name, folder / name / "model")
        rows[name] = {}
        for kind in ("lora", "prefix"):
            rows[name][kind], blocks = put(name, kind, folder / name)
            rows[name].setdefault("blocks", blocks)
    done = subprocess.run(
        [sys.executable, "-m", "tests.architectures", "reload", str(folder)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for key, problem in json.loads(done.stdout.splitlines()[-1]).items():
        name, kind = key.split("/")
        if problem:
            rows[name][kind] = f"reloaded otherwise: {problem}"
    return rows


def table(rows: dict[str, dict[str, str]]) -> str:
    """In Markdown."""
    lines = ["| model | adapted blocks | LoRA | targets | prefix |", "|---|---|---|---|---|"]
    for name, row in rows.items():
        cells = ["yes" if row[kind] == "yes" else "refused" for kind in ("lora", "prefix")]
        targets = ", ".join(ARCHITECTURES[name][1]) if row["lora"] == "yes" else ""
        lines.append(f"| {name} | {row['blocks']} | {cells[0]} | {targets} | {cells[1]} |")
    return "\n".join(lines)


def main() -> None:
    """The command."""
    if sys.argv[1:2] == ["reload"]:
        print(json.dumps(reload(Path(sys.argv[2]))))
        return
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(tuple(sys.argv[1:]) or tuple(ARCHITECTURES), Path(folder))
    print(table(rows))
    for name, row in rows.items():
        for kind in ("lora", "prefix"):
            if row[kind] != "yes":
                print(f"{name}, {kind}: {row[kind]}", file=sys.stderr)


if __name__ == "__main__":
    main()
