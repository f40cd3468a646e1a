"""The output of `fedlabel list`: names, shipped configurations, and the keys of a method or section."""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fedlabel.config import ConfigError, ExperimentConfig
from fedlabel.config_names import inner_schema
from fedlabel.config_schema import describe, fields_of, hints
from fedlabel.config_text import as_yaml
from fedlabel.data.partition import FLWR_DATASETS
from fedlabel.data.sets.config import SETS
from fedlabel.methods import METHODS, method_class
from fedlabel.models import AUXILIARY_OUTPUTS, FOREIGN, MODELS, TORCHVISION
from fedlabel.names import did_you_mean
from fedlabel.shipped import CONFIGS

PARTITIONS = {
    "iid": "every client holds the same mix of classes",
    "dirichlet": "FedLabel's: a Dirichlet vector over classes for each client",
    "dirichlet_per_class": "the common one: a Dirichlet vector over clients for each class",
    "classes_per_client": "every client holds a few classes",
    "quantity_skew": "clients differ in how many samples they hold",
    "column": "each value of a column of the data, partition.column, is a client",
    "flwr_datasets:NAME": "a partitioner of the package flwr-datasets, e.g. flwr_datasets:ShardPartitioner",
}
LABELS = {
    "few_labels": "some samples have their true label, the others none",
    "full": "all samples have their true label",
    "partial": "candidate sets",
    "noisy": "labels that may be wrong",
    "partial_and_noisy": "candidate sets and labels that may be wrong",
    "bags": "groups of samples with the number of samples in each class",
    "labeling_functions": "votes of your own labelling functions",
}
SECTIONS = tuple(name for name, kind in hints(ExperimentConfig).items() if inner_schema(kind) is not None)
"""Keys of which `fedlabel list KEY` shows the keys below."""
_TERM = re.compile(r" +\S.{,18}? {2,}")


def choices(strategies: Sequence[str]) -> dict[str, dict[str, str]]:
    """Returns key -> name -> one-line description; `strategies`: the names that `strategy.name` may have."""
    import torchvision

    nets = [net for net in torchvision.models.list_models(torchvision.models) if net not in AUXILIARY_OUTPUTS]
    flower = dict.fromkeys(strategies[1:], "Flower's")
    return {
        "method.name": {name: method.description for name, method in METHODS.items()},
        "data.name": {name: entry.description for name, entry in SETS.items()},
        "model.name": {name: entry.description for name, entry in MODELS.items()}
        | {f"{TORCHVISION}NAME": f"untrained, by NAME: {', '.join(nets)}"}
        | FOREIGN,
        "partition.kind": PARTITIONS,
        "supervision.kind": LABELS,
        "strategy.name": {strategies[0]: "weighted mean of the clients' models (default)"} | flower,
        "fedlabel run": shipped("experiment"),
        "fedlabel run EXPERIMENT": shipped("devices"),
        "fedlabel sweep": shipped("sweep"),
    }


def shipped(folder: str) -> dict[str, str]:
    """Returns the YAML files of a folder of `configs/`, each with the first sentence of its comment."""
    files = sorted((CONFIGS / folder).glob("*.yaml"))
    return {path.relative_to(CONFIGS).as_posix(): _first_sentence(path) for path in files}


def _first_sentence(path: Path) -> str:
    comment = []
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        comment.append(line.lstrip("# "))
    return " ".join(comment).partition(". ")[0].rstrip(".")


def about(name: str, width: int, strategies: Sequence[str] = ("weighted_mean",)) -> Iterator[str]:
    """Yields lines that describe a method (by the name that `method.name` may have) or a section of the configuration.

    Args:
        name: of the method or section.
        width: of a line.
        strategies: see `choices`.

    Raises:
        ConfigError: there is neither; it says so where the name is a value of some key.
    """
    if name == "method":
        raise ConfigError(
            f"`method` has other keys for every method: fedlabel list METHOD, one of {', '.join(METHODS)}."
        )
    if name in SECTIONS:
        schema = inner_schema(hints(ExperimentConfig)[name])
        assert schema is not None
        yield from _laid_out(inspect.getdoc(schema) or "", width)
        yield from _keys(schema, name, width)
        return
    takers = _takers(name, strategies) if name not in METHODS else []
    if takers:
        every = " or ".join(takers)
        raise ConfigError(f"`{name}` is neither a method nor a section but a value of {every}: {takers[0]}={name}.")
    if name in METHODS or ":" in name:
        try:
            method = method_class(name)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        yield from _wrapped(f"method.name={name}: {method.description}", width, "", "    ")
        yield ""
        yield from _laid_out(inspect.getdoc(sys.modules[method.__module__]) or "", width)
        yield from _keys(method, "method", width)
        return
    names = [*METHODS, *SECTIONS]
    raise ConfigError(
        f"`{as_yaml(name)}` is neither a method nor a section of the configuration. Allowed: "
        f"{', '.join(names)}.{did_you_mean(name, names)}"
    )


