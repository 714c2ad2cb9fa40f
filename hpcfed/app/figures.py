"""The figures of `hpcfed report`, by matplotlib."""

import json
from collections.abc import Mapping, Sequence
from statistics import mean, pstdev
from typing import Any

from hpcfed.app.curves import AXES, Run, by_round
from hpcfed.errors import UserError
from hpcfed.state import PHASES
from hpcfed.storage.paths import CLIENTS, HISTORY

WIDTHS = {"column": 3.4, "page": 7.0}  # inches, of a paper in two columns
_LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
_MARKS = "osD^vP*X<>"
_HATCHES = ("", "///", "...", "xxx", "\\\\\\")

Curves = Mapping[str, Sequence[Run]]


def draw(curves: Curves, width: str) -> dict[str, Any]:
    """Name -> matplotlib figure, of what there is to show. Raises UserError without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("Figures need matplotlib: `pip install 'hpcfed[plot]'`.") from None
    with matplotlib.rc_context({"font.size": 8, "axes.grid": True, "grid.alpha": 0.3}):
        found = {
            "score": _score(curves, WIDTHS[width]),
            "layers": _layers(curves, WIDTHS[width]),
            "curriculum": _curriculum(curves, WIDTHS[width]),
            "clients": _clients(curves, WIDTHS[width]),
            "seconds": _seconds(curves, WIDTHS[width]),
        }
    return {name: figure for name, figure in found.items() if figure is not None}


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _style(number: int, curves: int) -> dict[str, Any]:
    """Colour, line and mark of a curve; the first are thicker, so that equal ones can be seen below
    those that come later."""
    return {
        "color": f"C{number % 10}",
        "linestyle": _LINES[number % len(_LINES)],
        "marker": _MARKS[number % len(_MARKS)],
        "linewidth": 1.1 + 0.9 * min(3, curves - 1 - number),
        "markersize": 3.5 + 1.2 * min(3, curves - 1 - number),
        "markerfacecolor": "none",
    }


def _legend(figure: Any, panel: Any, width: float) -> None:
    handles, labels = panel.get_legend_handles_labels()
    columns = 1 if width < 5 or max(map(len, labels), default=0) > 40 else 2
    if labels:
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, handlelength=4)


def _score(curves: Curves, width: float) -> Any:
    """Validation over what it cost; over several seeds the mean, and one standard deviation as thin
    lines of the curve's own style around a faint band."""
    if not any(run.points for runs in curves.values() for run in runs):
        return None
    from matplotlib.ticker import MaxNLocator

    figure = _figure(width, (0.72 if width > 5 else 1.0) * width + 0.17 * len(curves))
    panels = figure.subplots(2, 2, sharey=True).flat
    chances = {run.chance for runs in curves.values() for run in runs} - {None}
    for panel, (name, key) in zip(panels, AXES, strict=True):
        for number, (legend, runs) in enumerate(curves.items()):
            columns = by_round(runs)
            if not columns:
                continue
            style = _style(number, len(curves))
            x = [mean(getattr(p, key) for p in column) for column in columns]
            y = [mean(p.score for p in column) for column in columns]
            panel.plot(x, y, label=legend, zorder=3 + number, **style)
            if len(columns[0]) > 1:
                off = [pstdev([p.score for p in column]) for column in columns]
                for sign in (-1, 1):
                    edge = [a + sign * b for a, b in zip(y, off, strict=True)]
                    panel.plot(
                        x, edge, color=style["color"], linestyle=style["linestyle"], linewidth=0.5
                    )
                low, high = ([a + s * b for a, b in zip(y, off, strict=True)] for s in (-1, 1))
                panel.fill_between(x, low, high, alpha=0.08, linewidth=0, color=style["color"])
        for number, level in enumerate(sorted(c for c in chances if c is not None)):
            label = "always the most frequent class" if not number else None
            panel.axhline(level, color="0.4", linewidth=0.8, dashes=(1, 2), label=label)
        panel.set_xlabel(name)
        panel.set_xlim(left=0)
        panel.xaxis.set_major_locator(MaxNLocator(4, integer=key != "up"))
    figure.supylabel("personal validation score", fontsize=8)
    _legend(figure, figure.axes[0], width)
    return figure


