"""A frozen dataclass as the schema of a mapping: `build` checks names and types, the dataclass itself its ranges."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import math
import textwrap
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple, TypeVar, Union

from fedlabel.config_text import ConfigError, Plain, plain, shown

T = TypeVar("T")
Unknown = Callable[[type, str, str], str]
"""(schema, where, name) -> the message for a name that the schema does not have."""
HOLDS = "fields may be bool, int, float, str, lists, dictionaries and dataclasses of these"
LARGEST = 2**53
"""Of whole numbers: torch and numpy count with 64 bits, and double precision holds each of these."""


class KeyInfo(NamedTuple):
    """What can be said of a key."""

    name: str
    type: str
    """As written in the source."""
    default: Any
    """`dataclasses.MISSING`: it must be given."""
    doc: str
    """In one line; "" for none."""


class WrongType(Exception):
    """A value is not of the type wanted; the message says what is: "a number"."""


@lru_cache
def hints(schema: type) -> dict[str, Any]:
    """Returns the types of a dataclass's fields.

    Raises:
        ConfigError: an annotation names something that does not exist.
    """
    try:
        return typing.get_type_hints(schema)
    except (NameError, AttributeError, TypeError, SyntaxError) as error:
        raise ConfigError(
            f"The types of {schema.__name__}'s fields cannot be read ({error}): import what they name, outside of "
            "`if TYPE_CHECKING`."
        ) from error


def fields_of(schema: type) -> dict[str, dataclasses.Field[Any]]:
    """Returns the fields that a configuration may set, by name."""
    return {each.name: each for each in dataclasses.fields(schema) if each.init}


def default_of(each: dataclasses.Field[Any]) -> Any:
    """Returns a field's default, or `dataclasses.MISSING`."""
    if each.default_factory is not dataclasses.MISSING:
        return each.default_factory()
    return each.default


def build(schema: type[T], values: Mapping[str, Any], where: str, unknown: Unknown, base: Any = None) -> T:
    """Returns the dataclass that a mapping describes.

    Args:
        schema: a dataclass whose fields are bool, int, float, str, Literal, lists, tuples or dictionaries of these,
            other such dataclasses, each of these or None; or Any, which takes plain data.
        values: as `parse_yaml` returns it, or plain data; what is left out keeps its default.
        where: the full key of the mapping, "" for the whole; for messages.
        unknown: makes the message for a name that is no field.
        base: a `schema` that has the values of what is left out; None: the fields' defaults.

    Raises:
        ConfigError: a name is unknown, a value has another type, or the dataclass refuses it.
    """
    prefix = f"{where}." if where else ""
    known, types_of = fields_of(schema), hints(typing.cast(type, schema))
    for name in values:
        if name not in known:
            raise ConfigError(unknown(schema, where, name))
    given = {name: getattr(base, name) for name in known} if isinstance(base, schema) else {}
    for name, value in values.items():
        default = given.get(name, default_of(known[name]))
        try:
            given[name] = convert(types_of[name], value, prefix + name, unknown, default)
        except WrongType as error:
            has_default = default is not dataclasses.MISSING and not dataclasses.is_dataclass(default)
            its_default = f"; its default is {shown(default)}" if has_default else ""
            raise ConfigError(f"`{prefix}{name}` (={shown(value)}) must be {error}{its_default}.") from error
    missing = [name for name, each in known.items() if name not in given and default_of(each) is dataclasses.MISSING]
    if missing:
        raise ConfigError(f"`{prefix}{missing[0]}` must be given: it has no default.")
    try:
        return schema(**given)
    except ConfigError:
        raise
    except ValueError as error:
        item = f"{where}: " if where.endswith("]") else ""  # of a list; the dataclass does not know which
        raise ConfigError(f"{item}{error}") from error


