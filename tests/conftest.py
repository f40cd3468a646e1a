"""One Ray for all tests: starting it takes longer than a run."""

from __future__ import annotations

import gc
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

os.environ.pop("COLUMNS", None)  # pytest-xdist sets it, and rich would keep to it whatever a test says
torch.set_num_threads(1)  # as runs do: sums depend on it, to the bit


@contextmanager
def unclosed_ignored() -> Iterator[None]:
    """Ray closes neither its log files nor, at once, its processes; other tests keep their ResourceWarnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        yield
        gc.collect()


@pytest.fixture(scope="session")
def shared_ray() -> Iterator[None]:
    """Ray with room for three workers; `RayGrid` uses the Ray that it finds running."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    with unclosed_ignored():
        ray.init(address="local", num_cpus=3, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
    yield
    with unclosed_ignored():
        ray.shutdown()
