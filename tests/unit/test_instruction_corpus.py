"""The corpus of examples/instructions.py: right answers, clients, and no test row trained on."""

import json
import re
import runpy

from tests.support import ROOT

write = runpy.run_path(str(ROOT / "examples" / "instructions.py"))["main"]


def test_answers_are_right_and_held_out(tmp_path):
    write(tmp_path / "skills")
    rows = {
        split: [json.loads(line) for line in (tmp_path / "skills" / f"{split}.jsonl").open()]
        for split in ("train", "test")
    }
    assert {len(rows["train"]), len(rows["test"])} == {8 * 48, 8 * 10}
    assert not {row["prompt"] for row in rows["train"]} & {row["prompt"] for row in rows["test"]}
    clients = [row["client"] for row in rows["train"]]
    assert len(set(clients)) == 8 and {clients.count(client) for client in clients} == {48}
    factors = {"metres": 100, "hours": 60, "kilograms": 1000}
    for row in rows["train"] + rows["test"]:
        asked, told, skill = row["prompt"], row["completion"], row["client"].partition("-")[0]
        numbers = [int(number) for number in re.findall(r"\d+", asked)]
        if skill == "sort":
            assert told == ", ".join(map(str, sorted(numbers)))
        elif skill == "reverse":
            assert told.split() == asked.removesuffix(".").split(": ")[1].split()[::-1]
        elif skill == "extract":
            assert f"city={told}." in asked
        else:
            assert told.split()[0] == str(numbers[0] * factors[asked.split()[2]])
    before = (tmp_path / "skills" / "train.jsonl").read_bytes()
    write(tmp_path / "again")
    assert (tmp_path / "again" / "train.jsonl").read_bytes() == before
