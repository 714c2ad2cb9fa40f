"""Exported folders: loaded by PEFT or transformers, in a process without hpcfed, they predict what
the run has predicted of every test row; and so does `hpcfed predict`."""

import csv
import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from hpcfed.app.cli import main
from hpcfed.data import corpus, skills
from tests.mpi.variants import COMMON
from tests.support import MODEL, ROOT

# What model cards show, one after the other, where hpcfed cannot be imported.
FRESH = """
import json, os, sys
sys.modules["hpcfed"] = None
for folder, program, call, rows in json.load(sys.stdin):
    os.chdir(folder)
    names = {"rows": rows}
    exec(program, names)
    print(json.dumps(eval(call, names)))
"""
LM_EVAL = os.environ.get("LM_EVAL") or shutil.which("lm_eval")
LM_TASK = """task: asked
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/asked/test.jsonl}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{completion}}}}"
generation_kwargs: {{until: ["[END]"], max_gen_toks: 6, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true, ignore_case: true}}]
"""
SPLIT = [
    "layers.score=random", "layers.keep=0.5", "federation.rounds=3", "federation.per_round=4",
    "data.validation=0.2", "evaluation.every=1", "local.lr=0.01", "local.epochs=2",
]  # fmt: skip
WORDS = "task.verbalizer={number: great, person: terrible, place: good, reason: bad, time: green}"
RUNS = {
    "lora": ["bert-classifier"],
    "roberta": ["roberta-classifier"],
    "prefix": ["roberta-classifier", "adapter.kind=prefix", "adapter.virtual_tokens=4"],
    "bottleneck": ["bert-classifier", "adapter.kind=bottleneck"],
    "hetlora": ["bert-classifier", "updates.transforms=[hetlora]"],
    "cloze": ["bert-cloze", "model.head=cloze", "task.template='{a} . It was <mask> .'", WORDS],
    "words": [
        "llama-label_words", "model.head=label_words", "task.template='{a} . It was <mask>'", WORDS,
        "adapter.targets=[q_proj,v_proj]",
    ],
}  # fmt: skip


@pytest.fixture
def federated(worlds, data, tmp_path):
    """federated(name, *more): the run directory of a run of RUNS."""

    (tmp_path / "few").mkdir()
    for split, rows in zip(("train", "test"), corpus.generate(), strict=True):
        lines = [json.dumps({"text": text, "label": label}) for text, label in rows[:60]]
        (tmp_path / "few" / f"{split}.jsonl").write_text("\n".join(lines) + "\n")

    def run(name, *more):
        model, *own = RUNS[name]
        words = {
            word.partition("=")[0]: word
            for word in [*COMMON, *SPLIT, "task.max_length=64", f"data.root={tmp_path}",
                         f"model.name={data}/{model}", *own, *more]
        }  # fmt: skip
        worlds.call(
            (2, 1), "tests.mpi.cases.runs:federate", folder=tmp_path,
            runs={name: list(words.values())},
        )  # fmt: skip
        return tmp_path / name

    return run


def texts(folder):
    lines = (folder / "few" / "test.jsonl").read_text().splitlines()
    return [json.loads(line)["text"] for line in lines]


