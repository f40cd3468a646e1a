"""What the configuration says of labels: which kind, how many, who holds them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

KINDS = ("few_labels", "full", "partial", "noisy", "partial_and_noisy", "bags", "labeling_functions")
COUNTS = ("labels_per_class", "labels_per_client", "labels_total")
HOLDERS = ("clients", "server", "some_clients")
CANDIDATES = ("uniform", "similar", "instance")
ON_ERROR = ("abstain", "stop")
NOISE = ("symmetric", "asymmetric", "pair_flip", "instance", "file")


@dataclass(frozen=True)
class LabelKind:
    """One kind of label and how many samples have it.

    The amount is one of four. `label_rate` is the default; a count replaces it, and at most one count may be given.
    """

    kind: str = "few_labels"
    """few_labels: some samples have their true label, nothing is known of the others. full: all samples have it, or
    where the data lack labels, all that have one in the data.
    partial: a set of candidates that holds the truth (with `noise_rate`: that may miss it). noisy: a label that may be
    wrong, or one of each annotator. partial_and_noisy: a set that holds the truth and a label that may be wrong.
    bags: groups of a client's samples of which only the number in each class is known. labeling_functions: what the
    functions of `module` say of samples."""
    label_rate: float | None = 0.1
    """Part of the n samples of each client with labels (of the training set for labels_at=server), in [0, 1]: exactly
    int(label_rate * n), n being those that have a label in the data. Not given for another kind than few_labels, or for
    labels_at=some_clients: null, all n."""
    labels_per_class: int | None = None
    """Samples with a label per class, in the whole federation, whoever holds them (of those who have labels)."""
    labels_per_client: int | None = None
    """Samples with a label per client."""
    labels_total: int | None = None
    """Samples with a label in the whole federation, whoever holds them (of those who have labels)."""
    stratified: bool = False
    """Whether the labelled samples have the class shares of what they are drawn from: the client's samples, or for
    `labels_total` and labels_at=server all samples. False (FedLabel's paper): uniformly at random. No effect on
    `labels_per_class`."""
    partial_ratio: float | None = None
    """Kinds with candidates: the probability q in [0, 1] that a wrong class is one; in the mean over the wrong classes
    for candidates=similar and instance."""
    candidates: str = "uniform"
    """uniform: every wrong class with probability q. similar: classes that a small network confuses with the true one
    more often. instance: those that it finds probable for this very sample (Xu et al., 2021)."""
    noise: str = "symmetric"
    """Kinds with noisy labels. symmetric: a class drawn from all, the true one among them. asymmetric: a fixed similar
    class, known for MNIST, digits, Fashion-MNIST and CIFAR. pair_flip: the next class. instance (our own noise, not
    that of Xia et al., 2020): a wrong class that a small network finds probable, for the samples that it finds hard.
    file: from `labels_file`."""
    noise_rate: float = 0.0
    """noisy: the share of samples whose label is drawn anew (symmetric: from all classes, so that of 10 classes
    a rate of .4 leaves .64 of the labels right),
    exact per federation (symmetric, instance) or class (asymmetric, pair_flip). partial: the probability that a class
    outside the set takes the truth's place in it."""
    labels_file: str | None = None
    """noise=file: a .npz, .npy, CSV or Parquet file below `data.root` (data.name=npz or table: beside it), with labels
    in the order of the data set's training samples; of a table whose test set is split off: of all rows of its file, of
    which test rows are not looked at. A label is the name of a class, or its number from 0 where classes are not named
    by numbers; -1 (unless it is the name of a class), NaN or an empty text is none."""
    labels_keys: tuple[str, ...] = ()
    """noise=file: arrays or columns of the file; none: all. One column is a noisy label; several, or an array of
    several columns, are those of as many annotators. In a mix the annotators of each part are others."""
    vote: bool = False
    """noise=file, several annotators: their labels become one noisy label, the most frequent; a tie is decided by
    chance."""
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
    """kind=bags: samples per bag; what is left of a client's samples is its last bag."""
    bag_size_max: int | None = None
    """kind=bags: sizes are drawn from bag_size to this; null: all are `bag_size`."""
    bag_feature: str | None = None
    """kind=bags: samples with neighbouring values of this feature (a table's column, or the number of an image's pixel
    from 0) share a bag; null: bags are drawn at random."""
    module: str | None = None
    """kind=labeling_functions: a module of functions, or the path of its file, which every node imports; see
    `fedlabel/data/labels/labeling_functions.py`."""
    on_error: str = "abstain"
    """kind=labeling_functions. abstain: a function that fails on a sample, or says what is no class, abstains there; it
    is counted in `labeling_functions.csv` and warned of. stop: the first such answer ends the run before it begins."""
    count_epsilon: float | None = None
    """kind=bags: counts have discrete Laplace noise, as if each bag were to be epsilon-differentially private (a
    simulation: the noise comes from `seed`); null: counts are exact."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels_keys", tuple(self.labels_keys))  # YAML gives a list; must be hashable
        self._check_kind()
        given = [name for name in COUNTS if getattr(self, name) is not None]
        values = " and ".join(f"`supervision.{name}` (={getattr(self, name)})" for name in given)
        if len(given) > 1:
            raise ValueError(f"{values} exclude each other: give one of them.")
        if self.kind == "full" and given:
            raise ValueError(f"{values} has no place beside supervision.kind=full: take supervision.kind=few_labels.")
        for name in given:
            if getattr(self, name) < 1:
                raise ValueError(f"`supervision.{name}` (={getattr(self, name)}) must be at least 1.")
        if self.label_rate is None:
            if not given and self.kind == "few_labels" and not self._all_without_amount():
                raise ValueError(
                    "`supervision.label_rate` (=None) says nothing of the amount: "
                    f"give it, or one of {', '.join(f'supervision.{name}' for name in COUNTS)}."
                )
        elif not 0 <= self.label_rate <= 1:
            raise ValueError(f"`supervision.label_rate` (={self.label_rate}) must lie in [0, 1].")

    def _all_without_amount(self) -> bool:
        return False

    def _check_kind(self) -> None:
        for key, allowed in {"kind": KINDS, "candidates": CANDIDATES, "noise": NOISE}.items():
            if getattr(self, key) not in allowed:
                raise ValueError(f"`supervision.{key}` (={getattr(self, key)}) must be one of {', '.join(allowed)}.")
        if not 0 <= self.noise_rate <= 1:
            raise ValueError(f"`supervision.noise_rate` (={self.noise_rate}) must lie in [0, 1].")
        if self.has_candidates and self.partial_ratio is None:
            raise ValueError(
                f"`supervision.partial_ratio` (=None) must be given for supervision.kind={self.kind}: a number in "
                "[0, 1]."
            )
        if not self.has_candidates and self.partial_ratio is not None:
            raise ValueError(
                f"`supervision.partial_ratio` (={self.partial_ratio}) has no place beside supervision.kind={self.kind}"
                ": take supervision.kind=partial or partial_and_noisy, or leave it out."
            )
        if self.partial_ratio is not None and not 0 <= self.partial_ratio <= 1:
            raise ValueError(f"`supervision.partial_ratio` (={self.partial_ratio}) must lie in [0, 1].")
        if self.candidates != "uniform" and not self.has_candidates:
            raise ValueError(
                f"`supervision.candidates` (={self.candidates}) has no place beside supervision.kind={self.kind}: take "
                "supervision.kind=partial, or leave it out."
            )
        if self.classless and (self.labels_per_class is not None or self.stratified):
            raise ValueError(
                f"`supervision.labels_per_class` (={self.labels_per_class}) and `supervision.stratified` "
                f"(={self.stratified}) choose samples by their class, which nobody knows with supervision.kind="
                f"{self.kind}: take label_rate, labels_per_client or labels_total."
            )
        self._check_bag()
        if self.on_error not in ON_ERROR:
            raise ValueError(f"`supervision.on_error` (={self.on_error}) must be one of {', '.join(ON_ERROR)}.")
        if self.on_error != "abstain" and self.kind != "labeling_functions":
            raise ValueError(
                f"`supervision.on_error` (={self.on_error}) has no place beside supervision.kind={self.kind}: take "
                "supervision.kind=labeling_functions, or leave it out."
            )
        if self.kind == "labeling_functions" and self.module is None:
            raise ValueError(
                "`supervision.module` (=None) must be given for supervision.kind=labeling_functions: a module of "
                "functions, or the path of its file."
            )
        if self.kind != "labeling_functions" and self.module is not None:
            raise ValueError(
                f"`supervision.module` (={self.module}) has no place beside supervision.kind={self.kind}: take "
                "supervision.kind=labeling_functions, or leave it out."
            )
        from_file = self.noise == "file"
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
            if from_file == (self.noise_rate > 0):
                raise ValueError(
                    f"`supervision.noise_rate` (={self.noise_rate}) must be above 0 for supervision.kind={self.kind}, "
                    "and is not given for supervision.noise=file, where the file has the noise."
                )
        elif self.noise != "symmetric" or (self.noise_rate > 0 and self.kind != "partial"):
            raise ValueError(
                f"`supervision.noise` (={self.noise}) and `supervision.noise_rate` (={self.noise_rate}) have no place "
                f"beside supervision.kind={self.kind}: take supervision.kind=noisy, or leave them out."
            )

    def _check_bag(self) -> None:
        if self.kind != "bags":
            for key in ("bags_file", "bag_column", "bag_size", "bag_size_max", "bag_feature", "count_epsilon"):
                if getattr(self, key) is not None:
                    raise ValueError(
                        f"`supervision.{key}` (={getattr(self, key)}) has no place beside supervision.kind="
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
                        f"`supervision.{key}` (={getattr(self, key)}) has no place beside supervision.bags_file, which "
                        "says which bags there are: leave it out."
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
        if self.count_epsilon is not None and not 0 < self.count_epsilon < float("inf"):
            raise ValueError(f"`supervision.count_epsilon` (={self.count_epsilon}) must be a positive number, or null.")

    @property
    def has_candidates(self) -> bool:
        """Whether samples have sets of candidates."""
        return self.kind in ("partial", "partial_and_noisy")

    @property
    def has_noisy_labels(self) -> bool:
        """Whether samples have labels that may be wrong."""
        return self.kind in ("noisy", "partial_and_noisy")

    @property
    def from_truth(self) -> bool:
        """Whether what is known of a sample is made of its true label, which the data must then have."""
        from_elsewhere = self.kind == "noisy" and self.noise == "file"
        return self.kind != "labeling_functions" and self.bags_file is None and not from_elsewhere

    @property
    def classless(self) -> bool:
        """Whether nobody knows the class of a sample of which something is known."""
        return self.kind in ("bags", "labeling_functions")

    @property
    def everything(self) -> bool:
        """Whether those who have labels have a label of each of their samples."""
        return self.kind == "full" or (self.label_rate in (None, 1) and all(getattr(self, c) is None for c in COUNTS))


@dataclass(frozen=True)
class MixPart(LabelKind):
    """One kind of label in a mix."""

    share: float = 0.0
    """Part of the clients, or of each client's samples, in (0, 1]."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.share <= 1:
            raise ValueError(f"`supervision.mix[].share` (={self.share}) must lie in (0, 1]: give each part one.")


@dataclass(frozen=True)
class SupervisionConfig(LabelKind):
    """Who is told what about the labels."""

    labels_at: str = "clients"
    """clients: every client has labels of its own samples. server: the labelled samples are chosen over the whole
    training set and are the server's; the clients share the others and have no label. some_clients: `labeled_clients`
    clients have labels as the amount says, or all of theirs where no amount is given; the others have none."""
    labeled_clients: int | None = None
    """Of labels_at=some_clients: how many clients have labels; which ones is drawn from the seed."""
    mix: tuple[MixPart, ...] = ()
    """Several kinds of label in one federation, each with a `share`, in place of `kind` and its keys here. Shares sum
    to at most 1; of what is left nothing is known."""
    mix_over: str = "clients"
    """clients: every client has one kind of label; samples: every client has all of them, by chance."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "mix", tuple(self.mix))
        object.__setattr__(self, "labels_keys", tuple(self.labels_keys))
        if self.mix:
            self._check_mix()
        else:
            super().__post_init__()
        self._check_holder()

    def _all_without_amount(self) -> bool:
        return self.labels_at == "some_clients"

    def _check_mix(self) -> None:
        if self.mix_over not in ("clients", "samples"):
            raise ValueError(f"`supervision.mix_over` (={self.mix_over}) must be one of clients, samples.")
        default = LabelKind()
        beside = ["labels_at"] if self.labels_at != "clients" else []
        beside += [f.name for f in fields(LabelKind) if getattr(self, f.name) != getattr(default, f.name)]
        if beside:
            name = beside[0]
            raise ValueError(
                f"`supervision.{name}` (={getattr(self, name)}) has no place beside supervision.mix, whose parts say "
                "it themselves: leave it out, or take supervision.mix=[]."
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
        if self.labels_at not in HOLDERS:
            raise ValueError(f"`supervision.labels_at` (={self.labels_at}) must be one of {', '.join(HOLDERS)}.")
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
                f"`supervision.labeled_clients` (={self.labeled_clients}) has no place beside "
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
                    f"`supervision.labels_per_client` (={self.labels_per_client}) has no place beside "
                    "supervision.labels_at=server, where no client has a label: take labels_per_class or labels_total."
                )

    @property
    def parts(self) -> Sequence[LabelKind]:
        """The kinds of label in the federation: those of the mix, or this one."""
        return self.mix or [self]


def fill_amounts(user: dict[str, Any]) -> None:
    """Writes into a user's mapping what giving one way to say the amount of labels means for the other."""
    if any(user.get(count) is not None for count in COUNTS):
        user["label_rate"] = None
    if user.get("labels_at") == "some_clients" or user.get("kind", "few_labels") not in ("few_labels", "full"):
        user.setdefault("label_rate", None)
    mix = user.get("mix")
    for part in mix if isinstance(mix, list) else []:
        if isinstance(part, dict):
            fill_amounts(part)
