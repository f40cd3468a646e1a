"""No client that follows its method is ever refused, whatever the method."""

from __future__ import annotations

from pathlib import Path

import pytest

import fedlabel
from fedlabel.cohort import ClientResult
from fedlabel.methods import METHODS
from fedlabel.metric_tags import client_tags, find_tag
from server.schema import Refused, RoundSchema

TINY = (
    *("num_clients=3", "fraction_train=1.0", "partition.kind=dirichlet", "data.train_samples=150", "model.name=mlp"),
    *("model.hidden_layers=[8]", "training.local_steps=null", "training.local_epochs=1", "training.batch_size=16"),
    *("device=cpu", "evaluation.figures=false", "evaluation.panel_samples=0"),
)
LABELS = ("supervision.label_rate=0.3", "num_rounds=1")
NOISY = ("supervision.kind=noisy", "supervision.noise=symmetric", "supervision.noise_rate=0.3", "num_rounds=1")
SETS = ("supervision.kind=partial", "supervision.partial_ratio=0.3", "num_rounds=1")
BAGS = ("supervision.kind=bags", "supervision.bag_size=4", "num_rounds=1")
OVERRIDES = {
    **{"ill": (*NOISY, "method.noise.warmup_rounds=0"), "gce": NOISY, "elr": NOISY, "co_teaching": NOISY},
    "forward": (*NOISY, "method.warmup_rounds=2", "num_rounds=3"),
    **dict.fromkeys(("proden", "cc", "lws"), SETS),
    **dict.fromkeys(("dllp", "easy_llp", "gen_bags", "count_likelihood", "llp_vat"), BAGS),
    "top_count": (*BAGS, "data.positive_classes=[0,1,2,3,4]"),
    "llp_bp": (*BAGS, "method.stage_rounds=1", "num_rounds=2"),
    "fedlabel": (*LABELS, "method.merge=mean"),
    "fedmatch": (*LABELS, "method.helper_interval=1", "num_rounds=2"),
    "fedtrinet": (*LABELS, "method.warmup_rounds=1", "num_rounds=2"),
    "dp_ssl": (
        *(*LABELS, "method.functions_rounds=2", "method.assignment_rounds=1", "method.label_model_rounds=2"),
        *("method.num_functions=4", "method.heads_per_class=4", "num_rounds=5"),
    ),
}
"""`LABELS` for all others."""
BATCH_NORM = ("model.name=cnn", "model.hidden_layers=[]", "model.norm=batch", "training.local_epochs=3")
OTHER_FORMS = {
    "ill with logits": ("method.name=ill", *NOISY, "method.noise.form=gradient", "method.noise.warmup_rounds=0"),
    "ill that aligns": ("method.name=ill", *SETS, "method.alignment=true"),
    "ill with noisy sets": (
        "method.name=ill",
        *SETS,
        "supervision.noise_rate=0.2",
        "method.set_likelihood.kind=product",
    ),
    "cbafed": ("method.name=fixmatch", *LABELS, "method.mask.kind=cbafed", "training.unlabeled_includes_labeled=true"),
    "size": ("method.name=fixmatch", *LABELS, "training.weight_by=size", "method.confidence_threshold=0"),
    "all pairs are neighbours": (
        *("method.name=llp_bp", *BAGS, "supervision.bag_size=8", "data.positive_classes=[0,1,2,3,4]", "num_clients=1"),
        *("data.train_samples=800", "method.num_neighbors=800", "method.stage_rounds=1", "method.max_iterations=1"),
        *("training.local_steps=1", "training.local_epochs=null", "num_rounds=2"),
    ),
    "batch norm": ("method.name=supervised", *LABELS, *BATCH_NORM),
    "batch norm of two parts": ("method.name=fedlabel", *LABELS, *BATCH_NORM, "method.merge=mean"),
    "batch norm of a sum": ("method.name=fedmatch", *LABELS, *BATCH_NORM, "num_rounds=2", "training.lr=0.01"),
    "batch norm of twins": ("method.name=co_teaching", *NOISY, *BATCH_NORM, "num_rounds=2"),
}


@pytest.mark.parametrize("name", [*METHODS, *OTHER_FORMS])
def test_honest_clients_are_not_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And every metric that a run writes is declared, those as a client's that clients send and no others. No client
    can make any of its statistics a million times as large: each shared state bounds them by what the client holds."""
    check, sent = RoundSchema.check, set()

    def watching(self: RoundSchema, result: ClientResult) -> ClientResult:
        sent.update(result.sums)
        for statistic, value in result.statistics.items():
            if value.any():
                exaggerated = {**result.statistics, statistic: 1e6 * value}
                with pytest.raises(Refused, match="statistic|class_mean|class_share|anchor"):
                    check(self, result._replace(statistics=exaggerated))
        return check(self, result)

    monkeypatch.setattr(RoundSchema, "check", watching)
    overrides = OTHER_FORMS.get(name) or (f"method.name={name}", *OVERRIDES.get(name, LABELS))
    result = fedlabel.run([], [*TINY, *overrides], name="x", out=tmp_path)
    failed = tmp_path / "x" / "failures.log"
    assert not failed.exists(), failed.read_text()
    for row in result.metrics:
        assert (row["system/refused_replies"], row["system/failed_clients"]) == (0, 0)
        assert not {key for key in row if find_tag(key) is None} - {"round"}
        assert set(row) & client_tags().keys() <= sent
    assert sent <= client_tags().keys()
