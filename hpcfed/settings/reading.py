"""YAML of the user's, read strictly: a file, or the value of an override.

What YAML allows and a configuration does not need is refused here, in one sentence: a key given
twice, of which the last would win in silence; an alias to what it stands in; thousands of levels or
values; a number or a date that Python cannot make; a number that is another one than it looks like.
"""

import re
from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import Any

import yaml

from hpcfed.errors import UserError

MOST_LEVELS = 30
MOST_VALUES = 100_000


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which names what it cannot make, and takes no key twice."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._level = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._level += 1
        if self._level > MOST_LEVELS:
            raise _too_much(self.peek_event().start_mark)  # type: ignore[no-untyped-call]
        try:
            return super().compose_node(parent, index)
        finally:
            self._level -= 1

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        if _odd(node):
            raise yaml.constructor.ConstructorError(
                None, None, f"{shown(node.value, 30)} is a number to the base of 8 or 60 in YAML; "
                "write it to the base of 10, or in quotes", node.start_mark,
            )  # fmt: skip
        try:
            value = super().construct_object(node, deep)
            if isinstance(value, int) and value.bit_length() > 64:
                raise OverflowError
            return value
        except (ValueError, ArithmeticError, LookupError, AttributeError, TypeError):
            named = node.tag.rpartition(":")[2]
            raise yaml.constructor.ConstructorError(
                None, None, f"{shown(node.value, 30)} is no {named} that can be used",
                node.start_mark,
            ) from None  # fmt: skip

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if (key.tag, key.value) in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {shown(key.value)} is given twice", key.start_mark
                    )
                seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)


def _odd(node: yaml.Node) -> bool:
    """Whether YAML takes it for another number than its writer: 010 for 8, 1:30 for 90."""
    if node.tag not in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float"):
        return False
    digits = str(node.value).lstrip("+-")
    return ":" in digits or (node.tag.endswith("int") and re.match("0[0-7_]", digits) is not None)


def parse(text: str) -> Any:
    """The value of a YAML text. Raises yaml.YAMLError for one that cannot be had."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _measure(node)
        return loader.construct_document(node)
    except (ValueError, ArithmeticError, LookupError):  # of PyYAML's scanner, on odd numbers
        raise yaml.scanner.ScannerError(
            None, None, "a number or escape that cannot be used", loader.get_mark()
        ) from None
    finally:
        loader.dispose()


def _measure(root: yaml.Node) -> None:
    """Raises yaml.YAMLError if the tree, with what aliases repeat, has too many levels or nodes;
    one that holds itself has."""
    values, todo = 0, [(root, 1)]
    while todo:
        node, level = todo.pop()
        values += 1
        if level > MOST_LEVELS or values > MOST_VALUES:
            raise _too_much(node.start_mark)
        if isinstance(node, yaml.MappingNode):
            todo += [(part, level + 1) for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            todo += [(part, level + 1) for part in node.value]


def _too_much(mark: yaml.Mark) -> yaml.MarkedYAMLError:
    return yaml.composer.ComposerError(
        None, None, f"it holds itself, or more than {MOST_LEVELS} levels or {MOST_VALUES:,} values",
        mark,
    )  # fmt: skip


def why(error: yaml.YAMLError) -> str:
    """What a YAML error says, on one line."""
    said = " ".join(str(getattr(error, "problem", None) or error).split())
    return said if len(said) <= 200 else f"{said[:197]}..."


def read_file(path: Path) -> dict[str, Any]:
    """The keys and values in a YAML file. Raises UserError if it holds anything else."""
    try:
        return read_text(path.read_text(encoding="utf-8-sig"), str(path))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}).") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 (byte {error.start}); save it in that encoding."
        ) from None


def read_text(text: str, name: str) -> dict[str, Any]:
    """The keys and values in a YAML text; `name` says in messages where it is from."""
    try:
        tree = parse(text)
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f", line {where.line + 1}" if where else ""
        raise UserError(f"{name}{line}: not valid YAML ({why(error)}).") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"{name}: the top level must be keys and values, not {kind(tree)}.")
    return tree


def override(text: str) -> dict[str, Any]:
    """The tree of one `section.key=value`."""
    key, equals, value = text.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise UserError(f"Override {shown(text)} must look like section.key=value.")
    if len(parts) > MOST_LEVELS:
        raise UserError(f"Override {shown(text)}: no option lies so deep.")
    try:
        tree: Any = parse(value)
    except yaml.YAMLError as error:
        raise UserError(
            f"Override {shown(text)}: the value is not valid YAML ({why(error)})."
        ) from None
    for part in reversed(parts):
        tree = {part: tree}
    return dict(tree)


def given_once(overrides: Iterable[str]) -> None:
    """Raises UserError if two overrides set the same option, of which one would be dropped."""
    seen: dict[str, str] = {}
    for text in overrides:
        for key in _keys(override(text), ""):
            for before, other in seen.items():
                if f"{key}.".startswith(f"{before}.") or f"{before}.".startswith(f"{key}."):
                    raise UserError(
                        f"{key} is given twice ({shown(other)} and {shown(text)}); leave one out."
                    )
            seen[key] = text


def _keys(tree: dict[Any, Any], prefix: str) -> Iterable[str]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _keys(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def shown(value: Any, most: int = 60) -> str:
    """A value as it stands in a message: not of 5,000 characters."""
    text = repr(value)
    return text if len(text) <= most else f"{text[: most - 3]}..."


def kind(value: Any) -> str:
    """What a value is called that stands where it may not."""
    return {
        list: "a list", str: "a text", int: "a number", float: "a number", type(None): "null",
        dict: "keys and values",
    }.get(type(value), shown(value))  # fmt: skip
