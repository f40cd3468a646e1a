"""The model that a run ended with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedlabel.errors import RunError
from server.final_model import final_model
from tests.integration.tiny import final_weights, run_tiny


def test_it_is_the_one_that_was_evaluated(tmp_path: Path) -> None:
    result = run_tiny(tmp_path, "run", "num_rounds=2")
    experiment, model = final_model(result.path)
    split = experiment.evaluates_on.split
    logits = model(experiment.transform.normalize(split.images))
    accuracy = float((logits.argmax(1) == split.labels).double().mean())
    assert accuracy == pytest.approx(result.summary["eval/accuracy"]["last"])
    weights = final_weights(result.path)
    with torch.no_grad():
        again = torch.func.functional_call(experiment.teacher, weights, (experiment.transform.normalize(split.images),))
    assert torch.equal(logits, again)


def test_a_run_that_is_not_finished_has_none(tmp_path: Path) -> None:
    path = run_tiny(tmp_path, "run", "num_rounds=2").path
    text = (path / "config.yaml").read_text()
    (path / "config.yaml").write_text(text.replace("num_rounds: 2", "num_rounds: 3"))
    with pytest.raises(RunError, match="has done 2 of 3 rounds: resume it first"):
        final_model(path)
    with pytest.raises(ValueError, match="cannot be written or read"):
        final_model(tmp_path / "none")
