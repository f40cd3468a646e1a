"""Some cases of every door's fuzzer; `python scripts/fuzz.py` does more."""

import importlib
import pkgutil

import pytest

import tests.fuzzing

CASES = {"replies": 300}
"""Area -> cases; 100 of any other."""


@pytest.mark.parametrize("area", sorted(module.name for module in pkgutil.iter_modules(tests.fuzzing.__path__)))
def test_wrong_input_is_refused_in_one_sentence(area, tmp_path):
    case = importlib.import_module(f"tests.fuzzing.{area}").case
    wrong = {}
    for seed in range(CASES.get(area, 100)):
        folder = tmp_path / str(seed)
        folder.mkdir()
        if found := case(seed, folder):
            wrong[seed] = found
    assert not wrong
