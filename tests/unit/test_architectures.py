"""transformers' text classifiers: adapters go on them, and PEFT reloads what was saved."""

import pytest

from tests import architectures

# What attention of other kinds, or of two stacks, does not take.
NO_PREFIX = {"bart", "deberta-v2", "funnel", "mpnet", "t5", "xlnet"}


def check(rows):
    for name, row in rows.items():
        wanted = "no linear layers" if name == "squeezebert" else "yes"
        assert wanted in row["lora"], (name, row)
        assert "reloaded otherwise" not in row["prefix"], (name, row)


def test_lora_on_each_kind_and_prefixes_where_they_go(tmp_path):
    rows = architectures.measure(architectures.QUICK, tmp_path)
    check(rows)
    assert {name for name, row in rows.items() if row["prefix"] != "yes"} >= NO_PREFIX
    assert rows["roberta"]["prefix"] == "yes"  # PEFT takes its classifier, two layers, as a whole
    depths = {"albert": "1", "bart": "5", "t5": "5", "funnel": "2"}
    assert {name: rows[name]["blocks"] for name in depths} == depths


@pytest.mark.long
def test_all_of_the_table(tmp_path):
    assert len(architectures.ARCHITECTURES) >= 25
    check(architectures.measure(tuple(architectures.ARCHITECTURES), tmp_path))
