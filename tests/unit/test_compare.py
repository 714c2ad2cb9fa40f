"""Comparisons: descriptions that cannot be, equal budgets, the bootstrap against a plain loop."""

import numpy as np
import pytest
from sklearn.metrics import f1_score, matthews_corrcoef

from hpcfed.app import bootstrap, compare_file
from hpcfed.app.cells import Rows, identity, settings_of
from hpcfed.errors import UserError
from hpcfed.settings.resolve import resolve

GOOD = {"folder": "runs/c", "methods": ["lora-fedavg", "fibecfed"], "seeds": [1, 2]}
TUNE = {"tune": {"local.lr": [0.1, 0.2]}}

# What is wrong, what differs from GOOD (None: left out), and what is said.
CASES = [
    ("an unknown key", {"method": ["a"]}, r"unknown key 'method';.*methods"),
    ("no folder", {"folder": None}, r"folder is missing"),
    ("no methods", {"methods": []}, r"methods is missing"),
    ("methods as a text", {"methods": "fibecfed"}, r"methods must be a list"),
    ("a method twice", {"methods": ["demo", "demo"]}, r"methods has 'demo' twice"),
    ("a method without its preset", {"methods": [{"name": "x"}]}, r"method 1 must be a preset"),
    ("seeds that are no numbers", {"seeds": ["one"]}, r"seeds must be whole numbers"),
    ("a seed twice", {"seeds": [1, 1]}, r"seeds has '1' twice"),
    ("a foreign reference", {"reference": "fedavgm"}, r"reference is 'fedavgm', which is none"),
    ("another executor", {"executor": "pbs"}, r"executor is 'pbs'; choose one of: "),
    ("a target of no kind", {"target": "soon"}, r"target is 'soon'; it must be"),
    ("a target above all", {"target": "140%"}, r"target is '140%'"),
    ("the score on test", {"score": "best-on-test"}, r"score is 'best-on-test'; choose one of"),
    ("an output of its own", {"overrides": {"output": "x"}}, r"output is not to be set here"),
    ("a look at the test split", {"overrides": {"evaluation.test": True}}, r"evaluation\.test is"),
    ("a task without a name", {"tasks": [{"task.max_length": 9}]}, r"tasks: each must be a name"),
    ("a rate that is no list", {"tune": {"local.lr": 0.1}}, r"tune\.local\.lr must be a list"),
    ("tuning on no task", {**TUNE, "tune": {**TUNE["tune"], "tasks": ["x"]}}, r"tune\.tasks must"),
    (
        "one method with more tries",
        {**TUNE, "methods": ["demo", {"method": "fibecfed", "tune": {"local.lr": [1, 2, 3]}}]},
        r"as many tries; they have: demo 2, fibecfed 3",
    ),
    (
        "tries of one method alone",
        {"methods": ["demo", {"method": "fibecfed", "tune": {"local.lr": [1]}}]},
        r"method fibecfed has `tune`, but the comparison has none",
    ),
    (
        "the choice of a method that has none",
        {**TUNE, "methods": ["demo", {"method": "fibecfed", "tune": "mine"}]},
        r"tune is 'mine', which is no method",
    ),
    (
        "a rate that is set and tuned",
        {**TUNE, "methods": [{"method": "demo", "local.lr": 0.3}]},
        r"local\.lr is set and tuned too",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "said"), [case[1:] for case in CASES],
                         ids=[case[0] for case in CASES])  # fmt: skip
def test_a_description_that_cannot_be(changes, said):
    tree = {key: value for key, value in {**GOOD, **changes}.items() if value is not None}
    with pytest.raises(UserError, match=said):
        compare_file.parse(tree)


def test_a_description():
    spec = compare_file.parse({**GOOD, **TUNE, "tasks": ["mr", "trec"], "target": "95%"})
    assert [method.name for method in spec.methods] == GOOD["methods"]
    assert [setting.task for setting in spec.settings] == ["mr", "trec"]
    assert spec.target == 0.95 and spec.relative and spec.reference == "lora-fedavg"
    assert spec.values(spec.methods[1]) == {"local.lr": [0.1, 0.2]}


def test_a_cell_is_that_of_its_configuration():
    """What changes no bit does not count; whatever does, does."""

    def digest(*words):
        return identity(settings_of(resolve("lora-fedavg", list(words)).config))

    same = digest("local.lr=0.01")
    assert digest("local.lr=0.01", "output=runs/other") == same
    assert digest("local.lr=0.01", "data.root=/elsewhere") == same
    assert len({same, digest("local.lr=0.02"), digest("local.lr=0.01", "seed=9")}) == 3
    assert len({same, digest("local.lr=0.01", "evaluation.test=false")}) == 2


def answers(rng, metric, size=37):
    truth, told = rng.integers(0, 2, (2, size)).astype(bool)
    return Rows(metric, "same", told == truth, told, truth)


@pytest.mark.parametrize("metric", ["accuracy", "accuracy_f1", "matthews"])
def test_the_score_is_the_librarys(metric):
    own = answers(np.random.default_rng(5), metric)
    accuracy = float((own.hit == own.truth).mean())
    wanted = {
        "accuracy": accuracy,
        "accuracy_f1": (accuracy + f1_score(own.truth, own.hit)) / 2,
        "matthews": matthews_corrcoef(own.truth, own.hit),
    }
    assert bootstrap.score(own) == pytest.approx(wanted[metric], abs=1e-12)


def test_the_bootstrap_is_paired(monkeypatch):
    """The same rows for both methods and all seeds that have them, as a loop would draw them."""
    monkeypatch.setattr(bootstrap, "DRAWS", 40)
    rng = np.random.default_rng(3)
    runs = [[answers(rng, "accuracy") for _ in range(2)] for _ in range(2)]
    drawn = bootstrap.scores(runs)
    size = len(runs[0][0].right)
    rows = np.random.default_rng([bootstrap.SEED, 0]).integers(0, size, (40, size))
    for draw, chosen in enumerate(rows):
        for method, own in enumerate(runs):
            wanted = np.mean([seed.right[chosen].mean() for seed in own])
            assert drawn[draw, method] == pytest.approx(wanted, abs=1e-6)
    same = bootstrap.scores([runs[0], runs[0]])
    assert np.array_equal(same[:, 0], same[:, 1])


def test_the_interval_of_a_difference():
    """Of a method that is right on 80 % of 400 rows and one at 60 %, as the normal law has it."""
    rng = np.random.default_rng(1)
    better, worse = rng.random(400) < 0.8, rng.random(400) < 0.6
    runs = [[Rows("accuracy", "same", own, None, None)] for own in (better, worse)]
    drawn = bootstrap.scores(runs)
    low, high = bootstrap.interval(drawn[:, 0] - drawn[:, 1])
    paired = better.astype(float) - worse
    error = 1.96 * paired.std() / np.sqrt(len(paired))
    assert low == pytest.approx(paired.mean() - error, abs=0.01)
    assert high == pytest.approx(paired.mean() + error, abs=0.01)
