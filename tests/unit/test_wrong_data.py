"""Wrong data are refused before anything starts: in one sentence, and nothing is written."""

import re
from pathlib import Path

import pytest

from hpcfed.errors import UserError
from hpcfed.rounds import preflight
from hpcfed.settings.resolve import resolve
from tests.unit import wrong_answers, wrong_data
from tests.unit.wrong_data import Build

CASES = [*wrong_data.CASES, *wrong_answers.CASES]


def contents(folder: Path) -> dict[Path, bytes | None]:
    """Everything in a folder."""
    return {
        path: path.read_bytes() if path.is_file() and not path.is_symlink() else None
        for path in folder.rglob("*")
    }


@pytest.mark.parametrize(
    ("build", "sentence"), [pytest.param(*case[1:], id=case[0]) for case in CASES]
)
def test_wrong_data(tmp_path: Path, build: Build, sentence: str) -> None:
    overrides = build(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(UserError) as caught:
        preflight.check(resolve("lora-fedavg", [*overrides, f"output={tmp_path}/run"]), 1)
    message = str(caught.value)
    assert re.search(sentence, message), message
    assert "\n" not in message and len(message) < 600 and message.endswith("."), message
    assert message.encode()
    assert contents(tmp_path) == before


def test_each_case_is_another() -> None:
    assert len({case[0] for case in CASES}) == len({case[2] for case in CASES}) == len(CASES) >= 40
