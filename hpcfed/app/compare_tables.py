"""The tables of a comparison: Markdown, LaTeX, CSV and JSON, from its rows."""

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hpcfed.app import bootstrap
from hpcfed.app.compare import Comparison
from hpcfed.app.compare_rows import (
    COSTS,
    Row,
    Total,
    at_chance,
    budget,
    curves,
    rows,
    totals,
)
from hpcfed.storage.files import write_bytes, write_json, writing

FILES = ("table.csv", "table.md", "table.tex", "cells.json", "curves.csv")
# Of a cell: the best of its column, or not significantly behind it.
Marked = tuple[str, str]  # text, "best" | "near" | ""
Table = tuple[str, list[str], list[list[Marked]]]  # caption, titles, lines


def write(comparison: Comparison) -> str:
    """Write all files into the comparison's folder; the tables as text, for a terminal."""
    found = rows(comparison)
    tables, notes = list(_tables(comparison, found)), list(_notes(comparison, found))
    folder = comparison.spec.folder
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    texts = {
        "table.csv": _csv([_flat(comparison, row) for row in found]),
        "table.md": _markdown(tables, notes),
        "table.tex": _latex(tables, notes),
        "curves.csv": _csv(list(curves(comparison))),
    }
    for name, text in texts.items():
        write_bytes(folder / name, text.encode())
    write_json(folder / "cells.json", list(_cells(comparison)))
    return texts["table.md"]


def _tables(comparison: Comparison, found: list[Row]) -> Iterator[Table]:
    """For each model and point of the grid a table over tasks, if there are several; and a table
    for each setting."""
    spec = comparison.spec
    places = dict.fromkeys((own.model, own.condition) for own in spec.settings)
    for model, condition in places:
        settings = [s for s in spec.settings if (s.model, s.condition) == (model, condition)]
        own = [row for row in found if row.setting in settings]
        where = ", ".join(part for part in (model, condition) if part)
        if len(settings) > 1 and own:
            yield _over_tasks(comparison, own, [s.task for s in settings], where)
        for setting in settings:
            of_setting = [row for row in own if row.setting is setting]
            if of_setting:
                yield _of_setting(comparison, of_setting)


def _over_tasks(comparison: Comparison, found: list[Row], tasks: list[str], where: str) -> Table:
    """Methods x tasks: scores; their average; wins, ties and losses against the reference."""
    by_place = {(row.method, row.setting.task): row for row in found}
    lines = []
    every = totals(found, len(tasks))
    top = max((t.average for t in every if t.average is not None), default=None)
    for total in every:
        cells = [
            (_score(by_place[total.method, task]), _mark(by_place[total.method, task]))
            if (total.method, task) in by_place
            else ("", "")
            for task in tasks
        ]
        average = "" if total.average is None else f"{total.average:.3f}"
        wins = f"{total.wins}/{total.ties}/{total.losses}"
        lines.append(
            [
                (total.method, ""), *cells,
                (average, "best" if total.average is not None and total.average == top else ""),
                ("" if total.method == comparison.spec.reference else wins, ""),
                *((_over(total, key), "") for key in COSTS[1:]),
            ]
        )  # fmt: skip
    titles = ["method", *tasks, "average", "win/tie/loss", "time", "samples", "uploads"]
    caption = f"Scores on the test split{f', {where}' if where else ''}"
    return caption, titles, lines


def _over(total: Total, key: str) -> str:
    """A share to the target, mean over tasks."""
    share = total.to_target[key]
    if share is None:
        return "never"
    few = f" ({total.reached} of {total.tasks})" if total.reached < total.tasks else ""
    return f"{share:.2f}{few}"


def _of_setting(comparison: Comparison, found: list[Row]) -> Table:
    reference = comparison.spec.reference
    titles = [
        "method", "tuned", "seeds", "score", "difference", "seconds to target",
        "samples to target", "MB to target", "share of time", "of samples", "of uploads",
        "samples in all", "uploads in all",
    ]  # fmt: skip
    lines = []
    for row in found:
        lines.append(
            [
                (row.method, ""),
                (row.tuned or "not tuned", ""),
                (str(len(row.seeds)), ""),
                (_score(row), _mark(row)),
                ("" if row.method == reference else _difference(row), ""),
                *((_cost(row, key), "") for key in COSTS[1:]),
                *((_shown(row.to_target.get(key)), "") for key in COSTS[1:]),
                *((_shown(row.in_all.get(key)), "") for key in ("samples", "up")),
            ]
        )
    return found[0].setting.label or "Scores on the test split", titles, lines


def _score(row: Row) -> str:
    return f"{row.score:.3f}" + ("" if row.spread is None else f" ± {row.spread:.3f}")


def _mark(row: Row) -> str:
    return "best" if row.best else "near" if row.near else ""


def _difference(row: Row) -> str:
    if row.difference is None:
        return ""
    if row.low is None or row.high is None:
        return f"{row.difference:+.3f}"
    return f"{row.difference:+.3f} ({row.low:+.3f} to {row.high:+.3f})"


