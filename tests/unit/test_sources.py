"""Own data: forms of files, names of splits, shares to hold out, labels and clients."""

import contextlib
import csv
import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pandas
import pytest

from hpcfed.data import partition, sources
from hpcfed.errors import UserError
from hpcfed.rounds import preflight
from hpcfed.settings.config import Columns, Config, Data, Federation, Partition, Splits, Task

TRAIN = [{"text": f"row {i}", "label": "xy"[i % 2], "who": f"c{i % 3}"} for i in range(24)]
TEST = [{"text": f"other {i}", "label": "xy"[i % 2], "who": f"c{i % 3}"} for i in range(12)]


@pytest.fixture(autouse=True)
def _quiet():
    datasets.disable_progress_bars()


def config(root, name="own", **data):
    return Config(task=Task(name=name), data=Data(root=str(root), **data))


def write(path, rows, encoding="utf-8"):
    """One split, in the form that its name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding=encoding)
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding=encoding) as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        pandas.DataFrame(rows).to_parquet(path)
    else:
        datasets.Dataset.from_list(rows).save_to_disk(path)


def same(one, two):
    """Whether two splits hold the same."""
    return (one.texts, one.pairs, one.owners) == (two.texts, two.pairs, two.owners) and (
        one.labels.tolist() == two.labels.tolist()
    )


# --- forms -----------------------------------------------------------------------------------


@pytest.mark.parametrize("test", [".csv", ".parquet", ""])
@pytest.mark.parametrize("train", [".jsonl", ".csv", ".parquet", ""])
def test_every_form_gives_the_same_task(tmp_path, train, test):
    write(tmp_path / "own" / f"train{train}", TRAIN)
    write(tmp_path / "own" / f"test{test}", TEST)
    write(tmp_path / "plain" / "train.jsonl", TRAIN)
    write(tmp_path / "plain" / "test.jsonl", TEST)
    natural = Partition(kind="natural", column="who")
    found = sources.load(config(tmp_path, partition=natural))
    plain = sources.load(config(tmp_path, "plain", partition=natural))
    assert found.labels == plain.labels == ("x", "y")
    assert same(found.train, plain.train) and same(found.test, plain.test)


def test_a_saved_dict_and_class_labels(tmp_path):
    labels = datasets.ClassLabel(names=["no", "yes"])
    features = datasets.Features({"text": datasets.Value("string"), "label": labels})
    splits = {
        name: datasets.Dataset.from_dict(
            {"text": [f"{name} {i}" for i in range(6)], "label": [0, 1] * 3}, features=features
        )
        for name in ("train", "validation")
    }
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "own")
    task = sources.load(config(tmp_path, splits=Splits(test="validation")))
    assert task.labels == ("no", "yes") and task.train.labels.tolist() == [0, 1] * 3
    assert task.test.texts[0] == "validation 0"
    (tmp_path / "parquet").mkdir()
    for name, dataset in splits.items():
        dataset.to_parquet(tmp_path / "parquet" / f"{name}.parquet")
    again = sources.load(config(tmp_path, "parquet", splits=Splits(test="validation")))
    assert again.labels == task.labels and same(again.train, task.train)


def test_parquet_categories_and_a_folder_that_looks_like_a_partition(tmp_path):
    folder = tmp_path / "label=z"
    folder.mkdir()
    categories = pandas.Categorical([row["label"] for row in TRAIN])
    columns = {"text": [row["text"] for row in TRAIN], "label": categories}
    pandas.DataFrame(columns).to_parquet(folder / "train.parquet")
    write(folder / "test.jsonl", TEST)
    task = sources.load(config(tmp_path, "label=z"))
    assert task.labels == ("x", "y") and len(task.train) == len(TRAIN)


@pytest.mark.parametrize("form", [".jsonl", ".csv"])
def test_a_byte_order_mark_and_a_field_of_a_million_characters(tmp_path, form):
    rows = [*TRAIN, {"text": "word " * 200_000, "label": "x", "who": "c0"}]
    write(tmp_path / "own" / f"train{form}", rows, encoding="utf-8-sig")
    write(tmp_path / "own" / f"test{form}", TEST, encoding="utf-8-sig")
    task = sources.load(config(tmp_path))
    assert task.train.texts == [row["text"] for row in rows]


def test_csv_as_excel_leaves_it(tmp_path):
    (tmp_path / "own").mkdir()
    lines = ["text, label,,", "a,x,,", '"two\r\nlines",y,,', "", 'he said ""b"",y,,']
    lines[-1] = '"he said ""b""",y,,'
    (tmp_path / "own" / "train.csv").write_bytes("\r\n".join(lines).encode("utf-8-sig"))
    write(tmp_path / "own" / "test.jsonl", TEST)
    task = sources.load(config(tmp_path))
    assert task.train.texts == ["a", "two\r\nlines", 'he said "b"']
    assert task.train.labels.tolist() == [0, 1, 1]


