"""Reads and writes YAML for the configuration: the core schema of YAML 1.2, with messages of our own.

What differs from PyYAML's loader, and why:

* A plain scalar keeps its text beside its value. So a column called 010, 1e5 or no stays what was written, and only a
  key that wants a number or a truth value reads one. `yes`, `0x10`, `1_000` and `12:30` are texts, as in YAML 1.2.
* Aliases, tags, `${...}` and keys that stand twice are refused: they would make a value depend on more than what is
  written in its place, and a few bytes of aliases can fill any memory.
"""

from __future__ import annotations

import math
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from omegaconf import OmegaConf

from fedlabel.shown import printable, shown

MAX_BYTES = 1_000_000
"""Of a file."""
MAX_DEPTH = 20
"""Of mappings and lists in each other."""
MAX_MESSAGE = 2_000
"""Characters of a message."""
MAX_SHOWN = 200
"""Characters of a value in a message."""

HELP = "Indent with spaces, close brackets and quotes, and put a text with `: `, ` #` or brackets in it in quotes."

_NULLS = ("", "~", "null", "Null", "NULL")
_TRUTH = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INTEGER = re.compile(r"[-+]?[0-9]{1,400}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_BARE = re.compile(r"[^\W\d][\w./-]*")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\x80-\x9f\u2028\u2029\ud800-\udfff]")


class ConfigError(ValueError):
    """The user's configuration is wrong; the message names the key, the value and the fix, in one line."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class Plain(NamedTuple):
    """An unquoted scalar that can be read as a number or boolean as well as a text."""

    value: bool | int | float
    text: str
    """As written in the file."""


def one_line(message: str) -> str:
    """Returns a message that can be printed anywhere: one line of bounded length, control characters escaped."""
    lines = re.sub(r"\s*\n\s*", " ", message)
    text = printable(lines)
    return text if len(text) <= MAX_MESSAGE else f"{text[:1200]} [...] {text[-700:]}"


def as_yaml(value: Any) -> str:
    """Returns a value as YAML for a message, truncated if it is long; `value`: as `parse_yaml` returns it."""
    return shown(value if isinstance(value, str) else _flow(value), MAX_SHOWN)


def _flow(value: Any) -> str:
    """Returns a value as YAML lists and mappings in one line: numbers as they were written."""
    if isinstance(value, Plain):
        return value.text
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_flow(str(key))}: {_flow(each)}" for key, each in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_flow, value))}]"
    if isinstance(value, str):
        bare = _BARE.fullmatch(value) and value not in (*_NULLS, *_TRUTH)
        return value if bare else "'" + value.replace("'", "''") + "'"
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return f"{'-' * (value < 0)}.inf" if isinstance(value, float) and math.isinf(value) else str(value)


def as_written(message: str, layers: Sequence[Mapping[str, Any]]) -> str:
    """Returns a message in which "`key` (=value)" has the text written by the user in place of Python's text of the
    value.

    Args:
        message: of whoever knows values only: `10.0` of 1e1, `inf` of .inf, `True` of true.
        layers: mappings as `parse_yaml` returns them; later ones win.
    """
    for key, value in {key: value for layer in layers for key, value in _by_key("", layer)}.items():
        number = plain(value)
        forms = {str(number), as_yaml(number)}
        if isinstance(number, list):
            forms |= {str(tuple(number)), f"[{', '.join(map(str, number))}]"}
        elif isinstance(number, (int, float)):
            forms |= {f"{number:g}", f"{float(number)}"} if abs(number) < 1e300 else set()
        for form in forms:
            message = message.replace(f"`{key}` (={form})", f"`{key}` (={as_yaml(value)})")
    return message


def _by_key(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yields the full key and the value of every entry of a mapping."""
    if key:
        yield key, value
    if isinstance(value, Mapping):
        for name, each in value.items():
            yield from _by_key(f"{key}.{name}" if key else name, each)
    elif isinstance(value, list):
        for place, each in enumerate(value):
            yield from _by_key(f"{key}[{place}]", each)


def plain(value: Any) -> Any:
    """Returns what `parse_yaml` returned with values in place of every `Plain`."""
    if isinstance(value, Plain):
        return value.value
    if isinstance(value, Mapping):
        return {key: plain(each) for key, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, (list, tuple)) else value


