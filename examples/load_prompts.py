"""Prompts of `idpg`, `lpt`, `attempt` without hpcfed: torch, transformers and safetensors alone.

    python load_prompts.py runs/questions-lpt-42/adapter MODEL "How far is the moon?" ...

prints the label of each text. MODEL is the run's model.name, as a hub id or a folder. From Python:

    model = AutoModelForSequenceClassification.from_pretrained(MODEL, num_labels=5).eval()
    logits = load(model, "runs/questions-lpt-42/adapter")(input_ids, attention_mask)
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn


def blocks(model: Any) -> list[nn.Module]:
    """The model's transformer blocks: its longest list of modules of one kind."""
    lists = [list(m) for m in model.base_model.modules() if isinstance(m, nn.ModuleList)]
    return max(lists, key=len)


def load(model: Any, folder: str | Path) -> Any:
    """A function (input_ids, attention_mask, **others) -> logits, with the folder's prompts. The
    model is of the class that was trained; the head's values in it are replaced."""
    config = json.loads((Path(folder) / "adapter_config.json").read_text())
    tensors = load_file(Path(folder) / "adapter_model.safetensors")
    mixes = config["kind"] == "hpcfed-attempt"
    names = ["sources", "prompt.weight", "down.weight", "up.weight"]
    if not mixes:
        names = [
            f"generator.{role}.{kind}" for role in ("down", "up") for kind in ("weight", "bias")
        ]
    own = [tensors.pop(name) for name in names]
    with torch.no_grad():
        for name, value in tensors.items():  # the head, and what the checkpoint lacked
            model.get_parameter(name).copy_(value)
    count = config["virtual_tokens"]
    embedding = model.get_input_embeddings()

    def made(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """(samples, tokens, hidden): the prompts, of the mean over a text's hidden states."""
        mean = (hidden * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
        small = nn.functional.gelu(nn.functional.linear(mean, own[0], own[1]))
        return nn.functional.linear(small, own[2], own[3]).view(len(hidden), count, -1)

    def mixed(embeddings: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """(samples, tokens, hidden): of prompts by attention, text by text."""
        sources, prompt, down, up = own
        found = []
        for text, inside in zip(embeddings, mask.bool(), strict=True):
            small = nn.functional.silu(down @ text[inside].max(0).values)
            query = nn.functional.layer_norm(up @ small, (text.shape[1],))
            every = torch.stack([*sources, prompt])
            scores = torch.stack([query @ one.max(0).values for one in every])
            weights = (scores / (torch.e * text.shape[1])).softmax(0)
            found.append(prompt + sum(w * one for w, one in zip(weights, every, strict=True)))
        return torch.stack(found)

    def longer(values: torch.Tensor, filler: int) -> torch.Tensor:
        return nn.functional.pad(values, (count, 0), value=filler)

    def run(input_ids: torch.Tensor, attention_mask: torch.Tensor, **others: Any) -> torch.Tensor:
        prompts = torch.zeros(0)
        kept = torch.zeros(0)
        text = {"input_ids": input_ids, "attention_mask": attention_mask, **others}
        ids = longer(input_ids, 0 if config["pad_id"] else 1)
        types = {name: longer(value, 0) for name, value in others.items()}

        def keep(module: nn.Module, args: Any, kwargs: Any) -> None:
            nonlocal kept
            kept = args[0] if args else kwargs["hidden_states"]

        def embedded(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
            return torch.cat([prompts, output[:, count:]], dim=1)

        def entered(module: nn.Module, args: Any, kwargs: Any) -> Any:
            hidden = torch.cat([prompts, kept[:, count:]], dim=1)
            if args:
                return (hidden, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": hidden}

        with torch.no_grad():
            if config["kind"] != "hpcfed-lpt":
                prompts = (
                    mixed(embedding(input_ids), attention_mask)
                    if mixes
                    else made(model.base_model(**text).last_hidden_state, attention_mask)
                )
                handle = embedding.register_forward_hook(embedded)
            else:
                # What the text's hidden states are where nothing stands in front of it.
                block = blocks(model)[config["layer"]]
                handle = block.register_forward_pre_hook(keep, with_kwargs=True)
                model(input_ids=ids, attention_mask=longer(attention_mask, 0), **types)
                handle.remove()
                prompts = made(kept[:, count:], attention_mask)
                handle = block.register_forward_pre_hook(entered, with_kwargs=True)
            try:
                seen = longer(attention_mask, 1)
                logits = model(input_ids=ids, attention_mask=seen, **types).logits
            finally:
                handle.remove()
        return logits[:, count:] if logits.ndim == 3 else logits

    return run


def main(folder: str, name: str, *texts: str) -> None:
    """Print the label of each text."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    labels = json.loads((Path(folder) / "labels.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=len(labels))
    model.config.pad_token_id = json.loads((Path(folder) / "adapter_config.json").read_text())[
        "pad_id"
    ]
    batch = tokenizer(list(texts), padding=True, padding_side="right", return_tensors="pt")
    logits = load(model.eval(), folder)(batch["input_ids"], batch["attention_mask"])
    for text, number in zip(texts, logits.argmax(-1).tolist(), strict=True):
        print(f"{labels[number]}\t{text}")


if __name__ == "__main__":
    main(*sys.argv[1:])
