"""`hpcfed report`: one page that works offline, figures for a paper, and the data as CSV."""

import base64
import csv
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hpcfed.app import curves as told
from hpcfed.app import figures, written
from hpcfed.app.curves import Run
from hpcfed.data.metrics import over_clients
from hpcfed.errors import UserError
from hpcfed.storage.files import write_bytes, writing

FORMATS = ("png", "pdf", "svg")
Table = list[list[Any]]

_TITLES = {
    "score": "Score, and what it cost",
    "layers": "Layers",
    "curriculum": "Curriculum",
    "clients": "Clients",
    "seconds": "Time",
}
_STYLE = """body{font:15px/1.5 sans-serif;max-width:62em;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;font-size:13px;display:block;overflow-x:auto}
td,th{padding:.2em .7em;border-bottom:1px solid #ddd;text-align:right;white-space:nowrap}
td:first-child,th:first-child,.texts td,.texts th{text-align:left}
svg{max-width:100%;height:auto}
.texts td{white-space:pre-wrap;vertical-align:top;max-width:22em}.hit{background:#dff3df}
pre{font-size:12px;overflow-x:auto;background:#f6f6f6;padding:1em}"""


def report(
    folders: Sequence[Path],
    to: Path,
    pictures: Path | None = None,
    form: str = "png",
    width: str = "page",
) -> int:
    """Write the page and, if asked, the figures and tables of CSV into the folder `pictures`. How
    many runs it shows.

    Raises UserError for what is no run, or cannot be written.
    """
    runs = [told.read(folder) for folder in told.find(folders)]
    runs = [run for run in runs if run.records]
    if not runs:
        raise UserError("No run among these has a round yet; wait for the first.")
    curves = told.curves(runs)
    tables = {
        "runs": _of_runs(curves),
        "rounds": _of_rounds(curves),
        "clients": _of_clients(curves),
    }
    drawn = figures.draw(curves, width)
    write_bytes(to, _page(curves, tables, drawn).encode())
    if pictures is not None:
        with writing(pictures):
            pictures.mkdir(parents=True, exist_ok=True)
            for name, figure in drawn.items():
                figure.savefig(pictures / f"{name}.{form}", dpi=200)
        for name, table in tables.items():
            write_bytes(pictures / f"{name}.csv", _as_csv(table).encode())
    return len(runs)


def _of_runs(curves: figures.Curves) -> Table:
    """A line a run."""
    table: Table = [
        ["run", "curve", "seed", "rounds", "best validation", "at round", "test", "majority",
         "clients: std", "worst tenth", "worst", "MB up", "samples", "seconds", "failures",
         "epsilon", "ended early"]
    ]  # fmt: skip
    for legend, runs in curves.items():
        for run in runs:
            best = max(run.points, key=lambda p: p.score, default=None)
            spread = _spread(run)
            table.append(
                [
                    run.path.name, legend, run.summary.get("seed"), len(run.records),
                    best and best.score, best and best.round,
                    run.summary.get("score", {}).get("personal"), run.summary.get("majority"),
                    *(spread.get(key) for key in ("std", "worst_tenth", "min")),
                    sum(r["bytes"]["up"] for r in run.records) / 1e6,
                    sum(r["samples"] for r in run.records),
                    sum(sum(r["seconds"].values()) for r in run.records),
                    sum(len(r["failed"]) for r in run.records),
                    run.records[-1].get("privacy", {}).get("epsilon"),
                    run.summary.get("privacy", {}).get("ended_early"),
                ]
            )  # fmt: skip
    return table


def _spread(run: Run) -> dict[str, Any]:
    """Of the clients' own accuracies, as summary.json has it."""
    import numpy as np

    if not run.of_clients():
        return {}
    found = run.predictions
    right = np.array(found["personal"]) == np.array(found["label"])
    return dict(over_clients(right, np.array(found["client"])))


