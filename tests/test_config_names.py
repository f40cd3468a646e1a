"""Keys that do not exist: what is meant, or whose they are."""

from __future__ import annotations

import pytest

from fedlabel.config import ConfigError, ExperimentConfig, load_config
from fedlabel.config_names import CALLED_ELSEWHERE, all_keys
from fedlabel.methods import METHODS


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (
            "training.learning_rate=1",
            r"`training.learning_rate` is not a configuration key. Did you mean training.lr\?",
        ),
        ("learning_rate=1", r"Did you mean training.lr\?"),
        ("lr=1", r"Did you mean training.lr\?"),
        ("epochs=1", r"Did you mean num_rounds or training.local_epochs\?"),
        ("training.epochs=1", r"Did you mean training.local_epochs or num_rounds|num_rounds or training.local_epochs"),
        ("n_clients=1", r"Did you mean num_clients\?"),
        ("training.num_clients=1", r"Did you mean num_clients\?"),
        ("alpha=1", r"Did you mean partition.dirichlet_alpha\?"),
        ("dataset=digits", r"Did you mean data.name\?"),
        ("data.path=x", r"Did you mean data.root\?"),
        ("gpu=0", r"Did you mean device\?"),
        ("wd=0", r"Did you mean training.weight_decay\?"),
        ("workers=2", r"Did you mean grid.num_workers\?"),
        ("random_state=2", r"Did you mean seed\?"),
        ("fraction_fit=.1", r"Did you mean fraction_train\?"),
        ("proximal_mu=.1", r"Did you mean training.prox_mu\?"),
        ("server_lr=.1", r"Did you mean strategy.args.eta\?"),
        ("num_classes=3", "the data set says it by itself"),
        ("output_dir=x", "an option of the command: --out"),
        ("name=x", "an option of the command: --name"),
        (
            "method.threshold=.5",
            r"is not a field of fedlabel, but of llp_bp. Did you mean method.confidence_threshold\?",
        ),
        ("method.mask.ema=.5", r"is not a field of fedlabel, but of .*fixmatch"),
        ("method.noise.scope=global", "is not a field of fedlabel, but of ill"),
        ("zzzzz=1", "`zzzzz` is not a configuration key. Allowed here: seed, device"),
    ],
)
def test_what_is_meant(override: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_config([], [override])


def test_all_keys_are_named_only_where_none_is_near() -> None:
    with pytest.raises(ConfigError) as near:
        load_config([], ["training.learning_rate=1"])
    assert str(near.value) == "`training.learning_rate` is not a configuration key. Did you mean training.lr?"
    with pytest.raises(ConfigError, match="Allowed here: lr, optimizer") as far:
        load_config([], ["training.zzzzz=1"])
    assert "Did you mean" not in str(far.value)


def test_a_key_with_a_dot_in_a_file(tmp_path) -> None:
    (tmp_path / "a.yaml").write_text("training.lr: 1\n")
    with pytest.raises(ConfigError, match=r"in a file a mapping stands for the dot, `training: \{lr: ...\}`"):
        load_config([tmp_path / "a.yaml"])


def test_all_that_is_suggested_exists() -> None:
    known = {key for method in METHODS.values() for key in all_keys(ExperimentConfig, method)}
    known |= {"strategy.args.eta", "strategy.args.server_learning_rate", "strategy.args.num_malicious_nodes"}
    assert {key for keys in CALLED_ELSEWHERE.values() for key in keys} <= known


@pytest.mark.parametrize(
    "override", ["+seed=1", "seed =1", "seed:=1", "~seed=1", "supervision.mix[0].share=1", "=1", "a..b=1"]
)
def test_forms_of_other_tools(override: str) -> None:
    with pytest.raises(ConfigError, match="must have the form key=value"):
        load_config([], [override])


@pytest.mark.parametrize("item", ["training.lr", "~training.lr", "--lr"])
def test_a_key_without_a_value_is_no_file(item: str) -> None:
    with pytest.raises(ConfigError, match="neither a configuration file nor an override, which has the form key=value"):
        load_config([item])
