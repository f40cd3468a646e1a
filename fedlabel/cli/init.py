"""`fedlabel init`: a small project of one's own, from the files in `template/`."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from fedlabel.errors import make_folder, naming

ORDER = ("config.yaml", "method.py", "labeling_functions.py", "votes.yaml", "README.md")
"""The files of a project, as they are named to the user."""


def make_project(folder: Path) -> list[Path]:
    """Writes the files of a project, and returns their paths.

    Raises:
        ValueError: the folder holds a file or folder of such a name already; nothing is written then.
        FileError: the system does not let us write.
    """
    with naming(folder):
        taken = [name for name in ORDER if (folder / name).exists()]
    if taken:
        raise ValueError(
            f"{folder} holds {', '.join(taken)} already, and nothing is overwritten: give a new or an empty folder."
        )
    make_folder(folder)
    template = files("fedlabel.cli") / "template"
    for name in ORDER:
        with naming(folder / name), open(folder / name, "x", encoding="utf-8", newline="\n") as file:
            file.write((template / name).read_text(encoding="utf-8"))
    return [folder / name for name in ORDER]
