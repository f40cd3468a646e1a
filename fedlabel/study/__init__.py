"""Sweeps of many runs, and their comparison: plan, workers, reading runs, statistics, tables, report."""
