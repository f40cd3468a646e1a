#!/usr/bin/env bash
# Installs fedlabel into .venv (once), trains four methods with four seeds each on a federation with three kinds of
# label, and prints a table; curves and a report page are beside it. Safe to run again: each call has its own folder.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh
SECONDS=0
setup_venv ""
echo "Set up in $SECONDS s."

out="runs/demo/$(date +%Y%m%d-%H%M%S)"
mkdir -p "$out"
cat <<TEXT

Ten clients hold scikit-learn's digits. Three know the true label of a tenth of their images, three only a set of five or
six classes that holds it, four a label of each image that is wrong in 40 % of the cases.

  labels as they are   training on everything that looks like a label
  FedLabel             and on pseudo-labels for the other images
  ILL                  one EM over all three kinds: it also learns what the noise is like
  fully labelled       every true label: what could be reached at best

16 trainings, four for each: up to two minutes on two idle cores. They go to $out.

TEXT
SECONDS=0
fedlabel sweep sweep/demo.yaml --workers 2 --out "$out" 2>"$out/messages.log" || { tail -n 5 "$out/messages.log" >&2; exit 1; }
fedlabel compare "$out"
echo
echo "Trained in $SECONDS s. Accuracy in %, mean ± standard deviation over four seeds; p: paired t test, corrected (Holm)."
echo "Curves:      $out/curves-all.png"
echo "Everything:  $out/report.html, or .venv/bin/fedlabel tensorboard $out"
echo "How learning rates were chosen, and more rows: docs/results/demo.md"
