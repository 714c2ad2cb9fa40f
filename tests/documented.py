"""The files that docs/add-a-method.md shows, as they stand there."""

import re
from pathlib import Path

from tests.support import ROOT

PAGE = ROOT / "docs" / "add-a-method.md"
# `name`: on a line, and the block that follows it.
_FILE = re.compile(r"^`([\w.]+)`:\n\n```\w+\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def files() -> dict[str, str]:
    """Name -> content, in the page's order."""
    text = PAGE.read_text()
    found = dict(_FILE.findall(text))
    assert len(found) == text.count("\n```\n"), "a block without a name, or two of one name"
    return found


def write(folder: Path) -> Path:
    """All of them into a folder."""
    for name, content in files().items():
        (folder / name).write_text(content)
    return folder
