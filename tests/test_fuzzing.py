"""Some cases of every door's fuzzer; `python scripts/fuzz.py` does more."""

import importlib
import pkgutil
import time

import pytest

import tests.fuzzing
from tests.fuzzing import limited

CASES = {"replies": 300}
"""Area -> cases; 100 of any other."""
SECONDS = 60
"""That a case may take; all take less than one, but for those on a machine that is busy otherwise."""


@pytest.mark.parametrize("area", sorted(module.name for module in pkgutil.iter_modules(tests.fuzzing.__path__)))
def test_wrong_input_is_refused_in_one_sentence(area, tmp_path):
    case = importlib.import_module(f"tests.fuzzing.{area}").case
    wrong = {}
    for seed in range(CASES.get(area, 100)):
        folder = tmp_path / str(seed)
        folder.mkdir()
        if found := limited(case, seed, folder, SECONDS):
            wrong[seed] = found
    assert not wrong


def test_a_case_that_hangs_is_stopped_and_said(tmp_path):
    def hang(seed, folder):
        while True:
            try:
                time.sleep(10)
            except Exception:
                continue

    assert limited(hang, 7, tmp_path, 0.05) == "took more than 0.05 s"
    assert limited(lambda seed, folder: f"{seed} is wrong", 7, tmp_path, 0.05) == "7 is wrong"
    time.sleep(0.1)  # nothing rings any more
