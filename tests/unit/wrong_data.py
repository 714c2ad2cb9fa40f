"""Wrong data, one case a kind of fault: what is wrong, what makes it, and the sentence.

A function of a case writes data into a folder and returns overrides of `lora-fedavg`; the sentence
is a regular expression.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import pandas
import pyarrow
import pyarrow.parquet

Build = Callable[[Path], list[str]]

TRAIN = [{"text": f"row {i}", "label": "xy"[i % 2]} for i in range(8)]
TEST = [{"text": f"other {i}", "label": "xy"[i % 2]} for i in range(4)]
CSV_TRAIN = "text,label\n" + "".join(f"row {i},{'xy'[i % 2]}\n" for i in range(8))
OWNED = [row | {"who": f"c{i % 2}"} for i, row in enumerate(TRAIN)]
NATURAL = ["data.partition.kind=natural", "data.partition.column=who", "federation.clients=2"]


def jsonl(rows: Sequence[Any]) -> str:
    """Lines of rows; those that are texts already stay as they are."""
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


def words(folder: Path, *more: str) -> list[str]:
    """Overrides for the task `own` in a folder."""
    return [
        "task.name=own", f"data.root={folder}", "federation.clients=2", "federation.per_round=1",
        *more,
    ]  # fmt: skip


def write(folder: Path, contents: dict[str, str | bytes]) -> None:
    """Files of the task `own`."""
    (folder / "own").mkdir()
    for name, content in contents.items():
        data = content.encode() if isinstance(content, str) else content
        (folder / "own" / name).write_bytes(data)


def given(contents: dict[str, str | bytes], *more: str) -> Build:
    """These files, and no others."""

    def build(folder: Path) -> list[str]:
        write(folder, contents)
        return words(folder, *more)

    return build


def rows(
    train: Sequence[Any] | bytes = TRAIN,
    test: Sequence[Any] | bytes = TEST,
    more: Sequence[str] = (),
) -> Build:
    """Both splits as JSONL."""
    train, test = (part if isinstance(part, bytes) else jsonl(part) for part in (train, test))
    return given({"train.jsonl": train, "test.jsonl": test}, *more)


def third(line: Any) -> Build:
    """A line after two good ones."""
    return rows([*TRAIN[:2], line])


def csv(train: str | bytes) -> Build:
    """The training rows as CSV."""
    return given({"train.csv": train, "test.jsonl": jsonl(TEST)})


def parquet(**columns: Any) -> Build:
    """The training rows as parquet."""

    def build(folder: Path) -> list[str]:
        write(folder, {"test.jsonl": jsonl(TEST)})
        pandas.DataFrame(columns).to_parquet(folder / "own" / "train.parquet")
        return words(folder)

    return build


def saved(*labels: int | None, damage: str = "") -> Build:
    """The training rows by save_to_disk; damage: a file that is made unreadable."""

    def build(folder: Path) -> list[str]:
        write(folder, {"test.jsonl": jsonl(TEST)})
        names = datasets.ClassLabel(names=["x", "y"])
        features = datasets.Features({"text": datasets.Value("string"), "label": names})
        columns = {"text": [f"row {i}" for i in range(len(labels))], "label": list(labels)}
        datasets.Dataset.from_dict(columns, features=features).save_to_disk(
            folder / "own" / "train"
        )
        if damage:
            (folder / "own" / "train" / damage).write_text("{")
        return words(folder)

    return build


def linked(split: str, target: str) -> Build:
    """A split that is a link to something else."""

    def build(folder: Path) -> list[str]:
        write(folder, {"train.jsonl": jsonl(TRAIN), "test.jsonl": jsonl(TEST)})
        (folder / "own" / f"{split}.jsonl").unlink()
        (folder / "own" / f"{split}.jsonl").symlink_to(target)
        return words(folder)

    return build


def twice_in_parquet(folder: Path) -> list[str]:
    """Two columns of one name, which pandas would not write."""
    write(folder, {"test.jsonl": jsonl(TEST)})
    column = pyarrow.array(["x", "y"])
    table = pyarrow.Table.from_arrays([column] * 3, ["text", "label", "label"])
    pyarrow.parquet.write_table(table, folder / "own" / "train.parquet")
    return words(folder)


def root_is_a_file(folder: Path) -> list[str]:
    """data.root that names one of the files."""
    write(folder, {"train.jsonl": jsonl(TRAIN)})
    return [*words(folder), f"data.root={folder / 'own' / 'train.jsonl'}"]


def natural(train: Sequence[Any] = OWNED, test: Sequence[Any] = TEST, *more: str) -> Build:
    """Clients by the column `who`."""
    return rows(train, test, [*NATURAL, *more])


def without_files(*more: str) -> Build:
    """Overrides alone."""
    return lambda folder: list(more)


DEEP = '{"text": "a", "label": "x", "more": ' + "[" * 100_000 + "]" * 100_000 + "}"
LONG = '{"text": "a", "label": ' + "9" * 5000 + "}"

_FILES: list[tuple[str, Build, str]] = [
    (
        "a JSONL file that is not UTF-8",
        rows(jsonl(TRAIN[:2]).encode() + '{"text": "café", "label": "x"}\n'.encode("latin-1")),
        r"train\.jsonl, line 3: not UTF-8 text .*save it in that encoding",
    ),
    (
        "a JSONL file in UTF-16",
        rows(jsonl(TRAIN).encode("utf-16")),
        r"train\.jsonl, line 1: not UTF-8",
    ),
    (
        "a line that is cut off",
        third('{"text": "a", "label": "x"'),
        r"train\.jsonl, line 3: not valid JSON .*each line must be one JSON object",
    ),
    (
        "one JSON array over several lines",
        rows([json.dumps(TRAIN, indent=1)]),
        r"train\.jsonl, line 1: not valid JSON",
    ),
    ("a line that is a list", third([1]), r"line 3: each line must be a JSON object"),
    (
        "a key that stands twice in a line",
        third('{"text": "a", "label": "x", "label": "y"}'),
        r"line 3: the key 'label' stands twice",
    ),
    ("a line that is nested very deeply", third(DEEP), r"line 3: JSON that is nested too deeply"),
    ("a number of 5,000 digits", third(LONG), r"line 3: a number of more than 4300 digits"),
    (
        "half of a surrogate pair in a text",
        third(r'{"text": "a \ud800", "label": "x"}'),
        r"line 3: 'text' holds half of a character, '\\ud800'",
    ),
    (
        "half of a surrogate pair in a label",
        third(r'{"text": "a", "label": "\udfff"}'),
        r"line 3: 'label' holds half of a character, '\\udfff'",
    ),
    (
        "a CSV file that is not UTF-8",
        csv(CSV_TRAIN.encode() + "café,x\n".encode("latin-1")),
        r"train\.csv, line 10: not UTF-8",
    ),
    (
        "a CSV row with a comma in its text",
        csv(CSV_TRAIN + "here, there,x\n"),
        r"train\.csv, line 10: expected 2 columns .* not 3; .*double quotes",
    ),
    (
        "a CSV row without a label's column",
        csv("text,label\na,x\n\nb\n"),
        r"train\.csv, line 4: expected 2 columns as in the header, not 1",
    ),
    (
        "a CSV quote that is never closed",
        csv('text,label\na,x\n"b,y\nc,x\n'),
        r"train\.csv, line 3: malformed CSV",
    ),
    (
        "two CSV columns of one name",
        csv("text,label,label\na,x,y\n"),
        r"train\.csv, line 1: two columns are called 'label'; name each once",
    ),
    (
        "a CSV file with semicolons",
        csv("text;label\na;x\n"),
        r"train\.csv, line 1: the header has one column, 'text;label'; .*commas",
    ),
    (
        "a CSV file without a header",
        csv("a,x\nb,y\n"),
        r"train\.csv, line 2: no 'text' \(there are: 'a', 'x'\); data\.columns says",
    ),
    (
        "a parquet file that is something else",
        given({"train.parquet": CSV_TRAIN, "test.jsonl": jsonl(TEST)}),
        r"train\.parquet cannot be read as parquet \(ArrowInvalid",
    ),
    ("two parquet columns of one name", twice_in_parquet, r"two columns are called 'label'"),
    (
        "a saved data set that is damaged",
        saved(0, 1, damage="state.json"),
        r"own/train cannot be read as a data set of save_to_disk \(JSONDecodeError",
    ),
    (
        "a file that gives an I/O error",
        linked("train", "/proc/self/mem"),
        r"train\.jsonl cannot be read \(Input/output error\)",
    ),
]

_ROWS: list[tuple[str, Build, str]] = [
    (
        "a row without a text",
        third({"sentence": "a", "label": "x"}),
        r"line 3: no 'text' \(there are: 'sentence', 'label'\); data\.columns",
    ),
    ("a row without a label", third({"text": "a"}), r"line 3: no 'label' .*data\.columns"),
    ("an empty text", third({"text": " ", "label": "x"}), r"line 3: 'text' must be a non-empty"),
    (
        "a text that is a number",
        third({"text": 5, "label": "x"}),
        r"must be a non-empty text, not 5",
    ),
    ("a text that is null", third({"text": None, "label": "x"}), r"non-empty text, not None"),
    (
        "a text that is a list",
        third({"text": ["a"] * 9999, "label": "x"}),
        r"line 3: 'text' must be a non-empty text, not \['a', 'a', 'a', 'a', 'a', 'a', \.\.\.\]",
    ),
    (
        "a second text that is a number",
        third({"text": "a", "text_pair": 1, "label": "x"}),
        r"line 3: 'text_pair' must be a text, not 1",
    ),
    (
        "a label that is null",
        third({"text": "a", "label": None}),
        r"'label' must be a text or whole",
    ),
    ("an empty label", csv(CSV_TRAIN + "a, \n"), r"train\.csv, line 10: 'label' must be a text"),
    ("a label that is a fraction", third({"text": "a", "label": 1.5}), r"whole number, not 1\.5"),
    ("a label that is a list", third({"text": "a", "label": ["x"]}), r"whole number, not \['x'\]"),
    (
        "true and false beside 0 and 1",
        rows([{"text": f"t{i}", "label": label} for i, label in enumerate([0, 1, True])]),
        r"line 3: the label is true, but '0' at .*line 1; write all labels alike",
    ),
    (
        "true and false in one split, 0 and 1 in the other",
        rows(
            [{"text": "a", "label": True}, {"text": "b", "label": False}],
            [{"text": "c", "label": 1}],
        ),
        r"train\.jsonl, line 1: the label is true, but '1' at .*test\.jsonl, line 1",
    ),
    (
        "parquet labels that are fractions",
        parquet(text=["a", "b"], label=[0.0, 1.0]),
        r"train\.parquet, row 0: 'label' must be a text or whole number, not 0\.0",
    ),
    (
        "a parquet file without the column of the label",
        parquet(text=["a", "b"], kind=["x", "y"]),
        r"train\.parquet: no 'label' \(there are: 'text', 'kind'\)",
    ),
    (
        "labels that a hub data set hides",
        saved(0, 1, -1),
        r"train, row 2: 'label' is -1, which stands for no class",
    ),
    ("a missing label in a saved data set", saved(0, None), r"row 1: 'label' must be .*not None"),
]

_SPLITS: list[tuple[str, Build, str]] = [
    (
        "a folder without the task's",
        without_files("task.name=own", "data.root=tests/unit/golden"),
        r"own/train\.jsonl .*does not exist \(tests/unit/golden holds .*\); check data\.root",
    ),
    (
        "training rows in a file of another name",
        given({"train.json": jsonl(TRAIN), "test.jsonl": jsonl(TEST)}),
        r"train\.jsonl .*does not exist \(.*own holds test\.jsonl, train\.json\)",
    ),
    ("data.root that is a file", root_is_a_file, r"own/train\.jsonl .*does not exist"),
    (
        "no test split",
        given({"train.jsonl": jsonl(TRAIN)}),
        r"No test rows: .*test\.jsonl .*does not exist .*hold out training rows with data\.test",
    ),
    (
        "a test split, and a share to hold out",
        rows(more=["data.test=0.2"]),
        r"data\.test=0\.2 holds out .*there is .*own/test\.jsonl; leave out data\.test",
    ),
    (
        "a share to hold out of the built-in data",
        without_files("data.test=0.2"),
        r"data\.test holds out training rows, but task 'questions' has test rows",
    ),
    (
        "a share to hold out of two rows",
        given({"train.jsonl": jsonl(TRAIN[:2])}, "data.test=0.5"),
        r"data\.test=0\.5 can hold out no row .*each of its 2 rows is the last of its label",
    ),
    ("an empty training split", rows(train=b""), r"The train split of task 'own' is empty"),
    ("an empty test split", rows(test=b"\n\n"), r"The test split of task 'own' is empty"),
    (
        "one split in two forms",
        given({"train.jsonl": jsonl(TRAIN), "train.csv": CSV_TRAIN, "test.jsonl": jsonl(TEST)}),
        r"train\.jsonl and .*train\.csv are both there; keep the one",
    ),
    (
        "train and test as one file",
        linked("test", "train.jsonl"),
        r"splits of task 'own' hold the same rows \(.*train\.jsonl, line 1; .*test\.jsonl, line 1",
    ),
    (
        "the training rows as test rows, in another order and form",
        given({"train.csv": CSV_TRAIN, "test.jsonl": jsonl(TRAIN[::-1])}),
        r"train and test splits of task 'own' hold the same rows",
    ),
    (
        "a test label that training rows do not have",
        rows(test=[{"text": "a", "label": "z"}]),
        r"test\.jsonl, line 1: test label 'z' never occurs in the training rows \(there: x, y\)",
    ),
    (
        "a label as long as a text",
        rows(test=[{"text": "a", "label": "why\n" * 5000}]),
        r"line 1: test label 'why\\nwhy.*' never occurs in the training rows",
    ),
    ("one label only", rows(TRAIN[::2], TEST[::2]), r"all training rows have the label 'x'"),
    (
        "second texts in the training rows only",
        rows([row | {"text_pair": "b"} for row in TRAIN]),
        r"train\.jsonl, line 1: this training row has a second text, 'text_pair', and no test row",
    ),
    (
        "a second text's column that is not there",
        rows(more=["data.columns.text_pair=question"]),
        r"data\.columns\.text_pair is 'question', but no training row has one",
    ),
    (
        "one column as text and label",
        rows(more=["data.columns.text=label"]),
        r"data\.columns\.text and data\.columns\.label are both 'label'; name a column for each",
    ),
    (
        "one split to train and to test",
        rows(more=["data.splits.test=train"]),
        r"data\.splits\.train and data\.splits\.test are both 'train'",
    ),
    (
        "a split that is elsewhere",
        rows(more=["data.splits.test=../own/test"]),
        r"data\.splits\.test is '\.\./own/test'; it must be a plain name",
    ),
    (
        "a task name that leads out of data.root",
        rows(more=["task.name=../.."]),
        r"task\.name is '\.\./\.\.'",
    ),
    (
        "a task name of three parts",
        rows(more=["task.name=a/b/c"]),
        r"task\.name is 'a/b/c'; it must be a plain name.*or a hub id, owner/name",
    ),
    (
        "a task name on two lines",
        rows(more=['task.name="a\\nb"']),
        r"task\.name is 'a\\nb'; it must be a plain name",
    ),
    (
        "an unknown task",
        without_files("task.name=other"),
        r"Unknown task 'other': .*set data\.root to a folder .*or name a hub id",
    ),
    (
        "task.max_train that leaves out a label",
        rows(more=["task.max_train=1"]),
        r"task\.max_train=1 draws no row of the label '.'; with this seed task\.max_train=\d is",
    ),
]

_CLIENTS: list[tuple[str, Build, str]] = [
    (
        "a row without its client",
        natural([*OWNED, TRAIN[0]]),
        r"train\.jsonl, line 9: no 'who' .*data\.partition\.column says which column names",
    ),
    (
        "a client that is null",
        natural([*OWNED, TRAIN[0] | {"who": None}]),
        r"line 9: 'who' must be a text or whole number, not None",
    ),
    ("a client without a name", natural([*OWNED, TRAIN[0] | {"who": " "}]), r"line 9: 'who' must"),
    (
        "a list as a client",
        natural([*OWNED, TRAIN[0] | {"who": ["c0", "c1"]}]),
        r"line 9: 'who' must be a text or whole number, not \['c0', 'c1'\]",
    ),
    (
        "true as a client",
        natural([*OWNED, TRAIN[0] | {"who": True}]),
        r"line 9: 'who' must be a text or whole number, not True",
    ),
    (
        "a test row of a client that has no training rows",
        natural(OWNED, [TEST[0] | {"who": "c7"}]),
        r"test\.jsonl, line 1: the client 'c7': no training row is its own",
    ),
    (
        "task.max_train that leaves out a client",
        natural(
            [*OWNED, *(row | {"who": f"d{i}"} for i, row in enumerate(TRAIN))],
            [row | {"who": f"d{i}"} for i, row in enumerate(TRAIN)],
            "task.max_train=8",
        ),
        r"test\.jsonl, line \d: the client 'd\d': task\.max_train draws none of its training rows",
    ),
    (
        "some test rows that name a client, after some that do not",
        natural(OWNED, [TEST[0], TEST[1] | {"who": "c1"}]),
        r"test\.jsonl, line 2: 'who' is here and not in the rows before; give it in all",
    ),
    (
        "some test rows that name no client, after some that do",
        natural(OWNED, [TEST[0] | {"who": "c0"}, TEST[1]]),
        r"test\.jsonl, line 2: no 'who'",
    ),
    (
        "another number of clients than the rows name",
        natural(OWNED, TEST, "federation.clients=3"),
        r"The column names 2 clients in the training rows; set federation\.clients=2, or null",
    ),
    (
        "more clients a round than the rows name",
        natural(OWNED, TEST, "federation.clients=null", "federation.per_round=3"),
        r"federation\.per_round is 3 but the training rows name 2 clients",
    ),
    (
        "clients to be counted where nothing names them",
        rows(more=["federation.clients=null"]),
        r"federation\.clients is null, but with data\.partition\.kind=dirichlet there is nothing",
    ),
    (
        "clients of their own, and no column that names them",
        rows(more=["data.partition.kind=natural"]),
        r"data\.partition\.kind=natural needs data\.partition\.column",
    ),
    (
        "clients of their own in the built-in data",
        without_files(*NATURAL, "federation.per_round=1"),
        r"data\.partition\.kind=natural needs .*and data that have one",
    ),
    (
        "more clients than training rows",
        rows(more=["federation.clients=9"]),
        r"federation\.clients is 9 but task 'own' has 8 training rows",
    ),
    (
        "more classes a client than there are",
        rows(more=["data.partition.kind=pathological", "data.partition.classes_per_client=3"]),
        r"data\.partition\.classes_per_client is 3 but task 'own' has 2 classes",
    ),
]

CASES = [*_FILES, *_ROWS, *_SPLITS, *_CLIENTS]
