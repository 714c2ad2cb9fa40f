"""Sources, partitions, batches, metrics and the built-in corpus."""

import json
from dataclasses import replace

import datasets
import numpy as np
import pytest
import sklearn.metrics
import torch

from hpcfed.data import corpus, files, metrics, partition, sources, tables
from hpcfed.data.batches import POOL, Tokens, form_batches, split_batch, tokenize
from hpcfed.data.rows import read as read_rows
from hpcfed.data.tasks import TASKS
from hpcfed.errors import UserError
from hpcfed.model import load_tokenizer
from hpcfed.settings.config import Columns, Config, Data, Federation, Partition, Task


def write_task(folder, train, test, name="own"):
    (folder / name).mkdir(exist_ok=True)
    for split, rows in (("train", train), ("test", test)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / name / f"{split}.jsonl").write_text(text)
    return Config(task=Task(name=name), data=Data(root=str(folder)))


ROWS = [{"text": f"row {i}", "label": "xy"[i % 2]} for i in range(20)]
TEST = [{"text": f"other {i}", "label": "xy"[i % 2]} for i in range(20)]


# --- sources ---------------------------------------------------------------------------------


def test_own_jsonl_with_pairs_and_numbers_as_labels(tmp_path):
    rows = [{"text": "a", "text_pair": "b", "label": i % 2} for i in range(4)]
    task = sources.load(write_task(tmp_path, rows, rows[:2]))
    assert task.labels == ("0", "1")
    assert task.train.pairs == ["b"] * 4
    assert task.test.labels.tolist() == [0, 1]


def test_own_csv_with_named_columns(tmp_path):
    (tmp_path / "own").mkdir()
    for split, rest in (("train", ""), ("test", "how,x\n")):
        (tmp_path / "own" / f"{split}.csv").write_text(
            f'question,kind\n"how, and when",x\nwhy,y\n{rest}', encoding="utf-8"
        )
    columns = Columns(text="question", label="kind")
    config = Config(task=Task(name="own"), data=Data(root=str(tmp_path), columns=columns))
    task = sources.load(config)
    assert task.train.texts == ["how, and when", "why"]
    assert task.train.pairs is None


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"text": "a", "label": "x"', ["line 3", "not valid JSON"]),
        ("[1]", ["line 3", "JSON object"]),
        ('{"text": "a"}', ["line 3", "no 'label'", "data.columns"]),
        ('{"text": " ", "label": "x"}', ["line 3", "non-empty text"]),
        ('{"text": 5, "label": "x"}', ["line 3", "non-empty text", "5"]),
        ('{"text": "a", "label": null}', ["line 3", "'label'"]),
        ('{"text": "a", "label": "x", "text_pair": 1}', ["line 3", "'text_pair'"]),
    ],
)
def test_malformed_lines_are_named(tmp_path, line, words):
    config = write_task(tmp_path, ROWS, TEST)
    path = tmp_path / "own" / "train.jsonl"
    path.write_text("\n".join([*path.read_text().splitlines()[:2], line]) + "\n")
    with pytest.raises(UserError) as caught:
        sources.load(config)
    for word in [str(path), *words]:
        assert word in str(caught.value)


def test_other_faults_of_the_data(tmp_path):
    config = write_task(tmp_path, ROWS, TEST)
    with pytest.raises(UserError, match=r"test label 'z' never occurs.*x, y"):
        sources.load(write_task(tmp_path, ROWS, [{"text": "a", "label": "z"}]))
    with pytest.raises(UserError, match="train split of task 'own' is empty"):
        sources.load(write_task(tmp_path, [], TEST))
    with pytest.raises(UserError, match="all training rows have the label"):
        sources.load(write_task(tmp_path, ROWS[::2], TEST[::2]))
    with pytest.raises(UserError, match=r"train\.jsonl \(or \.csv.*does not exist"):
        sources.load(replace(config, task=Task(name="other")))
    with pytest.raises(UserError, match="Unknown task 'other'"):
        sources.load(Config(task=Task(name="other")))
    (tmp_path / "own" / "train.jsonl").write_bytes(b'{"text": "\xff"}\n')
    with pytest.raises(UserError, match="not UTF-8"):
        sources.load(config)