def _takers(value: str, strategies: Sequence[str]) -> list[str]:
    """Returns the keys that accept a value: those of `choices`, and those whose documentation begins with "a | b"."""
    found = [key for key, rows in choices(strategies).items() if "." in key and value in rows]
    prefixes = {TORCHVISION: "model.name", FLWR_DATASETS: "partition.kind"}
    found += [key for prefix, key in prefixes.items() if value.startswith(prefix)]
    schemas = [("", ExperimentConfig), *(("method.", method) for method in METHODS.values())]
    return list(dict.fromkeys([*found, *(key for prefix, schema in schemas for key in _naming(value, schema, prefix))]))


def _naming(value: str, schema: type, prefix: str) -> Iterator[str]:
    for key in describe(schema):
        inner = inner_schema(hints(schema)[key.name])
        if inner is not None:
            yield from _naming(value, inner, f"{prefix}{key.name}.")
        elif (alternatives := re.match(r"\w+( \| \w+)+", key.doc)) and value in alternatives[0].split(" | "):
            yield f"{prefix}{key.name}"


def _keys(schema: type, where: str, width: int, base: object = None) -> Iterator[str]:
    """Yields the keys below `where` with type, default (that of `base`, if given) and documentation."""
    if where == "method" and set(fields_of(schema)) == {"name"}:
        yield from ("", "It has no keys of its own.")
    for key in describe(schema):
        if where == "method" and key.name == "name":
            continue
        inner = inner_schema(hints(schema)[key.name])
        default = getattr(base, key.name, key.default)
        yield ""
        if inner is not None:
            yield f"{where}.{key.name}.*"
            yield from _laid_out(key.doc or inspect.getdoc(inner) or "", width, "    ")
            yield from _keys(inner, f"{where}.{key.name}", width, default)
            continue
        yield from _wrapped(f"{where}.{key.name} ({key.type}), default {_default(default)}", width, "", "    ")
        yield from _wrapped(key.doc, width, "    ")


def _default(value: Any) -> str:
    if value is dataclasses.MISSING:
        return "none: it must be given"
    return '""' if value == "" else str(value).lower() if isinstance(value, bool) else as_yaml(value)


def _laid_out(docstring: str, width: int, margin: str = "") -> Iterator[str]:
    """Yields the lines of a docstring, wrapped anew: paragraphs, items of lists and indented lines stay apart."""
    items: list[list[str]] = []
    for line in docstring.splitlines():
        if items and line.strip() and _continues(line, items[-1][0]):
            items[-1].append(line)
        else:
            items.append([line])
    for first, *others in items:
        indent = first[: _indentation(first)]
        term = _TERM.match(first)  # with a column of its own, where the text beside it is aligned
        if others:
            hanging = others[0][: _indentation(others[0])]
        else:
            hanging = " " * len(term[0]) if term else indent + "  " * bool(indent or _is_item(first))
        text = " ".join([first.strip(), *(other.strip() for other in others)])
        if not term and len(margin + first) > width:
            text = " ".join(text.split())  # no room for columns
        yield from _wrapped(text, width, margin + indent, margin + hanging) or [""]


def _continues(line: str, first: str) -> bool:
    """Whether a line goes on with the paragraph, list item or indented line that begins with the line `first`."""
    if not first.strip() or _is_item(line):
        return False
    within = bool(_indentation(first)) or _is_item(first)
    return _indentation(line) > _indentation(first) if within else not _indentation(line)


def _is_item(line: str) -> bool:
    return line.lstrip().startswith("- ")


def _indentation(line: str) -> int:
    return len(line) - len(line.lstrip())


def _wrapped(text: str, width: int, first: str = "", later: str | None = None) -> list[str]:
    later = first if later is None else later
    wrapper = textwrap.TextWrapper(
        max(width, 20), initial_indent=first, subsequent_indent=later, break_long_words=False, break_on_hyphens=False
    )
    return wrapper.wrap(text)
