"""Where the configurations are that come with fedlabel.

A checkout, and the app that Flower makes of it, has them in `configs/` beside the packages. An installed package has
them in `fedlabel/configs/`: a folder `configs` among the installed packages could be anyone's.
"""

from __future__ import annotations

from pathlib import Path

_INSTALLED = Path(__file__).resolve().parent / "configs"
CONFIGS = _INSTALLED if _INSTALLED.is_dir() else _INSTALLED.parents[1] / "configs"
"""Holds `experiment/`, `devices/` and `sweep/`."""
