"""Configuration: what wins, what is refused, and with which words."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedlabel.config import (
    ConfigError,
    ExperimentConfig,
    Unavailable,
    flatten,
    load_config,
    load_recorded,
    parse_config,
    to_yaml,
)
from fedlabel.data.labels.supervision_config import MixPart, SupervisionConfig
from fedlabel.data.partition import LabeledPartitionConfig
from fedlabel.data.sets.config import DataConfig
from fedlabel.data.skew import SkewConfig
from fedlabel.methods import METHODS, recipe_of
from fedlabel.methods.fedlabel import FedLabel
from fedlabel.methods.supervised import Supervised
from fedlabel.models import ModelConfig
from tests.methods.recipes import task


def test_defaults_are_fedlabel_on_digits() -> None:
    config = load_config()
    assert config == ExperimentConfig()
    assert config.method == FedLabel()
    assert config.data.name == "digits"


def test_later_files_and_overrides_win(tmp_path: Path) -> None:
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("seed: 1\ntraining: {lr: 0.5, batch_size: 8}\nmethod: {name: supervised, oracle_labels: false}\n")
    second.write_text("training: {lr: 0.25}\n")
    config = load_config([first, second], ["training.batch_size=16", "method.oracle_labels=true"])
    assert (config.seed, config.training.lr, config.training.batch_size) == (1, 0.25, 16)
    assert config.method == Supervised(oracle_labels=True)


def test_text_form_reads_back_equal() -> None:
    config = load_config([], ["method.lambda_0=0.5", "strategy.name=FedAdam", "strategy.args.eta=0.01", "seed=3"])
    assert parse_config(to_yaml(config)) == config
    assert flatten(config)["strategy.args.eta"] == 0.01
    assert flatten(config)["method.lambda_0"] == 0.5
    assert flatten(config)["training.local_epochs"] == "null"


def test_shipped_configurations_are_valid() -> None:
    root = Path(__file__).parent.parent / "configs"
    files = sorted(file for file in root.rglob("*.yaml") if file.parent.name != "sweep")  # these: test_sweep.py
    assert files
    for file in files:
        load_config([file])
        load_config([file.relative_to(root)])  # by the name below configs/


def test_method_by_import_path() -> None:
    config = load_config([], ["method.name=fedlabel.methods.supervised:Supervised", "method.oracle_labels=true"])
    assert isinstance(config.method, Supervised)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.lrr=1", r"`training.lrr` is not a configuration key. Did you mean training.lr\?$"),
        ("sed=1", r"`sed` is not a configuration key. Did you mean seed\?"),
        ("method.lambda0=1", r"`method.lambda0` is not a field of fedlabel. Did you mean method.lambda_0\?"),
        ("training.lr=fast", r"`training.lr` \(=fast\) must be a number; its default is 0.1"),
        ("seed=1.5", r"`seed` \(=1.5\) must be a whole number"),
        ("num_rounds=0", r"`num_rounds` \(=0\) must be at least 1"),
        ("fraction_train=1.5", r"`fraction_train` \(=1.5\) must lie in \(0, 1\]"),
        ("method.confidence_threshold=2", r"`method.confidence_threshold` \(=2\) must lie in \[0, 1\]"),
        ("method=fedlabel", r"`method` \(=fedlabel\) must be a mapping of keys: .* method.name="),
        ("method.name=fedlable", "Did you mean fedlabel"),
        ("method.name=FedAvg", "Take supervised, which is FedAvg on the labelled samples"),
        ("method.name=fed_sgd", "Take supervised with training.local_steps=1, which is FedSGD"),
        ("method.name=FedAdam", "how the server combines models: set strategy.name"),
        ("model.name=cnm", r"`model.name` \(=cnm\)"),
        ("data.name=digit", r"`data.name` \(=digit\)"),
        ("partition.kind=dirichet", r"`partition.kind` \(=dirichet\)"),
        ("grid.kind=rays", r"`grid.kind` \(=rays\) must be one of in_process, ray"),
        ("training", "must have the form key=value"),
        ("training=3", r"`training` \(=3\) must be a mapping of keys: .* training.lr=0.1"),
        ("strategy.args.eta=1", "must be empty for strategy.name=weighted_mean"),
        ("evaluation.every=0", r"`evaluation.every` \(=0\)"),
        ("checkpoint.keep=0", r"`checkpoint.keep` \(=0\)"),
    ],
)
def test_user_errors_are_one_message_with_key_value_and_fix(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_config([], [override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("num_rounds=1e1", "1e1"),  # the schema's own message, the others are of dataclasses
        ("num_rounds=True", "True"),
        ("num_rounds=-00", "-00"),
        ("training.lr=-.Inf", "-.Inf"),
        ("training.momentum=1e0", "1e0"),
        ("fraction_train=+2", "+2"),
        ("training.nesterov=true", "true"),
        ("model.hidden_layers=[1e1, '8', true]", "[1e1, '8', true]"),
        ("model.hidden_layers=[08]", "[08]"),
        ("strategy.args={eta: 1e-2}", "{eta: 1e-2}"),
    ],
)
def test_a_message_has_the_value_as_it_was_written(override: str, value: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config([], ["seed=1", override])
    assert f"`{override.partition('=')[0]}` (={value})" in str(caught.value)


def test_the_last_of_several_values_is_the_one_that_was_written(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("training: {lr: -1e0}\n")
    with pytest.raises(ConfigError, match=r"`training.lr` \(=-1e0\)"):
        load_config([tmp_path / "a.yaml"])
    with pytest.raises(ConfigError, match=r"`training.lr` \(=-1.00\)"):
        load_config([tmp_path / "a.yaml"], ["training.lr=-1.00"])


def test_numbers_and_truth_values_in_quotes_are_read_as_if_they_had_none() -> None:
    plain = ["num_rounds=3", "training.lr=1e-2", "evaluation.figures=false", "model.hidden_layers=[8]"]
    quoted = ['num_rounds="3"', "training.lr='1e-2'", "evaluation.figures='false'", "model.hidden_layers=['8']"]
    assert load_config([], ["model.name=mlp", *quoted]) == load_config([], ["model.name=mlp", *plain])


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere.yaml does not exist: looked at"):
        load_config(["nowhere.yaml"])
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1")
    with pytest.raises(ConfigError, match=r"broken.yaml is not readable YAML"):
        load_config([broken])
    listing = tmp_path / "list.yaml"
    listing.write_text("- a\n")
    with pytest.raises(ConfigError, match="must hold a mapping"):
        load_config([listing])


def test_one_way_to_say_it_replaces_the_default_of_the_other() -> None:
    training = load_config([], ["training.local_epochs=2"]).training
    assert (training.local_steps, training.local_epochs) == (None, 2)
    supervision = load_config([], ["supervision.labels_per_class=3"]).supervision
    assert (supervision.label_rate, supervision.labels_per_class) == (None, 3)


def test_clients_with_labels_have_all_of_theirs_unless_an_amount_is_given() -> None:
    some = ["supervision.labels_at=some_clients", "supervision.labeled_clients=2"]
    assert load_config([], some).supervision.label_rate is None
    assert load_config([], [*some, "supervision.label_rate=0.5"]).supervision.label_rate == 0.5
    config = load_config([], some)
    assert parse_config(to_yaml(config)) == config
    with pytest.raises(ConfigError, match=r"`supervision.labeled_clients` \(=3\) must not exceed `num_clients` \(=2\)"):
        load_config([], [some[0], "supervision.labeled_clients=3", "num_clients=2"])


def test_law_of_their_own_for_the_labelled_samples(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("labeled_partition: {kind: iid, partitioner_args: {a: 1}}\n")
    config = load_config([file], ["labeled_partition.dirichlet_alpha=0.1"])
    law = LabeledPartitionConfig(kind="iid", dirichlet_alpha=0.1, partitioner_args='{"a": 1}')
    assert config.labeled_partition == law
    assert parse_config(to_yaml(config)) == config
    assert flatten(config)["labeled_partition.dirichlet_alpha"] == 0.1
    without = load_config([file], ["labeled_partition=null"])
    assert without.labeled_partition is None
    assert parse_config(to_yaml(without)) == without
    assert flatten(without)["labeled_partition"] == "null"


def test_classes_are_a_list_in_text_and_hashable_in_the_configuration() -> None:
    config = load_config([], ["skew.unlabeled_only_classes=[8,9]"])
    assert config.skew == SkewConfig(unlabeled_only_classes=("8", "9"))
    assert parse_config(to_yaml(config)) == config
    assert hash(parse_config(to_yaml(config)).skew) == hash(config.skew)
    assert flatten(config)["skew.unlabeled_only_classes"] == '["8", "9"]'
    assert parse_config(to_yaml(config), ["skew.unlabeled_only_classes=[]"]).skew == SkewConfig()


def test_lists_of_data_and_model_survive_yaml() -> None:
    """Numbers of classes become texts, and null is not the same as no column."""
    asked = ["data.positive_classes=[3,8]", "model.name=mlp", "model.hidden_layers=[16,8]"]
    config = load_config([], asked)
    assert config.data == DataConfig(positive_classes=("3", "8"))
    assert config.model == ModelConfig(name="mlp", hidden_layers=(16, 8))
    assert parse_config(to_yaml(config)) == config
    table = load_config([], ["data.name=bank_marketing", "data.drop_columns=[]", "data.categorical=[day]"]).data
    assert (table.drop_columns, table.categorical) == ((), ("day",))
    assert hash(table) != hash(load_config([], ["data.name=bank_marketing"]).data)
    assert load_config([], ["data.name=bank_marketing", "data.drop_columns=null"]).data.drop_columns is None


@pytest.mark.parametrize("name", ["fedlc", "fedrs", "fedrod"])
def test_a_client_prior_is_not_corrected_for_twice(name: str) -> None:
    message = rf"`prior.kind` \(=em\) corrects for a client's classes, and so does .* `method.name` \(={name}\)"
    with pytest.raises(ValueError, match=message):
        load_config([], [f"method.name={name}", "prior.kind=em"])
    assert load_config([], [f"method.name={name}"]).method.name == name
    assert load_config([], ["method.name=supervised", "prior.kind=em"]).prior.kind == "em"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["labeled_partition=iid"], r"`labeled_partition` \(=iid\) must be a mapping .* labeled_partition.kind="),
        (
            ["labeled_partition.kin=iid"],
            r"`labeled_partition.kin` is not a configuration key. Did you mean labeled_partition.kind\?",
        ),
        (["labeled_partition.kind=id"], r"`labeled_partition.kind` \(=id\).*Did you mean iid"),
        (
            ["labeled_partition.kind=iid", "supervision.labels_at=server"],
            r"`supervision.labels_at` \(=server\) .*labeled_partition=null",
        ),
        (
            ["labeled_partition.kind=iid", "supervision.labels_per_client=4"],
            r"`supervision.labels_per_client` \(=4\) contradicts labeled_partition.*take labels_per_class",
        ),
        (
            ["labeled_partition.kind=iid", "supervision.kind=full"],
            r"`supervision.kind` \(=full\).*set labeled_partition=null",
        ),
        (
            ["data.positive_classes=ship"],
            r"`data.positive_classes` \(=ship\) must be a list of texts, e.g. data.positive_classes=",
        ),
        (["data.positive_classes=[[1]]"], r"`data.positive_classes` \(=\[\[1\]\]\) must be a list of texts"),
        (["data.drop_columns={a: b}"], r"`data.drop_columns` \(=\{a: b\}\) must be a list of texts"),
        (["data.categorical=age"], r"`data.categorical` \(=age\) must be a list of texts"),
        (
            ["model.hidden_layers=[8,x]"],
            r"`model.hidden_layers` \(=\[8, x\]\) must be a list of whole numbers, e.g. model.hidden_layers=\[8, 8\]",
        ),
        (["skew.unlabeled_only_classes=3"], r"`skew.unlabeled_only_classes` \(=3\) must be a list of texts"),
        (["skew.unlabeled_only_classes=[[1]]"], r"`skew.unlabeled_only_classes` \(=\[\[1\]\]\) must be a list"),
        (["skew.labeled_imbalance=0"], r"`skew.labeled_imbalance` \(=0\)"),
    ],
)
def test_labels_and_skew_that_cannot_be(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config([], overrides)


# Kinds of label, and mixes of them.

MIX = "supervision.mix=[{share: 0.25, kind: partial, partial_ratio: 0.3}, {share: 0.5, labels_per_client: 3}]"


def test_a_mix_in_yaml_and_on_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "mix.yaml"
    file.write_text(
        "supervision:\n  mix_over: samples\n  mix:\n"
        "    - {share: 0.5, kind: noisy, noise: file, labels_file: a.npz, labels_keys: [x, y]}\n"
        "    - {share: 0.3}\n"
    )
    config = load_config([file])
    shipped = MixPart(
        share=0.5, kind="noisy", noise="file", labels_file="a.npz", labels_keys=("x", "y"), label_rate=None
    )
    assert config.supervision == SupervisionConfig(mix=(shipped, MixPart(share=0.3)), mix_over="samples")
    assert all(type(part) is MixPart for part in config.supervision.mix)
    replaced = load_config([file], [MIX])  # a list is replaced as a whole
    partial = MixPart(share=0.25, kind="partial", partial_ratio=0.3, label_rate=None)
    few = MixPart(share=0.5, labels_per_client=3, label_rate=None)
    assert replaced.supervision == SupervisionConfig(mix=(partial, few), mix_over="samples")
    for each in (config, replaced):
        assert parse_config(to_yaml(each)) == each
        assert hash(parse_config(to_yaml(each)).supervision) == hash(each.supervision)
    flat = flatten(replaced)
    assert json.loads(str(flat["supervision.mix"]))[1]["labels_per_client"] == 3
    assert flat["supervision.mix"] != flatten(config)["supervision.mix"]
    assert parse_config(to_yaml(config), ["supervision.mix=[]", "supervision.mix_over=clients"]) == load_config()
    assert flatten(load_config())["supervision.mix"] == "[]"


@pytest.mark.parametrize(
    ("overrides", "rate"),
    [
        ([], 0.1),
        (["supervision.kind=full"], 0.1),
        (["supervision.kind=partial", "supervision.partial_ratio=0.3"], None),
        (["supervision.kind=noisy", "supervision.noise_rate=0.3"], None),
        (["supervision.kind=noisy", "supervision.noise_rate=0.3", "supervision.label_rate=0.4"], 0.4),
        (["supervision.kind=noisy", "supervision.noise_rate=0.3", "supervision.labels_total=9"], None),
        (
            ["supervision.kind=partial_and_noisy", "supervision.noise_rate=0.3", "supervision.partial_ratio=0.3"],
            None,
        ),
    ],
)
def test_imprecise_labels_are_those_of_all_samples_unless_an_amount_is_given(
    overrides: list[str], rate: float | None
) -> None:
    config = load_config([], overrides)
    assert config.supervision.label_rate == rate
    assert parse_config(to_yaml(config)) == config


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["supervision.mix=[{share: 0.5}, {share: 0.5, kindd: partial}]"],
            r"`supervision.mix\[1\].kindd` is not .* Did you mean supervision.mix\[1\].kind\?",
        ),
        (
            ["supervision.mix=[{kind: full}]"],
            r"supervision.mix\[0\]: `supervision.mix\[\].share` \(=0.0\) must lie in \(0, 1\]: give each part one",
        ),
        (
            ["supervision.mix=[{share: 0.5}, {share: 0.5, kind: partial}]"],
            r"supervision.mix\[1\]: `supervision.partial_ratio` \(=None\) must be given",
        ),
        (
            ["supervision.mix=[{share: 0.5}, {share: much}]"],
            r"`supervision.mix\[1\].share` \(=much\) must be a number; its default is 0.0",
        ),
        (
            ["supervision.mix=[{share: 0.5, labels_total: 2.5}]"],
            r"`supervision.mix\[0\].labels_total` \(=2.5\) must be a whole number",
        ),
        (
            ["supervision.mix=[{share: 0.5, labels_keys: x}]"],
            r"`supervision.mix\[0\].labels_keys` \(=x\) must be a list of texts",
        ),
        (["supervision.labels_keys=x"], r"`supervision.labels_keys` \(=x\) must be a list of texts"),
        (["supervision.mix=[{share: 0.6}, {share: 0.6}]"], r"The shares of `supervision.mix` sum to 1.2"),
        (["supervision.mix=half"], r"`supervision.mix` \(=half\) must be a list of mappings, e.g. supervision.mix=\["),
        (["supervision.mix={share: 0.5}"], r"`supervision.mix` \(=\{share: 0.5\}\) must be a list of mappings"),
        (["supervision.mix=[half]"], r"`supervision.mix` \(=\[half\]\) must be a list of mappings"),
        (["supervision.mix=null"], r"`supervision.mix` \(=null\) must be a list of mappings"),
        (
            ["supervision.mix.0.share=0.5"],
            r"`supervision.mix` \(=\{'0': \{share: 0.5\}\}\) must be a list of mappings",
        ),
        (
            [MIX, "supervision.mix.0.share=0.5"],
            r"`supervision.mix` \(=\{'0': \{share: 0.5\}\}\) does not fit .* A list is replaced as a whole",
        ),
        (
            [MIX, "supervision.labels_at=some_clients", "supervision.labeled_clients=2"],
            r"`supervision.labels_at` \(=some_clients\) cannot be combined with supervision.mix",
        ),
        (
            [MIX, "labeled_partition.kind=iid"],
            r"`labeled_partition` cannot be combined with supervision.mix.*: set labeled_partition=null",
        ),
        (
            ["supervision.kind=noisy", "supervision.noise_rate=0.2", "labeled_partition.kind=iid"],
            r"`supervision.kind` \(=noisy\) .* label all samples, .*set labeled_partition=null",
        ),
    ],
)
def test_kinds_of_label_that_cannot_be(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_config([], overrides)
    assert "\n" not in str(caught.value)


BAGS = ["supervision.kind=bags", "supervision.bag_size=4"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method.name=llp_bp", "num_rounds=10"], r"`num_rounds` \(=10\) ends before the last of `method.num_stages`"),
        (["method.name=llp_bp", "supervision.bag_size=0"], r"`supervision.bag_size` \(=0\)"),
    ],
)
def test_bags_that_make_no_sense_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config([], [*BAGS, *overrides])


def test_bags_leave_no_label_beside_their_counts() -> None:
    assert load_config([], [*BAGS, "method.name=llp_bp"]).supervision.label_rate is None


def test_a_part_of_a_mapping_keeps_the_methods_own_default_for_the_rest() -> None:
    """FreeMatch's mask is of kind freematch, not the fixed one that a mask is by itself."""
    mask = load_config([], ["method.name=freematch", "method.mask.ema=0.9"]).method.mask
    assert (mask.kind, mask.ema) == ("freematch", 0.9)


