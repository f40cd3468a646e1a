"""Written labelling functions: how a module is read, what counts as a vote, and who is asked."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedlabel.config import ConfigError, load_config
from fedlabel.data.federation import Federation, build_federation
from fedlabel.data.labels.imprecision import LabelSources
from fedlabel.data.labels.labeling_functions import NOT_ASKED, FunctionReport, cast_votes, load_functions
from fedlabel.data.labels.supervision import KIND_NAMES, Supervision, ask_functions, build_supervision, reveal_labels
from fedlabel.data.labels.supervision_config import LabelKind, MixPart, SupervisionConfig
from fedlabel.data.partition import PartitionConfig
from fedlabel.data.sets.config import DataConfig
from fedlabel.data.sets.datasets import load_dataset
from fedlabel.data.skew import SkewConfig

NAMES = ("cat", "dog", "cow")


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def names_of(functions: list[Callable[[Any], Any]]) -> list[str]:
    return [function.__name__ for function in functions]


# -------------------------------------------------------------------------------------------------------------- modules

THREE = """
from math import floor  # is not this module's own
from os.path import join

def zebra(sample):
    return 0

def _helper(sample):
    return 1

def apple(sample):
    return _helper(sample)

mango = lambda sample: 2
NUMBER = 4

class Thing:
    pass
"""


def test_own_public_functions_in_the_order_of_the_file(tmp_path: Path) -> None:
    functions = load_functions(write(tmp_path / "mine.py", THREE))
    assert [function(None) for function in functions] == [0, 1, 2]
    assert names_of(functions)[:2] == ["zebra", "apple"]


def test_a_module_that_python_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "votes_of_us").mkdir()
    write(tmp_path / "votes_of_us" / "__init__.py", "")
    write(tmp_path / "votes_of_us" / "rules.py", THREE)
    monkeypatch.syspath_prepend(tmp_path)
    assert names_of(load_functions("votes_of_us.rules"))[:2] == ["zebra", "apple"]
    del sys.modules["votes_of_us.rules"], sys.modules["votes_of_us"]


def test_a_list_says_which_and_in_what_order(tmp_path: Path) -> None:
    text = "\nfrom functools import partial\nlabeling_functions = [_helper, zebra, partial(max, 5)]\n"
    functions = load_functions(write(tmp_path / "listed.py", THREE + text))
    assert [function(3) for function in functions] == [1, 0, 5]


def test_functions_that_are_made_or_decorated_keep_their_order_and_their_own_names(tmp_path: Path) -> None:
    """What counts is the name in the module: of their code it is `vote` for all."""
    text = """
def _upside_down(function):
    def _wrapper(sample):
        return function(-sample)
    return _wrapper

def _above(limit):
    def vote(sample):
        return int(sample > limit)
    return vote

@_upside_down
def second_letter(sample):
    return sample

_hidden = _above(100)
above_two = _above(2)
above_one = _above(1)

def _logged(function):
    @functools.wraps(function)
    def logged(sample):
        return function(sample)
    return logged

@_logged
def twice(sample):
    return 2 * sample["size"] if isinstance(sample, dict) else 2 * sample
