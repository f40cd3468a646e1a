"""The table of metric tags is whole, and a method adds its own."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import fedlabel
from fedlabel.errors import RunError
from fedlabel.experiment import open_experiment
from fedlabel.learning.evaluation import EVALUATED
from fedlabel.methods import method_class
from fedlabel.metric_tags import TAGS, Tag, client_tags, find_tag
from fedlabel.record.json_files import read_metrics
from server.simulation import RunResult
from tests.integration.processes import environment, fedlabel_command

ROOT = Path(__file__).resolve().parents[1]
METHOD = "method.name=my_method:SelfTraining"
MINE = Tag("pseudo/margin", "margin", "share", "Pseudo-labels", "lower", least=0.0, largest=1.0)
TINY = (
    *("num_clients=2", "fraction_train=1.0", "num_rounds=1", "data.train_samples=100", "supervision.label_rate=0.5"),
    *("model.name=mlp", "model.hidden_layers=[8]", "training.local_steps=1", "training.batch_size=16", "device=cpu"),
    *("evaluation.figures=false", "evaluation.panel_samples=0", "partition.kind=iid"),
)


def test_names_are_unique() -> None:
    assert len({tag.name for tag in TAGS}) == len(TAGS)


def test_every_tag_that_stands_in_the_code_is_declared() -> None:
    groups = "|".join(sorted({tag.name.partition("/")[0] for tag in TAGS if "/" in tag.name}))
    literal = re.compile(rf'"((?:{groups})/[A-Za-z0-9_]+)"')
    files = [file for folder in ("fedlabel", "server", "clients") for file in (ROOT / folder).rglob("*.py")]
    found = {name for file in files for name in literal.findall(file.read_text())}
    assert len(found) > 60
    assert not {name for name in found if find_tag(name) is None}
    assert all(find_tag(name) for name in EVALUATED)


def test_a_tag_is_found_by_name_by_number_or_among_the_methods_own() -> None:
    found = find_tag("transition/12")
    assert found is not None
    assert found.name == "transition/{annotator}"
    assert find_tag("transition/x") is None
    assert find_tag("pseudo/margin") is None
    assert find_tag("pseudo/margin", (MINE,)) is MINE


def test_ranges_follow_the_number_of_classes() -> None:
    tags = client_tags()
    assert tags["posterior/entropy"].range(10) == (0, pytest.approx(math.log(10)))
    assert tags["posterior/candidates"].range(10) == (1, 10)
    assert tags["pseudo/coverage"].range(10) == (0, 1)
    assert tags["train/loss"].range(10) == (-1e9, 1e9)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"page": "Losses"}, r"`page` \(=Losses\) of metric pseudo/margin must be one of Learning, "),
        ({"direction": "up"}, r"`direction` \(=up\) .* must be one of higher, lower, neither"),
        ({"least": 2.0}, r"`least` \(=2\) and `largest` \(=1\) of metric pseudo/margin must be finite and in rising"),
        ({"largest": math.inf}, "must be finite"),
        ({"least": math.nan}, "must be finite"),
    ],
)
def test_an_impossible_tag_is_refused(changes, reason):
    with pytest.raises(ValueError, match=reason):
        replace(MINE, **changes)


@pytest.mark.parametrize(
    ("own", "reason"),
    [
        (("pseudo/margin",), r"`metrics` \(='pseudo/margin'\) must be a tuple of fedlabel.metric_tags.Tag"),
        ((replace(MINE, name="eval/mine"),), "eval/mine must be a group in lower case.*the groups comm/, eval/"),
        ((replace(MINE, name="margin"),), "margin must be a group in lower case, / and .* such as pseudo/margin;"),
        ((replace(MINE, name="pseudo/a b"),), "pseudo/a b must be a group in lower case"),
        ((replace(MINE, name="pseudo/coverage"),), "pseudo/coverage is declared already"),
        ((replace(MINE, name="pseudo/samples"),), "pseudo/samples is declared already"),
        ((MINE, MINE), "pseudo/margin is declared already"),
    ],
)
def test_what_a_method_may_not_declare(own, reason):
    with pytest.raises(ValueError, match=reason):
        client_tags(own)


# ------------------------------------------------------------------------------------------------ a method from outside


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The example of docs/extend.md as a module `my_method`; a test may change it."""
    example, *_ = re.findall(r"```python\n(.*?)```", (ROOT / "docs/extend.md").read_text(), re.DOTALL)
    (tmp_path / "my_method.py").write_text(example)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / "my_method.py"
    sys.modules.pop("my_method", None)
    open_experiment.cache_clear()  # it knows methods by name


