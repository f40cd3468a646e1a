"""Makes `server`, `clients` and `fedlabel` resolve to our packages, whatever other modules have these names.

`server` and `clients` are names that people give to files of their own, and a working directory, or the folder of a
script, often comes before installed packages on `sys.path`.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import sysconfig
from pathlib import Path

from fedlabel.hardware import PACKAGE_ROOT


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