def read_mapping(path: Path) -> dict[str, Any]:
    """Returns the mapping of a YAML file, {} if it is empty; see `parse_yaml`.

    Raises:
        ConfigError: the file cannot be read, is too large, is no YAML, or holds no mapping.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not readable YAML: it is no UTF-8 text. Save it as UTF-8.") from error
    if len(content) > MAX_BYTES:
        raise ConfigError(f"{path} has more than {MAX_BYTES:,} bytes, which is no configuration file.")
    loaded = parse_yaml(text, str(path))
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path} must hold a mapping of keys to values, e.g. `seed: 1`, not {_kind(loaded)}.")
    return loaded


def _kind(value: Any) -> str:
    return "a list" if isinstance(value, list) else f"one value (={as_yaml(value)})"


def parse_yaml(text: str, what: str) -> Any:
    """Returns a YAML document: dictionaries with texts as keys, lists, texts, None, and `Plain` numbers and booleans.

    Args:
        text: one document.
        what: what it is, for messages.

    Raises:
        ConfigError: it is no YAML, or has what this module refuses.
    """
    node = _compose(text, what)
    return None if node is None else _data(node, what)


def parse_value(text: str, what: str) -> Any:
    """Returns the value of an override, see `parse_yaml`; a comment in it, which would cut it short, is rejected."""
    node = _compose(text, what)
    if isinstance(node, yaml.ScalarNode) or getattr(node, "flow_style", False):
        cut = node.end_mark.index < len(text.rstrip())
    else:
        cut = node is None and text.strip() != ""
    if cut:
        raise ConfigError(f"{what}: a `#` after a space, or at the start, begins a comment. Put the value in quotes.")
    return None if node is None else _data(node, what)


class _Refused(Exception):
    """The document has a construct that is not allowed here."""


class _Composer(yaml.SafeLoader):
    """Makes YAML nodes; `_scalar` decides the types of plain scalars."""

    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012
    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        line = f"line {event.start_mark.line + 1}"
        if isinstance(event, yaml.AliasEvent):
            raise _Refused(f"{line} has an alias (*{event.anchor}): write the value out in its place")
        if getattr(event, "tag", None) is not None:
            raise _Refused(f"{line} has a tag ({event.tag.replace('tag:yaml.org,2002:', '!!')}): leave it out")
        if self.depth == MAX_DEPTH:
            raise _Refused(
                f"{line} has lists or mappings more than {MAX_DEPTH} deep in each other: that is no value here"
            )
        self.depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1


def _compose(text: str, what: str) -> Any:
    if found := _CONTROL.search(text.replace("\r\n", "\n")):
        raise ConfigError(f"{what} has the character {found[0]!a}, which cannot be printed: leave it out.")
    try:
        return yaml.compose(text, Loader=_Composer)
    except _Refused as error:
        raise ConfigError(f"{what}: {error}.") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{what} is not readable YAML{_place(error, text)}. {HELP}") from error


def _place(error: yaml.YAMLError, text: str) -> str:
    """Returns the position in `text` where a parser stopped, as the end of a clause."""
    mark = getattr(error, "problem_mark", None)
    lines = text.splitlines()
    if mark is None or mark.line >= len(lines):
        return " (it ends too early)" if mark is not None else ""
    line = lines[mark.line]
    if line.lstrip(" ").startswith("\t"):
        return f": line {mark.line + 1} begins with a tab"
    if line.startswith("---"):
        return f": a second document begins in line {mark.line + 1}"
    return f": look at line {mark.line + 1}, `{as_yaml(line.strip())}`" if len(lines) > 1 else ""


def _data(node: Any, what: str) -> Any:
    if isinstance(node, yaml.ScalarNode):
        return _scalar(node, what)
    if isinstance(node, yaml.SequenceNode):
        return [_data(each, what) for each in node.value]
    mapping: dict[str, Any] = {}
    for key_node, value_node in node.value:
        line = f"line {key_node.start_mark.line + 1}"
        if not isinstance(key_node, yaml.ScalarNode):
            raise ConfigError(f"{what}: {line} has a list or mapping for a key, which must be a name.")
        key = key_node.value
        name, colon, rest = key.partition(":")
        nothing = isinstance(value_node, yaml.ScalarNode) and value_node.style is None and not value_node.value
        if node.flow_style and colon and rest and nothing and key_node.style is None:
            raise ConfigError(f"{what}: YAML needs a space after the colon: write {as_yaml(f'{name}: {rest}')}.")
        if key in mapping:
            raise ConfigError(f"{what} has the key {as_yaml(key)} twice ({line}): leave one out.")
        mapping[key] = _data(value_node, what)
    return mapping


def _scalar(node: yaml.ScalarNode, what: str) -> Plain | str | None:
    text: str = node.value
    if text == "???":
        raise ConfigError(f"{what} has ???, which stands for a value that is missing: write the value itself.")
    if "${" in text:
        raise ConfigError(
            f"{what} has {as_yaml(text)}: nothing is put in place of ${{...}} here. Write the value itself."
        )
    if found := _CONTROL.search(text):
        raise ConfigError(f"{what} has the character {found[0]!a}, which cannot be printed: leave it out.")
    if node.style is not None:  # quotes, | and >
        return text
    if text in _NULLS:
        return None
    if text in _TRUTH:
        return Plain(_TRUTH[text], text)
    if _INTEGER.fullmatch(text):
        return Plain(int(text), text)
    if _FLOAT.fullmatch(text):
        return Plain(float(text), text)
    return Plain(float(text.replace(".", "")), text) if _NOT_FINITE.fullmatch(text) else text


def merged(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Returns layers of plain data merged: mappings key by key, otherwise the last layer wins.

    Raises:
        ConfigError: one has a list where another has a mapping.
    """
    together = OmegaConf.create({})
    for layer in layers:
        try:
            together = OmegaConf.merge(together, OmegaConf.create(dict(layer)))  # type: ignore[assignment]
        except TypeError as error:
            key, value, old = _clash(OmegaConf.to_container(together), layer)
            raise ConfigError(
                f"`{key}` (={as_yaml(value)}) does not fit what was said before (={as_yaml(old)}). A list is replaced "
                "as a whole, e.g. supervision.mix=[{share: 0.5, kind: full}], a mapping key by key."
            ) from error
    return typing.cast(dict[str, Any], OmegaConf.to_container(together))


def _clash(first: Any, second: Mapping[str, Any]) -> tuple[str, Any, Any]:
    """Returns the key, the old and the new value where one of two layers has a list and the other a mapping."""
    for key, value in second.items():
        old = first.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            inner, new, before = _clash(old, value)
            if inner:
                return f"{key}.{inner}", new, before
        elif old is not None and isinstance(old, Mapping) != isinstance(value, Mapping):
            return key, value, old
    return "", None, None
