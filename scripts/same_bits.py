"""Compares what two versions compute, bit for bit: `python scripts/same_bits.py BASE [part of a case's name ...]`.

Each method, with every kind of label it learns from, is run on embedded data by the commit BASE (in a worktree of its
own) and by this tree: 3 rounds or more, the last one after a resume, in this process and on two Ray workers. Metrics
(but `system/*`) and the final tensors have to be equal. Nothing is stored: both run now, on this machine.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TINY = (
    *("num_clients=4", "fraction_train=0.75", "partition.kind=dirichlet", "data.train_samples=160", "model.name=mlp"),
    *("model.hidden_layers=[8]", "training.batch_size=16", "device=cpu", "grid.num_workers=2"),
    *("evaluation.figures=false", "evaluation.panel_samples=0", "checkpoint.keep=2"),
)
TWO = ("data.positive_classes=[0,1,2,3,4]",)
KINDS: dict[str, tuple[str, ...]] = {
    "true": ("supervision.label_rate=0.4",),
    "at server": ("supervision.labels_at=server", "supervision.label_rate=0.4", "training.server_steps=2"),
    "noisy": ("supervision.kind=noisy", "supervision.noise=symmetric", "supervision.noise_rate=0.3"),
    "sets": ("supervision.kind=partial", "supervision.partial_ratio=0.3"),
    "noisy sets": ("supervision.kind=partial_and_noisy", "supervision.partial_ratio=0.3", "supervision.noise_rate=0.2"),
    "bags": ("supervision.kind=bags", "supervision.bag_size=8"),
    "votes": ("supervision.kind=labeling_functions", "supervision.module=FUNCTIONS"),
    "mixed": (
        "supervision.mix=[{kind: few_labels, label_rate: 0.5, share: 0.4},"
        "{kind: partial, partial_ratio: 0.3, share: 0.3},"
        "{kind: noisy, noise: symmetric, noise_rate: 0.3, share: 0.3}]",
    ),
}
"""Kind of label -> overrides."""
IN_BAGS = ("dllp", "easy_llp", "gen_bags", "count_likelihood", "llp_vat", "top_count", "llp_bp")
USES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("supervised", "fixmatch", "semifl", "fedmatch", "freematch", "uda"), ("true", "at server")),
    **dict.fromkeys(("pseudo_label", "fedlabel", "fedtrinet", "sage", "fedlc", "fedrs", "fedrod"), ("true",)),
    **dict.fromkeys(("gce", "elr", "co_teaching", "forward"), ("noisy",)),
    **dict.fromkeys(("proden", "cc", "lws"), ("sets",)),
    **dict.fromkeys(IN_BAGS, ("bags",)),
    "ill": ("true", "noisy", "sets", "noisy sets", "mixed"),
    "dp_ssl": ("true", "votes"),
}
ROUNDS = {"dp_ssl": 6, "forward": 4, "llp_bp": 4, "fedtrinet": 4}
"""3 for all others."""
OWN: dict[str, tuple[str, ...]] = {
    "ill": ("method.noise.warmup_rounds=1",),
    "forward": ("method.warmup_rounds=2",),
    "top_count": TWO,
    "llp_bp": ("method.stage_rounds=2",),
    "fedlabel": ("method.confidence_threshold=0.2",),
    "fixmatch": ("method.confidence_threshold=0.3",),
    "uda": ("method.confidence_threshold=0.3",),
    "semifl": ("method.confidence_threshold=0.3",),
    "fedmatch": ("method.helper_interval=1", "method.confidence_threshold=0.3", "training.lr=0.01"),
    "fedtrinet": ("method.warmup_rounds=2", "method.quality_start=0.2"),
    "dp_ssl": (
        *("method.functions_rounds=2", "method.assignment_rounds=1", "method.label_model_rounds=2"),
        *("method.num_functions=4", "method.heads_per_class=4"),
    ),
}
MORE: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "fedlabel, mean": ("fedlabel", "true", ("method.merge=mean",)),
    "fedlabel, burn-in": ("fedlabel", "true", ("method.burn_in_rounds=1", "method.prox_mu=0.1")),
    "fedmatch, disjoint": ("fedmatch", "true", ("method.variant=disjoint",)),
    "fedmatch, one model": ("fedmatch", "true", ("method.variant=inter_client",)),
    "fixmatch, flexmatch": ("fixmatch", "true", ("method.mask.kind=flexmatch", "method.mask.debias=prior")),
    "fixmatch, cbafed": ("fixmatch", "true", ("method.mask.kind=cbafed",)),
    "fixmatch, freematch": ("fixmatch", "true", ("method.mask.kind=freematch",)),
    "pseudo_label, round": ("pseudo_label", "true", ("method.relabel=round", "method.confidence_threshold=0.3")),
    "ill, logits": ("ill", "noisy", ("method.noise.form=gradient",)),
    "ill, own matrices": ("ill", "noisy", ("method.noise.form=gradient", "method.noise.scope=client")),
    "ill, prior": ("ill", "noisy", ("method.noise.scope=prior",)),
    "ill, aligned": ("ill", "true", ("method.alignment=true", "method.top_k=3", "method.balance_weight=0.1")),
    "ill, three views": ("ill", "sets", ("method.view_mean=true", "method.complement_weight=1")),
    "llp_bp, two classes": ("llp_bp", "bags", (*TWO, "method.rule=top_count", "method.centered=true")),
    "llp_bp, current": ("llp_bp", "bags", ("method.evidence=current",)),
    "llp_bp, with labels": (
        "llp_bp",
        "bags",
        ("supervision.mix=[{kind: bags, bag_size: 8, share: 0.6},{kind: few_labels, label_rate: 0.5, share: 0.4}]",),
    ),
    "dp_ssl, random sets": ("dp_ssl", "true", ("method.assignment=random", "method.num_functions=20")),
    "dp_ssl, warm": ("dp_ssl", "true", ("method.end_start=warm", "method.prior=client", "method.lambda_c=0.5")),
    "batch norm": ("supervised", "true", ("model.name=cnn", "model.norm=batch", "model.hidden_layers=[]")),
    "FedAdam": ("supervised", "true", ("strategy.name=FedAdam",)),
    "selected": ("llp_bp", "bags", ("evaluation.select=instance_loss", "data.validation_fraction=0.1")),
    "every label": ("supervised", "true", ("method.oracle_labels=true",)),
}  # fmt: skip
"""Name -> method, kind of label, overrides."""
GRIDS = ("in_process", "ray")
FUNCTIONS = """def bright(image):
    return int(image.mean()) % 10 if image.mean() > 70 else -1


