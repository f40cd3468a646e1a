"""Suspected label errors beside cleanlab's on the same predictions, and what training after an audit gains.

    python scripts/bench_audit.py errors --data DATA    # CIFAR-10's test labels, with predictions that come with them
    python scripts/bench_audit.py people --data DATA    # CIFAR-10N: labels by people, predictions of a federation
    python scripts/bench_audit.py loop --data DATA      # noisy digits and Fashion-MNIST: audit, then train again

DATA holds label-errors/ and cifar-10h/ (errors), cifar-10-batches-py/ and cifar-10n/ (people), FashionMNIST/ (loop); a
part without its data is skipped. cleanlab (`pip install -e ".[crosscheck]"`) gets the same predictions as one pool;
without it its rows are left out. Tables are Markdown: mean and sample standard deviation over seeds, in %.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import average_precision_score

sys.path.insert(0, str(Path(__file__).parents[1]))

from fedlabel.config import ExperimentConfig, load_config
from fedlabel.experiment import Experiment
from fedlabel.inference.confident import RULES, calibrated_joint, confident_counts, self_confidence, thresholds_of
from fedlabel.inference.prototypes import similarity_margin
from fedlabel.methods.batch import Model
from fedlabel.methods.supervised import Supervised
from fedlabel.study.audit import Client, Predicted, find, predict_folds, write_audit
from server.final_model import final_model
from server.simulation import simulate

Row = dict[str, list[float]]
"""Column -> a value per seed."""
LR = "training.lr=0.03"
TRAINED = {
    "confident": ("drop", "relabel", "weight"),
    "prune_by_noise_rate": ("drop",),
    "prototypes": ("drop", "relabel", "weight"),
}
"""What is trained after the audit in `loop`: method -> actions."""
NOISES = {
    "symmetric": ["supervision.noise=symmetric", "supervision.noise_rate=0.4"],
    "asymmetric": ["supervision.noise=asymmetric", "supervision.noise_rate=0.3"],
}
NUMBERS = ("suspects", "unlike cleanlab's")
"""Columns of numbers of samples; the others are shares."""
CLEANLAB = {"confident": "confident_learning", **{rule: rule for rule in RULES[1:]}}
"""A rule, and cleanlab's name for it."""


def train(config: ExperimentConfig, path: Path) -> tuple[Experiment, Model]:
    simulate(config, name=path.name, out=path.parent)
    return final_model(path)


def pooled(clients: Sequence[Client]) -> Client:
    predictions, labels = zip(*clients, strict=True)
    return torch.cat(predictions), torch.cat(labels)


def deal(client: Client, clients: int) -> list[Client]:
    """Deals samples out to clients, sorted by label: each has few classes."""
    order = client[1].argsort(stable=True).tensor_split(clients)
    return [(client[0][rows], client[1][rows]) for rows in order]


def learn(clients: Sequence[Client]) -> tuple[torch.Tensor, torch.Tensor]:
    own = torch.stack([self_confidence(*client) for client in clients]).sum(0)
    thresholds = thresholds_of(own)
    counts = torch.stack([confident_counts(*client, thresholds) for client in clients]).sum(0)
    return thresholds, calibrated_joint(counts, own[:, 1])


def check_same(clients: Sequence[Client]) -> None:
    """Prints how far the federation's thresholds and joint are from those of the pool, and whether suspects are."""
    federated, central = learn(clients), learn([pooled(clients)])
    apart = [float((one - other).abs().max()) for one, other in zip(federated, central, strict=True)]
    assert max(apart) < 1e-12
    same = []
    for rule in RULES:
        masks = [mask_of(clients, rule), mask_of([pooled(clients)], rule)]
        same.append(bool((masks[0] == masks[1]).all()))
    print(
        f"\n{len(clients)} clients, {sum(len(labels) for _, labels in clients):,} labels: thresholds differ from the "
        f"pool's by {apart[0]:.1e} at most, the joint by {apart[1]:.1e}; the same suspects by "
        f"{', '.join(rule for rule, equal in zip(RULES, same, strict=True) if equal) or 'no rule'}."
    )


def mask_of(clients: Sequence[Client], method: str) -> np.ndarray:
    """Returns the suspects of all clients, one client after the other, (n,) bool."""
    masks = []
    for (_, labels), suspects in zip(clients, find(clients, method).suspects, strict=True):
        mask = np.zeros(len(labels), dtype=bool)
        mask[suspects.rows] = True
        masks.append(mask)
    return np.concatenate(masks)


def cleanlab_masks(clients: Sequence[Client]) -> Iterator[tuple[str, np.ndarray]]:
    """Yields cleanlab's suspects of the pool, by filter."""
    if not importlib.util.find_spec("cleanlab"):
        return
    from cleanlab.filter import find_label_issues

    predictions, labels = (each.numpy() for each in pooled(clients))
    filters = (*CLEANLAB.values(), "predicted_neq_given", "low_self_confidence", "low_normalized_margin")
    for name in filters:
        yield f"cleanlab, {name}", find_label_issues(labels, predictions, filter_by=name, n_jobs=1)


