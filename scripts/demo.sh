#!/usr/bin/env bash
# Installs fedlabel into .venv (once), trains three methods on scikit-learn's digits over 20 clients, prints the results.
# Safe to run again: every call writes a new folder below runs/demo/.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh
setup_venv ""

out="runs/demo/$(date +%Y%m%d-%H%M%S)"
mkdir -p "$out"
echo "Training over 20 clients with 10 % labels (some 90 seconds of processor time: a minute or two on two idle cores, longer beside other work)."
echo "Runs go to $out."
fedlabel run experiment/digits.yaml method.name=supervised --out "$out" --name labelled-only >"$out/labelled-only.log" 2>&1 &
other=$!
trap 'kill "$other" 2>/dev/null || true' EXIT
fedlabel run experiment/digits.yaml --out "$out" --name fedlabel
wait "$other"
trap - EXIT
fedlabel run experiment/digits.yaml method.name=supervised method.oracle_labels=true --out "$out" --name fully-labelled

python - "$out" <<'PY'
import json, pathlib, sys
from rich.console import Console
from rich.table import Table
table = Table("method", "test\naccuracy", "best", "worst\nclient", "pseudo-\nlabelled", "of them\nright", "seconds")
for name in ("labelled-only", "fedlabel", "fully-labelled"):
    s = json.loads((pathlib.Path(sys.argv[1]) / name / "summary.json").read_text())
    show = lambda key, column="last": f"{s[key][column]:.3f}" if key in s else "-"
    table.add_row(name, show("eval/accuracy"), show("eval/accuracy", "best"), show("eval/worst_client_accuracy"),
                  show("pseudo/coverage"), show("pseudo/accuracy"), f"{s['seconds']:.0f}")
Console().print(table)
PY
echo "One seed and a small set: FedLabel may well end below labelled-only here; docs/results.md says where methods gain and why."
echo "Look inside:  .venv/bin/fedlabel tensorboard $out"
