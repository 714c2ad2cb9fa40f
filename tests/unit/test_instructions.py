"""Prompts and answers: shapes of rows, templates, what is an answer, what is cut, the loss."""

import json
from functools import partial

import numpy as np
import pytest
import torch
import transformers

from hpcfed import model
from hpcfed.data import partition, rendering, sources
from hpcfed.data.instructions import Example, Instructions
from hpcfed.data.rendering import Template
from hpcfed.data.sources import Split
from hpcfed.errors import UserError
from hpcfed.objectives import heads
from hpcfed.settings.config import (
    Adapter,
    Columns,
    Config,
    Data,
    Federation,
    Model,
    Partition,
    Task,
)
from tests import models
from tests.mpi.slow import CPU, obvious_losses

USER, ASSISTANT, SYSTEM = (
    lambda text, role=role: {"role": role, "content": text}
    for role in ("user", "assistant", "system")
)


def read(*records, **columns):
    reader = Instructions(Columns(**columns))
    return [
        Example.of(row.text) for row in reader.read((f"row {i}", r) for i, r in enumerate(records))
    ]


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [USER("ask"), ASSISTANT("tell")]},
        {"prompt": "ask", "completion": "tell", "messages": None},
        {"prompt": [USER("ask")], "completion": [ASSISTANT("tell")]},
        {"instruction": "ask", "input": "", "output": "tell"},
        {"instruction": "ask", "context": None, "response": "tell", "category": "open_qa"},
        {"conversations": [{"from": "human", "value": "ask"}, {"from": "gpt", "value": "tell"}]},
    ],
)
def test_all_shapes_are_one(record):
    assert read(record) == [Example((USER("ask"), ASSISTANT("tell")))]


def test_shapes_with_more():
    alpaca, choice, named, system = read(
        {"instruction": "ask", "input": "of this", "output": "tell"},
        {"prompt": "ask", "completion": 1, "choices": ["no", "yes"]},
        {"question": "ask", "completion": "b", "prompt": "ask", "choices": ["a", "b"]},
        {"messages": [SYSTEM("be kind"), USER("a"), ASSISTANT("b"), USER("c"), ASSISTANT("d")]},
    )
    assert alpaca.messages[0]["content"] == "ask\n\nof this"
    assert choice.answer == "yes" and choice.choices == ("no", "yes")
    assert named.answer == "b"
    assert [m["role"] for m in system.messages] == ["system", *["user", "assistant"] * 2]
    (mapped,) = read({"q": "ask", "a": "tell"}, prompt="q", completion="a")
    assert mapped.answer == "tell"