"""
    functions = load_functions(write(tmp_path / "made.py", "import functools\nfrom math import sqrt\n" + text))
    assert [function(2) for function in functions] == [-2, 0, 1, 4]
    assert functions[-1]({"size": 3}) == 6
    assert functions[-1].__name__ == "twice"


def test_two_files_of_one_name_are_two_modules(tmp_path: Path) -> None:
    for place in (0, 1):
        (tmp_path / str(place)).mkdir()
        (tmp_path / str(place) / "mine.py").write_text(f"def vote(sample):\n    return {place}\n")
    both = [load_functions(str(tmp_path / str(place) / "mine.py"))[0] for place in (0, 1)]
    assert [vote(None) for vote in both] == [0, 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"`supervision.module` \(=.*mine.py\) cannot be imported: FileNotFoundError"),
        ("def vote(sample):\nreturn 1\n", "cannot be imported: IndentationError"),
        ("raise SystemExit\n", "cannot be imported: SystemExit"),
        ("import numpi\n", "cannot be imported: ModuleNotFoundError: No module named 'numpi'"),
        ("x = '" + "\x00" + "'\n", "cannot be imported: SyntaxError"),
        ("raise ValueError('a\\nb' * 1000)\n", "cannot be imported: ValueError: a b.{,200} Give a module"),
        ("1 / 0\n", "cannot be imported: ZeroDivisionError: division by zero. Give a module that"),
        ("def _vote(sample):\n    return 1\n", "has no labelling functions: define some, or list them"),
        ("labeling_functions = []\ndef vote(sample):\n    return 1\n", "has no labelling functions"),
        ("labeling_functions = [len, 'max']\n", "has no labelling functions"),
    ],
)
def test_a_module_without_functions_is_named(text: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_functions(str(path))


def test_a_module_that_is_not_there_is_named() -> None:
    message = r"`supervision.module` \(=no.such.module\) cannot be imported: ModuleNotFoundError"
    with pytest.raises(ValueError, match=message):
        load_functions("no.such.module")


# ---------------------------------------------------------------------------------------------------------------- votes


def one(answer: object, names: Sequence[str] = NAMES) -> FunctionReport:
    """Asks a function that always says `answer` about one sample."""
    (report,) = cast_votes([lambda x: answer], [0], names).reports
    assert report.asked == 1 == report.votes + report.abstained + report.failed + report.invalid
    return report


def test_classes_by_number_or_name_and_ways_to_abstain() -> None:
    functions: list[Callable[[Any], Any]] = [
        lambda x: x,
        lambda x: None,
        lambda x: -1,
        lambda x: NAMES[x],
        lambda x: np.int8(x),
        lambda x: np.array([3, 1, 2]).argmin(),
        lambda x: np.str_("cow"),
        lambda x: torch.tensor(x),
        lambda x: float(x),
        lambda x: f" {NAMES[x].upper()} ",
        lambda x: "",
        lambda x: float("nan"),
    ]
    votes, reports = cast_votes(functions, [2, 0], NAMES)
    assert votes.tolist() == [[2, -1, -1, 2, 2, 1, 2, 2, 2, 2, -1, -1], [0, -1, -1, 0, 0, 1, 2, 0, 0, 0, -1, -1]]
    assert votes.dtype == np.int64
    assert [report.votes for report in reports] == [2, 0, 0, 2, 2, 2, 2, 2, 2, 2, 0, 0]
    assert [report.abstained for report in reports] == [0, 2, 2, 0, 0, 0, 0, 0, 0, 0, 2, 2]
    assert not any(report.warning() for report in reports)


def test_a_number_is_the_class_of_that_name_where_all_classes_are_numbers() -> None:
    """With classes 1 and 2 the answer 1 was once taken for the second class, which is `2`."""
    functions: list[Callable[[Any], Any]] = [lambda x: 1, lambda x: 2.0, lambda x: "2", lambda x: 0, lambda x: -1]
    votes, reports = cast_votes(functions, [None], ["1", "2"])
    assert votes.tolist() == [[0, 1, 1, -1, -1]]
    assert reports[3].first_invalid == "first sample 0 with 0, which is none of the classes 1, 2"
    votes, _ = cast_votes(functions, [None], ["-1", "1"])
    assert votes[0, [0, 4]].tolist() == [1, 0]


def test_no_samples_give_no_rows() -> None:
    votes, reports = cast_votes([lambda x: 0, lambda x: 1], [], NAMES)
    assert votes.shape == (0, 2)
    assert [report.seconds_per_1000 for report in reports] == [0.0, 0.0]


async def awaited(sample: object) -> int:
    return 1


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (3, "3, which is none of the classes cat, dog, cow, or a number from 0 to 2"),
        (-2, "-2, which is none of"),
        (True, "True, which is none of the classes cat, dog, cow, and no number of one"),
        (np.bool_(False), "np.False_, which is none of"),
        (0.5, "0.5, which is none of"),
        ("fox", "'fox', which is none of"),
        ([1], r"[1], which is none of"),
        (10**30, "10000"),
        ((number for number in [1]), "a generator: write the function with return, not yield"),
        (lambda: 1, "<function <lambda> at"),
        ("x" * 10_000, "'" + "x" * 50),
    ],
)
def test_what_is_no_class_is_an_abstention_that_is_counted(answer: object, said: str) -> None:
    report = one(answer)
    assert (report.votes, report.invalid) == (0, 1)
    assert report.first_invalid.startswith(f"first sample 0 with {said}")
    assert len(report.first_invalid) < 250
    doubt = report.warning()
    assert doubt is not None
    assert doubt.startswith("Labelling function `<lambda>` answers 1 of 1 samples with no class (first sample 0")
    with pytest.raises(ValueError, match=r"Labelling function `<lambda>` answers with no class: first sample 0 with "):
        cast_votes([lambda x: answer], [0], NAMES, stop=True)


def test_a_coroutine_is_closed_and_named() -> None:
    (report,) = cast_votes([awaited], [0], NAMES).reports
    assert report.first_invalid == "first sample 0 with a coroutine: write the function without async"


def lookup(sample: dict[str, int]) -> int:
    return sample["size"]


def closer(one: int, other: int) -> int:
    return one


def leaves(sample: object) -> int:
    sys.exit("bye")


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise KeyError("no")


def unspeakable(sample: object) -> int:
    raise Unspeakable


def chatty(sample: object) -> int:
    raise RuntimeError("\x1b[31m" + "much to say\n" * 1000)


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lookup, r"first on sample 1 in line \d+: KeyError: 'size'; a sample has the columns colour$"),
        (closer, r"first on sample 0, which alone is what it gets: TypeError: closer\(\) missing 1 required"),
        (leaves, r"first on sample 0 in line \d+: SystemExit: bye$"),
        (unspeakable, r"first on sample 0 in line \d+: Unspeakable$"),
        (chatty, r"first on sample 0 in line \d+: RuntimeError:  \[31mmuch to say much to say[ muchtosay]+$"),
    ],
)
def test_a_function_that_fails_abstains_there_and_is_counted(function: Callable[[Any], Any], said: str) -> None:
    samples = [{"size": 1}, {"colour": 2}, {"colour": 3}]
    votes, reports = cast_votes([lambda x: 0, function], samples, NAMES)
    failing = reports[1]
    assert votes[:, 0].tolist() == [0, 0, 0]
    assert votes[1:, 1].tolist() == [-1, -1]
    assert failing.failed == (2 if function is lookup else 3)
    assert failing.votes + failing.failed == 3
    assert re.match(said, failing.first_failure)
    assert len(failing.first_failure) < 300
    assert f"fails on {failing.failed} of 3 samples (first on sample" in str(failing.warning())
    with pytest.raises(ValueError, match=rf"Labelling function `{function.__name__}` fails: first on sample"):
        cast_votes([function], samples, NAMES, stop=True)


def test_seconds_are_those_of_the_function() -> None:
    _, (slow, fast) = cast_votes([lambda x: time.sleep(0.002), lambda x: None], range(10), NAMES)
    assert 2.0 <= slow.seconds_per_1000 < 100
    assert fast.seconds_per_1000 < slow.seconds_per_1000


# --------------------------------------------------------------------------------------------------------------- record


def recorded() -> Supervision:
    """A labelled sample, one of which nothing is known, three that functions saw (of one they said nothing)."""
    plain = reveal_labels(torch.tensor([1, 0, 0, 0, 0]), torch.arange(5) < 1, 3)
    return replace(plain, votes=torch.tensor([[-2, -2], [-2, -2], [0, -1], [-1, -1], [2, 1]]))


def test_votes_tell_kinds_apart() -> None:
    record = recorded()
    assert record.voted_on.tolist() == [False, False, True, True, True]
    assert record.has_supervision.tolist() == [True, False, False, False, False]
    assert [KIND_NAMES[kind] for kind in record.kind] == ["label", "nothing", "votes", "votes", "votes"]
    assert not record.labeled[2:].any()


def test_votes_follow_their_samples() -> None:
    record = recorded()
    assert record.rows(torch.tensor([4, 0])).votes.tolist() == [[2, 1], [-2, -2]]
    assert record.rows(torch.arange(5) == 2).votes.tolist() == [[0, -1]]
    assert torch.equal(record.to(torch.device("cpu")).votes, record.votes)
    assert reveal_labels(torch.zeros(4).long(), torch.ones(4).bool(), 3).votes.shape == (4, 0)


@pytest.mark.parametrize("votes", [torch.zeros(5, 2), torch.zeros(4, 2).long(), torch.zeros(5).long()])
def test_votes_of_a_wrong_shape_are_named(votes: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"`votes` \(torch.* must be int64 of shape \(5, functions\)"):
        replace(recorded(), votes=votes)


# ---------------------------------------------------------------------------------------------------------- federation

IMAGES = """
import numpy as np