def test_csv_rows_of_another_width(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("text,label\na,x\nb\n")
    with pytest.raises(UserError, match=r"line 3: expected 2 columns"):
        read_rows(files.records(path), Columns())


def test_max_train_is_a_seeded_draw(tmp_path):
    config = write_task(tmp_path, ROWS, TEST)
    few = replace(config, task=Task(name="own", max_train=6))
    one, two = sources.load(few), sources.load(few)
    assert len(one.train) == 6 and one.train.texts == two.train.texts
    assert one.train.texts != sources.load(replace(few, seed=1)).train.texts


def read_saved(folder, source):
    """Rows of a data set as it would come from the hub."""
    records = tables.records(
        datasets.load_from_disk(folder), "hub", source.columns, None, source.rename
    )
    return read_rows(records, source.columns)


HUB_COLUMNS = {  # the columns and label types of each data set on the hub
    "rte": ({"sentence1": "a", "sentence2": "b"}, ["entailment", "not_entailment"]),
    "mrpc": ({"sentence1": "a", "sentence2": "b"}, ["not_equivalent", "equivalent"]),
    "qnli": ({"question": "a", "sentence": "b"}, ["entailment", "not_entailment"]),
    "sst2": ({"sentence": "a"}, ["negative", "positive"]),
    "cola": ({"sentence": "a"}, ["unacceptable", "acceptable"]),
    "mr": ({"text": "a"}, ["neg", "pos"]),
}


@pytest.mark.parametrize("name", HUB_COLUMNS)
def test_hub_columns_with_class_labels(name, tmp_path):
    texts, names = HUB_COLUMNS[name]
    features = datasets.Features(
        {c: datasets.Value("string") for c in texts} | {"label": datasets.ClassLabel(names=names)}
    )
    saved = datasets.Dataset.from_dict(
        {c: [v] * 2 for c, v in texts.items()} | {"label": [0, 1]}, features=features
    )
    saved.save_to_disk(tmp_path / name)
    found = read_saved(tmp_path / name, TASKS[name].hub)
    rename = {"neg": "negative", "pos": "positive"}
    assert [row.label for row in found] == [rename.get(n, n) for n in names]
    assert found[0].text == "a"
    assert found[0].text_pair == ("b" if len(texts) == 2 else None)


@pytest.mark.parametrize(
    ("name", "columns", "labels"),
    [
        ("boolq", {"question": "a", "passage": "b", "answer": [True, False]}, ["yes", "no"]),
        ("mpqa", {"sentence": "a", "label": [0, 1]}, ["negative", "positive"]),
        ("subj", {"text": "a", "label": [0, 1], "label_text": ["objective", "subjective"]},
         ["objective", "subjective"]),
        ("trec", {"text": "a", "label": [3, 4], "label_coarse_original": ["LOC", "NUM"]},
         ["LOC", "NUM"]),
    ],
)  # fmt: skip
def test_hub_columns_with_other_labels(name, columns, labels, tmp_path):
    filled = {c: v if isinstance(v, list) else [v] * 2 for c, v in columns.items()}
    datasets.Dataset.from_dict(filled).save_to_disk(tmp_path / name)
    found = read_saved(tmp_path / name, TASKS[name].hub)
    assert [row.label for row in found] == labels
    assert found[0].text == "a" and found[0].text_pair == ("b" if name == "boolq" else None)


def test_a_hub_out_of_reach_says_what_to_do(monkeypatch):
    def fail(*_):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UserError, match=r"CogComp|SetFit/TREC-QC.*data\.root"):
        sources.load(Config(task=Task(name="trec")))


def test_real_tasks_load(datasets_folder):
    for name in TASKS:
        config = Config(task=Task(name=name), data=Data(root=str(datasets_folder)))
        task = sources.load(config)
        assert len(task.labels) == (6 if name == "trec" else 2)
        assert (task.train.pairs is not None) == (name in ("rte", "mrpc", "qnli", "boolq"))
    assert sources.load(replace(config, task=Task(name="cola"))).metric == "matthews"


# --- corpus ----------------------------------------------------------------------------------


def test_corpus_is_balanced_and_its_splits_share_no_text():
    train, test = corpus.generate()
    assert (train, test) == corpus.generate()
    assert not {text for text, _ in train} & {text for text, _ in test}
    assert len({text for text, _ in train}) == len(train) == 2400
    _, counts = np.unique([label for _, label in test], return_counts=True)
    assert counts.tolist() == [120] * 5