def ranks(clients: Sequence[Client], kind: str) -> Iterator[tuple[str, np.ndarray]]:
    """Yields scores that are high where a label is probably wrong."""
    predictions, labels = pooled(clients)
    if kind == "similarities":
        yield "prototypes", -similarity_margin(predictions, labels).numpy()
        return
    from fedlabel.inference.confident import normalized_margin

    yield "fedlabel, normalised margin", -normalized_margin(predictions, labels).numpy()
    yield "fedlabel, self-confidence", -predictions.gather(1, labels[:, None])[:, 0].numpy()
    if importlib.util.find_spec("cleanlab"):
        from cleanlab.rank import get_label_quality_scores

        for name in ("normalized_margin", "self_confidence"):
            scores = get_label_quality_scores(labels.numpy(), predictions.numpy(), method=name)
            yield f"cleanlab, {name}", -scores


def note(row: Row, **values: float) -> None:
    for column, value in values.items():
        row.setdefault(column, []).append(value)


def compare(tables: tuple[dict[str, Row], dict[str, Row]], kinds: dict[str, list[Client]], wrong: np.ndarray) -> None:
    """Adds precision, recall and area of every method; wrong: (n,) bool, client by client."""
    found: list[tuple[str, np.ndarray]] = []
    for kind, clients in kinds.items():
        rules = ("prototypes",) if kind == "similarities" else RULES
        found += [(f"fedlabel, {rule}", mask_of(clients, rule)) for rule in rules]
        if kind == "probabilities":
            found += list(cleanlab_masks(clients))
        for name, scores in ranks(clients, kind):
            note(tables[1].setdefault(name, {}), area=average_precision_score(wrong, scores))
    masks = dict(found)
    for name, mask in found:
        hits = float((mask & wrong).sum())
        precision, recall = hits / max(1, mask.sum()), hits / wrong.sum()
        note(
            tables[0].setdefault(name, {}),
            suspects=float(mask.sum()),
            precision=precision,
            recall=recall,
            F1=2 * precision * recall / max(1e-9, precision + recall),
        )
        theirs = masks.get(f"cleanlab, {CLEANLAB.get(name.removeprefix('fedlabel, '), name)}")
        if theirs is not None and theirs is not mask:
            note(tables[0][name], **{NUMBERS[1]: float((mask != theirs).sum())})


