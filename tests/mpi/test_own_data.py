"""Own data as docs/own-data.md shows them: natural clients that are counted, a test file that does
not name them; run, resumed, and resumed with other data."""

import json
import re

import numpy as np
import pytest

from tests.mpi.test_plugins import command
from tests.support import ROOT

PAGE = ROOT / "docs" / "own-data.md"


def block(kind):
    """The page's block of a kind."""
    (found,) = re.findall(rf"^```{kind}\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    return found


@pytest.mark.parametrize("shape", [(2, 1)])
def test_what_the_page_shows(worlds, data, tmp_path, shape):
    folder = tmp_path / "data" / "tickets"
    folder.mkdir(parents=True)
    (tmp_path / "mine.yaml").write_text(block("yaml"))
    (folder / "train.csv").write_text(block("csv"))
    (folder / "test.csv").write_text("message,team\nMy mouse,hardware\nMy name,accounts\n")
    out = tmp_path / "run"
    line = [
        "run", tmp_path / "mine.yaml", f"data.root={tmp_path}/data", f"output={out}", "--resume",
        f"model.name={data}/bert-classifier", "federation.rounds=2",
        "deepspeed=ds_configs/zero0.json",
    ]  # fmt: skip
    assert "3 clients, 3 a round" in command(worlds, shape, line)
    table = json.loads((out / "partition.json").read_text())
    assert table["clients"] == ["Lyon", "Oslo", "Pisa"] and table["labels"] == [
        "accounts",
        "hardware",
    ]
    assert table["train"] == [[1, 1]] * 3
    assert np.sum(table["test"], axis=0).tolist() == [1, 1]
    assert json.loads((out / "summary.json").read_text())["rounds"] == 2
    assert "clients: null" in (out / "config.yaml").read_text()
    assert "is complete" in command(worlds, shape, line)
    (out / "summary.json").unlink()
    (folder / "train.csv").write_text(block("csv").replace("Pisa", "Rome"))
    assert "The data are not those" in command(worlds, shape, line, code=2)