def left(image):
    return 3 if image[..., :4].mean() > image[..., 4:].mean() else 7


def corner(image):
    return 1 if image.max() > 250 else -1
"""


def cases(folder: Path) -> Iterator[tuple[str, str, int, list[str]]]:
    """Yields (name, grid, rounds, overrides)."""
    module = folder / "bits_functions.py"
    module.write_text(FUNCTIONS)
    listed = {f"{method}, {kind}": (method, kind, ()) for method, kinds in USES.items() for kind in kinds}
    for grid in GRIDS:
        for name, (method, kind, more) in {**listed, **MORE}.items():
            own = [item for item in OWN.get(method, ()) if not (kind == "votes" and "_rounds" in item)]
            own = [item for item in own if not (kind == "votes" and ("num_f" in item or "heads" in item))]
            if kind == "votes":
                own = ["method.functions=written", "method.num_functions=3", "method.label_model_rounds=2"]
            labels = [item.replace("FUNCTIONS", str(module)) for item in KINDS[kind]]
            if any("supervision.mix" in item for item in more):
                labels = []
            overrides = [f"method.name={method}", *TINY, *labels, *own, *more, f"grid.kind={grid}"]
            yield f"{name}, {grid}", grid, ROUNDS.get(method, 3), overrides


def compute(chosen: Path, out: Path) -> None:
    """Runs the cases with the fedlabel that PYTHONPATH names, and writes what they computed, a line each."""
    import logging

    import ray

    import fedlabel
    from server.checkpoint import load_checkpoint

    logging.disable(logging.WARNING)
    for name, grid, rounds, overrides in json.loads(chosen.read_text()):
        if grid == "ray" and not ray.is_initialized():
            ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level=40, log_to_driver=False)
        with tempfile.TemporaryDirectory() as folder:
            found: dict[str, Any] = {"name": name}
            try:
                fedlabel.run([], [*overrides, f"num_rounds={rounds - 1}"], name="run", out=folder)
                fedlabel.run([], [*overrides, f"num_rounds={rounds}"], name="run", out=folder, resume=True)
                rows = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
                found["metrics"] = [
                    {tag: repr(value) for tag, value in row.items() if not tag.startswith("system/")} for row in rows
                ]
                failed = Path(folder) / "run" / "failures.log"
                found["failures"] = failed.read_text() if failed.exists() else ""
                last = load_checkpoint(Path(folder) / "run" / "checkpoints" / f"round_{rounds:06d}.ckpt")
                tensors = {f"{part} {key}": v for part in ("model", "shared") for key, v in getattr(last, part).items()}
                found["tensors"] = {
                    key: f"{v.dtype} {tuple(v.shape)} {hashlib.sha256(v.contiguous().numpy().tobytes()).hexdigest()}"
                    for key, v in tensors.items()
                }
            except Exception as error:  # the other version may say the same
                found["error"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        with out.open("a") as file:
            file.write(json.dumps(found) + "\n")


def difference(base: dict[str, Any], here: dict[str, Any]) -> str:
    """Returns where two results first differ; nothing where they are the same."""
    if "error" in base or "error" in here:
        return "" if base == here else f"base: {base.get('error', 'runs')}; here: {here.get('error', 'runs')}"
    for number, (old, new) in enumerate(zip(base["metrics"], here["metrics"], strict=False), 1):
        for tag in [*old, *(tag for tag in new if tag not in old)]:
            if old.get(tag) != new.get(tag):
                return f"round {number}, {tag}: {old.get(tag)} -> {new.get(tag)}"
    for key in [*base["tensors"], *(key for key in here["tensors"] if key not in base["tensors"])]:
        if base["tensors"].get(key) != here["tensors"].get(key):
            return f"{key}: {str(base['tensors'].get(key))[:40]} -> {str(here['tensors'].get(key))[:40]}"
    return "" if base == here else "another number of rounds, or other failures"


def start(tree: Path, chosen: Path, out: Path) -> subprocess.Popen[bytes]:
    """Starts the cases in a tree."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(tree),
        "OMP_NUM_THREADS": "1",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }
    command = [sys.executable, str(Path(__file__).resolve()), "--compute", str(chosen), str(out)]
    return subprocess.Popen(command, env=environment, cwd=chosen.parent, stdout=subprocess.DEVNULL)


