"""Fuzzing of the JSONL and CSV readers: rows, or a UserError in one line; never anything else."""

import contextlib
import csv
import io
import json
import string
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcfed.data import files, rows
from hpcfed.data.rows import Row
from hpcfed.errors import UserError
from hpcfed.settings.config import Columns

fuzz = settings(max_examples=100, deadline=None, derandomize=True, database=None)

# What the readers stumble over, if over anything.
PIECES = (
    '{"text": "a", "label": "x"}', '{"text": "a", "label": ', "{", "}", "[", "]", '"', '""', ",",
    ":", "\n", "\r", "\r\n", "\ufeff", "\\ud800", "\\u0000", "\0", "text", "label", "text,label\n",
    "text_pair", "who", "a,x\n", '"a\n', "true", "null", "NaN", "-Infinity", "1e999", "9" * 4400,
    "[" * 3000, '{"a":' * 3000, " ", "\u2028", "é",
)  # fmt: skip
TEXTS = st.text(alphabet=st.characters(exclude_categories=["Cs"]), min_size=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder for all examples."""
    return tmp_path_factory.mktemp("fuzz")


def read(path: Path, content: bytes) -> list[Row]:
    """Rows of a file, none if it is refused."""
    path.write_bytes(content)
    try:
        return rows.read(files.records(path), Columns(), "who", owned=False)
    except UserError as error:
        message = str(error)
        assert str(path) in message and message.endswith(".")
        assert len(message.splitlines()) == 1 and len(message) < 2000
        assert message.encode()
        return []


@pytest.mark.parametrize("form", ["t.jsonl", "t.csv"])
def test_any_bytes(folder, form):
    @fuzz
    @given(st.binary())
    def check(content):
        read(folder / form, content)

    check()


@pytest.mark.parametrize("form", ["t.jsonl", "t.csv"])
def test_any_pieces(folder, form):
    @fuzz
    @given(st.lists(st.sampled_from(PIECES), max_size=12), st.sampled_from(["utf-8", "utf-16"]))
    def check(pieces, encoding):
        header = "text,label,who\n" if form == "t.csv" else ""
        for start in ("", header):
            for row in read(folder / form, (start + "".join(pieces)).encode(encoding)):
                assert row.text.strip() and row.label != "" and row.owner != ""
                assert row.text.encode() is not None

    check()


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


def test_any_json_values(folder):
    names = st.sampled_from(["text", "label", "text_pair", "who"]) | st.text(max_size=3)

    @fuzz
    @given(st.lists(st.dictionaries(names, VALUES, max_size=5), max_size=4), st.booleans())
    def check(records, ascii_only):
        lines = "".join(json.dumps(record, ensure_ascii=ascii_only) + "\n" for record in records)
        found = read(folder / "t.jsonl", lines.encode("utf-8", "surrogatepass"))
        for row, record in zip(found, records, strict=False):
            assert row.text == record["text"]
            assert row.label in (record["label"], str(record["label"]).strip())

    check()


def written_csv(lines: list[list[str]]) -> bytes:
    """As the csv module writes them."""
    stream = io.StringIO(newline="")
    csv.writer(stream).writerows(lines)
    return stream.getvalue().encode()


def test_what_is_written_is_read(folder):
    word = st.text(string.ascii_letters + string.digits + "-,'\"\u00e9\u4e2d", min_size=1)
    row = st.tuples(TEXTS.filter(str.strip), TEXTS, word, word)

    @fuzz
    @given(st.lists(row, min_size=1, max_size=5))
    def check(wanted):
        header = ["text", "text_pair", "label", "who"]
        named = [dict(zip(header, fields, strict=True)) for fields in wanted]
        lines = "".join(json.dumps(record) + "\n" for record in named)
        for form, content in (
            ("t.jsonl", lines.encode()),
            ("t.csv", written_csv([header, *map(list, wanted)])),
        ):
            found = read(folder / form, content)
            got = [(row.text, row.text_pair, row.label, row.owner) for row in found]
            assert got == wanted, form

    check()


def test_columns_of_any_names(folder):
    @fuzz
    @given(st.lists(TEXTS, min_size=2, max_size=4), TEXTS)
    def check(header, field):
        content = written_csv([header, [field] * len(header)])
        with contextlib.suppress(UserError):
            (folder / "t.csv").write_bytes(content)
            columns = Columns(header[0].strip(), "none", header[1].strip())
            (row,) = rows.read(files.records(folder / "t.csv"), columns)
            assert row.text == field and row.label == field.strip()

    check()