# Numbers that are none, or too large; classes of the user's own.


def float_keys() -> list[tuple[str, str]]:
    """(method, key) of every key that holds a number."""
    found = []
    for name in METHODS:
        for key, value in flatten(load_config([], [*SETTINGS.get(name, []), f"method.name={name}"])).items():
            if isinstance(value, float) and (key.startswith("method.") or name == "supervised"):
                found.append((name, key))
    return found


SETTINGS = {"llp_bp": ["supervision.kind=bags", "supervision.bag_size=4"]}
UNBOUNDED = {"method.lambda_bag"}
"""inf: counts are exact."""


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf", "-1", "true", "1e999", "'x'"])
def test_no_number_may_be_what_it_cannot_mean(value: str) -> None:
    """NaN passes a check like `x < 0`, and infinity one like `x >= 0`."""
    keys = float_keys()
    assert len(keys) > 60
    for method, key in keys:
        if value == ".inf" and key in UNBOUNDED:
            continue
        with pytest.raises(ConfigError, match=key.rpartition(".")[2]):
            load_config([], [*SETTINGS.get(method, []), f"method.name={method}", f"{key}={value}"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["seed=9007199254740993"], r"`seed` \(=9007199254740993\) must be a whole number in \[-9007199254740992, "),
        (["seed=1e3"], r"`seed` \(=1e3\) must be a whole number \(write 1000\)"),
        (["seed=true"], r"`seed` \(=true\) must be a whole number"),
        (["training.nesterov=3.5x"], r"`training.nesterov` \(=3.5x\) must be true or false"),
        (["seed=null"], r"`seed` \(=null\) must be a whole number; its default is 0"),
        (["data.root=null"], r"`data.root` \(=null\) must be a text"),
        (["data.root=[a]"], r"`data.root` \(=\[a\]\) must be a text \(in quotes, if it has brackets"),
        (["data.train_samples=many"], r"`data.train_samples` \(=many\) must be a whole number or null"),
        (["strategy.args=[1,2,3]"], r"`strategy.args` \(=\[1, 2, 3\]\) must be a mapping, e.g. \{name: value\}"),
        (["method.name=[1,2]"], r"`method.name` \(=\[1, 2\]\) must be a text"),
        (["supervision.mix=.inf"], r"`supervision.mix` \(=.inf\) must be a list of mappings"),
        (["model.hidden_layers=[1e9]"], r"must be a list of whole numbers, e.g. .* \(write 1000000000\)"),
        (["model.width=9223372036854775807"], r"`model.width` \(=9223372036854775807\) must be a whole number in"),
        (["model.hidden_layers=[[1]]"], r"`model.hidden_layers` \(=\[\[1\]\]\) must be a list of whole numbers"),
        (["model.width=65537"], r"`model.width` \(=65537\) must lie in \[1, 65536\]"),
        (["model.name=mlp", "model.hidden_layers=[1048577]"], r"at most 100 widths in \[1, 1048576\]"),
        (["augment.num_ops=1000000000"], r"`augment.num_ops` \(=1000000000\) must lie in \[1, 14\]"),
        (["grid.num_workers=100000"], r"`grid.num_workers` \(=100000\) must lie in \[1, 1024\]"),
        (["grid.timeout=1e10"], r"`grid.timeout` \(=1e10\) must lie in \(0, 1e\+09\]"),
        (["method.name=forward", "method.matrix=[1,2]"], r"`method.matrix` .* a list of lists of numbers, e.g."),
        (["method.name=forward", "method.matrix=[{a: 1}]"], r"`method.matrix` .* a list of lists of numbers, e.g."),
        (["method.name=forward", "method.matrix=[[null]]"], r"`method.matrix` .* a list of lists of numbers, e.g."),
    ],
)
def test_types_and_sizes(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config([], overrides)


OWN = """
import abc
from dataclasses import dataclass, field
from fedlabel.methods.recipe import Method, Recipe

@dataclass(frozen=True)
class Base(Method):
    def recipe(self, task):
        return Recipe(())

@dataclass(frozen=True)
class Good(Base):
    name: str = "own:Good"
    widths: tuple[int, ...] = (1, 2)
    scales: dict[str, float] = field(default_factory=dict)

@dataclass(frozen=True)
class Fails(Base):
    def __post_init__(self):
        {}["key"]

@dataclass(frozen=True)
class Abstract(Base, abc.ABC):
    @abc.abstractmethod
    def further(self): ...

@dataclass(frozen=True)
class Sets(Base):
    classes: set = field(default_factory=lambda: {1})

@dataclass(frozen=True)
class Needs(Base):
    name: str = "own:Needs"
    weight: float = field(kw_only=True)

class Bare(Base):
    weight: float = 0.1

@dataclass(frozen=True)
class Untyped(Base):
    weight = 0.1

class Plain:
    pass

number = 3

@dataclass(frozen=True)
class Misspelt(Method):
    def recipee(self, task): ...
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "broken.py").write_text("x = 1 /\n")
    (tmp_path / "divides.py").write_text("\n1 / 0\n")
    (tmp_path / "leaves.py").write_text("import sys\nsys.exit(3)\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in ("own", "broken", "divides", "leaves"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "own:Fails",
            r"`method.name` \(=own:Fails\) cannot be made of its fields: KeyError: 'key' \(.*own.py, line 20\)",
        ),
        ("own:Abstract", r"`method.name` \(=own:Abstract\) is abstract: its class must define further"),
        ("own:Sets", r"`method.name` \(=own:Sets\) has a field .* cannot hold: fields may be bool, int"),
        ("own:Needs", "`method.weight` must be given: it has no default"),
        ("own:Bare", r"\(=own:Bare\) is no dataclass of its own: write @dataclass\(frozen=True\) above the class"),
        ("own:Plain", "must be a subclass of fedlabel.methods.recipe.Method"),
        ("own:Misspelt", r"does not define `recipe`: .* recipe\(self, task\).* Rename recipee, if that is it"),
        ("own:number", "must be a subclass of"),
        ("own:Goood", "own has no Goood. Did you mean Good"),
        ("broken:X", r"cannot be imported: SyntaxError: .*broken.py, line 1\)"),
        ("divides:X", r"cannot be imported: ZeroDivisionError: .*divides.py, line 2\)"),
        ("leaves:X", "cannot be imported: SystemExit: 3"),
        ("nowhere_at_all:X", r"cannot be imported: ModuleNotFoundError: No module named 'nowhere_at_all'\. The module"),
        ("os:system", "must be a subclass of"),
        (".own:Good", "must have the form package.module:Class"),
        ("own:Good:x", "must have the form package.module:Class"),
    ],
)
def test_methods_of_the_users_own_that_cannot_be(name: str, message: str, own: Path) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_config([], [f"method.name={name}"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("method.name=own.py:Good", r"must have the form .*\. Write own:Good \(without .py\)\.$"),
        ("method.name=./own.py:Good", r"Write own:Good \(without .py\)\.$"),
        ("model.name=own.py:build", r"must have the form .*\. Write own:build \(without .py\)\.$"),
        ("method.name=own", r"own.py is here: write own:Base or own:Good or own:Fails or own:Abstract or own:Sets\.$"),
        ("model.name=few.py", r"few.py is here: write few:build or few:Net\.$"),
        ("model.name=few", r"few.py is here: write few:build or few:Net\.$"),
        ("method.name=broken", r"broken.py is here: write broken:NAME, with a name that it defines\.$"),
        ("method.name=broken:X", r"SyntaxError: invalid syntax \(.*broken.py, line 1\)\.$"),
    ],
)
def test_files_in_place_of_modules(given: str, message: str, own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (own / "few.py").write_text("import nowhere_at_all\n\ndef build(): ...\n\nclass Net: ...\n\nclass _Part: ...\n")
    monkeypatch.chdir(own)
    with pytest.raises(ConfigError, match=message):
        load_config([], [given])


def test_a_recipe_that_fails_is_one_sentence_with_its_line(own: Path) -> None:
    method = load_config([], ["method.name=own:Good"]).method
    with pytest.raises(
        ValueError, match=r"(?s)^`recipe` of `method.name` \(=own:Good\) fails: TypeError: .*'uses'"
    ) as caught:
        recipe_of(method, task(3))
    assert "own.py, line 9)" in str(caught.value)


def test_an_attribute_without_a_type_is_no_field(own: Path) -> None:
    with pytest.raises(ConfigError, match=r"an attribute of own:Untyped but no field.* write weight: float = 0.1 in"):
        load_config([], ["method.name=own:Untyped", "method.weight=0.3"])
    with pytest.raises(ConfigError, match="`method.metrics` is not a field of own:Untyped"):
        load_config([], ["method.name=own:Untyped", "method.metrics=3"])


def test_a_method_of_the_users_own_may_have_lists_and_mappings(own: Path) -> None:
    config = load_config([], ["method.name=own:Good", "method.widths=[3]", "method.scales={a: 1}"])
    assert (config.method.widths, config.method.scales) == ((3,), {"a": 1.0})
    assert parse_config(to_yaml(config)) == config
    with pytest.raises(ConfigError, match=r"`method.scales.a` \(=x\) must be a number"):
        load_config([], ["method.name=own:Good", "method.scales={a: x}"])


PRIVATE = ("privacy.kind=server", "privacy.clipping_norm=1", "privacy.noise_multiplier=1", "training.weight_by=uniform")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["evaluation.at=nodes"], r"`evaluation.at` \(=nodes\) is for data.name=nodes"),
        (["evaluation.at=clients"], r"`evaluation.at` \(=clients\) must be one of server, nodes, none"),
        (["data.schema=x"], r"`data.schema` \(=x\) is for data.name=nodes, not for digits"),
        (["data.test=x"], r"`data.test` \(=x\) is for data.name=nodes, not for digits"),
        (["data.name=nodes", "partition.kind=iid"], "`partition` describes a simulated federation"),
        (["data.name=nodes", "supervision.label_rate=0.3"], "`supervision` describes a simulated federation"),
        (["data.name=nodes", "skew.feature_shift=rotation"], "`skew` describes a simulated federation"),
        (["data.name=nodes", "data.validation_fraction=0"], r"`data.validation_fraction` \(=0\) describes"),
        (["data.name=nodes", "data.root=x"], r"`data.root` \(=x\) describes"),
        (["data.name=nodes", "evaluation.split=validation"], r"`evaluation.split` \(=validation\) describes"),
        (["data.name=nodes", "evaluation.select=instance_loss"], r"`evaluation.select` \(=instance_loss\) describes"),
        (["data.name=nodes", "method.name=supervised", "method.oracle_labels=true"], "true labels, which real nodes"),
        (["data.name=nodes", *PRIVATE], r"`privacy.kind` \(=server\) does not cover the counts of labels"),
    ],
)
def test_keys_of_a_simulation_and_of_real_nodes_do_not_go_together(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config([], overrides)
    assert load_config([], ["data.name=nodes", "evaluation.at=nodes"]).data.name == "nodes"


RECORDED = """
from dataclasses import dataclass, field

from fedlabel.methods.supervised import Supervised


@dataclass(frozen=True)
class Own(Supervised):
    width: float = 3
    tag: str = "1e5"
    inner: dict = field(default_factory=lambda: {"a": 1})
    sizes: tuple[int, ...] = (1, 2)
    most: float | None = None
"""


def test_a_recorded_method_that_cannot_be_imported_keeps_its_name_and_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "recorded_method.py").write_text(RECORDED)
    with monkeypatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        config = load_config([], ["method.name=recorded_method:Own", "method.width=0.5", "method.oracle_labels=true"])
        file = tmp_path / "config.yaml"
        file.write_text(to_yaml(config))
        assert type(load_recorded(file).method) is type(config.method)
    del sys.modules["recorded_method"]
    recorded = load_recorded(file)
    assert isinstance(recorded.method, Unavailable)
    assert recorded.method.oracle_labels
    assert to_yaml(recorded) == to_yaml(config)
    assert flatten(recorded) == flatten(config)
    file.write_text(file.read_text().replace("num_rounds: 40", "num_rounds: -1"))
    with pytest.raises(ConfigError, match="num_rounds"):
        load_recorded(file)
    file.write_text("method: {name: nobody, x: 1}")
    with pytest.raises(ConfigError, match="must be one of"):
        load_recorded(file)
