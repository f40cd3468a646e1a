"""Accuracy and seconds of the label model beside other aggregators of votes.

    python scripts/bench_label_model.py            # who is right how often, and how that grows with the functions
    python scripts/bench_label_model.py --speed    # 50,000 samples x 50 functions, and 1,000,000 x 100

Votes are made by the recipe of tests/inference/test_label_model.py (5,000 samples, 10 classes): functions that know one
to three classes and at times vote for them on others. Snorkel and crowd-kit (`pip install -e ".[crosscheck]"`) get the
same votes; without them their rows are left out. "1 iteration" is one E and one M step.
"""

from __future__ import annotations

import argparse
import importlib.util
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from fedlabel.inference.label_model import LabelModel, coverage_normalized_votes, majority_vote
from tests.inference.test_label_model import simulate

CLASSES = 10


def fitted(votes: Tensor, sets: Tensor, variant: str = "full", abstentions: bool = True) -> Tensor:
    even = torch.ones(CLASSES)
    return LabelModel(CLASSES, sets, variant, prior=even, abstentions=abstentions).fit(votes).posterior(votes)


def snorkel(votes: Tensor, epochs: int = 150) -> Tensor:
    from snorkel.labeling.model import LabelModel as Snorkel

    model = Snorkel(CLASSES, verbose=False)
    model.fit(votes.numpy(), class_balance=[1 / CLASSES] * CLASSES, n_epochs=epochs, seed=0, progress_bar=False)
    return torch.from_numpy(model.predict_proba(votes.numpy()))


def dawid_skene(votes: Tensor, silence: bool) -> Tensor:
    import pandas
    from crowdkit.aggregation import DawidSkene

    task, worker = np.indices(votes.shape).reshape(2, -1)
    frame = pandas.DataFrame({"task": task, "worker": worker, "label": votes.numpy().ravel()})
    if not silence:
        frame = frame[frame.label >= 0]
    shares = DawidSkene(n_iter=100).fit_predict_proba(frame)
    posterior = torch.zeros(len(votes), CLASSES, dtype=torch.float64)
    columns = [label for label in shares.columns if label >= 0]  # who is said to be "abstain" counts as wrong
    posterior[shares.index.to_numpy()[:, None], np.array(columns)] = torch.tensor(shares[columns].to_numpy())
    return torch.where(posterior.sum(1, keepdim=True) > 0.5, posterior, -1.0)


def aggregators(tables: Tensor) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    def oracle(votes: Tensor, sets: Tensor) -> Tensor:
        model = LabelModel(CLASSES, sets, prior=torch.ones(CLASSES))
        model.tables = tables
        return model.posterior(votes)

    rows: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "majority vote": lambda votes, sets: majority_vote(votes, CLASSES),
        "votes / functions that cover the class": coverage_normalized_votes,
        "EM, abstentions left out": lambda votes, sets: fitted(votes, sets, abstentions=False),
        "EM, full": fitted,
        "EM, tied": lambda votes, sets: fitted(votes, sets, "tied"),
        "cage": lambda votes, sets: fitted(votes, sets, "cage"),
        "the true tables": oracle,
    }
    if importlib.util.find_spec("snorkel"):
        rows["Snorkel's LabelModel (150 epochs)"] = lambda votes, sets: snorkel(votes)
    if importlib.util.find_spec("crowdkit"):
        rows["crowd-kit's DawidSkene, abstentions missing"] = lambda votes, sets: dawid_skene(votes, False)
        rows["crowd-kit's DawidSkene, abstaining a label"] = lambda votes, sets: dawid_skene(votes, True)
    return rows


def correct(posterior: Tensor, truth: Tensor) -> float:
    right = (posterior.argmax(1) == truth) & (posterior.amax(1) >= 0)
    return float(right.double().mean())


def compare(seeds: list[int]) -> None:
    found: dict[str, list[tuple[float, float]]] = {}
    for seed in seeds:
        votes, sets, truth, tables = simulate(seed)
        for name, aggregate in aggregators(tables).items():
            started = time.perf_counter()
            value = correct(aggregate(votes, sets), truth)
            found.setdefault(name, []).append((value, time.perf_counter() - started))
    print(f"| aggregator | {' | '.join(f'seed {seed}' for seed in seeds)} | seconds (median) |")
    print("|---|" + "---|" * (len(seeds) + 1))
    for name, values in found.items():
        cells = [f"{100 * value:.1f}" for value, _ in values]
        print(f"| {name} | {' | '.join(cells)} | {np.median([seconds for _, seconds in values]):.2f} |")


def growth(seeds: list[int]) -> None:
    print("\n| functions | EM, full | majority vote |\n|---|---|---|")
    for functions in (5, 10, 25, 50, 100):
        rows = []
        for seed in seeds:
            votes, sets, truth, _ = simulate(seed, k=functions)
            if not bool(sets.any(0).all()):  # a class that no function votes for
                sets = torch.cat([sets, torch.ones(1, CLASSES, dtype=torch.bool)])
                votes = torch.cat([votes, votes.new_full((len(votes), 1), -1)], 1)
            rows.append((correct(fitted(votes, sets), truth), correct(majority_vote(votes, CLASSES), truth)))
        em, majority = 100 * np.mean(rows, 0)
        print(f"| {functions} | {em:.1f} | {majority:.1f} |")


def speed(n: int, functions: int, device: torch.device) -> None:
    votes, sets, truth, _ = (each.to(device) for each in simulate(0, n=n, k=functions))
    model = LabelModel(CLASSES, sets, prior=torch.ones(CLASSES, device=device))
    if device.type == "cuda":
        LabelModel(CLASSES, sets).fit(votes, max_iterations=1)  # warm-up
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    model.fit(votes)
    seconds = time.perf_counter() - started
    right = correct(model.posterior(votes), truth)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**30
    print(
        f"{n:,} samples x {functions} functions: {model.iterations} iterations in {seconds:.2f} s "
        f"({seconds / max(1, model.iterations):.3f} s each), {100 * right:.1f} % right, peak memory {peak:.1f} GiB "
        f"(the votes alone: {votes.nbytes / 2**30:.2f})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--speed", action="store_true", help="time large votes instead")
    parser.add_argument("--device", default="cpu", help="for --speed: cpu or cuda")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.speed:
        speed(50_000, 50, torch.device(arguments.device))
        speed(1_000_000, 100, torch.device(arguments.device))
    else:
        compare(arguments.seeds)
        growth(arguments.seeds)


if __name__ == "__main__":
    main()
