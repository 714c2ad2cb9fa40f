"""Models that a run refuses: one sentence, exit code 2, nothing written."""

import re

import pytest

from tests.mpi.test_errors import sentence
from tests.mpi.variants import overrides
from tests.unit.wrong_models import CASES, name


@pytest.mark.parametrize("shape", [(1, 1)])
@pytest.mark.parametrize("case", CASES, ids=name)
def test_it_is_refused_in_one_sentence(worlds, data, tmp_path, shape, case):
    _, make, wanted = case
    words = [*overrides(data, "sgd"), *make(tmp_path), f"output={tmp_path}/x"]
    ((code, _, printed),) = worlds.call(
        shape, "tests.mpi.cases.runs:command_line", words=["run", "lora-fedavg", *words]
    )
    assert code == 2, printed
    assert re.search(wanted, sentence(printed))
    assert not (tmp_path / "x").exists()