# --- the hub ---------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A place where `datasets` finds owner/name without the hub: a folder of that name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"sentence": row["text"], "kind": row["label"]} for row in TRAIN]
    write(tmp_path / "owner" / "name" / "train.jsonl", rows)
    return tmp_path / "owner" / "name", rows


COLUMNS = Columns(text="sentence", label="kind")


def test_any_hub_id(hub):
    folder, rows = hub
    spec = Config(task=Task(name="owner/name"), data=Data(columns=COLUMNS))
    with pytest.raises(UserError, match=r"no split 'test' \(it has train\)"):
        sources.load(spec)
    share = sources.load(replace(spec, data=replace(spec.data, test=0.25)))
    assert (len(share.train), len(share.test)) == (18, 6)
    write(folder / "validation.jsonl", rows[:8])
    spec = replace(spec, data=replace(spec.data, splits=Splits(test="validation")))
    task = sources.load(spec)
    assert task.test.texts == [row["sentence"] for row in rows[:8]]
    assert task.train.texts == [row["sentence"] for row in rows]
    with pytest.raises(UserError, match=r"has a split 'validation'; leave out data\.test"):
        sources.load(replace(spec, data=replace(spec.data, test=0.25)))
    with pytest.raises(UserError, match=r"train: no 'text' \(there are: 'sentence', 'kind'\)"):
        sources.load(replace(spec, data=replace(spec.data, columns=Columns())))
    with pytest.raises(UserError, match=r"Could not load owner/name .*'other' not found"):
        sources.load(replace(spec, data=replace(spec.data, subset="other")))
    assert preflight.output_folder(spec) == Path("runs/owner-name-lora-fedavg-42")


# --- a share to hold out -----------------------------------------------------------------------


def test_a_share_is_held_out_by_the_seed(tmp_path):
    write(tmp_path / "own" / "train.jsonl", TRAIN)
    one = sources.load(config(tmp_path, test=0.25))
    again = sources.load(config(tmp_path, test=0.25))
    other = sources.load(replace(config(tmp_path, test=0.25), seed=1))
    assert same(one.test, again.test) and not same(one.test, other.test)
    assert (len(one.train), len(one.test)) == (18, 6)
    order = [row["text"] for row in TRAIN]
    assert sorted(one.train.texts + one.test.texts, key=order.index) == order
    for split in (one.train, one.test):
        assert split.texts == sorted(split.texts, key=order.index)


def test_what_is_held_out_does_not_depend_on_max_train(tmp_path):
    write(tmp_path / "own" / "train.jsonl", TRAIN)
    spec = config(tmp_path, test=0.25)
    few = sources.load(replace(spec, task=Task(name="own", max_train=10)))
    assert same(few.test, sources.load(spec).test) and len(few.train) == 10


@pytest.mark.parametrize("seed", range(5))
def test_no_label_and_no_client_loses_its_last_row(tmp_path, seed):
    rows = [*TRAIN, {"text": "rare", "label": "z", "who": "c0"}]
    rows.append({"text": "alone", "label": "x", "who": "only"})
    write(tmp_path / "own" / "train.jsonl", rows)
    natural = Partition(kind="natural", column="who")
    spec = replace(
        config(tmp_path, test=0.9, partition=natural),
        seed=seed,
        federation=Federation(clients=None, per_round=1),
    )
    task = sources.load(spec)
    assert "rare" in task.train.texts and "alone" in task.train.texts
    assert set(task.train.owners) == {"c0", "c1", "c2", "only"}
    kept = zip(task.train.labels.tolist(), task.train.owners, strict=True)
    for label, owner in kept:  # none could be held out besides
        assert task.train.owners.count(owner) == 1 or (task.train.labels == label).sum() == 1
    assert len(partition.partition(task, spec)) == 4


# --- labels ----------------------------------------------------------------------------------


def labels_of(tmp_path, labels):
    write(tmp_path / "own" / "train.jsonl", [{"text": f"a {x}", "label": x} for x in labels])
    write(tmp_path / "own" / "test.jsonl", [{"text": "b", "label": labels[0]}])
    return sources.load(config(tmp_path))


@pytest.mark.parametrize(
    ("labels", "order"),
    [
        (range(11, -1, -1), [str(i) for i in range(12)]),
        ([10, "9", -2, -10], ["-10", "-2", "9", "10"]),
        (["10", "9", "x"], ["10", "9", "x"]),
        (["1.5", "10", "9"], ["1.5", "10", "9"]),
        ([True, False], ["False", "True"]),
        (["b", "B", "a"], ["B", "a", "b"]),
        ([10**30, 9], ["9", str(10**30)]),
    ],
)
def test_whole_numbers_are_in_their_order_and_other_labels_in_that_of_texts(
    tmp_path, labels, order
):
    task = labels_of(tmp_path, list(labels))
    assert list(task.labels) == order
    assert [task.labels[i] for i in task.train.labels] == [str(label) for label in labels]


