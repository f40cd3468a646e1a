"""Writes the generated parts of docs/: methods, configuration, metrics, kinds of label, data sets, partitions.

    python scripts/make_docs.py            # after a change of a method, a key or a metric
    python scripts/make_docs.py --check    # status 1 if a page is not as it would be written

A generated part of a page stands between `<!-- begin generated: NAME -->` and `<!-- end generated -->`; the rest of the
page is written by hand.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fedlabel.cli.listing import LABELS, PARTITIONS
from fedlabel.config import ExperimentConfig
from fedlabel.config_names import inner_schema
from fedlabel.config_schema import describe, hints
from fedlabel.config_text import as_yaml
from fedlabel.data.labels.label_card import LabelCard
from fedlabel.data.sets.config import SETS
from fedlabel.methods import METHODS
from fedlabel.methods.recipe import LabelKinds, Method, Task
from fedlabel.metric_tags import FIGURE, PAGES, TAGS

DOCS = Path(__file__).resolve().parents[1] / "docs"
FAMILIES = {
    "Few labels": (
        *("supervised", "fedlc", "fedrs", "fedrod", "pseudo_label", "uda", "fixmatch", "freematch"),
        *("fedlabel", "sage", "fedmatch", "fedtrinet", "semifl"),
    ),
    "Imprecise labels: all kinds in one": ("ill",),
    "Candidate sets": ("proden", "cc", "lws"),
    "Noisy labels": ("forward", "gce", "elr", "co_teaching"),
    "Bags of known counts": (
        *("llp_bp", "dllp", "easy_llp", "gen_bags"),
        *("count_likelihood", "top_count", "llp_vat"),
    ),
    "Labelling functions": ("dp_ssl",),
}
MEASURED = {
    "Few labels": "few-labels",
    "Bags of known counts": "bags",
    "Labelling functions": "labelling-functions",
}
"""Family -> page of docs/results/, if it is not that of imprecise labels."""
USES = {
    LabelKinds.TRUE: "certain labels",
    LabelKinds.NOISY: "noisy labels",
    LabelKinds.SETS: "candidate sets",
    LabelKinds.ANNOTATIONS: "labels of several annotators",
    LabelKinds.BAGS: "bags",
    LabelKinds.VOTES: "votes of labelling functions",
    LabelKinds.AT_SERVER: "labels at the server",
}
BLANK, TEXT, ITEM, MORE, COLUMNS = "blank", "text", "item", "more of an item", "columns"
"""Kinds of line in a docstring."""
_PART = re.compile(r"(<!-- begin generated: ([a-z-]+) -->\n).*?(<!-- end generated -->)", re.DOTALL)


def escaped(text: str) -> str:
    """Returns text in which Markdown sees no HTML, but for code."""
    pieces = re.split(r"(`[^`]*`)", text)
    return "".join(piece if piece.startswith("`") else piece.replace("<", "&lt;") for piece in pieces)


def markdown_of(docstring: str) -> Iterator[str]:
    """Yields the lines of a docstring as Markdown: lists stand apart, and indented lines keep their columns."""
    kind = BLANK
    for line in [*docstring.splitlines(), ""]:
        before, kind = kind, _kind(line, kind)
        if before == COLUMNS != kind:
            yield from ("```", "")
        elif kind == COLUMNS != before:
            yield from ("", "```text")
        elif (kind == ITEM and before == TEXT) or (kind == TEXT and before in (ITEM, MORE)):
            yield ""
        yield line if kind == COLUMNS else escaped(line)


def _kind(line: str, before: str) -> str:
    """Returns what a line is, after a line of the kind `before`."""
    if not line.strip():
        return BLANK
    if line.startswith("- "):
        return ITEM
    if line.startswith("  "):
        return MORE if before in (ITEM, MORE) else COLUMNS
    return TEXT


def default_of(value: Any) -> str:
    """Returns how a default is shown."""
    if value is dataclasses.MISSING:
        return "no default: it must be given"
    text = '""' if value == "" else str(value).lower() if isinstance(value, bool) else as_yaml(value)
    return f"default `{text}`"


def keys_of(schema: type, where: str, base: object = None) -> Iterator[str]:
    """Yields an item for each key below `where`; base: an instance that has other defaults."""
    for key in describe(schema):
        if where == "method" and key.name == "name":
            continue
        full = f"{where}.{key.name}" if where else key.name
        inner = inner_schema(hints(schema)[key.name])
        default = getattr(base, key.name, key.default)
        if inner is None:
            yield f"- `{full}` ({key.type.replace('|', 'or')}), {default_of(default)}. {escaped(key.doc)}".rstrip()
        else:
            yield f"- `{full}.*`: {escaped(key.doc or ' '.join((inspect.getdoc(inner) or '').split()))}"
            yield from (f"    {line}" for line in keys_of(inner, full, default))


def kinds_of(name: str) -> str:
    """Returns the kinds of label that a method learns from, in words."""
    everything = LabelCard(100, 50, 10, 10, 10, 10, 2, 10, 0, ())
    classes = 2 if name == "top_count" else 4
    uses = METHODS[name]().recipe(Task(classes, 100, everything)).uses
    return ", ".join(words for kind, words in USES.items() if kind in uses)


def methods() -> Iterator[str]:
    """Yields a section for each method: its paper, what differs from it, its fields."""
    listed = [name for names in FAMILIES.values() for name in names]
    assert sorted(listed) == sorted(METHODS), "scripts/make_docs.py: FAMILIES does not list each method once"
    for family, names in FAMILIES.items():
        page = MEASURED.get(family, "imprecise-labels")
        yield from ("", f"## {family}", "", f"What we measured: [{page.replace('-', ' ')}](results/{page}.md).")
        for name in names:
            method: type[Method] = METHODS[name]
            yield from ("", f"### `{name}`", "")
            yield from markdown_of(inspect.getdoc(sys.modules[method.__module__]) or "")
            yield from ("", f"Learns from: {kinds_of(name)}. Source: `{method.__module__.replace('.', '/')}.py`.", "")
            fields = list(keys_of(method, "method"))
            yield from fields or ["It has no keys of its own."]
    yield ""


def configuration() -> Iterator[str]:
    """Yields a section for each section of the configuration."""
    sections = {name: schema for name, kind in hints(ExperimentConfig).items() if (schema := inner_schema(kind))}
    yield from ("", "### The run", "")
    for key in describe(ExperimentConfig):
        if key.name not in sections and key.name != "method":
            yield f"- `{key.name}` ({key.type}), {default_of(key.default)}. {escaped(key.doc)}"
    for name, schema in sections.items():
        if name == "method":
            continue
        yield from ("", f"### `{name}`", "")
        doc = next(key.doc for key in describe(ExperimentConfig) if key.name == name)
        yield from markdown_of(inspect.getdoc(schema) or "")
        yield from ("", escaped(doc), "") if doc else ("",)
        yield from keys_of(schema, name)
    yield ""


def metrics() -> Iterator[str]:
    """Yields an item for each metric, by TensorBoard's pages."""
    for page in PAGES:
        yield from ("", f"### {page}", "")
        for tag in TAGS:
            if tag.page == page:
                better = "" if tag.direction == "neither" else f"; {tag.direction} is better"
                unit = "picture or table" if tag.unit == FIGURE else tag.unit
                yield f"- `{tag.name}`: {escaped(tag.title)} ({unit}{better})"
    yield ""


