"""`fedlabel audit`: from a run to suspects, and to a run after them."""

from __future__ import annotations

from pathlib import Path

import fedlabel
from fedlabel.config import load_config
from tests.cli.test_main import assert_refused, call
from tests.study.test_audit import NOISY


def test_a_run_its_audit_and_the_run_after(tmp_path: Path) -> None:
    run = fedlabel.run(overrides=[*NOISY, "num_rounds=2"], name="run", out=tmp_path).path
    assert_refused(call("audit", str(run), "--then", "delete"), "`--then` (=delete)", "drop, relabel")
    assert_refused(call("audit", str(run), "x.yaml"), "`x.yaml` must have the form key=value")
    assert not (run / "audit").exists()

    result = call("audit", str(run), "training.local_steps=10", "--folds", "2", "--then", "relabel")
    assert result.exit_code == 0, result.output
    assert "fold 2 of 2: 2 rounds of supervised" in result.output
    assert "suspects among 1,294 labels" in result.output
    assert sorted(path.name for path in (run / "audit").iterdir()) == ["audit.json", "suspects"]
    after = load_config([tmp_path / "run-relabel" / "config.yaml"])
    assert (after.supervision.audit, after.supervision.audit_action) == (str(run / "audit"), "relabel")
    assert after.training == load_config([run / "config.yaml"]).training  # those of the folds are the audit's own
    row = next(line for line in result.output.splitlines() if line.startswith("│ run-relabel"))
    assert row.count("0.") == 2

    assert_refused(call("audit", str(run), "--folds", "2"), "holds an audit already", "--then")
    assert_refused(call("audit", str(run), "--folds", "3", "--then", "drop"), "--method confident --folds 2")
    again = call("audit", str(run), "--folds", "2", "--then", "drop")
    assert again.exit_code == 0, again.output
    assert "fold" not in again.output.replace("--folds", "")
    assert (tmp_path / "run-drop" / "summary.json").is_file()
    assert_refused(call("audit", str(tmp_path / "run-drop")), "labels that an audit had changed")