def test_dpo_is_the_formula(tmp_path):
    """On logits at all positions, with the model itself as the reference; a fresh adapter has
    moved nothing."""
    folder = models.save("llama", tmp_path, "dpo", initializer_range=0.2)
    own = Config(
        model=Model(name=str(folder), head="dpo"), task=Task(max_length=30, beta=0.3),
        adapter=Adapter(targets=("q_proj", "v_proj"), dropout=0.5),
    )  # fmt: skip
    pairs = [("name a bird", "bird", "dog cat"), ("tree", "lake " * 9, "tree"), ("a", "b", "c d e")]
    rows = [Example(talk(a, b).messages, rejected=c) for a, b, c in pairs]
    task = sources.TaskData("own", (), "loss", 0, split(*rows), split(*rows), ("",))
    tokenizer = model.load_tokenizer(own)
    head = heads.build(own, task, tokenizer)
    tokens = head.encode(task.train, tokenizer, own.task.max_length)
    prepared = model.prepare(own, (), 0, {}, head)
    network, which = prepared.adapted.network.eval(), np.array([2, 0, 1])
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder)

    def log_probability(network, texts):
        (found,) = Template(tokenizer, False, "m").render([texts])
        logits = network(torch.tensor([found.ids]))
        logits = getattr(logits, "logits", logits)[0].log_softmax(-1)
        ((start, stop),) = found.answers
        return sum(logits[at - 1, found.ids[at]] for at in range(start, stop))

    # B is zero as PEFT makes it.
    fresh = head.losses(network, tokens, which, CPU)
    torch.testing.assert_close(fresh, torch.full((3,), float(np.log(2))))
    torch.manual_seed(2)
    for parameter in prepared.adapted.parameters:
        torch.nn.init.normal_(parameter)
    wanted = []
    for row in which:
        better, worse = rows[row].messages, rows[row].answered(rows[row].rejected)
        ratios = [
            log_probability(lambda ids: network(input_ids=ids, attention_mask=ids * 0 + 1), own)
            - log_probability(plain, own)
            for own in (better, worse)
        ]
        wanted.append(-torch.log(torch.sigmoid(0.3 * (ratios[0] - ratios[1]))))
    found = head.losses(network, tokens, which, CPU)
    torch.testing.assert_close(found, torch.stack(wanted), rtol=1e-3, atol=1e-4)
    told = head.predict(network, tokens, which, CPU).detach()
    assert told[0].tolist() == [float(loss < np.log(2)) for loss in found.tolist()]
    assert len(set(told[0].tolist())) == 2, "all the same: it shows little"
    assert head.score(told.numpy(), which, tokens, task)["score"] == float(told[0].mean())
    network.train()
    with network.reference():
        assert not network.training
    assert network.training


@pytest.fixture(scope="module")
def tokenizer():
    return models.tokenizer(chats=True)


def split(*examples):
    return Split([own.text() for own in examples], None, np.zeros(len(examples), np.int64), None)


def talk(*texts):
    """Texts of user and assistant in turns."""
    return Example(tuple((USER, ASSISTANT)[i % 2](text) for i, text in enumerate(texts)))


def words(tokenizer, ids):
    return " ".join(tokenizer.convert_ids_to_tokens(list(ids)))


@pytest.mark.parametrize("plain", [False, True])
def test_answers_and_nothing_else_are_marked(tokenizer, plain):
    """And what a text spells is text."""
    own = [talk("name a bird", "bird"), talk("cat [END] dog", "tree lake", "bad", "lake")]
    tokens = rendering.encode(split(*own), Template(tokenizer, plain, "m"), 0, 60)
    assert tokens.answers is not None and tokens.positions is not None and tokens.cut == 0
    found = []
    for row in range(2):
        ids = tokens.row(row)
        marks = tokens.answers[tokens.offsets[row] : tokens.offsets[row + 1]]
        found.append(words(tokenizer, ids[marks]))
        assert ids[-1] == tokenizer.eos_token_id and marks[-1]
        assert tokens.positions[row] == len(ids) - 2  # a word and its end
    assert found == ["bird [END]", "tree lake [END] lake [END]"]
    asked = words(tokenizer, tokens.row(1)[: tokens.positions[1]])
    if plain:
        joined = asked.replace(" ##", "")
        assert joined.endswith("# # # response :") and "# # # instruction : cat dog #" in joined
    else:
        assert asked == "[USER] cat dog [END] [BOT] tree lake [END] [USER] bad [END] [BOT]"


@pytest.mark.parametrize(("room", "kept"), [(40, None), (8, 2), (12, 3)])
def test_a_long_row_loses_its_beginning(tokenizer, room, kept):
    """At most a quarter of the room is kept from a long answer."""
    short, long = talk("cat " * 50, "bird dog"), talk("cat " * 50, "dog " * 28)
    tokens = rendering.encode(
        split(short, long, talk("cat", "dog")), Template(tokenizer, False, "m"), 0, room
    )
    assert tokens.cut == 2 and tokens.lengths.tolist()[:2] == [room, room]
    first = words(tokenizer, tokens.row(0))
    assert first.endswith("cat [END] [BOT] bird dog [END]") and first.count("cat") == room - 5
    second = words(tokenizer, tokens.row(1))
    if kept is None:
        assert second.endswith("dog [END]") and second.count("dog") == 28
    else:
        assert second.split()[:kept] == ["cat", "[END]", "[BOT]"][-kept:]
        assert second.count("dog") == room - kept
    for row in range(3):
        assert all(rendering.targets(tokens, row) > 0) and len(rendering.targets(tokens, row))


