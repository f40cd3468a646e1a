"""Event files of the four papers' methods, read back: every tag of the table that they can make, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import fedlabel
from fedlabel.metric_tags import TAGS, find_tag

TINY = (
    *(
        "num_clients=4",
        "num_rounds=4",
        "fraction_train=1.0",
        "device=cpu",
        "model.name=mlp",
        "model.hidden_layers=[16]",
    ),
    *("data.train_samples=300", "training.local_steps=2", "training.batch_size=16", "tracking.level=full"),
    "evaluation.panel_samples=4",
)
RUNS = {
    "fedlabel": (
        *(
            "method.name=fedlabel",
            "method.burn_in_rounds=1",
            "method.confidence_threshold=0.5",
            "training.local_steps=15",
        ),
        *("supervision.label_rate=0.2", "grid.profile=true", "evaluation.select=instance_accuracy"),
    ),
    "ill": (
        "method.name=ill",
        "supervision.kind=noisy",
        "supervision.noise_rate=0.3",
        "supervision.label_rate=1",
        "method.noise.warmup_rounds=1",
    ),
    "llp_bp": (
        *("method.name=llp_bp", "method.stage_rounds=2", "method.num_stages=2", "method.lambda_bag=1"),
        *("supervision.kind=bags", "supervision.bag_size=4", "data.positive_classes=[0,1,2,3,4]"),
        "evaluation.select=bag_mae",
    ),
    "dp_ssl": (
        *("method.name=dp_ssl", "method.functions_rounds=2", "method.assignment_rounds=1"),
        *("method.label_model_rounds=2", "supervision.labels_per_class=4", "num_rounds=6"),
    ),
}
ELSEWHERE = {
    # terms of other methods' losses
    *(f"train/loss_{name}" for name in ("inter_client", "mix", "fairness", "vat")),
    *("train/kept", "pseudo/threshold"),
    # other kinds of label
    *(f"posterior/accuracy_{name}" for name in ("label", "candidates", "noisy_candidates", "annotators", "votes")),
    *("posterior/accuracy_candidates_and_labels", "transition/{annotator}"),
    *("transition/own_dominant",),  # of matrices that stay at the clients
    "pseudo/samples_newly_kept",  # of samples that a client draws twice, see test_panel.py
    # workers of another process, simulated devices, failures, differential privacy
    "privacy/epsilon",
    *("system/seconds_wait", "system/seconds_e_step"),
    *("system/virtual_seconds", "system/late_clients", "system/dropped_clients", "system/clients_in_flight"),
    *("system/staleness", "system/work_share", "system/slow_half_share", "eval/rare_class_accuracy", "failures"),
    *("comm/claimed_bytes_up", "comm/claimed_bytes_down", "clients", "select/auc", "select/loss"),
}


@pytest.fixture(scope="module")
def tags(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """Run -> the tags in its event files."""
    out = tmp_path_factory.mktemp("runs")
    return {name: tags_of(fedlabel.run([], [*TINY, *keys], name=name, out=out).path) for name, keys in RUNS.items()}


def tags_of(path: Path) -> set[str]:
    read = EventAccumulator(str(path), size_guidance={"images": 0, "tensors": 0}).Reload().Tags()
    found = [*read["scalars"], *read["images"], *read["histograms"], *read["tensors"]]
    of_tensorboard = ("_hparams_/session_start_info", "_hparams_/session_end_info", "custom_scalars__config__")
    return {tag.removesuffix("/text_summary") for tag in found} - set(of_tensorboard)


def test_nothing_is_shown_that_the_table_does_not_declare(tags: dict[str, set[str]]) -> None:
    assert {tag for each in tags.values() for tag in each if find_tag(tag) is None} == set()


def test_all_that_these_methods_can_make_is_shown(tags: dict[str, set[str]]) -> None:
    shown = {tag for each in tags.values() for tag in each}
    table = {tag.name for tag in TAGS if not tag.name.startswith("system/worker_seconds_")}
    assert sorted(table - shown - ELSEWHERE) == []
    assert sorted(ELSEWHERE & shown) == []
    everywhere = set.intersection(*tags.values())
    assert {tag.name for tag in TAGS if tag.name.startswith("about/how_to_read_")} <= everywhere
    assert {"eval/clients_over_rounds", "eval/classes", "pseudo/experts", "about/label_card", "config"} <= everywhere


def test_levels(tmp_path: Path) -> None:
    """off: no events and no pictures; basic: the metrics, and without those figures that take long."""
    supervised = [*TINY, "method.name=supervised", "num_rounds=2", "supervision.label_rate=0.5"]
    off = fedlabel.run([], [*supervised, "tracking.level=off"], name="off", out=tmp_path)
    assert {file.name for file in off.path.iterdir()} == {
        *("card.json", "checkpoints", "config.yaml", "metrics.jsonl", "partition.json", "summary.json"),
        "supervision.json",
    }
    basic = fedlabel.run([], [*supervised, "tracking.level=basic"], name="basic", out=tmp_path)
    assert "eval/confusion" in tags_of(basic.path)
    assert not {"eval/clients_over_rounds", "eval/classes"} & tags_of(basic.path)
    assert not (basic.path / "projector").exists()
    for row, other in zip(off.metrics, basic.metrics, strict=True):
        assert row.keys() == other.keys()
        assert all(row[key] == other[key] for key in row if not key.startswith("system/"))
