"""Audits the labels of a run's federation: which of them are probably wrong, by models that were not trained on them.

A federation is trained once per fold; each client's samples of that fold, whose labels were withheld, are predicted by
its global model. What clients compute of these predictions adds up (see `inference/confident.py` and
`inference/prototypes.py`): the server gets sums and numbers, and a client's suspects stay in its own file.

OUT/folds/fold-0 ...           run folders of the folds' trainings, removed when the audit is done
OUT/suspects/client-000.csv    each client's suspects, see `data/labels/suspects.py`
OUT/audit.json                 what the server knows, written last
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedlabel.config import ConfigError, ExperimentConfig, load_config, parse_config, to_yaml
from fedlabel.data.federation import Federation
from fedlabel.data.labels.folds import fold_of_samples
from fedlabel.data.labels.supervision_config import AUDIT_ACTIONS
from fedlabel.data.labels.suspects import SUSPECTS, Suspects, file_name, to_csv
from fedlabel.errors import check_folder, make_folder, naming
from fedlabel.experiment import Experiment, open_experiment
from fedlabel.inference.confident import (
    RULES,
    calibrated_joint,
    class_counts,
    confident_class,
    confident_counts,
    cuts_for,
    noise_rates,
    normalized_margin,
    off_diagonal,
    pair_counts,
    prune_by_class,
    prune_by_noise_rate,
    prune_counts,
    self_confidence,
    suggested_label,
    thresholds_of,
)
from fedlabel.inference.prototypes import (
    embedding_sums,
    nearest_differs,
    nearest_other,
    prototypes_of,
    similarities,
    similarity_margin,
)
from fedlabel.learning.evaluation import BATCH_SIZE
from fedlabel.methods.batch import Model
from fedlabel.models import Net
from fedlabel.names import did_you_mean
from fedlabel.record.files import temporary_name, write_atomic
from fedlabel.record.json_files import as_json
from fedlabel.record.names import CONFIG_YAML, PARTITION_JSON

METHODS = (*RULES, "prototypes")
"""How suspects are found."""
AUDIT_JSON = "audit.json"
FOLDS = "folds"
Client = tuple[Tensor, Tensor]
"""Out-of-sample predictions (n, classes) of a client's labelled samples, and their given labels (n,)."""

TrainFold = Callable[[ExperimentConfig, Path], tuple[Experiment, Model]]
"""(configuration, run folder) -> the experiment and its final global model; goes on with a run that is there."""


@dataclass(frozen=True, eq=False)
class Found:
    """The result of a method on a federation."""

    suspects: list[Suspects]
    """Of each client."""
    server: dict[str, Any]
    """What the server knows, for `audit.json`."""


def check_request(folds: int, method: str, then: str | None = None) -> None:
    """Raises ConfigError unless the options of an audit are possible."""
    if folds < 2:
        raise ConfigError(f"`--folds` (={folds}) must be at least 2: a model is trained without each of them.")
    for option, value, allowed in (("method", method, METHODS), ("then", then, (None, *AUDIT_ACTIONS))):
        if value not in allowed:
            names = ", ".join(name for name in allowed if name)
            raise ConfigError(
                f"`--{option}` (={value}) must be one of {names}.{did_you_mean(str(value), filter(None, allowed))}"
            )


