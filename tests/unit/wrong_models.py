"""Models and tokenizers that a run refuses: what is wrong, how it comes about, what is said.

docs/troubleshooting.md and tests/mpi/test_wrong_models.py are made from it.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers

from tests import architectures, models

Case = tuple[str, Callable[[Path], list[str]], str]


def _bert(folder: Path, **changes: Any) -> Path:
    return models.save("bert", folder / "model", **changes)


def _without_tokenizer(architecture: str) -> Callable[[Path], list[str]]:
    def make(folder: Path) -> list[str]:
        place = models.save(architecture, folder / "model")
        for file in [*place.glob("*token*"), *place.glob("vocab*"), *place.glob("merges*")]:
            file.unlink()
        return _with(architecture, place)

    return make


def _with(architecture: str, folder: Path, *extra: str) -> list[str]:
    targets = ",".join(models.ARCHITECTURES[architecture][3])
    return [f"model.name={folder}", f"adapter.targets=[{targets}]", *extra]


def _tokenizer(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a saved tokenizer.json."""
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def _only_unknown(folder: Path) -> list[str]:
    place = _bert(folder)

    def forget(content: dict[str, Any]) -> None:
        vocab = content["model"]["vocab"]
        content["model"]["vocab"] = {
            (word if number < 5 else f"\u4e00{number}"): number for word, number in vocab.items()
        }

    _tokenizer(place, forget)
    return _with("bert", place)


def _no_padding(folder: Path) -> list[str]:
    place = models.save("gpt2", folder / "model")
    file = place / "tokenizer_config.json"
    content = json.loads(file.read_text())
    for name in ("pad_token", "eos_token"):
        content.pop(name, None)
    file.write_text(json.dumps(content))
    return _with("gpt2", place)