def is_an_image(image):
    assert image.dtype == np.uint8 and image.shape == (1, 8, 8)
    return int(image.sum()) % 10

def dark(image):
    return "1" if image.mean() < 70 else None
"""


def build(data: str = "digits", clients: int = 4, seed: int = 0, **supervision: Any) -> Federation:
    told = SupervisionConfig(**({"label_rate": None} | supervision))
    config = DataConfig(name=data)
    return build_federation(config, PartitionConfig(), None, told, SkewConfig(), clients, "test", False, seed)


def test_images_are_given_as_they_are_and_only_where_asked(tmp_path: Path) -> None:
    federation = build(kind="labeling_functions", module=write(tmp_path / "images.py", IMAGES))
    votes, images = federation.record.votes, federation.dataset.train.images
    assert votes[:, 0].tolist() == (images.long().sum((1, 2, 3)) % 10).tolist()
    assert votes[:, 1].tolist() == torch.where(images.float().mean((1, 2, 3)) < 70, 1, -1).tolist()
    assert 0 < (votes[:, 1] == 1).sum() < len(votes)
    assert not federation.record.has_supervision.any()
    rows = torch.from_numpy(federation.parts[2])
    assert torch.equal(federation.supervision(2).votes, votes[rows])


def test_a_function_may_write_on_its_sample(tmp_path: Path) -> None:
    """Neither training nor the next function sees it."""
    text = (
        "def wipe(image):\n    image[:] = 0\n    return 1\n\ndef dark(image):\n    return None if image.any() else 1\n"
    )
    before = load_dataset(DataConfig(), 0).train.images.clone()
    federation = build(kind="labeling_functions", module=write(tmp_path / "wipe.py", text))
    assert torch.equal(federation.dataset.train.images, before)
    assert federation.record.votes[:, 1].unique().tolist() == [-1]


def test_tables_give_cells_by_column_as_in_the_file(tmp_path: Path) -> None:
    text = """
