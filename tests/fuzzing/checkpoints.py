"""Damaged or foreign files in the folder of a run that is resumed: refused in one sentence, or of no effect.

A checkpoint is changed and signed anew, so that its digest is right. Left out are changes that make another sound
checkpoint: other finite numbers, or a client that seems never to have trained.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import random
import shutil
import tempfile
import traceback
from functools import cache
from pathlib import Path
from typing import Any

import torch

import fedlabel
from fedlabel.config import ExperimentConfig, load_config
from fedlabel.errors import RunError
from fedlabel.hardware import PACKAGE_ROOT, SOURCE_PACKAGES
from server.checkpoint import MAGIC, file_name, load_checkpoint
from server.grids.in_process import InProcessGrid
from server.server_app import run_federation
from tests.integration.tiny import comparable_metrics

TINY = [
    *("num_clients=4", "num_rounds=3", "fraction_train=0.75", "model.name=mlp", "model.hidden_layers=[8]"),
    *("training.local_steps=1", "training.batch_size=8", "data.train_samples=200", "checkpoint.keep=3", "device=cpu"),
    *("evaluation.figures=false", "evaluation.panel_samples=0"),
]
RUNS = {
    "fedtrinet": ["method.warmup_rounds=1", "strategy.name=FedAdam", "strategy.args.eta=0.01"],
    "freematch": ["strategy.name=FedAvgM", "strategy.args.server_momentum=0.5"],
    "fedmatch": ["method.helper_interval=1"],
    "llp_bp": ["method.stage_rounds=1", "supervision.kind=bags", "supervision.bag_size=5", "evaluation.select=bag_mae"],
}
"""Method -> options under which its checkpoints hold all that there can be."""
ROUND = 2
"""Of the newest checkpoint in the folder that is damaged."""
TOGETHER = 25
"""Cases in a row on the same run: data and model are kept from one to the next."""


class Touching:
    """Leaves a file behind if it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def case(seed: int, folder: Path) -> str | None:
    """See `tests.fuzzing`."""
    rng = random.Random(seed)
    method = list(RUNS)[seed // TOGETHER % len(RUNS)]
    whole = whole_run(method)
    run, mark = folder / "run", folder / "mark"
    shutil.copytree(whole, run, ignore=shutil.ignore_patterns("events.*", file_name(ROUND + 1)))
    what = rng.choice([damage_payload, damage_content, damage_content, damage_content, damage_folder])(rng, run, mark)
    config, text = config_of(method), run / "config.yaml"
    try:
        if text.is_file() and text.read_bytes() == (whole / "config.yaml").read_bytes():
            run_federation(config, InProcessGrid(), run, resume=True)
        else:
            fedlabel.run(name="run", out=folder, resume=True)
    except (ValueError, RunError) as error:
        return f"{method}, {what}: {complaint}" if (complaint := not_clean(error)) else ran(mark, what)
    except Exception:
        return f"{method}, {what}: {traceback.format_exc()}"
    same = comparable_metrics(run) == comparable_metrics(whole)
    last = Path("checkpoints") / file_name(ROUND + 1)
    first, second = load_checkpoint(run / last).model, load_checkpoint(whole / last).model
    same = same and all(torch.equal(first[name], second[name]) for name in second)
    return ran(mark, what) if same else f"{method}, {what}: accepted, and the result is another"


def ran(mark: Path, what: str) -> str | None:
    return f"{what}: code in the file was run" if mark.exists() else None


def not_clean(error: Exception) -> str | None:
    """Returns what is wrong with a refusal: several lines, or somebody else's words."""
    last = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    ours = any(PACKAGE_ROOT / name in last.parents for name in SOURCE_PACKAGES)
    text = str(error)
    if ours and "\n" not in text and len(text) < 2000 and text.isprintable():
        return None
    return f"{type(error).__name__} from {last}: {text[:500]!r}"


@cache
def config_of(method: str) -> ExperimentConfig:
    return load_config([], [*TINY, f"method.name={method}", *RUNS[method]])


@cache
def whole_run(method: str) -> Path:
    """Returns the folder of an undisturbed run."""
    out = Path(tempfile.mkdtemp(prefix="fedlabel-fuzz-"))
    return fedlabel.run(config_of(method), name="run", out=out).path


def sign(path: Path, payload: bytes) -> None:
    path.write_bytes(MAGIC + hashlib.sha256(payload).digest() + payload)


def payload_of(value: Any, path: Path) -> bytes:
    torch.save(value, path)
    content = path.read_bytes()
    path.unlink()
    return content


def damage_payload(rng: random.Random, run: Path, mark: Path) -> str:
    """Replaces the newest checkpoint as a whole."""
    path = run / "checkpoints" / file_name(ROUND)
    content = path.read_bytes()[len(MAGIC) + 32 :]
    scratch = run.parent / "scratch"
    other = list(RUNS)[rng.randrange(len(RUNS))]
    foreign = whole_run(other) / "checkpoints" / file_name(ROUND)
    flipped = bytearray(content)
    flipped[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    choices = {
        "empty": b"",
        "cut": content[: rng.randrange(len(content))],
        "noise": rng.randbytes(rng.randrange(1, 500)),
        "a list": payload_of([1, 2, 3], scratch),
        "a tensor": payload_of(torch.zeros(3), scratch),
        "a module": payload_of(torch.nn.Linear(2, 2), scratch),
        "a pickle": pickle.dumps({"round_number": 2}),
        "a pickle that runs code": pickle.dumps(Touching(mark)),
        "a file that runs code": payload_of(Touching(mark), scratch),
        "code inside": payload_of({"round_number": 2, "model": Touching(mark)}, scratch),
        "not even the beginning": None,
        "wrong digest": bytes(flipped),
        "another round's": (run / "checkpoints" / file_name(ROUND - 1)).read_bytes(),
        **({"another run's": foreign.read_bytes()} if not run.samefile(foreign.parent.parent) else {}),
    }
    name = rng.choice(list(choices))
    chosen = choices[name]
    if (
        name == "another run's"
        and whole_run(other).joinpath("config.yaml").read_text() == (run / "config.yaml").read_text()
    ):
        name, chosen = "empty", b""
    if chosen is None:
        path.write_bytes(rng.randbytes(30))
    elif name == "wrong digest":
        path.write_bytes(path.read_bytes()[: len(MAGIC) + 32] + chosen)
    elif name in ("another round's", "another run's"):
        path.write_bytes(chosen)
    else:
        sign(path, chosen)
    return name


def damage_content(rng: random.Random, run: Path, mark: Path) -> str:
    """Changes something inside the newest checkpoint."""
    path = run / "checkpoints" / file_name(ROUND)
    scratch = run.parent / "scratch"
    scratch.write_bytes(path.read_bytes()[len(MAGIC) + 32 :])
    content = torch.load(scratch, weights_only=True)
    places = sorted(_places(content, ()), key=repr)
    section = rng.choice(sorted({place[0] for place in places}))
    place = rng.choice([each for each in places if each[0] == section])
    holder: Any = content
    for key in place[:-1]:
        holder = holder[key]
    key, old = place[-1], holder[place[-1]]
    new = _other(rng, old)
    how = rng.choice(["replace", "replace", "replace", "remove", "add", "rename"])
    client = isinstance(holder, dict) and type(key) is int  # one that never trained has no entry
    if how == "replace" or client:
        holder[key], how = new, "replace"
    elif how == "remove":
        del holder[key]
    elif isinstance(holder, list):
        holder.insert(0, _other(rng, old))
    elif how == "add":
        holder["other"] = new
    else:
        holder["other"] = holder.pop(key)
    sign(path, payload_of(content, scratch))
    return f"{how} {place}: {str(old)[:60]!r} -> {str(new)[:60]!r}"


def _places(value: Any, place: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = [] if not place else [place]
    return found + [inner for key, item in items for inner in _places(item, (*place, key))]


def _other(rng: random.Random, old: Any) -> Any:
    """Returns something that cannot stand where `old` stands."""
    if isinstance(old, torch.Tensor):
        floating = old.is_floating_point()
        broken = old.clone() if floating else old.float()
        broken.view(-1)[:1] = float("nan")
        kinds = [
            torch.cat([old.flatten(), old.flatten(), torch.ones(1, dtype=old.dtype)]),
            old[None],
            torch.zeros(1, dtype=old.dtype).expand(10**12),  # no room for a copy of it
            torch.zeros(3, 5, 7),
            old.to_sparse() if old.dim() else old[None],
            torch.empty(old.shape, device="meta"),
            old.to(torch.complex64),
            torch.nn.Parameter(old.float()),
            *([broken] if old.numel() else []),
        ]
        return rng.choice([*kinds, None, 3, "text", [old]])
    if isinstance(old, bytes):
        return rng.choice([b"", old[:-1], rng.randbytes(50), old + b"x", "text", 7, None, [old]])
    if isinstance(old, bool):
        return rng.choice([not old, None, "yes", 1, 2.0])
    if isinstance(old, (int, float)):
        return rng.choice([old + 1, -1 - old, 1e300, float("nan"), float("inf"), 10**30, str(old), [old], None, {}])
    if isinstance(old, str):
        return rng.choice(
            ["", "- a\n- b", old[: len(old) // 3], "a: [", "seed: 1\n", old.encode(), 3, None, "\x00" * 9]
        )
    deep: Any = []
    for _ in range(rng.choice([1, 400])):
        deep = [deep]
    return rng.choice(
        [None if old is not None else 3, 3.5, "text", deep, {"x": 1}, {0: b"x"}, {"ndarray": 3}, torch.ones(2)]
    )


def damage_folder(rng: random.Random, run: Path, mark: Path) -> str:
    """Changes one of the other files."""
    name = rng.choice(
        ["metrics.jsonl"] * 3
        + ["partition.json", "config.yaml", "config.yaml", "supervision.json", "summary.json", "folder"]
    )
    path = run / name
    if name == "folder":
        return _damage_checkpoints(rng, run / "checkpoints")
    content = path.read_bytes()
    if name == "metrics.jsonl":
        return f"{name}: {_damage_metrics(rng, path)}"
    how = rng.choice(["cut", "empty", "noise", "list", "gone", "folder", "deep", "python"])
    # A configuration may be cut so that a key which need not be there is missing.
    if how == "cut" and name != "config.yaml":
        path.write_bytes(content[: rng.randrange(len(content))])
    elif how == "gone":
        path.unlink()
    elif how == "folder":
        path.unlink()
        path.mkdir()
    else:
        new = {"empty": b"", "list": b"[1, 2]", "deep": b"[" * 5000, "python": b"a: !!python/object/apply:os.getcwd []"}
        path.write_bytes(new.get(how, bytes([0, 255]) + rng.randbytes(99)))
    return f"{name}: {how}"


def _damage_metrics(rng: random.Random, path: Path) -> str:
    rows = path.read_text().splitlines(keepends=True)
    row = rng.randrange(ROUND)
    values = json.loads(rows[row])
    key = rng.choice(list(values))
    how = rng.choice(["cut", "nan", "text", "gone", "twice", "swapped", "noise", "deep", "number", "latin"])
    if how == "cut":
        rows = ["".join(rows)[: rng.randrange(len("".join(rows[:ROUND])) - 1)]]
    elif how in ("nan", "text"):
        values[key] = {"nan": float("nan"), "text": "text"}[how]
        rows[row] = json.dumps(values) + "\n"
    elif how == "gone":
        del rows[row]
    elif how == "twice":
        rows.insert(row, rows[row])
    elif how == "swapped":
        rows[0], rows[1] = rows[1], rows[0]
    else:
        rows[row] = {"noise": "\x00\x01\n", "deep": "[" * 50000 + "\n", "number": "3\n", "latin": "\udcff\n"}[how]
    path.write_bytes("".join(rows).encode(errors="surrogateescape"))
    return how


def _damage_checkpoints(rng: random.Random, folder: Path) -> str:
    newest = folder / file_name(ROUND)
    how = rng.choice(["file", "folder inside", "other name", "selected", "stray"])
    if how == "file":
        shutil.rmtree(folder)
        folder.write_text("text")
    elif how == "folder inside":
        newest.unlink()
        newest.mkdir()
    elif how == "other name":
        newest.rename(folder / file_name(rng.choice([7, 3, 10**9])))
    elif how == "selected":
        for file in folder.glob("selected_*"):
            file.write_bytes(rng.randbytes(9))
        (folder / "selected_x.pt").write_bytes(b"")
        (folder / "selected_999999999999999999999999.pt").write_bytes(b"")
    else:
        (folder / "round_x.ckpt").write_bytes(b"")
        (folder / "round_99999999999999999999999.ckpt").write_bytes(b"")
    return f"checkpoints: {how}"
