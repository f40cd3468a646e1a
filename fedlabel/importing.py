"""Imports what users name, and makes `server`, `clients` and `fedlabel` resolve to our packages, whatever other modules
have these names.

`server` and `clients` are names that people give to files of their own, and a working directory, or the folder of a
script, often comes before installed packages on `sys.path`.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import sysconfig
import traceback
from pathlib import Path
from typing import Any

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
        raise ValueError(
            f"`{key}` (={name}) cannot be imported: {describe_error(error)}. The module must be importable from "
            "where the command runs (PYTHONPATH)."
        ) from error
    found = getattr(module, attribute, None)
    if found is None:
        raise ValueError(f"`{key}` (={name}): {module_name} has no {attribute}.{did_you_mean(attribute, vars(module))}")
    return found


def describe_error(error: BaseException) -> str:
    """Returns the type, text, file and line of an error in a user's code."""
    frames = traceback.extract_tb(error.__traceback__)
    outside = [frame for frame in frames if not frame.filename.startswith((PACKAGE, "<frozen", IMPORTLIB))]
    place = f" ({outside[-1].filename}, line {outside[-1].lineno})" if outside else ""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{type(error).__name__}: {error.msg} ({error.filename}, line {error.lineno})"
    text = str(error)
    return f"{type(error).__name__}{': ' if text else ''}{text}{place}"