def radius(row):
    assert set(map(type, row.values())) == {float} and len(row) == 30
    return "malignant" if row["mean radius"] > 15 else None

def texture(row):
    return 1 if row["mean texture"] < 18 else -1
"""
    federation = build("breast_cancer", kind="labeling_functions", module=write(tmp_path / "rules.py", text))
    table = federation.dataset.tables["train"]
    assert federation.dataset.class_names[0] == "malignant"
    values = dict(zip(table.names, table.numbers.T, strict=True))
    votes = federation.record.votes.numpy()
    assert votes[:, 0].tolist() == np.where(values["mean radius"] > 15, 0, -1).tolist()
    assert votes[:, 1].tolist() == np.where(values["mean texture"] < 18, 1, -1).tolist()
    said = votes[:, 0] == 0
    assert (federation.dataset.train.labels.numpy()[said] == 0).mean() > 0.8


def test_texts_of_a_table_stay_texts(tmp_path: Path) -> None:
    lines = ["size,colour,kind", *(f"{i % 7}.50,{('red', 'blue')[i % 3 == 0]},{'ab'[i % 2]}" for i in range(60))]
    (tmp_path / "table.csv").write_text("\n".join(lines) + "\n")
    load_dataset.cache_clear()
    dataset = load_dataset(DataConfig(name="table", root=str(tmp_path / "table.csv"), label_column="kind"), 0)
    sizes, colours = set(), set()
    for place in range(len(dataset.train.labels)):
        row = dataset.sample(place)
        assert isinstance(row, dict)
        assert list(row) == ["size", "colour"]
        sizes.add(row["size"])
        colours.add(row["colour"])
    assert sizes == {i + 0.5 for i in range(7)}
    assert colours == {"red", "blue"}


@pytest.mark.parametrize("over", ["clients", "samples"])
def test_a_mix_asks_functions_about_its_share_alone(over: str, tmp_path: Path) -> None:
    parts = (
        MixPart("labeling_functions", share=0.5, label_rate=None, module=write(tmp_path / "mix.py", IMAGES)),
        MixPart("few_labels", share=0.5, label_rate=0.2),
    )
    federation = build(mix=parts, mix_over=over, label_rate=0.1)
    record = federation.record
    asked = record.voted_on
    assert (record.votes[~asked] == -2).all()
    assert (record.votes[asked] >= -1).all()
    assert (asked & record.labeled).any() == (over == "samples")  # who has functions asks them there, too
    asked &= ~record.labeled
    shares = [float(asked[torch.from_numpy(rows)].double().mean()) for rows in federation.parts]
    if over == "clients":
        assert sorted(shares) == [0, 0, 1, 1]
    else:
        assert all(0.4 < share < 0.6 for share in shares)
    kinds = torch.bincount(record.kind, minlength=len(KIND_NAMES))
    assert kinds[KIND_NAMES.index("votes")] == asked.sum()
    assert kinds[KIND_NAMES.index("label")] == record.labeled.sum() > 0


def test_hidden_labels_are_not_looked_at_and_votes_are_part_of_the_hash(tmp_path: Path) -> None:
    module = write(tmp_path / "images.py", IMAGES)
    dataset = load_dataset(DataConfig(), 0)
    n = len(dataset.train.labels)
    part = LabelKind("labeling_functions", label_rate=None, module=module)
    kinds = np.where(np.arange(n) < 50, 0, -1)
    sources = LabelSources(dataset, tmp_path, 0, np.arange(50))
    record = build_supervision(np.full(n, -99), kinds, [part], 10, sources, 0)
    assert not record.has_supervision.any()
    cast = ask_functions(kinds, [part], dataset)
    assert cast is not None
    assert (cast.votes > NOT_ASKED).any(1).tolist() == [True] * 50 + [False] * (n - 50)
    federation = build(kind="labeling_functions", module=module)
    turned = replace(federation, record=replace(federation.record, votes=federation.record.votes.flip(1)))
    assert turned.sha256 != federation.sha256


FAULTY = """
def right(image):
    return 1