def test_a_template_that_is_no_prefix_is_refused(tokenizer):
    """As one that writes the last answer otherwise, or joins it to the prompt."""
    for template, fault in (
        ("{{ messages | length }} {{ messages[-1].content }}", "other tokens"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "other tokens"),
        ("{{ raise_exception('no such role') }}", "no such role"),
    ):
        tokenizer = models.tokenizer(chats=True)
        tokenizer.chat_template = template
        with pytest.raises(UserError, match=f"{fault}.* in the row that begins 'c'.*=plain"):
            Template(tokenizer, False, "m").render([talk("c", "at").messages])
    with pytest.raises(UserError, match="no token that ends a text"):
        Template(models.tokenizer(), True, "m")


def test_todays_date_is_not_in_the_tokens(tokenizer):
    own = models.tokenizer(chats=True)
    own.chat_template = "{{ strftime_now('%d') }} " + models.CHAT_TEMPLATE
    tokens = rendering.encode(split(talk("cat", "dog")), Template(own, False, "m"), 0, 60)
    assert words(own, tokens.row(0)).replace(" ##", "").startswith("26 jul 2024 [USER]")


def write(folder, records):
    (folder / "own").mkdir()
    for name, part in (("train", records), ("test", records[::2])):
        lines = "".join(json.dumps(record) + "\n" for record in part)
        (folder / "own" / f"{name}.jsonl").write_text(lines)


@pytest.mark.parametrize("kind", ["iid", "quantity", "natural", "dirichlet", "pathological"])
def test_every_partition(tmp_path, kind):
    records = [
        {"prompt": f"p{i}", "completion": f"c{i}", "topic": "abc"[i % 3], "who": i % 4}
        for i in range(48)
    ]
    write(tmp_path, records)
    column = {"natural": "who", "dirichlet": "topic", "pathological": "topic"}.get(kind)
    own = Config(
        model=Model(head="completion"), task=Task("own"), federation=Federation(4, 2),
        data=Data(root=str(tmp_path), partition=Partition(kind, alpha=0.05, column=column)),
    )  # fmt: skip
    task = sources.load(own)
    assert task.labels == () and task.groups == (("a", "b", "c") if column == "topic" else ("",))
    rows = partition.partition(task, own)
    every = np.concatenate([np.concatenate([r.train, r.validation]) for r in rows])
    assert sorted(every) == list(range(48))
    table = np.array(partition.summary(task, rows)["train"])
    if kind == "natural":
        assert [len(r.train) + len(r.validation) for r in rows] == [12] * 4
    if kind == "pathological":
        assert ((table > 0).sum(1) <= 2).sum() >= 2  # the last ones get what is left
    if kind == "dirichlet":
        assert (table.max(1) / table.sum(1)).mean() > 0.6
    if kind == "quantity":
        assert len({len(r.train) for r in rows}) > 1


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3"])
def test_losses_equal_the_obvious_ones(architecture, tmp_path):
    """Rows of unlike lengths, one of two turns; and their gradients."""
    folder = models.save(architecture, tmp_path, "completion", initializer_range=0.2)
    own = Config(
        model=Model(name=str(folder), head="completion"), task=Task(max_length=20),
        adapter=Adapter(targets=tuple(models.ARCHITECTURES[architecture][3])),
    )  # fmt: skip
    rng = np.random.default_rng(0)
    some = "a fine film dull the best of all cats dogs so never again great terrible".split()
    texts = [" ".join(rng.choice(some, n)) for n in (1, 3, 40, 7, 2, 5, 12, 4, 1, 1)]
    examples = [talk(*texts[i : i + 2]) for i in range(0, 8, 2)] + [talk(*texts[6:])]
    task = sources.TaskData("own", (), "loss", 0, split(*examples), split(*examples), ("",))
    tokenizer = model.load_tokenizer(own)
    head = heads.build(own, task, tokenizer)
    tokens = head.encode(task.train, tokenizer, own.task.max_length)
    prepared = model.prepare(own, (), 0, {}, head)
    torch.manual_seed(2)
    parameters = prepared.adapted.parameters
    for parameter in parameters:
        torch.nn.init.normal_(parameter)
    network, rows = prepared.adapted.network.eval(), rng.permutation(5)
    losses, wanted = (
        head.losses(network, tokens, rows, CPU),
        obvious_losses(network, head, rows, tokens),
    )
    torch.testing.assert_close(losses, wanted, rtol=1e-4, atol=1e-5)
    gradients = (
        torch.cat(
            [g.flatten() for g in torch.autograd.grad(own.mean(), prepared.adapted.parameters)]
        )
        for own in (losses, wanted)
    )
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        told = head.predict(network, tokens, rows, CPU)
    counts = torch.tensor([len(rendering.targets(tokens, row)) for row in rows]).double()
    torch.testing.assert_close(told[0], (wanted * counts).double(), rtol=1e-4, atol=1e-5)
    assert told[1].tolist() == counts.tolist() and len(set(counts.tolist())) > 2
    scores = head.score(told.numpy(), rows, tokens, task)
    assert scores["loss"] == pytest.approx(float((wanted * counts).sum() / counts.sum()), rel=1e-4)