def main() -> int:
    """Compares, prints a line per case, and returns how many differ, at most 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="a commit")
    parser.add_argument("parts", nargs="*", help="run only cases whose names have one of these in them")
    parser.add_argument("--here", type=Path, default=Path(__file__).resolve().parents[1], help="the other tree")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bits") as text:
        folder = Path(text)
        base, chosen = folder / "base", folder / "cases.json"
        listed = [case for case in cases(folder) if not options.parts or any(part in case[0] for part in options.parts)]
        chosen.write_text(json.dumps(listed))
        git = ["git", "-C", str(options.here), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(base), options.base], check=True)
        try:
            running = {
                tree: start(tree, chosen, folder / f"{place}.jsonl") for place, tree in enumerate((base, options.here))
            }
            stopped = [process.wait() for process in running.values()]
            results = [
                [json.loads(line) for line in (folder / f"{place}.jsonl").read_text().splitlines()]
                for place in range(2)
            ]
        finally:
            for process in running.values():
                process.kill()
            subprocess.run([*git, "remove", "--force", str(base)], check=True)
    different = empty = 0
    for old, new in zip(*results, strict=True):
        found = difference(old, new)
        different += bool(found)
        empty += "error" in old and not found
        note = f" (fails in both: {old['error']})" if "error" in old and not found else ""
        print(f"{'DIFFERENT' if found else 'same     '} {old['name']}{note}{': ' * bool(found)}{found}")
    missing = len(listed) - len(results[0])
    print(f"{len(listed)} cases: {different} differ, {empty} fail in both, {missing} did not end (exit {stopped})")
    return int(different + empty + missing > 0 or any(stopped))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--compute"]:
        compute(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        sys.exit(main())