def _layers(curves: Curves, width: float) -> Any:
    """Of the first run of each curve, where not all layers always travel: which did, round by
    round."""
    shown = {}
    for legend, (run, *_) in curves.items():
        names = dict.fromkeys(b for r in run.records for b in r["shared_layers"])
        if len({tuple(r["shared_layers"]) for r in run.records}) > 1:
            places = {name: int(name) if name.isdecimal() else -1 for name in names}
            shown[legend] = (run, sorted(names, key=places.__getitem__))
    if not shown:
        return None
    figure = _figure(width, sum(0.7 + 0.13 * len(names) for _, names in shown.values()))
    panels = figure.subplots(len(shown), 1, squeeze=False).flat
    for panel, (run, ordered) in zip(panels, shown.values(), strict=True):
        cells = [[name in r["shared_layers"] for r in run.records] for name in ordered]
        rounds = len(run.records)
        panel.imshow(
            cells, aspect="auto", cmap="Blues", vmin=-0.3, vmax=1.3, origin="lower",
            extent=(0.5, rounds + 0.5, -0.5, len(ordered) - 0.5), interpolation="nearest",
        )  # fmt: skip
        step = max(1, len(ordered) // 12)
        panel.set_yticks(range(0, len(ordered), step), ordered[::step])
        panel.set_title(f"layers that travelled (dark), {run.path.name}", fontsize=8)
        panel.grid(False)
        panel.set_ylabel("layer")
    panel.set_xlabel("rounds")
    return figure


def _curriculum(curves: Curves, width: float) -> Any:
    """Of the first run of each curve with a curriculum: the share of batches in use, and the mean
    difficulty of the rows that its clients have met."""
    shown = {
        legend: runs[0] for legend, runs in curves.items()
        if any("share" in r for r in runs[0].records)
    }  # fmt: skip
    if not shown:
        return None
    figure = _figure(width, (0.42 if width > 5 else 0.7) * width + 0.17 * len(shown))
    measured = {legend: sorted(_difficulty(run).items()) for legend, run in shown.items()}
    pace, *others = figure.subplots(1, 1 + any(measured.values()), squeeze=False).flat
    for number, (legend, run) in enumerate(shown.items()):
        style = _style(number, len(shown))
        points = [(r["round"], r["share"]) for r in run.records if "share" in r]
        pace.plot(*zip(*points, strict=True), label=legend, **style)
        for panel in others if measured[legend] else ():
            panel.plot(*zip(*measured[legend], strict=True), **style)
    pace.set(xlabel="rounds", ylabel="share of batches in use", ylim=(0, 1.05))
    for panel in others:
        panel.set(xlabel="rounds", ylabel="mean difficulty of rows")
        panel.set_xlim(pace.get_xlim())
        if all(line.get_ydata().min() > 0 for line in panel.lines):
            panel.set_yscale("log")
    _legend(figure, pace, width)
    return figure


def _difficulty(run: Run) -> dict[int, float]:
    """Round -> mean difficulty of the rows of its clients after it."""
    found: dict[int, list[float]] = {}
    for file in sorted(run.path.glob(f"{CLIENTS}/*/{HISTORY}")):
        for line in file.read_text().splitlines(keepends=True):
            told = json.loads(line) if line.endswith("\n") else {}
            values = [v for v in (told.get("difficulty") or {}).values() if v is not None]
            if values:
                found.setdefault(told["round"], []).append(mean(values))
    return {number: mean(values) for number, values in found.items()}


def _clients(curves: Curves, width: float) -> Any:
    """Each client's accuracy on its own test rows, the worst first, of all runs of a curve."""
    shown = {
        legend: [sorted(run.of_clients().values()) for run in runs if run.of_clients()]
        for legend, runs in curves.items()
    }
    shown = {legend: each for legend, each in shown.items() if each}
    if not shown:
        return None
    figure = _figure(width, (0.45 if width > 5 else 0.75) * width + 0.17 * len(shown))
    panel = figure.subplots()
    for number, (legend, each) in enumerate(shown.items()):
        values = sorted(value for own in each for value in own)
        share = [i / len(values) for i in range(len(values) + 1)]
        style = _style(number, len(shown)) | {"marker": "", "drawstyle": "steps-pre"}
        panel.plot(share, [values[0], *values], label=legend, **style)
    panel.axvspan(0, 0.1, color="0.9", zorder=0, label="the worst tenth")
    panel.set(xlabel="share of the clients", ylabel="test accuracy of a client", xlim=(0, 1))
    _legend(figure, panel, width)
    return figure


def _seconds(curves: Curves, width: float) -> Any:
    """Seconds by phase, mean over the runs of a curve."""
    figure = _figure(width, 1.1 + 0.3 * len(curves))
    panel = figure.subplots()
    short = [legend if len(legend) <= 30 else f"{legend[:29]}…" for legend in curves]
    places = list(range(len(short)))[::-1]
    left = [0.0] * len(short)
    for number, phase in enumerate(PHASES):
        each = [
            mean(sum(r["seconds"].get(phase, 0.0) for r in run.records) for run in runs)
            for runs in curves.values()
        ]
        panel.barh(
            places, each, left=left, label=phase, color=f"C{number}", hatch=_HATCHES[number],
            edgecolor="white",
        )  # fmt: skip
        left = [a + b for a, b in zip(left, each, strict=True)]
    panel.set_axisbelow(True)
    panel.set_yticks(places, short)
    panel.set_xlabel("seconds of all rounds")
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5 if width > 5 else 3)
    return figure
