"""Configuration of supervision: the kind of labels, how many, and which clients have them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from fedlabel.checks import at_least, in_unit_interval, one_of, positive, within

KINDS = ("few_labels", "full", "partial", "noisy", "partial_and_noisy", "bags", "labeling_functions")
COUNTS = ("labels_per_class", "labels_per_client", "labels_total")
HOLDERS = ("clients", "server", "some_clients")
CANDIDATES = ("uniform", "similar", "instance")
ON_ERROR = ("abstain", "stop")
AUDIT_ACTIONS = ("drop", "relabel", "weight", "candidates")
NOISE = ("symmetric", "asymmetric", "pair_flip", "instance", "randomized_response", "file")


@dataclass(frozen=True)
class LabelKind:
    """One kind of label and how many samples have it.

    The amount is one of four. `label_rate` is the default; a count replaces it, and at most one count may be given.
    """

    kind: str = "few_labels"
    """few_labels: some samples have their true label, the others none. full: all samples have it or, if the data lack
    labels, all that have one in the data. partial: a candidate set that contains the true class (with `noise_rate`:
    that may miss it). noisy: a label that may be wrong, or one of each annotator. partial_and_noisy: a candidate set
    that contains the true class and a label that may be wrong. bags: groups of a client's samples with the number of
    samples in each class. labeling_functions: the votes of the functions of `module`."""
    label_rate: float | None = 0.1
    """Share of each client's n samples with labels (of the training set for labels_at=server), in [0, 1]: exactly
    int(label_rate * n), n being those that have a label in the data. If omitted for other kinds than few_labels, or for
    labels_at=some_clients: null, all n."""
    labels_per_class: int | None = None
    """Labelled samples per class, over the whole federation (of the clients that have labels)."""
    labels_per_client: int | None = None
    """Labelled samples per client."""
    labels_total: int | None = None
    """Labelled samples in the whole federation (of the clients that have labels)."""
    stratified: bool = False
    """Whether the labelled samples have the class shares of the population they are drawn from: the client's samples,
    or for `labels_total` and labels_at=server all samples. False (FedLabel's paper): uniformly at random. No effect on
    `labels_per_class`."""
    partial_ratio: float | None = None
    """Kinds with candidates: the probability q in [0, 1] that a wrong class is a candidate; for candidates=similar and
    instance the mean over the wrong classes."""
    candidates: str = "uniform"
    """uniform: every wrong class with probability q. similar: classes that a small network confuses with the true one
    more often. instance: those that it predicts for this sample (Xu et al., 2021)."""
    noise: str = "symmetric"
    """Kinds with noisy labels. symmetric: a class drawn from all, the true one among them. asymmetric: a fixed similar
    class, defined for MNIST, digits, Fashion-MNIST and CIFAR. pair_flip: the next class. instance (our own noise, not
    that of Xia et al., 2020): a wrong class that a small network predicts, for the samples that it finds hard.
    randomized_response: by `label_epsilon`. file: from `labels_file`."""
    noise_rate: float = 0.0
    """noisy: the share of samples whose label is redrawn (symmetric: from all classes, so that of 10 classes a rate of
    .4 leaves .64 of the labels right), exact per federation (symmetric, instance) or class (asymmetric, pair_flip).
    partial: the probability that a class outside the set replaces the true class in it."""
    label_epsilon: float | None = None
    """noise=randomized_response: each label is epsilon-differentially private by itself (Warner, 1965; Kairouz et al.,
    "Extremal Mechanisms for Local Differential Privacy", NeurIPS 2014): of C classes it is the true one with
    probability e^epsilon / (e^epsilon + C - 1), else one of the others. A simulation: the noise comes from `seed`."""
    labels_file: str | None = None
    """noise=file: a .npz, .npy, CSV or Parquet file below `data.root` (data.name=npz or table: beside it), with labels
    in the order of the data set's training samples; of a table whose test set is split off: of all rows of its file, of
    which test rows are not looked at. A label is the name of a class, or its number from 0 where classes are not named
    by numbers; -1 (unless it is the name of a class), NaN or an empty text is none."""
    labels_keys: tuple[str, ...] = ()
    """noise=file: arrays or columns of the file; empty: all. One column is a noisy label; several, or an array of
    several columns, are the labels of as many annotators. In a mix each part has its own annotators."""
    vote: bool = False
    """noise=file, several annotators: their majority label becomes one noisy label; ties are broken at random."""
    bags_file: str | None = None
    """kind=bags: published counts, in place of counts made of labels (`bag_size`). A CSV or Parquet file below
    `data.root` (data.name=npz or table: beside it), with the name of a bag in its first column and how many of its
    samples are in a class in each of the others, which are named by the classes. No training sample needs a label.
    Bags stay whole: a partition that draws deals out bags, as if each were all of its most frequent class; and no
    sample may be held out (data.validation_fraction=0, and a data.test_file)."""
    bag_column: str | None = None
    """Of bags_file: the column of a table (with data.name=npz the array) that has the name of each sample's bag; empty
    = in none. It is no feature."""
    bag_size: int | None = None
    """kind=bags: samples per bag; a client's last bag may be smaller."""
    bag_size_max: int | None = None
    """kind=bags: sizes are drawn from bag_size to this; null: all are `bag_size`."""
    bag_feature: str | None = None
    """kind=bags: samples with neighbouring values of this feature (a table's column, or the number of an image's pixel
    from 0) share a bag; null: bags are drawn at random."""
    module: str | None = None
    """kind=labeling_functions: a module of functions, or the path of its file, which every node imports; see
    `fedlabel/data/labels/labeling_functions.py`."""
    on_error: str = "abstain"
    """kind=labeling_functions. abstain: a function that fails on a sample, or returns no valid class, abstains there;
    it is counted in `labeling_functions.csv` and reported in a warning. stop: the first such answer ends the run before
    it begins."""
    count_epsilon: float | None = None
    """kind=bags: counts have discrete Laplace noise, as if each bag were epsilon-differentially private (a simulation:
    the noise comes from `seed`); null: counts are exact."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels_keys", tuple(self.labels_keys))  # YAML gives a list; must be hashable
        self._check_kind()
        given = [name for name in COUNTS if getattr(self, name) is not None]
        values = " and ".join(f"`supervision.{name}` (={getattr(self, name)})" for name in given)
        if len(given) > 1:
            raise ValueError(f"{values} exclude each other: give one of them.")
        if self.kind == "full" and given:
            raise ValueError(
                f"{values} cannot be combined with supervision.kind=full: take supervision.kind=few_labels."
            )
        at_least(self, "supervision", 1, *given)
        if self.label_rate is None:
            if not given and self.kind == "few_labels" and not self._all_without_amount():
                raise ValueError(
                    "`supervision.label_rate` (=None) does not define the amount: "
                    f"give it, or one of {', '.join(f'supervision.{name}' for name in COUNTS)}."
                )
        else:
            in_unit_interval(self, "supervision", "label_rate")

    def _all_without_amount(self) -> bool:
        return False

    def _check_kind(self) -> None:
        one_of(self, "supervision", kind=KINDS, candidates=CANDIDATES, noise=NOISE, on_error=ON_ERROR)
        in_unit_interval(self, "supervision", "noise_rate")
        self._check_candidates()
        if self.hides_classes and (self.labels_per_class is not None or self.stratified):
            raise ValueError(
                f"`supervision.labels_per_class` (={self.labels_per_class}) and `supervision.stratified` "
                f"(={self.stratified}) choose samples by their class, which is unknown with supervision.kind="
                f"{self.kind}: take label_rate, labels_per_client or labels_total."
            )
        self._check_bag()
        self._check_functions()
        self._check_noise()

    def _check_candidates(self) -> None:
        if self.has_candidates and self.partial_ratio is None:
            raise ValueError(
                f"`supervision.partial_ratio` (=None) must be given for supervision.kind={self.kind}: a number in "
                "[0, 1]."
            )
        if not self.has_candidates and self.partial_ratio is not None:
            raise ValueError(
                f"`supervision.partial_ratio` (={self.partial_ratio}) cannot be combined with "
                f"supervision.kind={self.kind}: take supervision.kind=partial or partial_and_noisy, or leave it out."
            )
        if self.partial_ratio is not None:
            in_unit_interval(self, "supervision", "partial_ratio")
        if self.candidates != "uniform" and not self.has_candidates:
            raise ValueError(
                f"`supervision.candidates` (={self.candidates}) cannot be combined with "
                f"supervision.kind={self.kind}: take supervision.kind=partial, or leave it out."
            )

    def _check_functions(self) -> None:
        if self.on_error != "abstain" and self.kind != "labeling_functions":
            raise ValueError(
                f"`supervision.on_error` (={self.on_error}) cannot be combined with supervision.kind={self.kind}: take "
                "supervision.kind=labeling_functions, or leave it out."
            )
        if self.kind == "labeling_functions" and self.module is None:
            raise ValueError(
                "`supervision.module` (=None) must be given for supervision.kind=labeling_functions: a module of "
                "functions, or the path of its file."
            )
        if self.kind != "labeling_functions" and self.module is not None:
            raise ValueError(
                f"`supervision.module` (={self.module}) cannot be combined with supervision.kind={self.kind}: take "
                "supervision.kind=labeling_functions, or leave it out."
            )

    def _check_noise(self) -> None:
        from_file, responds = self.noise == "file", self.noise == "randomized_response"
        positive(self, "supervision", "label_epsilon", null=True)
        if responds != (self.label_epsilon is not None):
            raise ValueError(
                f"`supervision.noise` (={self.noise}) and `supervision.label_epsilon` (={self.label_epsilon}) belong "
                "together: give both (noise=randomized_response, and its epsilon), or none."
            )
        if responds and self.kind == "partial_and_noisy":
            raise ValueError(
                "`supervision.noise` (=randomized_response) protects labels, and the candidate sets of "
                "supervision.kind=partial_and_noisy contain the true class: take supervision.kind=noisy."
            )
        if from_file != (self.labels_file is not None):
            raise ValueError(
                f"`supervision.noise` (={self.noise}) and `supervision.labels_file` (={self.labels_file}) belong "
                "together: give both (noise=file, and the file), or none."
            )
        for key, value in (("labels_keys", list(self.labels_keys)), ("vote", self.vote)):
            if value and not from_file:
                raise ValueError(
                    f"`supervision.{key}` (={value}) is for labels from a file: take supervision.noise=file with "
                    "supervision.labels_file, or leave it out."
                )
        if self.has_noisy_labels:
            if (from_file or responds) == (self.noise_rate > 0):
                raise ValueError(
                    f"`supervision.noise_rate` (={self.noise_rate}) must be above 0 for supervision.kind={self.kind}, "
                    "and is not given for supervision.noise=file, where the file has the noise, and "
                    "randomized_response, where it follows from supervision.label_epsilon."
                )
        elif self.noise != "symmetric" or (self.noise_rate > 0 and self.kind != "partial"):
            raise ValueError(
                f"`supervision.noise` (={self.noise}) and `supervision.noise_rate` (={self.noise_rate}) cannot be "
                f"combined with supervision.kind={self.kind}: take supervision.kind=noisy, or leave them out."
            )

    def _check_bag(self) -> None:
        if self.kind != "bags":
            for key in ("bags_file", "bag_column", "bag_size", "bag_size_max", "bag_feature", "count_epsilon"):
                if getattr(self, key) is not None:
                    raise ValueError(
                        f"`supervision.{key}` (={getattr(self, key)}) cannot be combined with supervision.kind="
                        f"{self.kind}: take supervision.kind=bags, or leave it out."
                    )
            return
        if (self.bags_file is None) != (self.bag_column is None):
            raise ValueError(
                f"`supervision.bags_file` (={self.bags_file}) and `supervision.bag_column` (={self.bag_column}) belong "
                "together: give both, or supervision.bag_size for counts made of labels."
            )
        if self.bags_file is not None:
            amounts = ("label_rate", *COUNTS)
            for key in ("bag_size", "bag_size_max", "bag_feature", "count_epsilon", *amounts):
                if getattr(self, key) is not None:
                    raise ValueError(
                        f"`supervision.{key}` (={getattr(self, key)}) cannot be combined with supervision.bags_file, "
                        "which defines the bags: leave it out."
                    )
            return
        if self.bag_size is None or self.bag_size < 1:
            raise ValueError(
                f"`supervision.bag_size` (={self.bag_size}) must be at least 1 for supervision.kind=bags (or give "
                "supervision.bags_file, with published counts)."
            )
        if self.bag_size_max is not None and self.bag_size_max < self.bag_size:
            raise ValueError(
                f"`supervision.bag_size_max` (={self.bag_size_max}) must be at least supervision.bag_size "
                f"(={self.bag_size}), or null."
            )
        positive(self, "supervision", "count_epsilon", null=True)

    @property
    def has_candidates(self) -> bool:
        """Whether samples have candidate sets."""
        return self.kind in ("partial", "partial_and_noisy")

    @property
    def has_noisy_labels(self) -> bool:
        """Whether samples have labels that may be wrong."""
        return self.kind in ("noisy", "partial_and_noisy")

    @property
    def from_true_labels(self) -> bool:
        """Whether the labels are generated from true labels, which the data must then have."""
        from_elsewhere = self.kind == "noisy" and self.noise == "file"
        return self.kind != "labeling_functions" and self.bags_file is None and not from_elsewhere

    @property
    def hides_classes(self) -> bool:
        """Whether this kind gives no class of a single sample: bags and labelling functions."""
        return self.kind in ("bags", "labeling_functions")

    @property
    def everything(self) -> bool:
        """Whether every sample of the clients with labels has one."""
        return self.kind == "full" or (self.label_rate in (None, 1) and all(getattr(self, c) is None for c in COUNTS))


@dataclass(frozen=True)
class MixPart(LabelKind):
    """One kind of label in a mix."""

    share: float = 0.0
    """Share of the clients, or of each client's samples, in (0, 1]."""

    def __post_init__(self) -> None:
        super().__post_init__()
        within(self, "supervision.mix[]", 0, 1, "share", ends="(]", hint="give each part one")


@dataclass(frozen=True)
class SupervisionConfig(LabelKind):
    """Which labels exist in the federation, and which clients or server hold them."""

    labels_at: str = "clients"
    """clients: every client has labels of its own samples. server: the labelled samples are chosen over the whole
    training set and are held by the server; the clients share the others and have no labels. some_clients:
    `labeled_clients` clients have labels as the amount says, or all of theirs if no amount is given; the others have
    none."""
    labeled_clients: int | None = None
    """For labels_at=some_clients: number of clients with labels; which ones is drawn from the seed."""
    mix: tuple[MixPart, ...] = ()
    """Several kinds of label in one federation, each with a `share`, in place of `kind` and its keys here. Shares sum
    to at most 1; the remaining samples have no label."""
    mix_over: str = "clients"
    """clients: every client has one kind of label; samples: every client has all kinds, assigned at random."""
    folds: int | None = None
    """Cross-validation: each client's samples with a single label are split into so many folds, and those of
    `withheld_fold` lose it, so that training cannot see it. What `fedlabel audit` trains with."""
    withheld_fold: int | None = None
    """Number of the fold, from 0."""
    audit: str | None = None
    """Folder of suspected label errors that `fedlabel audit` wrote for a run of the same data, partition, labels and
    seed; what is done with these labels is `audit_action`."""
    audit_action: str = "drop"
    """drop: suspects lose their label. relabel: they get the suggested one. weight: their labels are drawn less often,
    see `audit_weight`. candidates: the given and the suggested class are candidates, for methods that learn from
    candidate sets."""
    audit_weight: float = 0.25
    """audit_action=weight: the share of the passes over a client's labels that a suspect is in, in [0.01, 1)."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "mix", tuple(self.mix))
        object.__setattr__(self, "labels_keys", tuple(self.labels_keys))
        if self.mix:
            self._check_mix()
        else:
            super().__post_init__()
        self._check_holder()
        self._check_audit()

    def _all_without_amount(self) -> bool:
        return self.labels_at == "some_clients"

    def _check_mix(self) -> None:
        one_of(self, "supervision", mix_over=("clients", "samples"))
        default = LabelKind()
        beside = ["labels_at"] if self.labels_at != "clients" else []
        beside += [f.name for f in fields(LabelKind) if getattr(self, f.name) != getattr(default, f.name)]
        if beside:
            name = beside[0]
            raise ValueError(
                f"`supervision.{name}` (={getattr(self, name)}) cannot be combined with supervision.mix, whose parts "
                "have this key themselves: leave it out, or take supervision.mix=[]."
            )
        modules = [part.module for part in self.mix if part.module is not None]
        if len(modules) > 1:
            raise ValueError(
                f"`supervision.mix` has several parts of kind labeling_functions ({', '.join(modules)}): give one, "
                "with a module that has the functions of all."
            )
        published = [part.bags_file for part in self.mix if part.bags_file is not None]
        if len(published) > 1:
            raise ValueError(
                f"`supervision.mix` has several parts with a bags_file ({', '.join(published)}): give one, with all "
                "bags."
            )
        if published and self.mix_over == "samples":
            raise ValueError(
                f"`supervision.mix_over` (={self.mix_over}) would take bags of {published[0]} apart: take "
                "supervision.mix_over=clients."
            )
        total = sum(part.share for part in self.mix)
        if total > 1 + 1e-9:
            raise ValueError(f"The shares of `supervision.mix` sum to {total:g}; they must sum to at most 1.")

    def _check_holder(self) -> None:
        one_of(self, "supervision", labels_at=HOLDERS)
        if not self.mix and self.mix_over != "clients":
            raise ValueError(
                f"`supervision.mix_over` (={self.mix_over}) needs supervision.mix: give it, or leave it out."
            )
        if self.labels_at == "some_clients":
            if self.labeled_clients is None or self.labeled_clients < 1:
                raise ValueError(
                    f"`supervision.labeled_clients` (={self.labeled_clients}) must be at least 1 for "
                    "supervision.labels_at=some_clients: say how many clients have labels."
                )
        elif self.labeled_clients is not None:
            raise ValueError(
                f"`supervision.labeled_clients` (={self.labeled_clients}) cannot be combined with "
                f"supervision.labels_at={self.labels_at}: take supervision.labels_at=some_clients, or leave it out."
            )
        if self.labels_at == "server":
            if self.kind not in ("few_labels", "full"):
                raise ValueError(
                    f"`supervision.kind` (={self.kind}) must be few_labels for supervision.labels_at=server, whose own "
                    "training is on true labels."
                )
            if self.labels_per_client is not None:
                raise ValueError(
                    f"`supervision.labels_per_client` (={self.labels_per_client}) cannot be combined with "
                    "supervision.labels_at=server, where no client has a label: take labels_per_class or labels_total."
                )

    def _check_audit(self) -> None:
        one_of(self, "supervision", audit_action=AUDIT_ACTIONS)
        within(self, "supervision", 0.01, 1, "audit_weight", ends="[)")
        if self.audit_weight != SupervisionConfig.audit_weight and self.audit_action != "weight":
            raise ValueError(
                f"`supervision.audit_weight` (={self.audit_weight:g}) is for supervision.audit_action=weight, "
                f"which is {self.audit_action}: take weight, or leave it out."
            )
        if (self.folds is None) != (self.withheld_fold is None):
            raise ValueError(
                f"`supervision.folds` (={self.folds}) and `supervision.withheld_fold` (={self.withheld_fold}) belong "
                "together: give both, or none."
            )
        if self.folds is not None and self.withheld_fold is not None:
            at_least(self, "supervision", 2, "folds")
            within(self, "supervision", 0, self.folds - 1, "withheld_fold", hint="folds are numbered from 0")
            if self.labels_at == "server":
                raise ValueError(
                    f"`supervision.folds` (={self.folds}) are of the clients' labels, and with supervision.labels_at="
                    "server they have none."
                )
        if self.audit is None and self.audit_action != "drop":
            raise ValueError(
                f"`supervision.audit_action` (={self.audit_action}) needs supervision.audit, the folder of an audit: "
                "give it, or leave this out."
            )

    @property
    def parts(self) -> Sequence[LabelKind]:
        """The kinds of label in the federation: those of the mix, or this one."""
        return self.mix or [self]


def fill_amounts(user: dict[str, Any]) -> None:
    """Completes a user's mapping: setting one of the keys for the amount of labels unsets the others' defaults."""
    if any(user.get(count) is not None for count in COUNTS):
        user["label_rate"] = None
    if user.get("labels_at") == "some_clients" or user.get("kind", "few_labels") not in ("few_labels", "full"):
        user.setdefault("label_rate", None)
    mix = user.get("mix")
    for part in mix if isinstance(mix, list) else []:
        if isinstance(part, dict):
            fill_amounts(part)
