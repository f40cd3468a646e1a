#!/usr/bin/env bash
# All checks and tests, as CI runs them: formatting, lint, types, import rules, the documentation's site, then pytest
# (slow tests included).
# Installs into .venv when needed. Arguments go to pytest, e.g. `bash scripts/test.sh -m "not slow"`.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh
setup_venv "[dev,crosscheck,privacy,docs]"

echo "== ruff";        ruff format --check . && ruff check .
echo "== mypy";        mypy
echo "== import rules"; lint-imports
echo "== docs";        bash scripts/docs.sh
echo "== pytest";      exec python -m pytest -n 2 --dist loadfile "$@"