def test_blanks_around_labels_and_clients_make_no_others(tmp_path):
    rows = [row | {"label": row["label"] + " " * (i % 3)} for i, row in enumerate(TRAIN)]
    write(tmp_path / "own" / "train.jsonl", [row | {"who": f" {row['who']}\t"} for row in rows])
    write(tmp_path / "own" / "test.csv", [row | {"label": f"\t{row['label']}"} for row in TEST])
    task = sources.load(config(tmp_path, partition=Partition(kind="natural", column="who")))
    assert task.labels == ("x", "y")
    assert task.test.labels.tolist() == [0, 1] * 6
    assert set(task.train.owners) == set(task.test.owners) == {"c0", "c1", "c2"}


def test_the_least_max_train_that_is_named_keeps_all_labels(tmp_path):
    write(tmp_path / "own" / "train.jsonl", [*TRAIN, {"text": "rare", "label": "z"}])
    write(tmp_path / "own" / "test.jsonl", TEST)
    for seed in range(20):
        spec = replace(config(tmp_path), seed=seed, task=Task(name="own", max_train=2))
        with pytest.raises(UserError, match=r"draws no row of the label") as caught:
            sources.load(spec)
        least = int(str(caught.value).split("task.max_train=")[2].split()[0])
        full = sources.load(replace(spec, task=Task(name="own", max_train=least)))
        assert full.labels == ("x", "y", "z")
        with pytest.raises(UserError, match=r"draws no row of the label"):
            sources.load(replace(spec, task=Task(name="own", max_train=least - 1)))


# --- clients ---------------------------------------------------------------------------------


def test_natural_clients_are_counted_and_test_rows_without_the_column_are_dealt_out(tmp_path):
    rng = np.random.default_rng(0)
    sizes = {"a": 300, "b": 100, "c": 600}
    share = {"a": 0.9, "b": 0.5, "c": 0.1}  # of label x
    train = [
        {"text": f"{who} {i}", "label": "xy"[int(rng.random() > share[who])], "who": who}
        for who, size in sizes.items()
        for i in range(size)
    ]
    write(tmp_path / "own" / "train.jsonl", train)
    test = [{"text": f"t {i}", "label": "xy"[i % 2]} for i in range(500)]
    write(tmp_path / "own" / "test.jsonl", test)
    spec = replace(
        config(tmp_path, partition=Partition(kind="natural", column="who"), validation=0.0),
        federation=Federation(clients=None, per_round=2),
    )
    task = sources.load(spec)
    rows = partition.partition(task, spec)
    assert [len(r.train) for r in rows] == [300, 100, 600]
    assert [len(r.test) for r in rows] == [150, 50, 300]
    assert sorted(np.concatenate([r.test for r in rows]).tolist()) == list(range(500))
    summary = partition.summary(task, rows)
    assert summary["clients"] == ["a", "b", "c"]
    table = np.array(summary["test"])
    found = table[:, 0] / table.sum(1)
    assert found[0] > 0.8 and 0.3 < found[1] < 0.7 and found[2] < 0.35
    given = replace(spec, federation=Federation(clients=3, per_round=2))
    for one, two in zip(rows, partition.partition(task, given), strict=True):
        assert all(np.array_equal(getattr(one, k), getattr(two, k)) for k in vars(one))


# --- permissions -----------------------------------------------------------------------------


@contextlib.contextmanager
def ordinary_user():
    """Root may read everything, so root is nobody for a while."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.mark.parametrize("form", [".jsonl", ".csv", ".parquet", ""])
def test_files_that_may_not_be_read(form):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        write(folder / "own" / f"train{form}", TRAIN)
        write(folder / "own" / "test.jsonl", TEST)
        secret = folder / "own" / f"train{form}"
        for path in [secret, *secret.glob("*")]:
            path.chmod(0)
        try:
            with ordinary_user(), pytest.raises(UserError) as caught:
                sources.load(config(folder))
        finally:
            secret.chmod(0o755)
        assert str(folder / "own") in str(caught.value)
        assert "Permission denied" in str(caught.value)


def test_a_folder_that_may_not_be_entered():
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        write(folder / "own" / "train.jsonl", TRAIN)
        (folder / "own").chmod(0)
        try:
            with (
                ordinary_user(),
                pytest.raises(UserError, match=r"own cannot be read \(Permission"),
            ):
                sources.load(config(folder))
        finally:
            (folder / "own").chmod(0o755)
