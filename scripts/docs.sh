#!/usr/bin/env bash
# Builds the documentation into site/ (or the folder that is given). Fails on a warning, a broken link or anchor, or a
# page that loads something from the network. To write while it is shown: mkdocs serve.
set -euo pipefail
cd "$(dirname "$0")/.."
site="$(realpath -m "${1:-site}")"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" NO_MKDOCS_2_WARNING=1
python scripts/make_docs.py --check
exec python -m mkdocs build --strict --site-dir "$site"
