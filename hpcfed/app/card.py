"""README.md of an exported folder: what it is, what was measured, and how to predict with it.

Its code needs torch, transformers and, for an adapter, PEFT; not hpcfed.
"""

import json
from typing import Any

from hpcfed.settings.config import Config

_START = """import torch
from transformers import AutoTokenizer, {model_class}
{more}
folder = "."  # where this file lies
{names}tokenizer = AutoTokenizer.from_pretrained(folder)
tokenizer.padding_side = "right"
{load}


"""
_CLASSIFIER = """def predict(texts, pairs=None):
    batch = tokenizer(
        texts, pairs, truncation=True, max_length={max_length}, padding=True, return_tensors="pt",
        split_special_tokens=True, return_token_type_ids=pairs is not None,
    )
    with torch.no_grad():
        return [labels[i] for i in model(**batch).logits.argmax(-1)]
"""
_FILLED = """def filled(text, pair, gap):
    values = {{"{{a}}": text, "{{b}}": pair, "<mask>": gap}}
    return re.sub(r"\\{{a\\}}|\\{{b\\}}|<mask>", lambda field: values[field[0]], {template})


"""
_CLOZE = """def predict(texts, pairs=None):  # of at most {max_length} tokens, with the template
    pairs = pairs or [""] * len(texts)
    rows = [filled(*row, tokenizer.mask_token) for row in zip(texts, pairs)]
    batch = tokenizer(rows, padding=True, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        logits = model(**batch).logits
    gaps = (batch["input_ids"] == tokenizer.mask_token_id).int().argmax(-1)
    gaps += logits.shape[1] - batch["input_ids"].shape[1]  # virtual tokens in front
    words = logits[torch.arange(len(rows)), gaps][:, {word_ids}]
    return [labels[i] for i in words.argmax(-1)]
"""
_LABEL_WORDS = """def loss(ids, word):
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids + word])).logits[0, -len(word) - 1 : -1]
    return torch.nn.functional.cross_entropy(logits.float(), torch.tensor(word)).item()


def predict(texts, pairs=None):  # of at most {max_length} tokens, with template and word
    found = []
    for text, pair in zip(texts, pairs or [""] * len(texts)):
        ids = tokenizer(filled(text, pair, "").rstrip())["input_ids"]
        while len(ids) > 1 and ids[-1] in tokenizer.all_special_ids:
            ids = ids[:-1]
        losses = [loss(ids, word) for word in {word_ids}]
        found.append(labels[losses.index(min(losses))])
    return found
"""
_ANSWER = """def answer(prompt, longest=64):  # of at most {max_length} tokens
    inputs = tokenizer.apply_chat_template(
        [{{"role": "user", "content": prompt}}], add_generation_prompt=True, return_dict=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        ids = model.generate(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], do_sample=False,
            max_new_tokens=longest, eos_token_id={ends}, pad_token_id={pad_token_id},
        )[0, inputs["input_ids"].shape[1] :]
    return tokenizer.decode(ids, skip_special_tokens=True).strip()
"""

# What puts adapters into their models that PEFT does not know.
_PROMPTS = "examples/load_prompts.py of hpcfed's sources"
_LOADERS = {
    "bottleneck": "hpcfed.adapters.bottleneck.load",
    **dict.fromkeys(("prompt", "prefix", "idpg", "lpt", "attempt"), _PROMPTS),
}

_BY_HEAD = {
    "completion": _ANSWER,
    "classifier": _CLASSIFIER, "cloze": _FILLED + _CLOZE, "label_words": _FILLED + _LABEL_WORDS
}  # fmt: skip


def card(facts: dict[str, Any], config: Config, measured: list[str]) -> str:
    """The model card. facts: task.json. measured: lines."""
    merged = facts["form"] == "merged"
    classes = f" Classes: {', '.join(facts['labels'])}." if facts["labels"] else ""
    head = ["---", f"base_model: {facts['base']}"]
    head += [f"library_name: {'transformers' if merged else 'peft'}", "---"]
    kind = "merged into its model" if merged else f"an adapter ({config.adapter.kind})"
    lines = [
        *head,
        f"# {facts['task']}, trained by {config.method}",
        "",
        f"This folder holds {facts['holds']}, {kind}. Base: `{facts['base']}`, in "
        f"{facts['dtype']}.{classes}",
        "",
        f"It was trained by hpcfed in a simulated federation: method `{config.method}`, seed "
        f"{config.seed}, partition `{config.data.partition.kind}`, "
        f"{config.federation.per_round} clients a round.",
        "",
        "What the run has measured of this model:",
        "",
        *(f"- {line}" for line in measured or ["nothing"]),
        "",
    ]
    if "template" in facts:
        lines += [
            f"Template: `{facts['template']}`. Words: "
            + ", ".join(f"{label}: `{word}`" for label, word in facts["words"].items())
            + ". A text that is too long loses its end, never the template.",
            "",
        ]
    return "\n".join([*lines, *_use(facts)])


def _use(facts: dict[str, Any]) -> list[str]:
    command = "`hpcfed predict FOLDER texts.csv` predicts a file of texts."
    program = _BY_HEAD.get(facts["head"])
    if facts["form"] not in ("peft", "merged"):
        loader = _LOADERS.get(facts["form"])
        owner = f"whoever has the plug-in that registers `{facts['form']}`"
        who = f"`{loader}` puts" if loader else f"{owner} can put"
        return [f"PEFT has no adapter of this kind: {who} it into its model.", ""]
    if program is None:
        return []
    values = {
        **facts,
        "names": f"labels = {json.dumps(facts['labels'])}\n" if facts["labels"] else "",
        "template": json.dumps(facts.get("template", "")),
        "word_ids": json.dumps(list(facts.get("word_ids", {}).values())),
        **_loading(facts),
    }
    text = (_START + program).format(**values)
    if "re.sub" in program:
        text = "import re\n\n" + text
    lines = ["Without hpcfed:", "", "```python", text.rstrip(), "```", ""]
    return [*lines, f"With it, {command}", ""] if facts["labels"] else lines


def _loading(facts: dict[str, Any]) -> dict[str, str]:
    """The lines that load the model."""
    name, dtype = facts["model_class"], f"dtype=torch.{facts['dtype']}"
    if facts["form"] == "merged":
        return {"more": "", "load": f"model = {name}.from_pretrained(folder, {dtype}).eval()"}
    options = [dtype, f"pad_token_id={facts['pad_token_id']}"]
    if name == "AutoModelForSequenceClassification":
        options.append(f"num_labels={len(facts['labels'])}")
    load = (
        f"base = {name}.from_pretrained(\n    {facts['base']!r},\n    {', '.join(options)},\n)\n"
        "model = PeftModel.from_pretrained(base, folder).eval()"
    )
    return {"more": "from peft import PeftModel\n", "load": load}
