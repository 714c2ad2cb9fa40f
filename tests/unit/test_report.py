"""Reports of run directories: what they read, and the page in a real browser."""

import csv
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import yaml

from hpcfed.app.cli import main
from hpcfed.app.curves import curves, find, read
from hpcfed.app.figures import draw
from hpcfed.errors import UserError
from hpcfed.settings.resolve import resolve

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)


def save(folder, preset, scores, *words, every=2):
    """A run directory of `scores`, one a validation; each round takes 10 samples, 1 MB and 2 s."""
    folder.mkdir(parents=True)
    config = resolve(preset, [f"output={folder}", *words]).config
    (folder / "config.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(config.to_dict()))))
    lines = []
    for number in range(1, every * len(scores) + 1):
        early = number <= every or preset == "lora-fedavg"
        line = {
            "round": number, "samples": 10, "train_loss": 1 / number,
            "bytes": {"up": 1e6, "down": 2e6}, "seconds": {"train": 1.5, "evaluate": 0.5},
            "clients": [0, 1],
            "failed": {"1": "odd <loss>"} if number == 2 else {},
            "shared_layers": ["0", "1", "2"] if early else ["0", "2"],
        }  # fmt: skip
        if preset == "fibecfed":
            line["share"] = min(1.0, 0.4 + 0.2 * number)
        if number == 3:
            line["redrawn"] = [
                {"samples": 5, "bytes": {"up": 5e5, "down": 1e6}, "seconds": {"train": 1.0}}
            ]
        if number % every == 0:
            score = scores[number // every - 1]
            line["validation"] = {"personal": {"score": score, "accuracy": score}}
        lines.append(json.dumps(line) + "\n")
    (folder / "metrics.jsonl").write_text("".join(lines))
    table = {"validation": [[3, 1], [2, 2]], "train": [[1, 1]] * 2, "labels": ["a", "b"]}
    (folder / "partition.json").write_text(json.dumps(table))
    told = {
        "labels": ["a", "b"], "row": [0, 1, 2, 3], "client": [0, 0, 1, 1],
        "label": [0, 1, 0, 1], "personal": [0, 1, 0, 0],
    }  # fmt: skip
    (folder / "predictions.json").write_text(json.dumps(told))
    if preset == "fibecfed":
        (folder / "clients" / "000000").mkdir(parents=True)
        history = [{"round": n, "difficulty": {"0": 2.0 / n, "1": None}} for n in (1, 3)]
        text = "".join(json.dumps(line) + "\n" for line in history)
        (folder / "clients" / "000000" / "history.jsonl").write_text(text)
    summary = {"accuracy": {}, "score": {"personal": 0.75}, "seed": config.seed}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


@pytest.fixture
def runs(tmp_path):
    folder = tmp_path / "runs"
    for preset, shift in (("fibecfed", 0.1), ("lora-fedavg", 0.0)):
        for seed in (1, 2):
            scores = [0.3 + shift, 0.5, 0.6 + 0.05 * seed]
            save(folder / f"{preset}-{seed}", preset, scores, f"seed={seed}")
    (folder / "jobs.json").write_text("{}")
    return folder


def test_what_a_run_directory_tells(tmp_path):
    run = read(save(tmp_path / "a", "fibecfed", [0.3, 0.5]))
    assert [(p.round, p.seconds, p.samples, p.up, p.score) for p in run.points] == [
        (2, 4.0, 20, 2.0, 0.3), (4, 9.0, 45, 4.5, 0.5),
    ]  # fmt: skip
    assert run.chance == 5 / 8 and run.of_clients() == {0: 1.0, 1: 0.5}
    with (tmp_path / "a" / "metrics.jsonl").open("a") as stream:
        stream.write('{"round": 5, "sam')  # killed while it was written
    assert read(tmp_path / "a") == run


def test_runs_that_differ_in_the_seed_are_one_curve(runs, tmp_path):
    found = [read(folder) for folder in find([runs])]
    assert {name: len(own) for name, own in curves(found).items()} == {
        "fibecfed (2 runs)": 2, "lora-fedavg (2 runs)": 2,
    }  # fmt: skip
    assert find([*runs.iterdir()][:5]) and len(find([*runs.iterdir()])) == 4
    other = read(save(tmp_path / "other", "fibecfed", [0.2], "layers.keep=0.9"))
    assert list(curves([found[0], other])) == ["layers.keep=0.5", "layers.keep=0.9"]


def test_equal_curves_can_both_be_seen(tmp_path):
    pytest.importorskip("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    both = [
        read(save(tmp_path / name, name, [0.3, 0.5, 0.6])) for name in ("fibecfed", "lora-fedavg")
    ]
    figure = draw(curves(both), "column")["score"]
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    assert figure.get_figwidth() == 3.4
    colors = np.asarray(canvas.buffer_rgba())[..., :3].reshape(-1, 3)
    for wanted in ((31, 119, 180), (255, 127, 14)):  # the first two of matplotlib
        assert (colors == wanted).all(1).sum() > 100


def test_figures_and_data(runs, tmp_path):
    pytest.importorskip("matplotlib")
    out = tmp_path / "figures"
    page = tmp_path / "page.html"
    words = ["--to", str(page), "--figures", str(out), "--format", "pdf", "--width", "column"]
    assert main(["report", str(runs), *words]) == 0
    names = {"score", "layers", "curriculum", "clients", "seconds"}
    tables = {"runs.csv", "rounds.csv", "clients.csv"}
    assert {p.name for p in out.iterdir()} == {f"{name}.pdf" for name in names} | tables
    with (out / "runs.csv").open(newline="") as stream:
        rows = {row["run"]: row for row in csv.DictReader(stream)}
    first = rows["fibecfed-1"]
    assert (first["worst"], first["failures"], first["MB up"]) == ("0.5", "1", "6.0")
    with (out / "rounds.csv").open(newline="") as stream:
        assert len(list(csv.DictReader(stream))) == 24


def test_the_page_in_a_browser(runs, tmp_path):
    """No script, nothing from elsewhere, no name twice; and a browser renders all of it."""
    pytest.importorskip("matplotlib")
    page = tmp_path / "page.html"
    assert main(["report", str(runs), "--to", str(page)]) == 0
    text = page.read_text()
    assert text.count("<svg") == 5 and "odd &lt;loss&gt;" in text and "<script" not in text
    assert not re.search(r'(src|href)="(?!#|data:)', text)
    names = set(re.findall(r'\bid="([^"]+)"', text))
    assert set(re.findall(r'(?:xlink:href="#|url\(#)([^")]+)', text)) <= names
    if BROWSER is None:
        pytest.skip("no chromium here: apt-get install chromium")
    done = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
         f"--user-data-dir={tmp_path}/profile", "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "CONSOLE" not in done.stderr and "ERR_" not in done.stderr, done.stderr[-2000:]
    assert done.stdout.count("<svg") == 5 and done.stdout.rstrip().endswith("</html>")


def test_written_answers_are_shown_beside_the_right_ones(tmp_path):
    """Of each client in turn; an exact match, as it is counted, is marked; texts are no markup."""
    pytest.importorskip("matplotlib")
    run = save(tmp_path / "a", "lora-fedavg", [-0.3])
    told = {
        "row": [0, 1, 2], "client": [0, 0, 1], "prompts": ["<b>?", "two", "three"],
        "right_answers": ["an end", "2", "3"], "personal_answers": ["End.", "x" * 400, "3"],
        "global_answers": ["end", "1", "3"],
        "before": {"row": [2, 0], "global_answers": ["tres", ""]},
    }  # fmt: skip
    (run / "predictions.json").write_text(json.dumps(told))
    scores = {"perplexity": 2.5, "exact_match": 0.75}
    summary = {
        "score": {"personal": -0.3}, "seed": 1, "rounded": "of a rounded model",
        "test": {"personal": scores, "global": {**scores, "exact_match": 0.5}},
        "before": {"perplexity": 31.5, "exact_match": 0.0},
    }  # fmt: skip
    (run / "summary.json").write_text(json.dumps(summary))
    page = tmp_path / "page.html"
    assert main(["report", str(run), "--to", str(page)]) == 0
    text = page.read_text()
    assert "Of a rounded model." in text and "&lt;b&gt;?" in text and "<b>" not in text
    assert "<td>before</td><td>31.5</td><td>0.0000</td>" in text
    rows = re.findall(r"<tr>(<td>[01]</td><td>.*?)</tr>", text)
    assert rows == [
        "<td>0</td><td>&lt;b&gt;?</td><td>an end</td><td><i>nothing</i></td>"
        '<td class="hit">End.</td><td class="hit">end</td>',
        '<td>1</td><td>three</td><td>3</td><td>tres</td><td class="hit">3</td>'
        '<td class="hit">3</td>',
        f"<td>0</td><td>two</td><td>2</td><td></td><td>{'x' * 300}…</td><td>1</td>",
    ]


def test_what_cannot_be_shown_is_said(tmp_path, capsys):
    with pytest.raises(UserError, match="no run directory"):
        find([tmp_path])
    with pytest.raises(UserError, match="does not exist"):
        find([tmp_path / "nowhere"])
    empty = save(tmp_path / "a", "fibecfed", [])
    assert main(["report", str(empty), "--to", str(tmp_path / "x.html")]) == 2
    assert "has a round yet" in capsys.readouterr().err
    run = save(tmp_path / "b", "fibecfed", [0.5])
    (run / "metrics.jsonl").write_text("nothing\n")
    assert main(["report", str(run), "--to", str(tmp_path / "x.html")]) == 2
    assert "can be read" in capsys.readouterr().err
