"""The page of what is refused, from the tables that the tests run.

python -m tests.refusals      writes docs/refusals.md
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from tests.support import ROOT
from tests.unit import (
    wrong_answers,
    wrong_config,
    wrong_data,
    wrong_folders,
    wrong_launches,
    wrong_models,
)

PAGE = ROOT / "docs" / "refusals.md"

# Title -> the cases, each (what is wrong, what makes it, regular expression of what is said).
AREAS: dict[str, Sequence[tuple[str, Any, str]]] = {
    "Configuration, command line, DeepSpeed's JSON": wrong_config.CASES,
    "Data": [*wrong_data.CASES, *wrong_answers.CASES],
    "Models and tokenizers": wrong_models.CASES,
    "Launches, sweeps and scripts": wrong_launches.CASES,
    "Run directories, at --resume": wrong_folders.CASES,
}

HEAD = """# What is refused

{number} faults that are tried by the tests, each with a part of the one sentence that is said. All
end with exit code 2, before anything is trained or written; a run directory is left as it was. What
to do stands in the sentence itself; for faults that are not of this kind see
[troubleshooting.md](troubleshooting.md).

Made by `python -m tests.refusals`.
"""


TOP = "| what is wrong | what is said, in part |\n|---|---|"


def main() -> None:
    """Write the page."""
    PAGE.write_text(page())


def page() -> str:
    """The whole page."""
    number = sum(map(len, AREAS.values()))
    parts = [HEAD.format(number=number)]
    for title, cases in AREAS.items():
        rows = "\n".join(_rows(cases))
        parts.append(f"## {title}\n\n{TOP}\n{rows}\n")
    return "\n".join(parts)


def _rows(cases: Sequence[tuple[str, Any, str]]) -> Iterator[str]:
    """Of faults of which the same is said, one row."""
    wrong: dict[str, list[str]] = {}
    for what, _, pattern in cases:
        wrong.setdefault(words(pattern), []).append(what)
    for said, whats in wrong.items():
        cell = "; ".join(whats).replace("|", "\\|")
        yield f"| {cell} | {said.replace('|', chr(92) + '|')} |"


def words(pattern: str) -> str:
    """A regular expression as a reader would have it: what varies is `...`."""
    text = re.sub(r"\\d[+*]?|\.[*+]\??|\[[^]]*\][+*]?|\(\?[^)]*\)", " ... ", pattern)
    text = re.sub(r"(\w)\?", r"\1", text)
    text = re.sub(r"\\(.)", r"\1", text)
    return re.sub(r"\s+", " ", re.sub(r"( \.\.\. ?)+", " ... ", text)).strip(" ^$")


if __name__ == "__main__":
    main()
