"""Pages of HTML from the templates beside this file: one file each, which loads nothing, with every text escaped."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined


def render(template: str, **values: Any) -> str:
    """Returns a page.

    Args:
        template: name of a file in this folder; it extends page.html.jinja.
        values: what it shows.
    """
    environment = Environment(
        loader=FunctionLoader(asset), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(template).render(**values)


def asset(name: str) -> str:
    """Returns the text of a file in this folder, such as "vendor/echarts.common.min.js"."""
    return (files(__package__) / name).read_text(encoding="utf-8")