def _of_rounds(curves: figures.Curves) -> Table:
    """A line a round of each run."""
    table: Table = [
        ["run", "curve", "round", "loss", "validation", "seconds", "samples", "MB up", "share",
         "failed", "shared layers", "epsilon"]
    ]  # fmt: skip
    for legend, runs in curves.items():
        for run in runs:
            seconds, samples, up = 0.0, 0, 0.0
            for r in run.records:
                seconds += sum(r["seconds"].values())
                samples, up = samples + r["samples"], up + r["bytes"]["up"] / 1e6
                score = r["validation"]["personal"]["score"] if "validation" in r else None
                table.append(
                    [run.path.name, legend, r["round"], r["train_loss"], score, seconds, samples,
                     up, r.get("share"), len(r["failed"]), " ".join(r["shared_layers"]),
                     r.get("privacy", {}).get("epsilon")]
                )  # fmt: skip
    return table


def _of_clients(curves: figures.Curves) -> Table:
    """A line a client of each run that is complete."""
    table: Table = [["run", "curve", "client", "name", "test rows", "test accuracy"]]
    for legend, runs in curves.items():
        for run in runs:
            names = run.partition.get("clients", [])
            for k, value in run.of_clients().items():
                rows = run.predictions["client"].count(k)
                name = names[k] if k < len(names) else None
                table.append([run.path.name, legend, k, name, rows, value])
    return table


def _as_csv(table: Table) -> str:
    stream = io.StringIO()
    csv.writer(stream).writerows(table)
    return stream.getvalue()


def _page(curves: figures.Curves, tables: dict[str, Table], drawn: dict[str, Any]) -> str:
    runs = [run for own in curves.values() for run in own]
    tasks = ", ".join(sorted({run.settings.get("task.name", "") for run in runs}))
    parts = [f"<h1>{html.escape(tasks)}: {len(runs)} run{'s'[: len(runs) > 1]}</h1>"]
    parts.append(_as_html(tables["runs"]))
    for rounded in dict.fromkeys(run.summary.get("rounded") for run in runs):
        if rounded:
            parts.append(f"<p>{html.escape(rounded[:1].upper() + rounded[1:])}.</p>")
    parts += written.section([own[0] for own in curves.values()], _as_html)
    for name, figure in drawn.items():
        parts.append(f"<h2>{_TITLES[name]}</h2>\n{_svg(name, figure)}")
        if name == "score":
            parts.append(
                "<p>Of runs that differ in the seed: the mean, and one standard deviation.</p>"
            )
    parts.append(f"<h2>Failures</h2>\n{_failures(runs)}")
    links = " ".join(
        f'<a download="{name}.csv" href="data:text/csv;base64,'
        f'{base64.b64encode(_as_csv(table).encode()).decode()}">{name}.csv</a>'
        for name, table in tables.items()
    )
    parts.append(f"<h2>Data</h2>\n<p>{links}</p>\n<h2>Configuration</h2>")
    for legend, own in curves.items():
        text = html.escape(own[0].configuration)
        parts.append(
            f"<details><summary>{html.escape(legend)}</summary><pre>{text}</pre></details>"
        )
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<title>{html.escape(tasks)}</title>\n<link rel="icon" href="data:,">\n'
        f"<style>{_STYLE}</style></head>\n<body>\n"
        f"{body}\n</body></html>\n"
    )


def _svg(name: str, figure: Any) -> str:
    """An SVG that may stand in a page beside others: what it names has names of its own."""
    import matplotlib

    stream = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.id": name}):
        figure.savefig(stream, format="svg", metadata={"Date": None})
    text = stream.getvalue()
    return text[text.index("<svg") :]


def _failures(runs: Sequence[Run]) -> str:
    table: Table = [["run", "round", "client", "why"]]
    for run in runs:
        for r in run.records:
            table += [[run.path.name, r["round"], k, why] for k, why in r["failed"].items()]
    if len(table) == 1:
        return "<p>None: every client's update came through.</p>"
    return _as_html(table)


def _as_html(table: Table) -> str:
    def cell(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:.4f}" if abs(value) < 10 else f"{value:,.1f}"
        return "" if value is None else html.escape(str(value))

    head, *rows = [[cell(value) for value in row] for row in table]
    lines = ["<tr>" + "".join(f"<th>{own}</th>" for own in head) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{own}</td>" for own in row) + "</tr>" for row in rows]
    return "<table>" + "\n".join(lines) + "</table>"