def read_run(run: Path, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """Returns the configuration of a run, after a check that its data are still the same.

    Args:
        run: its folder; it need not be finished.
        overrides: key=value; only of training, as suspects are of the run's own data and labels.

    Raises:
        ConfigError: there is no run, it is one after an audit or of a fold, or the overrides change its labels.
        ValueError: the data are not what they were.
    """
    saved = run / CONFIG_YAML
    with naming(saved):
        if not saved.is_file():
            raise ConfigError(f"{saved} does not exist: {run} is not the folder of a run.")
        text = saved.read_text()
    config = load_config([saved])
    if config.supervision.audit is not None or config.supervision.folds is not None:
        raise ConfigError(
            f"{run} has trained on labels that an audit had changed or withheld (supervision.audit, "
            "supervision.folds): audit the run from which they came."
        )
    if config.method.oracle_labels:
        raise ConfigError(
            f"{run} has trained on the true labels of all samples (method.oracle_labels): nothing to audit."
        )
    federation = open_experiment(text).federation
    with naming(run / PARTITION_JSON):
        try:
            there = json.loads((run / PARTITION_JSON).read_bytes())["sha256"]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{run / PARTITION_JSON} is damaged: put it back as it was.") from error
    if there != federation.sha256:
        raise ConfigError(
            f"The data, partition or labels are no longer those of {run}: put the data back as they were."
        )
    without_method = re.sub(r"^method:\n(?: .*\n)+", "", to_yaml(config), flags=re.MULTILINE)  # it has other keys
    changed = parse_config(without_method, ["method.name=supervised", *overrides])
    for key in ("seed", "num_clients", "data", "partition", "labeled_partition", "supervision", "skew"):
        if getattr(changed, key) != getattr(config, key):
            raise ConfigError(f"`{key}` cannot be changed in an audit: suspects are of the run's own data and labels.")
    return changed


def read_audit(out: Path) -> dict[str, Any] | None:
    """Returns what `audit.json` holds, None if there is none.

    Raises:
        ConfigError: it is damaged.
    """
    with naming(out / AUDIT_JSON):
        if not (out / AUDIT_JSON).is_file():
            return None
        try:
            found = json.loads((out / AUDIT_JSON).read_bytes())
            return {key: found[key] for key in ("method", "folds", "suspects", "labels", *found)}
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{out / AUDIT_JSON} is damaged: move {out} away, and audit the run again.") from error


def audit(
    config: ExperimentConfig,
    out: Path,
    folds: int,
    method: str,
    train: TrainFold,
    told: Callable[[int], None] = lambda fold: None,
) -> None:
    """Audits the labels of a federation into a folder.

    Args:
        config: how each fold is trained, see `read_run`.
        out: the folder, which may not hold an audit yet. After an interruption the same call goes on.
        folds: how many, at least 2.
        method: one of `METHODS`.
        train: trains a fold.
        told: called with the number of each fold that begins.

    Raises:
        ValueError: the folder holds an audit, a fold has no label, or training refuses.
    """
    with naming(out):
        if (out / AUDIT_JSON).exists():
            raise ConfigError(f"{out} holds an audit already: give another --out, or move it away.")
        if (out / SUSPECTS).is_dir():  # of a call that was killed before its last file
            shutil.rmtree(out / SUSPECTS)
    check_folder(out)
    kind = "similarities" if method == "prototypes" else "probabilities"
    predicted = predict_folds(config, out / FOLDS, folds, (kind,), train, told)
    write_audit(out, find(predicted.clients[kind], method), predicted, method, config)
    shutil.rmtree(out / FOLDS, ignore_errors=True)


class Predicted(NamedTuple):
    """Out-of-sample predictions of all labelled samples of a federation."""

    federation: Federation
    fold: np.ndarray
    """(n,) int64, see `fold_of_samples`."""
    clients: dict[str, list[Client]]
    """By kind: probabilities, and similarities to the prototypes."""


def predict_folds(
    config: ExperimentConfig,
    folder: Path,
    folds: int,
    kinds: Sequence[str],
    train: TrainFold,
    told: Callable[[int], None] = lambda fold: None,
) -> Predicted:
    """Trains a federation without each of its folds, and predicts that fold.

    Args:
        config: how each fold is trained.
        folder: of the folds' runs.
        folds: how many.
        kinds: of predictions.
        train: trains a fold.
        told: called with the number of each fold that begins.

    Raises:
        ValueError: a fold has no label, or training refuses.
    """
    federation = open_experiment(to_yaml(config)).federation
    label = federation.record.label.numpy()
    fold = fold_of_samples(label, federation.parts, folds, config.seed)
    if not all((fold == each).any() for each in range(folds)):
        raise ConfigError(
            f"`--folds` (={folds}): each needs a sample of a client with a single label, and there are "
            f"{int((fold >= 0).sum())}; candidate sets, bags, votes and labels of several annotators are not audited. "
            "Take fewer folds, or a run whose clients have labels."
        )
    outputs = {kind: torch.zeros(len(label), federation.dataset.num_classes, dtype=torch.float64) for kind in kinds}
    for number in range(folds):
        told(number)
        experiment, model = train(fold_config(config, folds, number), folder / f"fold-{number}")
        rows = np.flatnonzero(fold == number)
        if "similarities" in kinds:
            outputs["similarities"][rows] = _similar(experiment, model, fold, number)
        if "probabilities" in kinds:
            outputs["probabilities"][rows] = _outputs(experiment, model, rows).softmax(1)
    held = federation.parts.where(fold[federation.parts.rows] >= 0)
    clients = {
        kind: [(values[rows], torch.from_numpy(label[rows])) for rows in held] for kind, values in outputs.items()
    }
    return Predicted(federation, fold, clients)


def fold_config(config: ExperimentConfig, folds: int, number: int) -> ExperimentConfig:
    """Returns the configuration that trains without a fold; without figures, and evaluated at its end only."""
    return replace(
        config,
        supervision=replace(config.supervision, folds=folds, withheld_fold=number),
        evaluation=replace(config.evaluation, figures=False, panel_samples=0, select=None, every=config.num_rounds),
    )


def _outputs(experiment: Experiment, model: Model, rows: np.ndarray, *part: str) -> Tensor:
    """Returns a model's outputs for rows of the training split, (m, ...) float64 on the CPU."""
    batches = experiment.images[torch.from_numpy(rows).to(experiment.device)].split(BATCH_SIZE)
    with torch.no_grad():
        return torch.cat([model(experiment.transform.normalize(each), *part).double().cpu() for each in batches])


def _similar(experiment: Experiment, model: Model, fold: np.ndarray, number: int) -> Tensor:
    """Returns the similarities of a fold's samples to the prototypes of the others, (m, classes): embeddings of two
    models have nothing in common.
    """
    if not isinstance(experiment.teacher, Net):
        raise ConfigError(
            f"`model.name` (={experiment.config.model.name}) gives no embeddings with method "
            f"{experiment.config.method.name}, which --method=prototypes needs: take a network of our own with "
            "method.name=supervised, or --method=confident."
        )
    federation, classes = experiment.federation, experiment.federation.dataset.num_classes
    label = torch.where(torch.from_numpy(fold == number), -1, federation.record.label)
    known = federation.parts.where(((fold >= 0) & (fold != number))[federation.parts.rows])
    sums = [
        embedding_sums(_outputs(experiment, model, rows, "embed"), label[rows], classes) for rows in known if len(rows)
    ]
    prototypes = prototypes_of(torch.stack(sums).sum(0))
    return similarities(_outputs(experiment, model, np.flatnonzero(fold == number), "embed"), prototypes)


def _total(clients: Sequence[Client], statistic: Callable[..., Tensor], *more: Tensor) -> Tensor:
    """Returns the sum over clients of what each sends."""
    total = statistic(*clients[0], *more)
    for client in clients[1:]:
        total = total + statistic(*client, *more)
    return total


def find(clients: Sequence[Client], method: str) -> Found:
    """Returns the suspects, by one of `METHODS`; the predictions are of its kind."""
    return by_prototypes(clients) if method == "prototypes" else by_confidence(clients, method)


def by_confidence(clients: Sequence[Client], rule: str) -> Found:
    """Finds suspects by confident learning; the predictions are probabilities.

    Args:
        clients: all of the federation's.
        rule: one of `RULES`.
    """
    own = _total(clients, self_confidence)
    thresholds, label_counts = thresholds_of(own), own[:, 1].long()
    counts = _total(clients, confident_counts, thresholds)
    joint, samples = calibrated_joint(counts, label_counts), int(label_counts.sum())
    exchanges, masks = 2, [off_diagonal(*client, thresholds) for client in clients]
    suggested = [confident_class(probabilities, thresholds) for probabilities, _ in clients]
    if rule != "confident":
        pruned = prune_counts(joint, samples)

        def cuts(statistic: Callable[..., Tensor], wanted: Tensor) -> Tensor:
            def over(values: Tensor) -> Tensor:
                nonlocal exchanges
                exchanges += 1
                return _total(clients, statistic, values)

            return cuts_for(over, wanted)

        masks = [torch.ones(len(labels), dtype=torch.bool) for _, labels in clients]
        if rule != "prune_by_noise_rate":
            by_class = cuts(class_counts, label_counts - pruned.diagonal())
            masks = [mask & prune_by_class(*client, by_class) for mask, client in zip(masks, clients, strict=True)]
        if rule != "prune_by_class":
            by_pair = cuts(pair_counts, pruned - torch.diag(pruned.diagonal()))
            masks = [mask & prune_by_noise_rate(*client, by_pair) for mask, client in zip(masks, clients, strict=True)]
        suggested = [suggested_label(*client) for client in clients]
    server = {
        "thresholds": torch.where(label_counts > 0, thresholds, torch.nan),
        "confident_joint": counts,
        "joint": joint,
        "noise_rates": noise_rates(joint),
        "estimated_errors": float(samples * (1 - joint.trace())),
        "exchanges": exchanges,
    }
    return Found(_suspects(clients, masks, suggested, normalized_margin), server)


def by_prototypes(clients: Sequence[Client]) -> Found:
    """Finds suspects by similarity to the classes' prototypes; the predictions are similarities."""
    masks = [nearest_differs(*client) for client in clients]
    suggested = [nearest_other(*client) for client in clients]
    return Found(_suspects(clients, masks, suggested, similarity_margin), {})


def _suspects(
    clients: Sequence[Client], masks: list[Tensor], suggested: list[Tensor], score: Callable[..., Tensor]
) -> list[Suspects]:
    return [
        Suspects(
            mask.nonzero()[:, 0].numpy(),
            labels[mask].numpy(),
            classes[mask].numpy(),
            score(predictions[mask], labels[mask]).numpy(),
        )
        for (predictions, labels), mask, classes in zip(clients, masks, suggested, strict=True)
    ]


def write_audit(out: Path, found: Found, predicted: Predicted, method: str, config: ExperimentConfig) -> None:
    """Writes the files of an audit: those of the clients as one folder, then the server's."""
    federation, fold = predicted.federation, predicted.fold
    names, classes = federation.dataset.class_names, federation.dataset.num_classes
    pairs = np.zeros((classes, classes), dtype=np.int64)
    unfinished = temporary_name(out / SUSPECTS)
    try:
        make_folder(unfinished)
        for client, (rows, suspects) in enumerate(zip(federation.parts, found.suspects, strict=True)):
            own = suspects._replace(rows=np.flatnonzero(fold[rows] >= 0)[suspects.rows])
            write_atomic(unfinished / Path(file_name(client)).name, to_csv(own, names))
            np.add.at(pairs, (own.given, own.suggested), 1)
        with naming(out):
            unfinished.rename(out / SUSPECTS)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    content = {
        "method": method,
        "folds": int(fold.max()) + 1,
        "trained_by": config.method.name,
        "num_rounds": config.num_rounds,
        "num_clients": len(federation.parts),
        "classes": list(names),
        "labels": int((fold >= 0).sum()),
        "suspects": int(pairs.sum()),
        "suspects_by_given_and_suggested": pairs,
        **found.server,
    }
    write_atomic(out / AUDIT_JSON, json.dumps(as_json(content), allow_nan=False) + "\n")
