"""Curves of run directories."""

import json

import numpy as np
import pytest
import yaml

from hpcfed.app.cli import main
from hpcfed.app.plot import curves, draw, read
from hpcfed.errors import UserError
from hpcfed.settings.resolve import resolve


def save(folder, preset, scores, *words, every=2):
    """A run directory of `scores`, one a validation; each round takes 10 samples and 1 MB."""
    folder.mkdir()
    config = resolve(preset, [f"output={folder}", *words]).config
    (folder / "config.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(config.to_dict()))))
    lines = []
    for number in range(1, every * len(scores) + 1):
        line = {"round": number, "samples": 10, "bytes": {"up": 1e6}}
        if number % every == 0:
            line["validation"] = {"personal": {"score": scores[number // every - 1]}}
        lines.append(json.dumps(line) + "\n")
    (folder / "metrics.jsonl").write_text("".join(lines))
    return folder


def test_what_a_run_directory_tells(tmp_path):
    run = read(save(tmp_path / "a", "fibecfed", [0.3, 0.5]))
    assert [(p.round, p.samples, p.up, p.score) for p in run.points] == [
        (2, 20, 2.0, 0.3), (4, 40, 4.0, 0.5),
    ]  # fmt: skip
    with (tmp_path / "a" / "metrics.jsonl").open("a") as stream:
        stream.write('{"round": 5, "sam')  # killed while it was written
    assert read(tmp_path / "a") == run


def test_runs_that_differ_in_the_seed_are_one_curve(tmp_path):
    runs = [
        read(save(tmp_path / f"{preset}{seed}", preset, [0.1 * seed], f"seed={seed}"))
        for preset in ("fibecfed", "lora-fedavg") for seed in (1, 2)
    ]  # fmt: skip
    assert {name: len(own) for name, own in curves(runs).items()} == {
        "fibecfed (2 runs)": 2, "lora-fedavg (2 runs)": 2,
    }  # fmt: skip
    other = read(save(tmp_path / "other", "fibecfed", [0.2], "layers.keep=0.9"))
    assert list(curves([runs[0], other])) == ["layers.keep=0.5", "layers.keep=0.9"]
    assert list(curves(runs[:1])) == ["fibecfed"]


def test_the_picture_has_the_curves(tmp_path):
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    a = save(tmp_path / "a", "fibecfed", [0.3, 0.5, 0.6], "seed=1")
    b = save(tmp_path / "b", "fibecfed", [0.4, 0.4, 0.8], "seed=2")
    c = save(tmp_path / "c", "lora-fedavg", [0.2, 0.3, 0.4])
    assert main(["plot", str(a), str(b), str(c), "-o", str(tmp_path / "x.png")]) == 0
    colors = np.unique((imread(tmp_path / "x.png")[..., :3] * 255).round().reshape(-1, 3), axis=0)
    for wanted in ((31, 119, 180), (255, 127, 14)):  # the first two of matplotlib
        assert (colors == wanted).all(1).any()


def test_what_cannot_be_drawn_is_said(tmp_path, capsys):
    with pytest.raises(UserError, match="no run directory"):
        draw([tmp_path], tmp_path / "x.png")
    run = save(tmp_path / "a", "fibecfed", [])
    with pytest.raises(UserError, match="no validation yet"):
        draw([run], tmp_path / "x.png")
    run = save(tmp_path / "b", "fibecfed", [0.5])
    with pytest.raises(UserError, match="cannot be written"):
        draw([run], tmp_path / "nowhere" / "x.png")
    assert main(["plot", str(run), "-o", str(tmp_path / "x.docx")]) == 2
    assert "x.docx" in capsys.readouterr().err
