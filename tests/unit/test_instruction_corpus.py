"""The built-in task `skills`: right answers, clients, and no test row trained on."""

import re

from hpcfed.data import skills


def test_answers_are_right_and_held_out():
    train, test = skills.generate()
    assert {len(train), len(test)} == {8 * 48, 8 * 10}
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in test}
    clients = [row["client"] for row in train]
    assert len(set(clients)) == 8 and {clients.count(client) for client in clients} == {48}
    factors = {"metres": 100, "hours": 60, "kilograms": 1000}
    for row in train + test:
        asked, told, skill = row["prompt"], row["completion"], row["skill"]
        numbers = [int(number) for number in re.findall(r"\d+", asked)]
        assert row["client"].startswith(f"{skill}-")
        if skill == "sort":
            assert told == ", ".join(map(str, sorted(numbers)))
        elif skill == "reverse":
            assert told.split() == asked.removesuffix(".").split(": ")[1].split()[::-1]
        elif skill == "extract":
            assert f"city={told}." in asked
        else:
            assert told.split()[0] == str(numbers[0] * factors[asked.split()[2]])
    assert skills.generate() == (train, test)
