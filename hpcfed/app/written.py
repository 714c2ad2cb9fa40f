"""The part of `hpcfed report` on written answers: some held-out questions, before and after."""

import html
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Any

from hpcfed.app.curves import Run
from hpcfed.data.answers import words

SHOWN = 12  # questions of a run
_LONGEST = 300  # characters of a text
_SCORES = {
    "perplexity": "perplexity", "exact_match": "exact match", "f1": "F1", "rouge_l": "ROUGE-L"
}  # fmt: skip
_WHO = {"before": "before", "personal": "after, personal", "global": "after, global"}


def scores(run: Run) -> list[list[Any]]:
    """A table of what the run says of its written answers; a line a model."""
    told = dict(run.summary.get("test") or {})
    if "before" in run.summary:
        told = {"before": run.summary["before"], **told}
    names = [name for name in _SCORES if any(name in own for own in told.values())]
    table: list[list[Any]] = [["", *(_SCORES[name] for name in names)]]
    table += [[_WHO[who], *(own.get(name) for name in names)] for who, own in told.items()]
    return table


def answers(run: Run) -> list[dict[str, str | None]]:
    """Some rows of the test split, of each client in turn: `client`, `question`, `right`, and the
    answers by whom they are, None of a row that could not be evaluated. Empty where none were
    written."""
    told = run.predictions
    if "prompts" not in told:
        return []
    before = told.get("before", {})
    first = dict(zip(before.get("row", []), before.get("global_answers", []), strict=True))
    names = run.partition.get("clients", [])
    by_client: dict[int, list[dict[str, str | None]]] = {}
    for place, (row, k) in enumerate(zip(told["row"], told["client"], strict=True)):
        by_client.setdefault(k, []).append(
            {
                "client": str(names[k] if k < len(names) else k),
                "question": told["prompts"][place],
                "right": told["right_answers"][place],
                **({"before": first.get(row)} if first else {}),
                "personal": told["personal_answers"][place],
                "global": told["global_answers"][place],
            }
        )
    turns = zip_longest(*(by_client[k] for k in sorted(by_client)))
    return [own for turn in turns for own in turn if own is not None][:SHOWN]


def section(runs: Sequence[Run], as_html: Any) -> Iterator[str]:
    """HTML of each run that has written answers. as_html: of a table."""
    for run in runs:
        shown = answers(run)
        if not shown:
            continue
        yield f"<h2>Written answers: {html.escape(run.path.name)}</h2>\n{as_html(scores(run))}"
        who = [key for key in _WHO if key in shown[0]]
        if all(own["personal"] == own["global"] for own in shown):
            who.remove("global")
        head = ["client", "question", "right answer"]
        head += [_WHO[key] if "global" in who else _WHO[key].split(",")[0] for key in who]
        yield (
            f"<p>{len(shown)} of {len(run.predictions['row'])} held-out questions, of each client "
            "in turn; on green an answer that matches exactly, as exact match counts it.</p>"
        )
        lines = ["<tr>" + "".join(f"<th>{own}</th>" for own in head) + "</tr>"]
        for own in shown:
            cells = [f"<td>{_text(own[key])}</td>" for key in ("client", "question", "right")]
            cells += [_answer(own[key], own["right"]) for key in who]
            lines.append(f"<tr>{''.join(cells)}</tr>")
        yield '<table class="texts">' + "\n".join(lines) + "</table>"


def _answer(text: str | None, right: str | None) -> str:
    hit = ' class="hit"' if text is not None and words(text) == words(right or "") else ""
    return f"<td{hit}>{_text(text)}</td>"


def _text(text: str | None) -> str:
    if text is None:
        return ""
    short = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
    return html.escape(short) or "<i>nothing</i>"
