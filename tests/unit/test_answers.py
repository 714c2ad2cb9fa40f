"""Answers that are written: greedy in batches as one at a time, and how near they are."""

import numpy as np
import pytest
import torch

from hpcfed import model
from hpcfed.data import answers
from hpcfed.engine.generation import Answers
from hpcfed.errors import UserError
from hpcfed.settings.config import Adapter, Config, Model
from tests import models

PROMPTS = [np.array(ids, dtype=np.int32) for ids in ([7, 9, 30], [12], [40, 41, 42, 43, 44, 45])]
LONGEST = 7


def slowly(network, prompt, ends):
    """The whole text is read again for each token."""
    ids = prompt.tolist()
    for _ in range(LONGEST):
        text = torch.tensor([ids])
        logits = network(input_ids=text, attention_mask=torch.ones_like(text))
        token = int(logits[0, -1].argmax())
        if token in ends:
            break
        ids.append(token)
    return ids[len(prompt) :]


@pytest.mark.parametrize("kind", ["lora", "prefix", "prompt"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3"])
def test_in_a_batch_as_one_at_a_time(architecture, kind, tmp_path):
    torch.manual_seed(0)
    folder = models.save(architecture, tmp_path, "completion", initializer_range=0.3)
    config = Config(
        model=Model(name=str(folder), head="completion"),
        adapter=Adapter(
            kind=kind, virtual_tokens=3, targets=tuple(models.ARCHITECTURES[architecture][3])
        ),
    )
    adapted = model.prepare(config, (), 0, {}).adapted
    for parameter in adapted.parameters:
        torch.nn.init.normal_(parameter, std=0.3)
    network = adapted.network.eval()
    with torch.no_grad():
        freely = [slowly(network, prompt, ()) for prompt in PROMPTS]
        # An end that one of them comes to half-way, and others perhaps never.
        ends = (freely[0][3],)
        wanted = [slowly(network, prompt, ends) for prompt in PROMPTS]
        written = Answers(PROMPTS, ends, 0, torch.device("cpu"))
        for _ in range(LONGEST):
            if written.step(network):
                break
    assert written.ids() == wanted
    assert len(wanted[0]) <= 3 < max(map(len, freely))
    assert len({tuple(own) for own in freely}) == len(PROMPTS), "all alike: it shows nothing"


@pytest.mark.parametrize(
    ("written", "right", "exact", "f1", "rouge"),
    [
        ("The cat.", "cat", 1, 1, 2 / 3),  # articles and points do not count, but for ROUGE
        ("cat dog", "dog cat", 0, 1, 0.5),  # words in any order; the longest in common is one
        ("cat cat dog", "cat bird", 0, 0.4, 0.4),  # a word counts as often as it stands there
        ("", "", 1, 1, 0),
        ("", "dog", 0, 0, 0),
        ("horse", "dog", 0, 0, 0),
    ],
)
def test_how_near_an_answer_is(written, right, exact, f1, rouge):
    found = answers.score([written], [right])
    assert found == {
        "exact_match": exact, "f1": pytest.approx(f1), "rouge_l": pytest.approx(rouge)
    }  # fmt: skip


def test_scores_are_means():
    both = answers.score(["cat", "horse"], ["cat", "dog"])
    assert both == {"exact_match": 0.5, "f1": 0.5, "rouge_l": 0.5}


def test_without_rouge_score_nothing_is_written(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"takes the package rouge-score; install .*\[instruct\]"):
        answers.check_installed()
