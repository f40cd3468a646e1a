#!/usr/bin/env bash
# Builds the documentation into site/ (or the folder that is given). Fails on a warning, a broken link or anchor, or a
# page that loads something from the network. To write while it is shown: mkdocs serve.
set -euo pipefail
cd "$(dirname "$0")/.."
site="$(realpath -m "${1:-site}")"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" NO_MKDOCS_2_WARNING=1
python -c 'import mkdocs, material, mkdocstrings' || { echo "It needs the extra docs: pip install -c constraints.txt -e '.[docs]'" >&2; exit 2; }
python scripts/make_docs.py --check
exec python -m mkdocs build --strict --site-dir "$site"