def wrong(image):
    return image["size"]

def odd(image):
    return "zero" if image.mean() < 70 else 0
"""


def test_what_came_of_asking_is_in_the_audit_and_warned_of(tmp_path: Path) -> None:
    federation = build(kind="labeling_functions", module=write(tmp_path / "faulty.py", FAULTY))
    n = len(federation.dataset.train.labels)
    right, wrong, odd = federation.functions
    assert (right.votes, wrong.failed, odd.votes + odd.invalid) == (n, n, n)
    assert odd.votes > 0 < odd.invalid
    assert federation.record.votes[:, 1].eq(-1).all()
    assert [said[:29] for said in federation.warnings()] == [
        "Labelling function `wrong` fa",
        "Labelling function `odd` answ",
    ]
    listed = federation.audit()["labeling_functions"]
    assert [row["name"] for row in listed] == ["right", "wrong", "odd"]
    assert listed[1]["first_failure"].startswith("first on sample 0 in line 6: IndexError")
    assert "seconds" not in listed[0]  # the file is the same on every machine
    with pytest.raises(ValueError, match=r"Labelling function `wrong` fails: first on sample 0 in line 6: IndexError"):
        build(kind="labeling_functions", module=write(tmp_path / "faulty.py", FAULTY), on_error="stop")


def test_functions_of_which_none_ever_votes_are_an_error(tmp_path: Path) -> None:
    module = write(tmp_path / "mute.py", "def first(x):\n    return None\ndef second(x):\n    return x.nothing\n")
    with pytest.raises(
        ValueError, match=r"none of its 2 functions votes on any of \d+ samples. Labelling .*`second` fai"
    ):
        build(kind="labeling_functions", module=module)


@pytest.mark.parametrize("seed", [0, 1])
def test_votes_do_not_depend_on_the_number_of_clients(seed: int, tmp_path: Path) -> None:
    module = write(tmp_path / "images.py", IMAGES)
    few, many = (build(clients=c, seed=seed, kind="labeling_functions", module=module) for c in (2, 9))
    assert torch.equal(few.record.votes, many.record.votes)


# -------------------------------------------------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"kind": "labeling_functions"}, r"`supervision.module` \(=None\) must be given for .*kind=labeling_functions"),
        ({"on_error": "go on"}, r"`supervision.on_error` \(=go on\) must be one of abstain, stop"),
        ({"on_error": "stop"}, r"`supervision.on_error` \(=stop\) cannot be combined with supervision.kind=few_labels"),
        (
            {"module": "rules"},
            r"`supervision.module` \(=rules\) cannot be combined with supervision.kind=few_labels: take",
        ),
    ],
)
def test_a_module_is_for_labelling_functions_and_they_need_one(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SupervisionConfig(**keys)


@pytest.mark.parametrize("kind", [{"kind": "labeling_functions", "module": "rules"}, {"kind": "bags", "bag_size": 4}])
@pytest.mark.parametrize("key", ["labels_per_class=2", "stratified=true"])
def test_samples_are_not_chosen_by_a_class_that_nobody_knows(kind: dict[str, Any], key: str) -> None:
    overrides = [f"supervision.{name}={value}" for name, value in kind.items()]
    message = rf"choose samples by their class, which is unknown with supervision.kind={kind['kind']}: take"
    with pytest.raises(ConfigError, match=message):
        load_config([], [*overrides, f"supervision.{key}"])
    load_config([], [*overrides, "supervision.labels_total=9"])
    with pytest.raises(ConfigError, match=r"`skew.unlabeled_only_classes` \(=\[1\]\) chooses samples by their class"):
        load_config([], [*overrides, "skew.unlabeled_only_classes=[1]"])


def test_two_parts_of_functions_are_refused() -> None:
    parts = tuple(MixPart("labeling_functions", share=0.4, label_rate=None, module=name) for name in ("a.py", "b.py"))
    with pytest.raises(ValueError, match=r"`supervision.mix` has several parts .* \(a.py, b.py\): give one, with"):
        SupervisionConfig(mix=parts)
    with pytest.raises(ValueError, match=r"`supervision.module` \(=c.py\)"):
        SupervisionConfig(mix=parts[:1], module="c.py")
