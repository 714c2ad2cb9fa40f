"""The house: no circle of imports, and floors that know only floors below them."""

import ast
import re
from pathlib import Path

import pytest

from tests.support import ROOT

HOUSE = ROOT / "hpcfed"
# Mathematics and policies are tested alone, on any device: nothing of MPI, DeepSpeed, or files.
PURE = ("policies", "importance", "privacy", "server", "state", "round", "rng", "errors")
NOT_PURE = ("mpi4py", "deepspeed", "safetensors", "hpcfed.cluster", "hpcfed.engine",
            "hpcfed.storage", "hpcfed.rounds", "hpcfed.app")  # fmt: skip
LONGEST = 400  # lines of a file


def name_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(file): file for file in HOUSE.rglob("*.py")}


def imports(file: Path) -> set[str]:
    """Modules that a file imports, inside functions and for types too."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in MODULES else node.module)
    return found


def test_no_circle():
    left = {name: imports(file) & MODULES.keys() - {name} for name, file in MODULES.items()}
    assert len(left) > 60 and sum(map(len, left.values())) > 150
    while left:
        free = {name for name, needs in left.items() if not needs & left.keys()}
        assert free, f"a circle among {sorted(left)}"
        left = {name: needs for name, needs in left.items() if name not in free}


@pytest.mark.parametrize("floor", PURE)
def test_mathematics_and_policies_know_no_machine(floor):
    own = [n for n in MODULES if n == f"hpcfed.{floor}" or n.startswith(f"hpcfed.{floor}.")]
    assert own
    for name in own:
        wrong = [other for other in imports(MODULES[name]) if other.startswith(NOT_PURE)]
        assert not wrong, f"{name} imports {wrong}"


def test_each_file_of_tests_says_what_it_guards():
    kinds = (ROOT / "tests" / "README.md").read_text().split("| tests/")[1:]
    told = [
        f"{kind.partition('/')[0]}/{file}"
        for kind in kinds
        for file in re.findall(r"^\| `(\w+\.py)` \| .+\. \|$", kind, re.MULTILINE)
    ]
    files = (file.relative_to(ROOT / "tests") for file in (ROOT / "tests").glob("*/test_*.py"))
    assert sorted(told) == sorted(map(str, files)), "tests/README.md has a line for each file"


def test_no_file_is_long():
    assert {n for n, f in MODULES.items() if len(f.read_text().splitlines()) > LONGEST} == set()
