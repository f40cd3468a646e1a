"""Comparing finished runs: `runs` reads them, `statistics` computes, `output` writes tables, curves and a report."""