def _added_padding(folder: Path) -> list[str]:
    place = models.save("gpt2", folder / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(place)
    tokenizer.add_special_tokens({"pad_token": "<new>"})
    tokenizer.save_pretrained(place)
    return _with("gpt2", place)


def _small_vocabulary(folder: Path) -> list[str]:
    place = models.save("bert", folder / "model", vocab_size=60)
    return _with("bert", place)


def _config(folder: Path, **values: Any) -> list[str]:
    place = _bert(folder)
    file = place / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
    return _with("bert", place)


def _architecture(name: str, *extra: str) -> Callable[[Path], list[str]]:
    def make(folder: Path) -> list[str]:
        place = architectures.save(name, folder / "model")
        targets = ",".join(architectures.ARCHITECTURES[name][1])
        return [f"model.name={place}", f"adapter.targets=[{targets}]", *extra]

    return make


def _adapter_as_model(folder: Path) -> list[str]:
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    return [f"model.name={folder}/adapter"]


def _start(config: dict[str, Any] | None) -> Callable[[Path], list[str]]:
    def make(folder: Path) -> list[str]:
        place = folder / "start"
        place.mkdir()
        if config is not None:
            from safetensors.torch import save_file

            (place / "adapter_config.json").write_text(json.dumps(config))
            save_file({}, place / "adapter_model.safetensors")
        return [*_with("bert", _bert(folder)), f"adapter.start={place}"]

    return make


def _broken(name: str, content: bytes) -> Callable[[Path], list[str]]:
    def make(folder: Path) -> list[str]:
        place = _bert(folder)
        (place / name).write_bytes(content)
        return _with("bert", place)

    return make


def _long(architecture: str, length: int) -> Callable[[Path], list[str]]:
    def make(folder: Path) -> list[str]:
        place = models.save(architecture, folder / "model")
        return _with(architecture, place, f"task.max_length={length}")

    return make


def _remove(pattern: str) -> Callable[[Path], list[str]]:
    def make(folder: Path) -> list[str]:
        place = _bert(folder)
        for file in place.glob(pattern):
            file.unlink()
        return _with("bert", place)

    return make


_GAP = [
    "task.template='{a} <mask>'", "model.head=cloze",
    "task.verbalizer={person: who, place: where, number: many, time: when, reason: why}",
]  # fmt: skip


def _writing(folder: Path, *extra: str) -> list[str]:
    place = models.save("llama", folder / "model", "completion")
    return [
        *_with("llama", place), "model.head=completion", "task.name=skills", "data.root=null",
        "data.partition.kind=iid", "task.max_length=96", "evaluation.max_new_tokens=64", *extra,
    ]  # fmt: skip


CASES: list[Case] = [
    ("a BERT folder without its tokenizer", _without_tokenizer("bert"), "holds no tokenizer"),
    ("a RoBERTa folder without its tokenizer", _without_tokenizer("roberta"), "holds no tokenizer"),
    ("a GPT-2 folder without its tokenizer", _without_tokenizer("gpt2"), "holds no tokenizer"),
    ("a LLaMA folder without its tokenizer", _without_tokenizer("llama"),
     "could not load the tokenizer"),
    ("a tokenizer of another language", _only_unknown, "nothing but unknown and special tokens"),
    ("a tokenizer without padding and end of text", _no_padding, "neither a padding token"),
    ("a padding token beyond the embedding", _added_padding, "embeds 512 tokens only"),
    ("a vocabulary too small for the tokenizer", _small_vocabulary, "embeds 60 tokens only"),
    ("DistilBERT with a prefix", _architecture("distilbert", "adapter.kind=prefix"),
     "takes no past keys"),
    ("T5 with a prefix", _architecture("t5", "adapter.kind=prefix"), "encoder with a decoder"),
    ("BART with a prefix", _architecture("bart", "adapter.kind=prefix"), "encoder with a decoder"),
    ("BART with prompts", _architecture("bart", "adapter.kind=prompt"), "encoder with a decoder"),
    ("SqueezeBERT with LoRA", _architecture("squeezebert"), "no linear layers in its blocks"),
    ("cloze without a masked model", _architecture("xlnet", *_GAP), "AutoModelForMaskedLM"),
    ("an adapter folder as model", _adapter_as_model, r"adapter\.start"),
    ("a start that is no adapter", _start(None), "no adapter folder that can be read"),
    ("a start of another kind", _start({"peft_type": "IA3"}), "peft_type=IA3"),
    ("a start of another rank", _start({"peft_type": "LORA", "r": 3}), "r=3"),
    ("a start without values", _start({"peft_type": "LORA", "r": 8, "lora_alpha": 16}),
     "holds no base_model"),
    ("weights of another shape", lambda folder: _config(folder, intermediate_size=50),
     "has another shape"),
    ("fewer layers in the checkpoint", lambda folder: _config(folder, num_hidden_layers=4),
     "holds no weights"),
    ("a kind of model that nobody knows", lambda folder: _config(folder, model_type="nobody"),
     "could not load"),
    ("a config.json that is no JSON", _broken("config.json", b"{"), "could not load"),
    ("weights that are cut off", _broken("model.safetensors", b"\x00" * 9), "could not load"),
    ("no weights", _remove("*.safetensors"), "could not load the model"),
    ("texts longer than BERT's positions", _long("bert", 129), "exceed the 128 positions"),
    ("texts longer than RoBERTa's positions", _long("roberta", 130), "exceed the 129 positions"),
    ("texts longer than MPNet's positions", _architecture("mpnet", "task.max_length=130"),
     r"exceed the 12\d positions"),
    ("prompts and answers longer than LLaMA's positions", _writing,
     r"max_length=96 and evaluation\.max_new_tokens=64 exceed the 128 positions"),
    ("attention that an architecture does not have", _architecture("mpnet", "model.attention=sdpa"),
     r"model\.attention=sdpa: transformers has it not .*use model\.attention=auto"),
    ("targets of another architecture",
     lambda folder: [f"model.name={_bert(folder)}", "adapter.targets=[q_proj]"], "legal targets"),
    ("a folder that is not there", lambda folder: [f"model.name={folder}/nowhere"],
     "does not exist"),
]  # fmt: skip


def name(case: Case) -> str:
    """For a test's id."""
    return re.sub(r"\W+", "-", case[0])
