"""A frozen dataclass as the schema of a mapping. OmegaConf checks names and types; the messages are our own."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import math
import textwrap
import types
import typing
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, Literal, NamedTuple, TypeVar, Union

from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from fedlabel.config_text import ConfigError, Plain, as_yaml

T = TypeVar("T")
Unknown = Callable[[type, str, str], str]
"""(schema, where, name) -> the message for a name that the schema does not have."""
HOLDS = "fields may be bool, int, float, str, lists, dictionaries and dataclasses of these"
LARGEST = 2**53
"""Of whole numbers: torch and numpy count with 64 bits, and double precision holds each of these."""


class KeyInfo(NamedTuple):
    """Documentation of one key."""

    name: str
    type: str
    """As written in the source."""
    default: Any
    """`dataclasses.MISSING`: the key is required."""
    doc: str
    """In one line; "" if there is none."""


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


def settled(kind: Any, value: Any, key: str = "") -> Any:
    """Returns plain data: each `Plain` becomes its text if the schema has a text there, else its value.

    Args:
        kind: the type of the field that gets the value.
        value: as `parse_yaml` returns it, or plain data.
        key: the value's full key, for messages.

    Raises:
        ConfigError: a number is NaN, or a whole number that is too large to be counted with.
    """
    kinds = _alternatives(kind)
    if isinstance(value, Plain) and str in kinds:
        return value.text
    if isinstance(value, Mapping):
        schema = next((each for each in kinds if dataclasses.is_dataclass(each)), None)
        of = hints(typing.cast(type, schema)) if schema is not None else {}
        inner = next((typing.get_args(each)[-1] for each in kinds if typing.get_origin(each) is dict), Any)
        prefix = f"{key}." if key else ""
        return {name: settled(of.get(name, inner), each, f"{prefix}{name}") for name, each in value.items()}
    if isinstance(value, (list, tuple)) and not isinstance(value, Plain):
        inner = next((typing.get_args(each)[0] for each in kinds if typing.get_origin(each) in (list, tuple)), Any)
        # OmegaConf does not look into lists in lists, and takes a list or mapping for a text.
        numbers = typing.get_origin(inner) in (list, tuple) and typing.get_args(inner)[0] in (int, float)
        wrong = (str, Mapping, types.NoneType) if numbers else (list, Mapping) if inner in _SINGULAR else ()
        if any(isinstance(each, wrong) for each in (_flat(list(value)) if numbers else value)):
            raise ConfigError(f"`{key}` (={as_yaml(value)}) must be {_wanted(kind, key)}.")
        return [settled(inner, each, f"{key}[{place}]") for place, each in enumerate(value)]
    number = value.value if isinstance(value, Plain) else value
    if isinstance(number, float) and (
        math.isnan(number) or (math.isinf(number) and "inf" not in as_yaml(value).lower())
    ):
        raise ConfigError(f"`{key}` (={as_yaml(value)}) must be a number below 1e308 (or .inf).")
    if isinstance(number, int) and abs(number) > LARGEST:
        raise ConfigError(f"`{key}` (={as_yaml(value)}) must be a whole number in [-{LARGEST}, {LARGEST}].")
    return number


def build(schema: type[T], values: Mapping[str, Any], where: str, unknown: Unknown, base: Any = None) -> T:
    """Returns the dataclass that a mapping describes: OmegaConf checks names and types, the dataclass its ranges.

    Args:
        schema: a dataclass that OmegaConf can structure.
        values: plain data; what is left out keeps its default.
        where: the full key of the mapping, "" for the whole; for messages.
        unknown: makes the message for a name that is no field.
        base: a structured `schema` with other defaults; None: its own.

    Raises:
        ConfigError: a name is unknown, a value has another type, or the dataclass refuses it.
    """
    node = OmegaConf.structured(schema) if base is None else base
    prefix = f"{where}." if where else ""
    try:
        return typing.cast(T, OmegaConf.to_object(OmegaConf.merge(node, values)))
    except ConfigKeyError as error:
        parent, _, name = str(error.full_key).rpartition(".")
        full = ".".join(filter(None, (where, parent)))
        raise ConfigError(unknown(error.object_type or schema, full, name)) from error
    except MissingMandatoryValue as error:
        raise ConfigError(f"`{prefix}{error.full_key}` must be given: it has no default.") from error
    except (OmegaConfBaseException, TypeError, OverflowError) as error:
        wrong = _wrong_value(typing.cast(type, schema), values)
        if wrong is None:  # the schema of a class of the user's own
            raise
        path, kind, value, default = wrong
        whole = next((each for each in _flat(value) if isinstance(each, float) and each.is_integer()), None)
        write = f" (write {int(whole)})" if whole is not None and "whole number" in _wanted(kind, path) else ""
        its_default = f"{write}; its default is {as_yaml(default)}" if _is_shown(default) else write
        message = f"`{prefix}{path}` (={as_yaml(value)}) must be {_wanted(kind, prefix + path)}{its_default}."
        raise ConfigError(message) from error
    except ConfigError:
        raise
    except ValueError as error:
        item = f"{where}: " if where.endswith("]") else ""  # of a list; the dataclass does not know which
        raise ConfigError(f"{item}{error}") from error


def parts(kind: Any, value: Any, key: str, unknown: Unknown) -> list[Any]:
    """Returns a list of mappings as dataclasses, each with its own key in messages; for the rest see `build`.

    Args:
        kind: tuple[SCHEMA, ...].
        value: plain data.
        key: the list's.
        unknown: see `build`.

    Raises:
        ConfigError: see `build`; or it is no list of mappings.
    """
    if not isinstance(value, list) or any(not isinstance(each, Mapping) for each in value):
        raise ConfigError(f"`{key}` (={as_yaml(value)}) must be {_wanted(kind, key)}.")
    schema = typing.get_args(kind)[0]
    return [build(schema, each, f"{key}[{place}]", unknown) for place, each in enumerate(value)]


def _wrong_value(schema: type, values: Mapping[str, Any], prefix: str = "") -> tuple[str, Any, Any, Any] | None:
    """Returns the first value that a schema rejects: its key, the type wanted, the value, the default."""
    for name, value in values.items():
        kind, default = hints(schema)[name], default_of(fields_of(schema)[name])
        inner = next((each for each in _alternatives(kind) if dataclasses.is_dataclass(each)), None)
        if inner is not None and isinstance(value, Mapping):
            if found := _wrong_value(typing.cast(type, inner), value, f"{prefix}{name}."):
                return found
            continue
        if _refused(schema, name, value):
            of = next((each for each in _alternatives(kind) if typing.get_origin(each) is dict), None)
            for key, item in value.items() if of is not None and isinstance(value, Mapping) else ():
                if _refused(schema, name, {key: item}):
                    return f"{prefix}{name}.{key}", typing.get_args(of)[1], item, dataclasses.MISSING
            return f"{prefix}{name}", kind, value, default
    return None


def _refused(schema: type, name: str, value: Any) -> bool:
    try:
        OmegaConf.merge(OmegaConf.structured(schema), {name: value})
    except (OmegaConfBaseException, TypeError, OverflowError):
        return True
    return False


def _alternatives(kind: Any) -> tuple[Any, ...]:
    """Returns the members of a union, or a list of the one type."""
    return typing.get_args(kind) if typing.get_origin(kind) in (Union, types.UnionType) else (kind,)


def _flat(value: Any) -> list[Any]:
    return [each for item in value for each in _flat(item)] if isinstance(value, list) else [value]


def _is_shown(default: Any) -> bool:
    return default is not dataclasses.MISSING and not dataclasses.is_dataclass(default)


def _wanted(kind: Any, key: str) -> str:
    """Returns the description of a type in messages, with an example if it is not one word."""
    kinds = [each for each in _alternatives(kind) if each is not types.NoneType]
    names = []
    for each in kinds:
        origin, arguments = typing.get_origin(each), typing.get_args(each)
        if dataclasses.is_dataclass(each):
            first = next(iter(fields_of(typing.cast(type, each)).values()))
            names.append(
                f"a mapping of keys: set one of its keys, e.g. {key}.{first.name}={as_yaml(default_of(first))}"
            )
        elif origin in (list, tuple):
            inner = _example(arguments[0])
            names.append(f"a list of {_plural(arguments[0])}, e.g. {key}=[{inner}, {inner}]")
        elif each is dict or origin is dict:
            names.append("a mapping, e.g. {name: value}")
        elif origin is Literal:
            names.append(f"one of {', '.join(map(str, arguments))}")
        else:
            names.append(_SINGULAR.get(each, f"a {getattr(each, '__name__', each)}"))
    return " or ".join([*names, *(["null"] if len(kinds) < len(_alternatives(kind)) else [])])


_SINGULAR = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text (in quotes, if it has brackets, `: ` or commas)",
}


def _plural(kind: Any) -> str:
    if dataclasses.is_dataclass(kind) or typing.get_origin(kind) is dict:
        return "mappings"
    if typing.get_origin(kind) in (list, tuple):
        return f"lists of {_plural(typing.get_args(kind)[0])}"
    return {int: "whole numbers", float: "numbers", str: "texts", bool: "true or false"}.get(kind, "values")


def _example(kind: Any) -> str:
    if dataclasses.is_dataclass(kind):
        return f"{{{next(iter(fields_of(typing.cast(type, kind))))}: ...}}"
    if typing.get_origin(kind) in (list, tuple):
        inner = _example(typing.get_args(kind)[0])
        return f"[{inner}, {inner}]"
    return {int: "8", float: "0.5", str: "name", bool: "true"}.get(kind, "...")


def describe(schema: type) -> list[KeyInfo]:
    """Returns the documentation of a dataclass's fields, from its source: types and the texts below the fields."""
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