def named(rows: dict[str, str]) -> Callable[[], Iterator[str]]:
    """Returns a part with an item for each name."""
    return lambda: iter(("", *(f"- `{name}`: {escaped(words)}" for name, words in rows.items()), ""))


PARTS: dict[str, Callable[[], Iterator[str]]] = {
    "methods": methods,
    "configuration": configuration,
    "metrics": metrics,
    "labels": named(LABELS),
    "partitions": named(PARTITIONS),
    "data-sets": named({name: entry.description for name, entry in SETS.items()}),
}


def made(page: str) -> str:
    """Returns the text of a page with its generated parts as they are now."""

    def part(found: re.Match[str]) -> str:
        return found[1] + "\n".join(line.rstrip() for line in PARTS[found[2]]()) + "\n" + found[3]

    return _PART.sub(part, page)


def main() -> int:
    """Writes the pages, or with --check compares them; returns the exit status."""
    check, status, used = sys.argv[1:] == ["--check"], 0, set()
    for path in sorted(DOCS.rglob("*.md")):
        old = path.read_text(encoding="utf-8")
        used |= {name for _, name, _ in _PART.findall(old)}
        new = made(old)
        if new == old:
            continue
        if check:
            status = 1
            difference = difflib.unified_diff(
                old.splitlines(), new.splitlines(), "as it is", "as it should be", "", "", 0
            )
            print(f"{path}: run python scripts/make_docs.py", *list(difference)[:20], sep="\n")
        else:
            path.write_text(new, encoding="utf-8")
            print(f"written: {path}")
    assert used == set(PARTS), f"no page has the parts {sorted(set(PARTS) - used)}"
    return status


if __name__ == "__main__":
    sys.exit(main())