# --- partition -------------------------------------------------------------------------------


def shares(kind, rows=400, clients=20, classes=4, seed=0, **options):
    rng = np.random.default_rng(1)

    def split(n):
        return sources.Split(["t"] * n, None, rng.integers(0, classes, n), None)

    names = tuple("abcdefgh"[:classes])
    task = sources.TaskData("t", names, "accuracy", 0, split(rows), split(rows // 4))
    config = Config(
        seed=seed,
        federation=Federation(clients=clients, per_round=1),
        data=Data(partition=Partition(kind=kind, **options)),
    )
    return task, partition.partition(task, config)


@pytest.mark.parametrize("kind", ["dirichlet", "iid", "quantity", "pathological"])
def test_every_row_belongs_to_one_client(kind):
    task, rows = shares(kind)
    for split, picks in (
        (task.train, [np.concatenate([r.train, r.validation]) for r in rows]),
        (task.test, [r.test for r in rows]),
    ):
        assert sorted(np.concatenate(picks).tolist()) == list(range(len(split)))
    assert all(len(r.train) for r in rows)


def test_partition_is_reproducible_and_depends_on_the_seed():
    one, two, other = (shares("dirichlet", seed=s)[1] for s in (0, 0, 1))
    assert all(np.array_equal(a.train, b.train) for a, b in zip(one, two, strict=True))
    assert any(not np.array_equal(a.train, b.train) for a, b in zip(one, other, strict=True))


def label_skew(task, rows):
    """Mean total-variation distance of a client's classes from the whole's."""
    counts = np.array(partition.summary(task, rows)["train"], dtype=float)
    whole = counts.sum(0) / counts.sum()
    return np.abs(counts / counts.sum(1, keepdims=True) - whole).sum(1).mean() / 2


def test_small_alpha_skews_labels_and_iid_does_not():
    skews = [
        label_skew(*shares("dirichlet", rows=4000, alpha=a, size_concentration=50))
        for a in (0.1, 1, 100)
    ]
    assert skews[0] > 0.4 > 0.1 > skews[2]
    assert skews[0] > skews[1] > skews[2]
    assert label_skew(*shares("iid", rows=4000)) < 0.1


def test_size_skew():
    def spread(*args, **kwargs):
        sizes = [len(r.train) + len(r.validation) for r in shares(*args, **kwargs)[1]]
        return np.std(sizes) / np.mean(sizes)

    assert spread("iid") < 0.05
    assert spread("quantity", size_concentration=1.0) > spread("quantity", size_concentration=50)


def test_the_test_split_follows_the_same_priors():
    task, rows = shares("dirichlet", rows=8000, clients=5, alpha=0.3)
    table = partition.summary(task, rows)
    train, test = (np.array(table[name], dtype=float) for name in ("train", "test"))
    train, test = train / train.sum(1, keepdims=True), test / test.sum(1, keepdims=True)
    assert np.abs(train - test).sum(1).max() / 2 < 0.25


def test_pathological_clients_hold_few_classes():
    task, rows = shares("pathological", rows=4000, classes=6, classes_per_client=2)
    counts = np.array(partition.summary(task, rows)["train"])
    main = np.sort(counts, 1)[:, -2:].sum(1) / counts.sum(1)
    assert (main > 0.9).mean() >= 0.8  # the last to draw take what is left
    assert (counts.sum(0) > 0).all()


def test_natural_partition_follows_the_column(tmp_path):
    rows = [{"text": "t", "label": "xy"[i % 2], "who": f"c{i % 3}"} for i in range(12)]
    config = write_task(tmp_path, rows, rows[:6])
    spec = Partition(kind="natural", column="who")
    config = replace(
        config,
        data=replace(config.data, partition=spec, validation=0.0),
        federation=Federation(clients=3, per_round=1),
    )
    task = sources.load(config)
    assert [r.train.tolist() for r in partition.partition(task, config)] == [
        [0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11],
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"federation\.clients=3"):
        partition.partition(task, replace(config, federation=Federation(clients=4, per_round=1)))


def test_partition_faults():
    with pytest.raises(UserError, match="each client needs at least one"):
        shares("iid", rows=10, clients=11)
    with pytest.raises(UserError, match="has 4 classes"):
        shares("pathological", classes_per_client=5)


def test_validation_never_takes_the_last_training_row():
    _, rows = shares("iid", rows=20, clients=20)
    assert all(len(r.train) == 1 and len(r.validation) == 0 for r in rows)


# --- batches ---------------------------------------------------------------------------------


def test_batches_cover_the_rows_once_and_waste_little():
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, 90, 1000)
    rows = rng.permutation(1000)[:613]
    batches = form_batches(rows, lengths, 8, rng)
    assert sorted(np.concatenate(batches).tolist()) == sorted(rows.tolist())
    assert sorted({len(b) for b in batches}) == [613 % 8, 8]
    padded = sum(lengths[b].max() * len(b) for b in batches)
    assert padded / lengths[rows].sum() < 1.15
    plain = [rows[i : i + 8] for i in range(0, 613, 8)]
    assert sum(lengths[b].max() * len(b) for b in plain) / lengths[rows].sum() > 1.5
    assert POOL * 8 < 613, "more than one pool was needed"


def test_batch_order_is_not_the_order_of_lengths():
    rng = np.random.default_rng(0)
    lengths = np.arange(400)
    firsts = [int(b.min()) for b in form_batches(np.arange(400), lengths, 8, rng)]
    assert firsts != sorted(firsts)


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("micro", [None, 1, 3])
def test_split_batch_deals_every_row_once(ranks, micro):
    for size in range(1, 20):
        batch = np.arange(100, 100 + size)
        steps = split_batch(batch, ranks, micro)
        assert all(len(shares) == ranks for shares in steps)
        rows = np.concatenate([share for shares in steps for share in shares])
        assert sorted(rows.tolist()) == batch.tolist()
        assert all(len(np.concatenate(shares)) for shares in steps), "a micro-step without rows"
        largest = max(len(share) for shares in steps for share in shares)
        assert largest <= (micro or -(-size // ranks))
        assert len(steps) == -(-size // (micro * ranks)) if micro else len(steps) == 1


def test_collate_equals_the_tokenizer_with_padding():
    tokenizer = load_tokenizer(Config())
    texts = ["a cat", "a much longer sentence about many cats and dogs", "x"]
    split = sources.Split(texts, ["b", "c c c", "d"], np.array([0, 1, 0]), None)
    assert split.pairs is not None
    tokens = tokenize(split, tokenizer, 12)
    rows = np.array([2, 0, 1])
    batch = tokens.collate(rows, torch.device("cpu"))
    wanted = tokenizer(
        [split.texts[r] for r in rows], [split.pairs[r] for r in rows], padding=True,
        truncation=True, max_length=12, return_tensors="pt",
    )  # fmt: skip
    for name in ("input_ids", "attention_mask", "token_type_ids"):
        assert torch.equal(batch[name], wanted[name]), name


def test_collate_pads_to_the_longest_of_its_rows():
    labels = np.zeros(3, dtype=np.int64)
    tokens = Tokens(np.arange(6, dtype=np.int32), None, np.array([0, 1, 3, 6]), labels, 9)
    batch = tokens.collate(np.array([0, 1]), torch.device("cpu"))
    assert batch["input_ids"].tolist() == [[0, 9], [1, 2]]
    assert batch["attention_mask"].tolist() == [[1, 0], [1, 1]]


# --- metrics ---------------------------------------------------------------------------------


def test_metrics_equal_scikit_learn():
    rng = np.random.default_rng(0)
    for _ in range(20):
        true, predicted = rng.integers(0, 2, (2, 30))
        accuracy = sklearn.metrics.accuracy_score(true, predicted)
        f1 = sklearn.metrics.f1_score(true, predicted, pos_label=0)
        matthews = sklearn.metrics.matthews_corrcoef(true, predicted)
        both = metrics.score(predicted, true, "accuracy_f1", positive=0)
        assert both == pytest.approx({"accuracy": accuracy, "f1": f1, "score": (accuracy + f1) / 2})
        found = metrics.score(predicted, true, "matthews", positive=0)
        assert found == pytest.approx(
            {"accuracy": accuracy, "matthews": matthews, "score": matthews}
        )


def test_metrics_of_a_constant_prediction():
    ones, mixed = np.ones(4, dtype=np.int64), np.array([0, 1, 0, 1])
    assert metrics.score(ones, mixed, "matthews", 1)["matthews"] == 0
    assert metrics.score(ones * 0, mixed, "accuracy_f1", 1)["f1"] == 0