def show(title: str, rows: dict[str, Row]) -> None:
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    print(f"\n{title}\n\n| | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for name, row in rows.items():
        print(f"| {name} | {' | '.join(cell(row[each], each) if each in row else '' for each in columns)} |")


def cell(values: list[float], column: str = "") -> str:
    scale, digits = (1, 0) if column in NUMBERS else (100, 1)
    deviation = f" ± {scale * np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{scale * np.mean(values):.{digits}f}{deviation}"


def errors(data: Path) -> None:
    folder = data / "label-errors"
    labels = torch.from_numpy(np.load(folder / "cifar10_test_set_original_labels.npy").astype(np.int64))
    client = torch.from_numpy(np.load(folder / "cifar10_test_set_pyx.npy")), labels
    clients = deal(client, 50)
    order = np.concatenate(labels.argsort(stable=True).tensor_split(50))
    check_same(clients)
    truths = {}
    reviewed = list(json.loads((folder / "cifar10_mturk.json").read_text()))
    ids = np.array([item["id"] for item in reviewed])
    confirmed = np.zeros(len(labels), dtype=bool)
    confirmed[ids] = [item["mturk"]["given"] < 3 for item in reviewed]
    truths["the five reviewers of an image: most do not confirm the label"] = confirmed
    if (data / "cifar-10h").is_dir():
        counts = np.load(data / "cifar-10h" / "cifar10h-counts.npy")
        truths["CIFAR-10H: the most frequent answer of about 50 people is another class"] = (
            counts.argmax(1) != labels.numpy()
        )
    for title, wrong in truths.items():
        tables: tuple[dict[str, Row], dict[str, Row]] = ({}, {})
        compare(tables, {"probabilities": clients}, wrong[order])
        for table in tables:
            show(f"CIFAR-10's test labels, {title} ({wrong.sum()} of {len(labels):,}):", table)


def predict(config: ExperimentConfig, folds: int) -> Predicted:
    with tempfile.TemporaryDirectory() as folder:
        return predict_folds(config, Path(folder), folds, ("probabilities", "similarities"), train)


def wrong_labels(predicted: Predicted) -> np.ndarray:
    """Returns, client by client, whether each audited label is wrong."""
    federation = predicted.federation
    held = federation.parts.where(predicted.fold[federation.parts.rows] >= 0).rows
    return (federation.record.label[held] != federation.dataset.train.labels[held]).numpy()


def people(data: Path, keys: Sequence[str], seeds: Sequence[int], folds: int, overrides: Sequence[str]) -> None:
    for key in keys:
        tables: tuple[dict[str, Row], dict[str, Row]] = ({}, {})
        accuracy, started = [], time.perf_counter()
        for seed in seeds:
            labels = ["supervision.kind=noisy", "supervision.partial_ratio=null", "supervision.noise=file"]
            labels += ["supervision.labels_file=cifar-10n/cifar10n_labels.npz", f"supervision.labels_keys=[{key}]"]
            given = [f"data.root={data}", f"seed={seed}", LR, "method.name=supervised", *labels, *overrides]
            predicted = predict(load_config(["experiment/imprecise_cifar10.yaml"], given), folds)
            wrong = wrong_labels(predicted)
            predictions, given_labels = pooled(predicted.clients["probabilities"])
            right = given_labels.numpy()[~wrong] == predictions.argmax(1).numpy()[~wrong]
            accuracy.append(float(right.mean()))
            compare(tables, predicted.clients, wrong)
            if seed == seeds[0]:
                check_same(predicted.clients["probabilities"])
        seconds = (time.perf_counter() - started) / len(seeds)
        for table in tables:
            show(
                f"CIFAR-10N {key}, {len(wrong):,} labels, {100 * wrong.mean():.1f} % wrong, seeds "
                f"{', '.join(map(str, seeds))}; {cell(accuracy)} % of right ones predicted; {seconds:.0f} s a seed",
                table,
            )


def loop(
    data: Path, sets: Sequence[str], noises: Sequence[str], seeds: Sequence[int], folds: int, overrides: Sequence[str]
) -> None:
    for name in sets:
        for noise in noises:
            rows: dict[str, Row] = {}
            tables: tuple[dict[str, Row], dict[str, Row]] = ({}, {})
            for seed in seeds:
                given = [
                    f"seed={seed}",
                    LR,
                    "supervision.kind=noisy",
                    "supervision.partial_ratio=null",
                    *NOISES[noise],
                    *overrides,
                ]
                given += [f"data.root={data}"] * (name != "digits") + [
                    "evaluation.figures=false",
                    "evaluation.every=100",
                ]
                one_loop(load_config([f"experiment/imprecise_{name}.yaml"], given), folds, rows, tables)
            title = f"{name}, {noise}, seeds {', '.join(map(str, seeds))}"
            show(f"{title}; test accuracy, mean of the last tenth of the rounds:", rows)
            for table in tables:
                show(f"{title}; suspects:", table)


def one_loop(
    ill: ExperimentConfig, folds: int, rows: dict[str, Row], tables: tuple[dict[str, Row], dict[str, Row]]
) -> None:
    """Adds one seed: without an audit, after each method and action, and with true labels; ill: the configuration."""
    plain = replace(ill, method=Supervised())
    predicted = predict(plain, folds)
    compare(tables, predicted.clients, wrong_labels(predicted))
    with tempfile.TemporaryDirectory() as folder:

        def score(row: str, config: ExperimentConfig) -> None:
            result = simulate(config, name=f"run{len(list(Path(folder).iterdir()))}", out=folder)
            accuracy = result.summary["eval/accuracy"]["mean_last_tenth"]
            note(rows.setdefault(row, {}), accuracy=accuracy)
            base = rows["ILL" if config.method.name == "ill" else "cross-entropy"]["accuracy"][-1]
            note(rows[row], gain=accuracy - base)

        score("cross-entropy", plain)
        for method, actions in TRAINED.items():
            kind = "similarities" if method == "prototypes" else "probabilities"
            out = Path(folder) / method
            write_audit(out, find(predicted.clients[kind], method), predicted, method, plain)
            for action in actions:
                supervision = replace(plain.supervision, audit=str(out), audit_action=action)
                score(f"cross-entropy, {method}, {action}", replace(plain, supervision=supervision))
        score("cross-entropy on true labels", replace(plain, method=Supervised(oracle_labels=True)))
        score("ILL", ill)
        supervision = replace(ill.supervision, audit=str(Path(folder) / "confident"), audit_action="candidates")
        score("ILL, confident, candidates", replace(ill, supervision=supervision))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("errors", "people", "loop"))
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of the data sets")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folds", type=int, default=4)
    parser.add_argument("--sets", nargs="+", default=["digits", "fashion_mnist"], help="of loop")
    parser.add_argument("--noises", nargs="+", default=list(NOISES), choices=NOISES, help="of loop")
    parser.add_argument("--labels", nargs="+", default=["worse_label", "aggre_label"], help="of people")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of people and loop")
    arguments = parser.parse_intermixed_args()
    torch.set_num_threads(1)
    logging.getLogger("fedlabel").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="May not flag all label issues")  # cleanlab, of rare classes
    data, seeds, folds = arguments.data.absolute(), arguments.seeds, arguments.folds
    needs: dict[str, tuple[Path, Callable[[], None]]] = {
        "errors": (data / "label-errors", lambda: errors(data)),
        "people": (data / "cifar-10n", lambda: people(data, arguments.labels, seeds, folds, arguments.overrides)),
        "loop": (
            data / "FashionMNIST",
            lambda: loop(data, arguments.sets, arguments.noises, seeds, folds, arguments.overrides),
        ),
    }
    folder, run = needs[arguments.part]
    if not folder.is_dir() and (arguments.part != "loop" or "fashion_mnist" in arguments.sets):
        print(f"skipped: there is no folder {folder}; --data says where the data sets are.")
        return
    run()


if __name__ == "__main__":
    main()