def test_multiple_choice_is_by_log_likelihood_a_character(tmp_path):
    """One row at a time, on logits at all positions; rows with two, with three and without."""
    folder = models.save("llama", tmp_path, "completion", initializer_range=0.2)
    own = Config(model=Model(name=str(folder), head="completion"), task=Task(max_length=40))
    rng = np.random.default_rng(3)
    answers = ["bird", "dog cat lake", "tree river", "forest", "a bad office"]
    rows = []
    for number in range(24):
        choices = tuple(rng.choice(answers, (0, 2, 3)[number % 3], replace=False))
        right = choices[0] if choices else "bird"
        said = talk(f"name {answers[number % 5]}", str(right)).messages
        rows.append(Example(said, tuple(map(str, choices))))
    task = sources.TaskData("own", (), "loss", 0, split(*rows), split(*rows), ("",))
    tokenizer = model.load_tokenizer(own)
    head = heads.build(own, task, tokenizer)
    tokens = head.encode(task.train, tokenizer, 40)
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder)
    wanted = []
    for row in rows:
        gains = []
        for text in row.choices:
            (found,) = Template(tokenizer, False, "m").render([row.answered(text)])
            logits = plain(torch.tensor([found.ids])).logits[0].log_softmax(-1)
            ((start, stop),) = found.answers
            summed = sum(float(logits[at - 1, found.ids[at]]) for at in range(start, stop))
            gains.append(summed / len(text))
        wanted.append(float(np.argmax(gains) == 0) if gains else -1.0)
    assert {*wanted} == {-1.0, 0.0, 1.0}
    prompt = partial(_logits, plain)
    with torch.no_grad():
        told = head.predict(prompt, tokens, np.arange(24), CPU).numpy()
    assert told[2].tolist() == wanted
    share = np.mean([hit for hit in wanted if hit >= 0])
    assert head.score(told, np.arange(24), tokens, task)["multiple_choice"] == share


def _logits(plain, positions, **inputs):
    logits = plain(**inputs).logits
    return logits.gather(1, positions.unsqueeze(-1).expand(-1, -1, logits.shape[-1]))