def run(path: Path, *overrides: str) -> RunResult:
    return fedlabel.run([], [*TINY, METHOD, *overrides], name="x", out=path.parent)


def change(path: Path, *pairs: tuple[str, str]) -> None:
    text = path.read_text()
    for old, new in pairs:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    path.write_text(text)


STEP = "return semi_supervised_step(supervised, unsupervised, 1.0, keep, pseudo)"
OWN = (
    f"        {STEP}",
    f"        step = {STEP.removeprefix('return ')}\n"
    '        return step._replace(metrics={**step.metrics, "pseudo/mine": step.metrics["pseudo/coverage"]})',
)
DECLARED = (
    '    description: ClassVar[str] = "global',
    '    metrics = (Tag("pseudo/mine", "mine", "share", "Pseudo-labels", "lower", least=0, largest=1),)\n'
    '    description: ClassVar[str] = "global',
)
IMPORT = ("from fedlabel.methods.recipe", "from fedlabel.metric_tags import Tag\nfrom fedlabel.methods.recipe")


def test_the_example_in_docs_runs(written: Path) -> None:
    """With a threshold that every sample reaches, all are used; with one that none does, none."""
    change(written, ("threshold: float = 0.9", "threshold: float = 0.0"))
    assert run(written).summary["pseudo/coverage"]["last"] == 1
    (row,) = fedlabel.run([], [*TINY, METHOD, "method.threshold=1"], name="none", out=written.parent).metrics
    assert row["pseudo/coverage"] == row["train/loss_unsupervised"] == 0 < row["train/loss"]
    with pytest.raises(ValueError, match=r"`method.threshold` \(=2\) must lie in \[0, 1\]"):
        run(written, "method.threshold=2")


def test_the_example_in_docs_is_short(written: Path) -> None:
    assert len([line for line in written.read_text().splitlines() if line and not line.startswith("#")]) <= 25


@pytest.mark.slow
def test_the_example_in_docs_runs_from_an_empty_folder_by_the_command(written: Path) -> None:
    """As its text says: the module in the folder where the command runs, and nothing else."""
    folder = written.parent / "empty"
    folder.mkdir()
    written.rename(folder / "my_method.py")
    done = subprocess.run(
        fedlabel_command("run", METHOD, *TINY, "--name", "x"),
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert {path.name for path in folder.iterdir()} <= {"my_method.py", "runs", "__pycache__"}
    assert read_metrics(folder / "runs" / "x")[0]["pseudo/coverage"] >= 0


def test_a_method_declares_its_own_metric(written: Path) -> None:
    change(written, OWN, DECLARED, IMPORT)
    (row,) = run(written).metrics
    assert 0 <= row["pseudo/mine"] <= 1
    assert row["system/refused_replies"] == 0
    method = method_class("my_method:SelfTraining")
    assert find_tag("pseudo/mine", method.metrics).direction == "lower"  # type: ignore[union-attr]


def test_a_metric_that_nobody_declared_fails_at_the_client_by_name(written: Path) -> None:
    change(written, OWN)
    with pytest.raises(RunError, match=r'makes the metric pseudo/mine, which is not declared.* \(Tag\("pse'):
        run(written)


def test_metrics_that_cannot_be_declared_fail_before_the_run(written: Path) -> None:
    change(written, (DECLARED[0], DECLARED[1].replace("pseudo/mine", "eval/mine")), IMPORT)
    with pytest.raises(ValueError, match=r"`method.name` \(=my_method:SelfTraining\): `metrics`: eval/mine must be"):
        run(written)
    assert not (written.parent / "x").exists()
