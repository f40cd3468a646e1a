"""Imports what users name, and makes `server`, `clients` and `fedlabel` resolve to our packages, whatever other modules
have these names.

`server` and `clients` are names that people give to files of their own, and a working directory, or the folder of a
script, often comes before installed packages on `sys.path`.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import sys
import sysconfig
import traceback
from pathlib import Path
from typing import Any

from fedlabel.errors import is_file
from fedlabel.hardware import PACKAGE_ROOT
from fedlabel.names import did_you_mean

PACKAGE = str(Path(__file__).resolve().parent)
IMPORTLIB = str(Path(importlib.__file__).parent)


def claim_packages() -> None:
    """Ensures that `import clients` and `import server` give our packages in this process.

    Raises:
        ValueError: another module of such a name has been imported already.
    """
    for name in ("clients", "server"):
        file = PACKAGE_ROOT / name / "__init__.py"
        module = sys.modules.get(name)
        if module is None:
            spec = importlib.util.spec_from_file_location(name, file)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[name] = module
            spec.loader.exec_module(module)
        elif Path(module.__file__ or "").resolve() != file:
            raise ValueError(
                f"A module `{name}` that is not fedlabel's has been imported (from {module.__file__}), and fedlabel "
                "has a package of this name: give your module another name."
            )


def add_working_directory() -> None:
    """Appends the working directory to `sys.path`, after all installed packages."""
    here = os.getcwd()
    if not {"", here} & {*sys.path}:
        sys.path.append(here)


def import_path() -> list[str]:
    """Returns `sys.path` for another process: all that can be imported here, our packages before all but Python's own
    library.
    """
    library = Path(sysconfig.get_path("stdlib"))
    places = [os.path.abspath(place) for place in sys.path]
    own = [place for place in places if library in (Path(place), Path(place).parent) and "-packages" not in place]
    return list(dict.fromkeys([*own, str(PACKAGE_ROOT), *places]))


def import_attribute(key: str, name: str) -> Any:
    """Returns what a configuration names as "package.module:attribute".

    Args:
        key: of the configuration, for messages.
        name: its value, of that form.

    Raises:
        ValueError: the module cannot be imported, or has no such attribute.
    """
    module_name, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # whatever a module of the user's own does
        missing = isinstance(error, ModuleNotFoundError)
        advice = " The module must be importable from where the command runs (PYTHONPATH)." if missing else ""
        raise ValueError(f"`{key}` (={name}) cannot be imported: {describe_error(error)}.{advice}") from error
    found = getattr(module, attribute, None)
    if found is None:
        raise ValueError(f"`{key}` (={name}): {module_name} has no {attribute}.{did_you_mean(attribute, vars(module))}")
    return found


def names_file(name: str) -> bool:
    """Returns whether what should be "package.module:attribute" names a file, module.py, in place of a module."""
    return name.partition(":")[0].endswith(".py")


def form_hint(name: str, *kinds: type[ast.stmt]) -> str:
    """Returns a sentence, with a leading space, on what to write for a name that has not the form
    "package.module:attribute" but means a file; "" if it means none. Nothing is imported.

    Args:
        name: as somebody wrote it.
        kinds: statements that define what may be named, e.g. `ast.ClassDef`.
    """
    file, _, attribute = name.partition(":")
    parts = [part for part in file.removesuffix(".py").replace(os.sep, ".").split(".") if part]
    if not parts or not all(part.isidentifier() for part in parts):
        return ""
    module = ".".join(parts)
    if attribute:
        return f" Write {module}:{attribute} (without .py)." if names_file(name) and attribute.isidentifier() else ""
    path = Path(*parts[:-1], f"{parts[-1]}.py")
    if not is_file(path):
        return ""
    found = [f"{module}:{each}" for each in _defined_in(path, kinds)][:5]
    return f" {path} is here: write {' or '.join(found or [f'{module}:NAME, with a name that it defines'])}."


def _defined_in(path: Path, kinds: tuple[type[ast.stmt], ...]) -> list[str]:
    """Returns the names that a file defines at its top, without importing it; none if it cannot be read."""
    try:
        body = ast.parse(path.read_bytes()).body
    except (OSError, SyntaxError, ValueError):
        return []
    names = [
        node.name for node in body if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and isinstance(node, kinds)
    ]
    return [name for name in names if not name.startswith("_")]


def describe_error(error: BaseException) -> str:
    """Returns the type, text, file and line of an error in a user's code."""
    frames = traceback.extract_tb(error.__traceback__)
    outside = [frame for frame in frames if not frame.filename.startswith((PACKAGE, "<frozen", IMPORTLIB))]
    place = f" ({outside[-1].filename}, line {outside[-1].lineno})" if outside else ""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{type(error).__name__}: {error.msg} ({error.filename}, line {error.lineno})"
    text = str(error)
    return f"{type(error).__name__}{': ' if text else ''}{text}{place}"