def convert(kind: Any, value: Any, key: str, unknown: Unknown, base: Any = None) -> Any:
    """Returns a value as the type `kind`; the arguments are those of `build`.

    Raises:
        WrongType: it cannot be read as such.
        ConfigError: something within it is wrong.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind in (Any, object):
        return plain(value)
    if origin in (Union, types.UnionType):
        return _one_of(arguments, value, key, unknown, base)
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping):
            first = next(iter(fields_of(typing.cast(type, kind)).values()))
            raise WrongType(
                f"a mapping of keys: set one of its keys, e.g. {key}.{first.name}={shown(default_of(first))}"
            )
        return build(typing.cast(type, kind), value, key, unknown, base)
    if kind in (list, tuple) or origin in (list, tuple, Sequence):
        return _sequence(origin or kind, arguments or (Any, ...), value, key, unknown)
    if kind is dict or origin in (dict, Mapping):
        of = arguments[1] if arguments else Any
        if not isinstance(value, Mapping):
            raise WrongType("a mapping, e.g. {name: value}")
        return {name: _element(of, each, f"{key}.{name}", unknown) for name, each in value.items()}
    if origin is Literal:
        texts = {str(each): each for each in arguments}
        if _text(value) not in texts:
            raise WrongType(f"one of {', '.join(texts)}")
        return texts[typing.cast(str, _text(value))]
    if kind not in _SCALARS:
        raise ConfigError(
            f"`{key}` has the type {getattr(kind, '__name__', kind)}, which a configuration cannot hold: {HOLDS}."
        )
    return _SCALARS[kind](value)


def _one_of(kinds: Sequence[Any], value: Any, key: str, unknown: Unknown, base: Any) -> Any:
    others = [kind for kind in kinds if kind is not types.NoneType]
    if value is None and len(others) < len(kinds):
        return None
    wanted = []
    for kind in others:
        try:
            return convert(kind, value, key, unknown, base)
        except WrongType as error:
            wanted.append(str(error))
    raise WrongType(" or ".join([*wanted, "null"] if len(others) < len(kinds) else wanted))


def _sequence(origin: Any, arguments: Sequence[Any], value: Any, key: str, unknown: Unknown) -> Any:
    kinds = list(arguments[:1] if origin is not tuple or arguments[-1] is ... else arguments)
    example = f"[{', '.join(_example(kind) for kind in (kinds if len(kinds) > 1 else kinds * 2))}]"
    if not isinstance(value, (list, tuple)) or isinstance(value, Plain):
        raise WrongType(f"a list of {_plural(kinds[0])}, e.g. {key}={example}")
    if len(kinds) > 1 and len(value) != len(kinds):
        raise WrongType(f"a list of {len(kinds)}, e.g. {key}={example}")
    each_kind = kinds * len(value) if len(kinds) == 1 else kinds
    try:
        found = [
            convert(kind, each, f"{key}[{place}]", unknown)
            for place, (kind, each) in enumerate(zip(each_kind, value, strict=True))
        ]
    except WrongType as error:
        fix = str(error).partition(": ")[2]
        fix = f" ({fix})" if fix.startswith("write ") else ""
        raise WrongType(f"a list of {_plural(kinds[0])}, e.g. {key}={example}{fix}") from error
    return tuple(found) if origin is tuple else found


def _element(kind: Any, value: Any, key: str, unknown: Unknown) -> Any:
    try:
        return convert(kind, value, key, unknown)
    except WrongType as error:
        raise ConfigError(f"`{key}` (={shown(value)}) must be {error}.") from error


def _bool(value: Any) -> bool:
    found = plain(value)
    if not isinstance(found, bool):
        raise WrongType("true or false")
    return found


def _int(value: Any) -> int:
    found = plain(value)
    if isinstance(found, float) and found.is_integer() and abs(found) <= LARGEST:
        raise WrongType(f"a whole number: write {int(found)}")
    if not isinstance(found, int) or isinstance(found, bool):
        raise WrongType("a whole number" + (" (without quotes)" if isinstance(found, str) and _digits(found) else ""))
    if abs(found) > LARGEST:
        raise WrongType(f"a whole number in [-{LARGEST}, {LARGEST}]")
    return found


def _digits(text: str) -> bool:
    return text.strip("+-").isdecimal()


def _float(value: Any) -> float:
    found = plain(value)
    if isinstance(found, str) and found.lower() in ("inf", "+inf", "-inf"):
        return float(found)
    if not isinstance(found, (int, float)) or isinstance(found, bool) or math.isnan(found):
        raise WrongType("a number")
    written = value.text.lower() if isinstance(value, Plain) else "inf"
    if abs(found) > 1e308 and "inf" not in written:
        raise WrongType("a number below 1e308 (or .inf)")
    return float(found)


def _text(value: Any) -> str | None:
    if isinstance(value, Plain):
        return value.text
    if isinstance(value, (str, int, float)):
        return str(value)
    return None


def _str(value: Any) -> str:
    found = _text(value)
    if found is None:
        raise WrongType("a text" + ("" if value is None else " (in quotes, if it has brackets, `: ` or commas)"))
    return found


def _none(value: Any) -> None:
    if value is not None:
        raise WrongType("null")


_SCALARS: dict[Any, Callable[[Any], Any]] = {bool: _bool, int: _int, float: _float, str: _str, types.NoneType: _none}


def _plural(kind: Any) -> str:
    if dataclasses.is_dataclass(kind) or kind is dict or typing.get_origin(kind) in (dict, Mapping):
        return "mappings"
    if typing.get_origin(kind) in (list, tuple, Sequence):
        return f"lists of {_plural(typing.get_args(kind)[0])}"
    return {int: "whole numbers", float: "numbers", str: "texts", bool: "true or false"}.get(kind, "values")


def _example(kind: Any) -> str:
    if dataclasses.is_dataclass(kind):
        first = next(iter(fields_of(typing.cast(type, kind))))
        return f"{{{first}: ...}}"
    if typing.get_origin(kind) in (list, tuple, Sequence):
        inner = _example(typing.get_args(kind)[0])
        return f"[{inner}, {inner}]"
    return {int: "8", float: "0.5", str: "name", bool: "true"}.get(kind, "...")


def as_plain(value: Any) -> Any:
    """Returns a dataclass as dictionaries, lists and scalars, in the order of its fields.

    Raises:
        ConfigError: it holds something else.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {name: as_plain(getattr(value, name)) for name in fields_of(type(value))}
    if isinstance(value, Mapping):
        return {name: as_plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_plain(each) for each in value]
    if value is not None and type(value) not in (bool, int, float, str):
        raise ConfigError(f"A configuration cannot hold a {type(value).__name__} (={shown(value)}): {HOLDS}.")
    return value


def describe(schema: type) -> list[KeyInfo]:
    """Returns what can be said of a dataclass's fields, from its source: types and the texts below the fields."""
    types_, docs = {}, {}
    for owner in reversed(schema.__mro__):
        if not dataclasses.is_dataclass(owner):
            continue
        body = typing.cast(ast.ClassDef, ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0]).body
        for place, node in enumerate(body):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                types_[node.target.id] = ast.unparse(node.annotation)
                after = body[place + 1] if place + 1 < len(body) else None
                if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                    docs[node.target.id] = " ".join(str(after.value.value).split())
    return [
        KeyInfo(name, types_[name], default_of(each), docs.get(name, "")) for name, each in fields_of(schema).items()
    ]