def _cost(row: Row, key: str) -> str:
    """What was spent to the target; some seeds may not have reached it."""
    value = row.cost.get(key)
    if value is None:
        return "never reached" if row.cost else ""
    text = f"{value / 1e6:.2f}" if key == "up" else f"{value:,.0f}"
    few = row.reached < len(row.seeds)
    return f"{text} ({row.reached} of {len(row.seeds)})" if few else text


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _notes(comparison: Comparison, found: list[Row]) -> Iterator[str]:
    """What has to be known to read the tables."""
    spec = comparison.spec
    when = {
        "last": "after the last round",
        "best": "at the round that was best on validation data",
    }
    yield (
        f"Score: the clients' own models on the test split {when[spec.score]}, mean and standard "
        f"deviation over seeds {', '.join(map(str, spec.seeds))}; bold: the best, underlined: not "
        "significantly behind it."
    )
    yield f"Methods are {budget(comparison)}."
    yield (
        f"Difference: to {spec.reference}, with the {bootstrap.LEVEL:.0%} interval of a paired "
        f"bootstrap over test rows ({bootstrap.DRAWS:,} draws, seed {bootstrap.SEED}); wins and "
        "losses are differences whose interval is off zero."
    )
    target = (
        f"{spec.target:.0%} of the last validation score of {spec.reference} with the same seed"
        if spec.relative
        else f"a validation score of {spec.target:g}"
    )
    yield (
        f"Target: {target}. Time, samples and uploads to it include the warm-up and every pass "
        f"that scores or chooses; shares are of what {spec.reference} spent. Time is without "
        "evaluation and start-up; up means sent by clients."
    )
    flat = at_chance(found, spec.reference)
    if flat:
        yield (
            f"{spec.reference} is no better than the most frequent class on: {', '.join(flat)}; "
            "what it costs to reach its score says nothing there."
        )
    missing = comparison.unknown() + sum(
        own is not None and comparison.cell(own) is None for own in comparison.finals()
    )
    if missing:
        yield f"{missing} runs are missing."


def _flat(comparison: Comparison, row: Row) -> dict[str, Any]:
    """A line of table.csv: every figure."""
    return {
        "task": row.setting.task, "model": row.setting.model, "condition": row.setting.condition,
        "method": row.method, "tuned": row.tuned or "not tuned", "tuning": budget(comparison),
        "seeds": " ".join(map(str, row.seeds)),
        "score": row.score, "deviation": row.spread, "lowest": row.low_score,
        "highest": row.high_score, "score_global": row.shared_score, "majority": row.majority,
        "difference": row.difference, "difference_low": row.low, "difference_high": row.high,
        "verdict": row.verdict, "best": row.best, "not_significantly_behind": row.near,
        "seeds_that_reach": row.reached,
        **{f"{key}_to_target": row.cost.get(key) for key in COSTS},
        **{f"{key}_to_target_share": row.to_target.get(key) for key in COSTS},
        **{f"{key}_in_all": row.spent[key] for key in COSTS[1:]},
        **{f"{key}_in_all_share": row.in_all.get(key) for key in COSTS[1:]},
    }  # fmt: skip


def _cells(comparison: Comparison) -> Iterator[dict[str, Any]]:
    """The finished runs of the table, with what was answered."""
    for wanted in comparison.finals():
        cell = None if wanted is None else comparison.cell(wanted)
        if wanted is not None and cell is not None:
            yield {
                "method": wanted.method, "setting": wanted.setting.label, "seed": wanted.seed,
                "tuned": wanted.tuned, "cell": wanted.identity, **cell.content,
            }  # fmt: skip


def _csv(lines: list[dict[str, Any]]) -> str:
    stream = io.StringIO()
    if lines:
        writer = csv.DictWriter(stream, lines[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    return stream.getvalue()


def _markdown(tables: Sequence[Table], notes: Sequence[str]) -> str:
    marks: dict[str, Callable[[str], str]] = {
        "best": "**{}**".format, "near": "<u>{}</u>".format, "": str,
    }  # fmt: skip
    parts = []
    for caption, titles, lines in tables:
        cells = [titles, *([marks[mark](text) for text, mark in line] for line in lines)]
        widths = [max(len(line[i]) for line in cells) for i in range(len(titles))]
        drawn = [
            "| " + " | ".join(f"{c:<{w}}" for c, w in zip(line, widths, strict=True)) + " |"
            for line in cells
        ]
        rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
        parts.append("\n".join([f"**{caption}**", "", drawn[0], rule, *drawn[1:]]))
    parts.append("\n".join(f"- {note}" for note in notes))
    return "\n\n".join(parts) + "\n"


_TEX = str.maketrans(
    {c: f"\\{c}" for c in "&%$#_{}"}
    | {"~": "\\textasciitilde{}", "^": "\\textasciicircum{}", "\\": "\\textbackslash{}",
       "±": "$\\pm$", "<": "$<$", ">": "$>$"}
)  # fmt: skip


def _latex(tables: Sequence[Table], notes: Sequence[str]) -> str:
    marks: dict[str, Callable[[str], str]] = {
        "best": "\\textbf{{{}}}".format, "near": "\\underline{{{}}}".format, "": str,
    }  # fmt: skip
    parts = ["% needs \\usepackage{booktabs,graphicx}", *(f"% {note}" for note in notes)]
    for caption, titles, lines in tables:
        body = [
            " & ".join(marks[mark](text.translate(_TEX)) for text, mark in line) + " \\\\"
            for line in lines
        ]
        parts += [
            "", "\\begin{table}", "\\centering", f"\\caption{{{caption.translate(_TEX)}}}",
            "\\resizebox{\\linewidth}{!}{%",
            f"\\begin{{tabular}}{{l{'r' * (len(titles) - 1)}}}", "\\toprule",
            " & ".join(title.translate(_TEX) for title in titles) + " \\\\", "\\midrule",
            *body, "\\bottomrule", "\\end{tabular}}", "\\end{table}",
        ]  # fmt: skip
    return "\n".join(parts) + "\n"


def files(folder: Path) -> str:
    """What was written, for a person."""
    return ", ".join(FILES) + f" lie in {folder}/"
