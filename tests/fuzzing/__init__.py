"""Seeded wrong input, one module per door: `case(seed, folder)` does one and returns what is wrong, or None.

tests/test_fuzzing.py does some of each; `python scripts/fuzz.py` does as many as asked for.
"""
