"""Cloze and label words: wordings, gaps that are never cut, losses and predictions."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from hpcfed import model
from hpcfed.adapters.layout import HEAD
from hpcfed.data import gaps, wordings
from hpcfed.data.sources import Split, TaskData
from hpcfed.errors import UserError
from hpcfed.objectives import heads
from hpcfed.settings.config import Adapter, Config, Model, Task
from tests import models
from tests.mpi.slow import CPU, obvious_losses

SENTIMENT = {"positive": "great", "negative": "terrible"}


@pytest.fixture(scope="module")
def tokenizer():
    return model.load_tokenizer(Config())


def data(name="mr", pairs=False, labels=("negative", "positive"), texts=None):
    texts = texts or ["a fine film", "dull", "the best of all the films about cats and dogs"]
    split = Split(texts, texts[::-1] if pairs else None, np.arange(len(texts)) % 2, None)
    return TaskData(name, labels, "accuracy", 0, split, split)


def config(head="cloze", **task):
    return Config(model=Model(head=head), task=Task(**task))


def test_every_shipped_wording_fits_both_heads():
    for name, shipped in wordings.SHIPPED.items():
        labels = tuple(sorted(shipped.verbalizer))
        for head in ("cloze", "label_words"):
            own = wordings.wording(config(head), data(name, "{b}" in shipped.template, labels))
            text = own.fill("A1", "B2", "GAP")
            assert "A1" in text and "GAP" in text and ("B2" in text) == ("{b}" in shipped.template)
            assert own.words == tuple(shipped.verbalizer[label] for label in labels)
            assert text.endswith("GAP") or head == "cloze"


@pytest.mark.parametrize(
    ("head", "task", "words"),
    [
        ("cloze", {"template": "{a} . It was ."}, ["exactly one <mask>"]),
        ("cloze", {"template": "{a} <mask> <mask>"}, ["exactly one <mask>"]),
        ("cloze", {"template": "It was <mask> ."}, ["exactly one {a}"]),
        ("cloze", {"template": "{a} <mask> {b}"}, ["no {b}"]),
        ("label_words", {"template": "{a} <mask> ."}, ["at the end"]),
        ("cloze", {"verbalizer": {"positive": "great"}}, ["each of the labels negative, positive"]),
        ("cloze", {"verbalizer": {"positive": "so", "negative": "so"}}, ["the same word"]),
    ],
)
def test_a_wording_that_does_not_fit_is_refused(head, task, words):
    with pytest.raises(UserError) as caught:
        wordings.wording(config(head, **task), data())
    for word in words:
        assert word in str(caught.value)


def test_a_task_without_a_wording_is_told_how_to_write_one():
    """What is missing, and an example that the head would take."""
    labels = {label: f"word{i}" for i, label in enumerate(data("own").labels)}
    gap = "{a} . It was <mask>"
    for head, own, missing in (
        ("cloze", {}, r"set task\.template, as '(.*)' and task\.verbalizer, as \{\w+: word"),
        ("label_words", {}, r"set task\.template, as '(.*)' and task\.verbalizer"),
        ("label_words", {"verbalizer": labels}, r"none: set task\.template, as '([^']*)'\.$"),
        ("label_words", {"template": gap}, r"none: set task\.verbalizer, as (.*)\.$"),
    ):
        with pytest.raises(UserError) as caught:
            wordings.wording(config(head, **own), data("own"))
        found = re.search(missing, str(caught.value))
        assert found, caught.value
        if "template" not in own:
            wordings.wording(config(head, template=found[1], verbalizer=labels), data("own"))


def test_words_must_be_single_tokens(tokenizer):
    own = wordings.wording(config(), data())
    found = wordings.single_tokens(own, tokenizer)
    assert tokenizer.convert_ids_to_tokens(found) == ["terrible", "great"]
    for word, reason in (("unacceptablest", "not one token"), ("\u2603", "not one token")):
        bad = wordings.Wording(own.parts, ("great", word))
        with pytest.raises(UserError, match=reason):
            wordings.single_tokens(bad, tokenizer)
    with pytest.raises(UserError, match="same token"):  # the tokenizer ignores case
        wordings.single_tokens(wordings.Wording(own.parts, ("Great", "great")), tokenizer)


def test_a_tokenizer_without_a_mask_is_refused(tokenizer):
    class Maskless:
        mask_token = None

    with pytest.raises(UserError, match="no mask token"):
        wordings.single_tokens(wordings.wording(config(), data()), Maskless())


@pytest.mark.parametrize("ends", [False, True])
def test_the_template_is_never_cut(tokenizer, ends):
    rng = np.random.default_rng(0)
    vocabulary = ["cat", "unbelievable", "dogs", "extraordinarily", "x", ",", "[MASK]", "é"]
    texts = [" ".join(rng.choice(vocabulary, rng.integers(1, 60))) for _ in range(60)]
    pairs = [" ".join(rng.choice(vocabulary, rng.integers(0, 60))) for _ in range(60)]
    split = Split(texts, pairs, np.zeros(60, dtype=np.int64), None)
    template = "{a} ? {b} . <mask>" if ends else "{a} ? <mask> , {b} !"
    task = data(pairs=True)
    own = wordings.wording(
        config("label_words" if ends else "cloze", template=template, verbalizer=SENTIMENT), task
    )
    for room in (12, 30, 200):
        tokens = gaps.encode(split, own, tokenizer, room, ends)
        assert tokens.lengths.max() <= room and (room == 200 or tokens.lengths.max() > room - 4)
        for row in range(60):
            ids = tokens.ids[tokens.offsets[row] : tokens.offsets[row + 1]].tolist()
            words = tokenizer.convert_ids_to_tokens(ids)
            assert words.count("[MASK]") == (0 if ends else 1)
            if ends:
                assert words[0] == "[CLS]" and words[-1] == "."
            else:
                assert tokens.positions is not None
                gap = int(tokens.positions[row])
                assert words[gap - 1 : gap + 1] == ["?", "[MASK]"]
                assert words[-2:] == ["!", "[SEP]"]
            if room == 200:  # nothing was too long: nothing is lost
                first, second = (text[row].replace("[MASK]", " ") for text in (texts, pairs))
                wanted = tokenizer(own.fill(first, second, "" if ends else "[MASK]"))["input_ids"]
                assert ids == (wanted[:-1] if ends else wanted)
    with pytest.raises(UserError, match="too short for the template"):
        gaps.encode(split, own, tokenizer, 2, ends)


def test_the_longer_text_of_a_pair_is_cut(tokenizer):
    split = Split(["cat " * 50], ["dog " * 5], np.zeros(1, dtype=np.int64), None)
    own = wordings.Wording(("{a}", " ? ", "<mask>", " , ", "{b}"), ("great", "terrible"))
    tokens = gaps.encode(split, own, tokenizer, 20, ends=False)
    words = tokenizer.convert_ids_to_tokens(tokens.ids)
    assert words.count("dog") == 5 and words.count("cat") == 10


@pytest.mark.parametrize(
    ("architecture", "head"), [("bert", "cloze"), ("gpt2", "label_words"), ("llama", "label_words")]
)
def test_losses_and_predictions_equal_the_obvious_ones(architecture, head, tmp_path):
    folder = models.save(architecture, tmp_path, head, initializer_range=0.2)
    verbalizer = {"positive": "great", "negative": "so bad"} if head == "label_words" else None
    own = Config(
        model=Model(name=str(folder), head=head),
        adapter=Adapter(targets=tuple(models.ARCHITECTURES[architecture][3])),
        task=Task(max_length=20, verbalizer=verbalizer),
    )
    rng = np.random.default_rng(0)
    words = "a fine film dull the best of all cats dogs so never again great terrible".split()
    task = data(texts=[" ".join(rng.choice(words, n)) for n in (1, 3, 40, 7, 2, 5, 12, 4)])
    tokenizer = model.load_tokenizer(own)
    found = heads.build(own, task, tokenizer)
    tokens = found.encode(task.train, tokenizer, own.task.max_length)
    prepared = model.prepare(own, task.labels, 0, {}, found)
    assert HEAD not in prepared.adapted.layout.blocks
    torch.manual_seed(2)
    for parameter in prepared.adapted.parameters:
        torch.nn.init.normal_(parameter)
    network = prepared.adapted.network.eval()
    rows = rng.permutation(8)
    with torch.no_grad():
        losses = found.losses(network, tokens, rows, CPU)
        wanted = obvious_losses(network, found, rows, tokens)
        torch.testing.assert_close(losses, wanted, rtol=1e-4, atol=1e-5)
        classes, again = found.predict(network, tokens, rows, CPU)
        again = again.float()
        torch.testing.assert_close(again, wanted, rtol=1e-4, atol=1e-5)
        each = []
        for label in range(2):
            labelled = replace(tokens, labels=np.full(8, label))
            each.append(obvious_losses(network, found, rows, labelled))
    assert classes.tolist() == torch.stack(each).argmin(0).tolist()
    assert len(set(classes.tolist())) == 2, "all the same: the test shows little"


def test_a_checkpoint_without_a_language_model_is_refused(tmp_path):
    models.save("bert", tmp_path)
    own = Config(model=Model(name=str(tmp_path), head="cloze"))
    with pytest.raises(UserError, match="no language model head"):
        model.prepare(own, ("a", "b"), 0, {})


def test_continuations_are_what_follows_a_text(tokenizer):
    own = wordings.Wording(("{a}", " was ", "<mask>"), ("great", "not so good"))
    found = wordings.continuations(own, tokenizer)
    assert [tokenizer.convert_ids_to_tokens(ids) for ids in found] == [
        ["great"], ["not", "so", "good"],
    ]  # fmt: skip
    melted = wordings.Wording(("{a}", "<mask>"), ("box", "bad"))  # xbox is a token
    with pytest.raises(UserError, match="melts into the text"):
        wordings.continuations(melted, tokenizer)