def alone(*asked, call="predict(rows)"):
    """What the cards' own programs predict, in a process without hpcfed. asked: (folder, rows)."""
    told = []
    for folder, rows in asked:
        card = (folder / "README.md").read_text()
        (program,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
        told.append((str(folder), program, call, rows))
    done = subprocess.run(
        [sys.executable, "-c", FRESH], input=json.dumps(told), capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return list(map(json.loads, done.stdout.splitlines()[-len(asked) :]))


def predicted(folder, rows, to, *options):
    """The labels of `hpcfed predict`; probabilities are those of the label that it gives."""
    source = to.with_suffix(".txt")
    source.write_text("\n".join(rows) + "\n")
    assert main(["predict", str(folder), str(source), "--to", str(to), *options]) == 0
    with to.open(newline="") as stream:
        found = list(csv.DictReader(stream))
    assert [row["text"] for row in found] == rows
    for row in found:
        odds = {key[2:-1]: float(value) for key, value in row.items() if key.startswith("p(")}
        assert (
            max(odds, key=odds.__getitem__) == row["predicted"]
            and abs(sum(odds.values()) - 1) < 1e-4
        )
    return [row["predicted"] for row in found]


def told(run, which="global"):
    """The run's own predictions, row by row, as labels; and the client of each."""
    found = json.loads((run / "predictions.json").read_text())
    assert found["row"] == list(range(len(found["row"])))
    return [found["labels"][i] for i in found[which]], found["client"]


def tree(folder):
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("*") if path.is_file()
    }  # fmt: skip


@pytest.mark.parametrize("shape", [(2, 1)])
@pytest.mark.parametrize("name", ["lora", pytest.param("cloze", marks=pytest.mark.long)])
def test_a_process_without_hpcfed_predicts_the_same(federated, data, tmp_path, name, shape):
    run, rows = federated(name), texts(tmp_path)
    before = tree(run)
    wanted, clients = told(run)
    assert len(set(wanted)) > 1
    assert main(["export", str(run), "--to", str(tmp_path / "shared")]) == 0
    assert predicted(tmp_path / "shared", rows, tmp_path / "a.csv") == wanted
    assert main(["export", str(run), "--merge", "--to", str(tmp_path / "merged")]) == 0
    assert "adapter_config.json" not in {p.name for p in (tmp_path / "merged").iterdir()}
    personal, _ = told(run, "personal")
    k = max(set(clients), key=clients.count)
    own = [i for i, client in enumerate(clients) if client == k]
    client = ["--client", str(k)]
    assert main(["export", str(run), *client, "--to", str(tmp_path / "own")]) == 0
    told_alone = alone(
        (tmp_path / "shared", rows), (tmp_path / "merged", rows),
        (tmp_path / "own", [rows[i] for i in own]),
    )  # fmt: skip
    assert told_alone == [wanted, wanted, [personal[i] for i in own]]
    mine = predicted(run, [rows[i] for i in own], tmp_path / "b.csv", *client)
    assert mine == [personal[i] for i in own]
    assert tree(run) == before
    config = json.loads((tmp_path / "shared" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str((data / RUNS[name][0]).resolve())
    assert config["task_type"] == ("SEQ_CLS" if name == "lora" else None)
    card = (tmp_path / "shared" / "README.md").read_text()
    score = json.loads((run / "summary.json").read_text())["test"]["global"]["accuracy"]
    assert f"test accuracy: {score:.4f}" in card


@pytest.mark.parametrize("shape", [(2, 1)])
@pytest.mark.parametrize(
    "name",
    [
        "words", "bottleneck", "hetlora",
        *(pytest.param(name, marks=pytest.mark.long) for name in ("roberta", "prefix")),
    ],
)  # fmt: skip
def test_each_kind_predicts_the_same(federated, tmp_path, name, shape):
    run, rows = federated(name), texts(tmp_path)
    wanted, clients = told(run)
    assert predicted(run, rows, tmp_path / "a.csv") == wanted
    if name not in ("bottleneck", "hetlora"):
        assert main(["export", str(run), "--to", str(tmp_path / "shared")]) == 0
        assert alone((tmp_path / "shared", rows)) == [wanted]
    personal, _ = told(run, "personal")
    for k in set(clients) if name == "hetlora" else ():
        own = [i for i, client in enumerate(clients) if client == k]
        mine = predicted(run, [rows[i] for i in own], tmp_path / f"{k}.csv", "--client", str(k))
        assert mine == [personal[i] for i in own]


@pytest.mark.parametrize("shape", [(2, 1)])
def test_the_best_round_is_the_run_that_ends_there(federated, tmp_path, shape):
    """A run that ends at the best round has it as its last one."""
    run, rows = federated("lora"), texts(tmp_path)
    best = json.loads((run / "summary.json").read_text())["best"]["round"]
    ends = federated("lora", f"federation.rounds={best}")
    personal, clients = told(ends, "personal")
    assert predicted(run, rows, tmp_path / "a.csv", "--best") == told(ends)[0]
    for k in set(clients):
        own = [i for i, client in enumerate(clients) if client == k]
        options = ["--best", "--client", str(k)]
        mine = predicted(run, [rows[i] for i in own], tmp_path / f"{k}.csv", *options)
        assert mine == [personal[i] for i in own]


@pytest.fixture
def tuned(worlds, data, tmp_path):
    """(run directory, answers, test rows of prompts) of a run that answers them."""
    (tmp_path / "asked").mkdir()
    for split, rows in zip(("train", "test"), skills.generate(), strict=True):
        lines = [json.dumps(row) for row in rows[::8]]
        (tmp_path / "asked" / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    words = [
        *(word for word in COMMON if not word.startswith(("task.name", "task.max", "model.name"))),
        f"model.name={data}/llama-completion", "model.head=completion", "task.name=asked",
        f"data.root={tmp_path}", "task.max_length=110", "data.partition.kind=iid",
        "local.lr=0.02", "evaluation.max_new_tokens=6",
    ]  # fmt: skip
    worlds.call((2, 1), "tests.mpi.cases.runs:federate", folder=tmp_path, runs={"chat": words})
    told = json.loads((tmp_path / "chat" / "predictions.json").read_text())
    assert len(set(told["global_answers"])) > 2
    return tmp_path / "chat", told["global_answers"], skills.generate()[1][::8]


@pytest.mark.parametrize("shape", [(2, 1)])
def test_a_process_without_hpcfed_answers_the_same(tuned, tmp_path, shape, capsys):
    run, wanted, rows = tuned
    prompts, asked = [row["prompt"] for row in rows], []
    for extra in ([], ["--merge"]):
        out = tmp_path / f"out{len(extra)}"
        assert main(["export", str(run), *extra, "--to", str(out)]) == 0
        asked.append((out, prompts))
    assert alone(*asked, call="[answer(prompt, 6) for prompt in rows]") == [wanted] * 2
    (tmp_path / "texts.txt").write_text("who\n")
    assert main(["predict", str(run), str(tmp_path / "texts.txt")]) == 2
    assert "writes answers and knows no labels" in capsys.readouterr().err


@pytest.mark.long
@pytest.mark.parametrize("shape", [(2, 1)])
def test_lm_eval_writes_the_same_answers(tuned, tmp_path, shape):
    """A task in a local file, the exported adapter over its base, and lm_eval's own generation."""
    if LM_EVAL is None:
        pytest.skip("no lm_eval here: pip install lm-eval, or name the command in LM_EVAL")
    run, wanted, rows = tuned
    out = tmp_path / "out"
    assert main(["export", str(run), "--to", str(out)]) == 0
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "asked.yaml").write_text(LM_TASK.format(folder=tmp_path))
    base = json.loads((out / "task.json").read_text())["base"]
    done = subprocess.run(
        [*shlex.split(LM_EVAL), "--model", "hf", "--model_args",
         f"pretrained={base},peft={out},tokenizer={out},dtype=float32,add_bos_token=False",
         "--tasks", "asked",
         "--include_path", str(tmp_path / "task"), "--apply_chat_template", "--device", "cpu",
         "--batch_size", "4", "--log_samples", "--output_path", str(tmp_path / "told")],
        capture_output=True, text=True, check=False, cwd=tmp_path,
        env={**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (samples,) = (tmp_path / "told").rglob("samples_asked*.jsonl")
    told = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda own: own["doc_id"])
    assert [own["resps"][0][0].strip() for own in told] == wanted
    (results,) = (tmp_path / "told").rglob("results*.json")
    score = json.loads(results.read_text())["results"]["asked"]["exact_match,none"]
    right = [
        row["completion"].lower() == text.lower() for row, text in zip(rows, wanted, strict=True)
    ]
    assert score == pytest.approx(sum(right) / len(right))


@pytest.mark.long
@pytest.mark.parametrize("shape", [(2, 1)])
def test_minilm(federated, tmp_path, shape):
    """The base of a package is a folder that transformers takes, and AutoPeftModel finds it."""
    run, rows = federated("lora", f"model.name={MODEL}"), texts(tmp_path)
    assert main(["export", str(run), "--to", str(tmp_path / "out")]) == 0
    assert alone((tmp_path / "out", rows)) == [told(run)[0]]
    program = (
        "from peft import AutoPeftModelForSequenceClassification as auto; "
        f"auto.from_pretrained({str(tmp_path / 'out')!r}, num_labels=5)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


@pytest.mark.parametrize("shape", [(2, 1)])
def test_what_cannot_be_is_said(federated, tmp_path, capsys, shape):
    run = federated("prefix", "data.validation=0")
    source = tmp_path / "texts.csv"
    source.write_text("text\nwho\n")
    odd = tmp_path / "odd.csv"
    odd.write_text("words\nwho\n")
    (tmp_path / "empty.txt").write_text("\n")
    damaged = tmp_path / "damaged"
    subprocess.run(["cp", "-r", run, damaged], check=True)
    file = next(damaged.glob("checkpoint/round-00003.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"\1")
    for old in damaged.glob("checkpoint/round-00002.safetensors"):
        old.unlink()
    for words, wanted in {
        ("export", run, "--best"): "has no best round",
        ("export", run, "--merge"): "only lora and adalora can",
        ("export", run, "--client", "4"): "give one of 0 to 3",
        ("export", run, "--client", "-1"): "give one of 0 to 3",
        ("export", run, "--to", run): "exists already",
        ("export", tmp_path): "cannot be read as a run",
        ("export", damaged): "checksum",
        ("predict", tmp_path, source): "hpcfed export",
        ("predict", run, odd): "'text' must be a text",
        ("predict", run, tmp_path / "empty.txt"): "holds no text",
        ("predict", run, tmp_path / "none.csv"): "cannot be read",
        ("predict", run, tmp_path / "x.docx"): "give texts as",
        ("predict", run, source, "--to", tmp_path / "x.txt"): "give a .csv",
        ("predict", run, source, "--batch", "0"): "at least 1",
    }.items():
        options = [] if words[0] == "predict" or "--to" in words else ["--to", tmp_path / "new"]
        assert main([*map(str, (*words, *options))]) == 2, words
        error = capsys.readouterr().err
        assert wanted in error and error.count("\n") == 1, (words, error)
        assert not (tmp_path / "new").exists()
