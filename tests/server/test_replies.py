"""The door for what clients send: what is wrong is refused by name, and nothing else is ever raised."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedlabel.cohort import Invitation
from fedlabel.learning.training_config import TrainingConfig
from fedlabel.methods.batch import State
from fedlabel.methods.dp_ssl import DPSSL
from fedlabel.methods.fedlabel import FedLabel
from fedlabel.methods.fedmatch import FedMatch
from fedlabel.methods.fixmatch import FixMatch
from fedlabel.methods.forward import Forward
from fedlabel.methods.freematch import FreeMatch
from fedlabel.methods.ill import ILL, NoiseMatrix
from fedlabel.methods.losses import labels_loss
from fedlabel.methods.masks import Mask
from fedlabel.methods.recipe import LabelKinds, Method, Phase, Recipe, Stage, Task
from fedlabel.methods.shared import Limits
from fedlabel.methods.supervised import Supervised
from fedlabel.metric_tags import Tag
from fedlabel.models import running_statistics
from fedlabel.server_config import StrategyConfig
from server.replies import ArrayForm, ReplyReader, read_identity
from server.schema import Range, Refused, ResultSchema, extremes, harmless
from server.strategy import reply_bounds
from tests.server.rounds import (
    CLASSES,
    MODEL,
    PSEUDO,
    SAMPLES,
    TRAINING,
    VOTES,
    content,
    reader_of,
    recipe_of,
    schema_of,
)

ROUND = reader_of(schema_of(functions=2))


def put(record: str, key: str, value: Any) -> Callable[[RecordDict], None]:
    def apply(body: RecordDict) -> None:
        body[record].__dict__["_data"][key] = value  # past Flower's own checks, which bytes on a wire pass, too

    return apply


def drop(record: str, key: str) -> Callable[[RecordDict], None]:
    return lambda body: body[record].__delitem__(key)


def array(values: Any, **claims: Any) -> Array:
    made = Array(np.asarray(values))
    for key, value in claims.items():
        setattr(made, key, value)
    return made


def header(text: str, version: bytes = b"\x01\x00", body: bytes = b"\0" * 12) -> Array:
    """Three numbers behind a header of one's own."""
    return Array(
        "float32",
        (3,),
        "numpy.ndarray",
        b"\x93NUMPY" + version + len(text).to_bytes(2, "little") + text.encode() + body,
    )


ONES = np.ones(3, np.float32)
HUGE = 10**400
FAULTS = {
    # records
    "no arrays": (lambda body: body.pop("arrays"), "lacks the record `arrays`"),
    "no counts": (lambda body: body.pop("counts"), "lacks the record `counts`"),
    "another record in its place": (lambda body: body.update({"sums": MetricRecord({})}), "lacks the record `sums`"),
    "a further record": (lambda body: body.update({"evil": ConfigRecord({})}), "were not requested, evil"),
    "a second model": (lambda body: body.update({"more": body["arrays"]}), "were not requested, more"),
    # arrays
    "an array less": (drop("arrays", "b"), "has missing or unexpected arrays: b"),
    "an array more": (put("arrays", "extra", array(ONES)), "arrays: extra"),
    "another shape": (put("arrays", "w", array(np.ones(4, np.float32))), r"w .* has shape \(4,\), not \(3,\)"),
    "bool": (put("arrays", "w", array([True, False, True])), "w of its model is bool, not float32"),
    "int8": (put("arrays", "w", array(np.ones(3, np.int8))), "is int8, not float32"),
    "datetime": (put("arrays", "w", array(np.ones(3, "M8[s]"))), r"is datetime64\[s\], not float32"),
    "strings": (put("arrays", "w", array(["a", "b", "c"])), "is <U1, not float32"),
    "float64 of 1e300": (put("arrays", "w", array([1e300, 1, 1])), "is float64, not float32"),
    "other byte order": (put("arrays", "w", array(np.ones(3, ">f4"))), "is >f4, not float32"),
    "strings called floats": (put("arrays", "w", array(["a", "b", "c"], dtype="float32")), r"holds <U1 \(3,\), not"),
    "bool called float": (put("arrays", "w", array([True] * 3, dtype="float32")), r"holds \|b1 \(3,\), not float32"),
    "a shape that is a claim": (put("arrays", "w", array(np.ones(4, np.float32), shape=(3,))), r"<f4 \(4,\), not"),
    "unknown stype": (put("arrays", "w", array(ONES, stype="pickle")), "serialised as pickle"),
    "rubbish": (put("arrays", "w", array(ONES, data=b"rubbish")), "no file of numpy.save"),
    "no data": (put("arrays", "w", array(ONES, data=b"")), "no file of numpy.save"),
    "cut data": (put("arrays", "w", array(ONES, data=Array(ONES).data[:-1])), "has 11 bytes, not 12"),
    "too much data": (put("arrays", "w", array(ONES, data=Array(ONES).data + b"0")), "has 13 bytes, not 12"),
    "a header that does not parse": (put("arrays", "w", header("{'descr': (")), "no file of numpy.save"),
    "a header of Python 2": (put("arrays", "w", header("{'descr': '<f4', 'shape': (3L,), }")), "no file of numpy.save"),
    "a header of brackets": (put("arrays", "w", header("(" * 9000)), "no file of numpy.save"),
    "a header of code": (put("arrays", "w", header("__import__('os')")), "no file of numpy.save"),
    "version 9": (put("arrays", "w", header("", b"\x09\x00")), "no file of numpy.save"),
    "NaN": (put("arrays", "w", array(np.array([1, np.nan, 1], np.float32))), "NotFinite: w of its model holds NaN"),
    "infinity": (put("arrays", "b", array(np.array(-np.inf, np.float32))), "NotFinite: b of its model holds NaN"),
    "1e30": (put("arrays", "w", array(np.array([1e30, 1, 1], np.float32))), "TooLarge: w of its model"),
    "an integer that overflows a mean": (put("arrays", "n", array(np.array(2**62))), "TooLarge: n of its model"),
    # metrics
    "no weight": (drop("metrics", "num-examples"), "lack `num-examples`"),
    "no loss": (drop("metrics", "train_loss"), "lack `train_loss`"),
    "a further part": (put("metrics", "weight/evil", 0.0), "were not requested, weight/evil"),
    "twenty further parts": (
        lambda body: [put("metrics", f"weight/e{i}", 1e9)(body) for i in range(20)],
        "were not requested, weight/e0, weight/e1, weight/e2, ...",
    ),
    "1e9 samples": (put("metrics", "num-examples", 1e9), r"`num-examples` \(=1000000000.0\) must lie in \[0, 8\]"),
    "1e300 samples": (put("metrics", "num-examples", 1e300), r"`num-examples` \(=1e\+300\)"),
    "one sample too many": (put("metrics", "num-examples", 9), r"`num-examples` \(=9.0\) must lie in \[0, 8\]"),
    "NaN samples": (put("metrics", "num-examples", float("nan")), r"`num-examples` \(=nan\)"),
    "less than no samples": (put("metrics", "num-examples", -1.0), r"`num-examples` \(=-1.0\)"),
    "true samples": (put("metrics", "num-examples", True), r"`num-examples` \(=True\)"),
    "a list of samples": (put("metrics", "num-examples", [1.0]), r"`num-examples` \(=\[1.0\]\)"),
    "a text of samples": (put("metrics", "num-examples", "8"), r"`num-examples` \(=8\)"),
    "an infinite loss": (put("metrics", "train_loss", float("inf")), r"`train_loss` \(=inf\)"),
    "a huge loss": (put("metrics", "train_loss", HUGE), r"`train_loss` \(=10000*…\)"),
    "a loss that is not the mean": (put("metrics", "train_loss", 0.25), r"`train_loss` \(=0.25\) is not the mean"),
    "a loss beyond all": (put("metrics", "train_loss", 1e10), r"TooLarge: `train_loss` .* in \[-1e\+09, 1e\+09\]"),
    # sums
    "the run's accuracy": (put("sums", "eval/accuracy", [99.0, 100.0]), "eval/accuracy is none that a client may"),
    "the round": (put("sums", "round", [1e6, 1.0]), "its metric round is none"),
    "the selection": (put("sums", "select/accuracy", [1.0, 1.0]), "its metric select/accuracy is none"),
    "the system": (put("sums", "system/failed_clients", [0.0, 1.0]), "its metric system/failed_clients is none"),
    "interim accuracy": (put("sums", "interim/accuracy", [1.0, 1.0]), "its metric interim/accuracy is none"),
    "what the evaluator counts": (put("sums", "pseudo/accuracy", [1.0, 1.0]), "its metric pseudo/accuracy is none"),
    "a path": (put("sums", "train/../../x", [1.0, 1.0]), "its metric train/../../x is none"),
    "terminal codes": (put("sums", "train/\x1b[2J", [1.0, 1.0]), r"its metric train/\\x1b\[2J is none"),
    "an invented metric": (put("sums", "train/m1", [1.0, 1.0]), "its metric train/m1 is none that a client may"),
    "a figure": (put("sums", "pseudo/samples", [1.0, 1.0]), "its metric pseudo/samples is none that a client may"),
    "a figure of an annotator": (put("sums", "transition/0", [1.0, 1.0]), "its metric transition/0 is none"),
    "a coverage of 1e40": (put("sums", "pseudo/coverage", [1e40, 1.0]), r"pseudo/coverage \(sum 1e\+40 over 1\) must"),
    "a coverage of 1.01": (put("sums", "pseudo/coverage", [4.04, 4.0]), r"must have a mean in \[0, 1\]"),
    "a coverage below 0": (put("sums", "pseudo/coverage", [-0.01, 1.0]), r"must have a mean in \[0, 1\]"),
    "a coverage of nothing": (put("sums", "pseudo/coverage", [1.0, 0.0]), r"\(sum 1 over 0\) must have a mean"),
    "more candidates than classes": (put("sums", "posterior/candidates", [13.0, 4.0]), r"a mean in \[1, 3\]"),
    "an entropy above log 3": (put("sums", "posterior/entropy", [4.5, 4.0]), r"a mean in \[0, 1.09861\]"),
    "a loss of 1.1e9": (put("sums", "train/loss", [2.2e9, 2.0]), r"TooLarge: its metric train/loss .* \[-1e\+09, "),
    "a loss of -1.1e9": (put("sums", "train/loss_em", [-2.2e9, 2.0]), "TooLarge: its metric train/loss_em"),
    "a loss of a float64": (put("sums", "train/loss", [1e308, 1.0]), "TooLarge: its metric train/loss"),
    "a sum that is a number": (put("sums", "train/loss", 1.0), "its metric train/loss is no list of floats"),
    "a sum that is a text": (put("sums", "train/loss", "no"), "its metric train/loss is no list of floats"),
    "sums that are texts": (put("sums", "train/loss", ["1", "2"]), "its metric train/loss is no list of floats"),
    "sums that are bytes": (put("sums", "train/loss", [b"1", b"2"]), "its metric train/loss is no list of floats"),
    "sums that are true": (put("sums", "train/loss", [True, True]), "its metric train/loss is no list of floats"),
    "huge whole sums": (put("sums", "train/loss", [HUGE, HUGE]), "its metric train/loss is no list of floats"),
    "one number": (put("sums", "train/loss", [1.0]), "its metric train/loss has 1 numbers, not 2"),
    "no numbers": (put("sums", "train/loss", []), "its metric train/loss has 0 numbers, not 2"),
    "an infinite sum": (put("sums", "train/loss", [float("inf"), 1.0]), "NotFinite: its metric train/loss holds"),
    "a NaN in sums": (put("sums", "train/loss", [float("nan"), 1.0]), "NotFinite: its metric train/loss holds"),
    "a count of -1": (put("sums", "train/loss", [1.0, -1.0]), "is over -1 samples"),
    "a count of 1e12": (put("sums", "train/loss", [1.0, 1e12]), r"is over 1e\+12 samples, more than it can have"),
    # counts
    "no passes": (drop("counts", "passes"), "its counts lack passes"),
    "passes of one": (put("counts", "passes", [1.0]), "its count passes has 1 numbers, not 2"),
    "passes of 1e300": (put("counts", "passes", [1e300, 1.0]), "NotFinite: its count passes"),
    "passes of 1e14": (put("counts", "passes", [1e14, 1.0]), "passes .* is more than it can have"),
    "more back than forth": (put("counts", "passes", [1.0, 2.0]), "passes .* is more than it can have"),
    "further counts": (put("counts", "evil", [1.0]), "counts have entries that were not requested, evil"),
    "bytes that its method does not claim": (put("counts", "claimed_bytes", [1.0, 1.0]), "requested, claimed_bytes"),
    "beliefs of three classes": (put("counts", "beliefs", [0.0] * 20), "were not requested, beliefs"),
    "one pseudo-label count less": (drop("counts", "kept"), "its counts lack kept"),
    "counts of another size": (put("counts", "drawn", [4.0, 4.0]), "its count drawn has 2 numbers, not 3"),
    "counts that are texts": (put("counts", "drawn", "abc"), "its count drawn is no list of floats"),
    "counts below 0": (put("counts", "correct", [3.0, 1.0, -1.0]), r"its count correct is below 0 \(=-1\)"),
    "more kept than drawn": (put("counts", "kept", [5.0, 2.0, 0.0]), "its count kept is more than drawn"),
    "too sure": (
        put("counts", "confidence_by_expert", [4.5, 0.8]),
        "confidence_by_expert is more than kept_by_expert",
    ),
    "others kept": (put("counts", "kept_by_both", [3.0, 0.0, 1.0, 2.0, 0.0, 0.0]), "kept_by_both is of other samples"),
    "other samples": (put("counts", "drawn_by_kind", [9.0, *[0.0] * 8]), "drawn_by_kind is of other samples"),
    "no function counts": (drop("counts", "function_counts"), "its counts lack function_counts"),
    "votes of three functions": (put("counts", "function_votes", [0.0] * 9), "has 9 numbers, not 6"),
    "more voted than there are": (put("counts", "function_samples", [9e6, 5.0, 9.0, 4.0, 4.0]), "function_samples is"),
    "more votes than samples": (put("counts", "function_votes", [9.0, *[0.0] * 5]), "function_votes or"),
    # statistics
    "statistics of no method": (put("statistics", "counts", [1.0, 1.0, 5.0]), "that were not requested, counts"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_refused_by_name(fault: str) -> None:
    spoil, reason = FAULTS[fault]
    body = content(**PSEUDO, **VOTES)
    spoil(body)  # type: ignore[no-untyped-call]
    with pytest.raises(Refused) as refusal:
        ROUND.read(body, 1)
    assert re.search(reason, str(refusal.value)), refusal.value
    assert str(refusal.value).isprintable()
    assert len(str(refusal.value)) < 500


def test_an_honest_reply_is_read_as_it_is() -> None:
    body = content(**PSEUDO, **VOTES)
    found = ROUND.read(body, 1)
    assert found.client == 1
    assert found.kept == {}
    ((name, (state, weight)),) = found.parts.items()
    assert (name, weight) == ("model", 8.0)
    assert all(torch.equal(state[key], value) for key, value in MODEL.items())
    assert found.sums == {"train/loss": [1.0, 2.0]}
    assert found.counts == {"passes": [4.0, 2.0], **PSEUDO, **VOTES}
    assert found.statistics == {}


def test_arrays_come_in_the_models_order_whatever_the_clients() -> None:
    """Flower's Krum, Bulyan and median go by position."""
    body = content()
    body["arrays"] = ArrayRecord(dict(reversed(body["arrays"].items())))  # type: ignore[arg-type]
    assert list(ROUND.read(body, 1).parts["model"].state) == ["w", "b", "n"]


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0, 4)])
@pytest.mark.parametrize("dtype", ["float32", "float64", "int64", "bool"])
def test_headers_are_read_as_numpy_writes_them(shape: tuple[int, ...], dtype: str) -> None:
    """Plain ones, those of other versions of numpy (padded otherwise), and arrays in Fortran's order."""
    values = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype)
    form = ArrayForm.like(torch.from_numpy(values))
    data = Array(values).data
    assert data.startswith(form.header)
    padded = (
        data[:8] + (len(form.header) + 6).to_bytes(2, "little") + data[10 : len(form.header) - 1] + b" " * 16 + b"\n"
    )
    for order, file in (("C", data), ("C", padded + values.tobytes()), ("F", Array(np.array(values, order="F")).data)):
        found = form.read("w", Array(dtype, shape, "numpy.ndarray", file))
        assert found.dtype == values.dtype, order
        np.testing.assert_array_equal(found, np.load(io.BytesIO(file)))


def test_a_bool_buffer_holds_bools_only() -> None:
    form, values = ArrayForm.like(torch.ones(3, dtype=torch.bool)), Array(np.ones(3, bool))
    assert form.read("mask", values).all()
    values.data = values.data[:-1] + b"\x07"
    with pytest.raises(Refused, match="neither true nor false"):
        form.read("mask", values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.bool])
def test_extremes_of_an_array(dtype: torch.dtype) -> None:
    """NaN where it holds one, and an empty array has none that could be out of range."""
    assert extremes([torch.tensor([[0, 1], [1, 1]]).to(dtype), torch.ones(0, 3, dtype=dtype)]) == [(0, 1), (0, 0)]
    if dtype.is_floating_point:
        ((least, largest),) = extremes([torch.tensor([1, float("nan"), 3], dtype=dtype)])
        assert math.isnan(least)
        assert math.isnan(largest)
        with pytest.raises(Refused, match="NotFinite: w holds NaN"):
            Range.of(torch.ones(1)).check("w", torch.tensor([float("nan")]), least, largest)


# ------------------------------------------------------------------------------------------------------ what is at most


def most(method: Method, round_number: int = 1, **training: Any) -> dict[str, float]:
    config = TrainingConfig(**{"local_steps": 2, "batch_size": 4, **training})
    schema = ResultSchema(MODEL, recipe_of(method), config, lambda client: SAMPLES, CLASSES, frozenset("wb"))
    return dict(schema.limits(0, round_number).weights)


def test_the_weight_is_at_most_what_the_method_gives_to_a_client_that_used_all_it_could() -> None:
    """10 samples, 2 steps of 4 labelled and 4 unlabelled ones."""
    assert most(Supervised()) == {"model": 8.0}
    assert most(FixMatch()) == {"model": 16.0}
    assert most(FixMatch(), unlabeled_ratio=5) == {"model": 2 * (4 + 10)}  # no more than it holds
    assert most(Supervised(), local_steps=None, local_epochs=3) == {"model": 3 * 3 * 4}  # 3 steps see all 10
    assert most(FixMatch(), weight_by="size") == {"model": 10.0}
    assert most(FixMatch(), weight_by="uniform") == {"model": 1.0}
    assert most(FedLabel()) == {"model": 16.0}  # two phases
    assert most(FedLabel(merge="mean")) == {"supervised": 1.0, "unlabeled": 8.0}
    assert most(FedMatch(variant="inter_client")) == {"model": 1.0}  # its mean is uniform
    no_steps = DPSSL(functions="written", num_functions=2, label_model_rounds=3)
    assert most(no_steps) == {"model": 0.0}
    assert most(no_steps, 4) == {"model": 16.0}


QFEDAVG = StrategyConfig("QFedAvg", {"client_learning_rate": 0.1})


def test_the_loss_of_qfedavg_has_powers() -> None:
    body = content()
    put("metrics", "train_loss", -0.5)(body)
    put("sums", "train/loss", [-1.0, 2.0])(body)
    assert ROUND.read(body, 1)
    with pytest.raises(Refused, match=r"`train_loss` \(=-0.5\) must be a number in \[0, 1e\+06\]"):
        reader_of(schema_of(bounds=reply_bounds(QFEDAVG))).read(body, 1)


def test_metrics_at_the_ends_of_their_range_are_taken() -> None:
    """Sums are made in float32: a mean may be a thousandth beyond."""
    body = content()
    sums = {
        "train/loss": [-2e9, 2.0],
        "train/loss_em": [1.0005e9, 1.0],
        "pseudo/coverage": [4.002, 4.0],
        "pseudo/confidence": [0.0, 0.0],
        "posterior/candidates": [4.0, 4.0],
        "posterior/entropy": [-1e-6, 1.0],
        "posterior/effective_classes": [12.0, 4.0],
    }
    body["sums"] = ConfigRecord(dict(sums))  # type: ignore[arg-type]
    put("metrics", "train_loss", -1e9)(body)
    assert ROUND.read(body, 0).sums == sums


def test_a_methods_own_metrics_have_its_own_range() -> None:
    @dataclass(frozen=True)
    class Own(Method):
        metrics = (Tag("pseudo/margin", "margin", "share", "Pseudo-labels", "higher", least=-1, largest=1),)

        def recipe(self, task: Task) -> Recipe:
            return Recipe((Stage((Phase("train", labels_loss),)),), LabelKinds.TRUE)

    body = content()
    put("sums", "pseudo/margin", [-4.0, 4.0])(body)
    schema = reader_of(
        ResultSchema(MODEL, recipe_of(Own()), TRAINING, lambda client: SAMPLES, CLASSES, metrics=Own.metrics)
    )
    put("metrics", "num-examples", 1.0)(body)
    assert schema.read(body, 0)
    put("sums", "pseudo/margin", [-5.0, 4.0])(body)
    with pytest.raises(Refused, match=r"pseudo/margin \(sum -5 over 4\) must have a mean in \[-1, 1\]"):
        schema.read(body, 0)
    with pytest.raises(Refused, match="its metric pseudo/margin is none that a client may write"):
        ROUND.read(body, 0)


def test_both_parts_of_the_released_merge_are_needed_and_no_others() -> None:
    schema = reader_of(schema_of(FedLabel(merge="mean")))
    body = content()
    names = [f"{part}/{name}" for part in ("supervised", "unlabeled") for name in MODEL]
    body["arrays"] = ArrayRecord({name: content()["arrays"][name.rpartition("/")[2]] for name in names})  # type: ignore[misc]
    body["metrics"] = MetricRecord(
        {"num-examples": 1.0, "train_loss": 0.5, "weight/supervised": 1.0, "weight/unlabeled": 8.0}
    )
    assert {part: (list(state), weight) for part, (state, weight) in schema.read(body, 0).parts.items()} == {
        "supervised": (list(MODEL), 1.0),
        "unlabeled": (list(MODEL), 8.0),
    }
    put("metrics", "num-examples", 0.5)(body)
    with pytest.raises(Refused, match=r"`num-examples` \(=0.5\) must be 1 beside weights of parts"):
        schema.read(body, 0)
    put("metrics", "num-examples", 1.0)(body)
    put("metrics", "weight/unlabeled", 9.0)(body)
    with pytest.raises(Refused, match=r"`weight/unlabeled` \(=9.0\) must lie in \[0, 8\]"):
        schema.read(body, 0)
    put("metrics", "weight/unlabeled", 8.0)(body)
    drop("arrays", "unlabeled/w")(body)
    with pytest.raises(Refused, match="arrays: unlabeled/w"):
        schema.read(body, 0)
    with pytest.raises(Refused, match="metrics lack `weight/supervised`"):
        schema.read(content(), 0)


def normed() -> tuple[ReplyReader, RecordDict]:
    """Of a network with BatchNorm inside, and what an honest client sends: sent 7 batches, saw 2 more in 2 steps."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Sequential(torch.nn.BatchNorm1d(3)))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    state["1.0.num_batches_tracked"] += 7
    trained = frozenset(name for name, _ in model.named_parameters())
    schema = ResultSchema(
        *(state, recipe_of(Supervised()), TRAINING, lambda client: SAMPLES, CLASSES, trained),
        max_update_norm=1.0,
        running=running_statistics(model),
    )
    body = content()
    body["arrays"] = ArrayRecord({**state, "1.0.num_batches_tracked": torch.tensor(9)})  # type: ignore[arg-type]
    return ReplyReader(schema.of_round(Invitation(1, state, {}, {}), {})), body


@pytest.mark.parametrize(
    ("key", "values", "reason"),
    [
        ("running_var", np.array([1, -1e12, 1], np.float32), r"running_var .* a number below 0 \(=-1e\+12\)"),
        ("running_var", np.array([1, -1e-30, 1], np.float32), r"running_var .* a number below 0 \(=-1e-30\)"),
        ("running_var", np.array([1, 1e13, 1], np.float32), "TooLarge: 1.0.running_var"),
        ("num_batches_tracked", np.array(-1), r"num_batches_tracked .* a number below 0 \(=-1\)"),
        ("num_batches_tracked", np.array(7 + 201), "num_batches_tracked of its model counts 208 batches, more than it"),
        ("num_batches_tracked", np.array(2**62), "TooLarge: 1.0.num_batches_tracked"),
    ],
)
def test_running_statistics_have_a_range(key: str, values: np.ndarray, reason: str) -> None:
    """A variance below 0 makes every output NaN."""
    schema, body = normed()
    assert schema.read(body, 0)
    put("arrays", f"1.0.{key}", Array(values))(body)
    with pytest.raises(Refused, match=reason):
        schema.read(body, 0)


def test_running_statistics_have_a_range_in_every_part_of_a_reply() -> None:
    model = torch.nn.BatchNorm1d(3)
    state, trained = model.state_dict(), frozenset(("weight", "bias"))
    whole = ResultSchema(
        *(state, recipe_of(FedLabel(merge="mean")), TRAINING, lambda client: SAMPLES, CLASSES, trained),
        running=running_statistics(model),
    )
    schema = ReplyReader(whole.of_round(Invitation(1, state, {}, {}), {}))
    body = content()
    parts = {f"{part}/{key}": value for part in ("supervised", "unlabeled") for key, value in state.items()}
    body["arrays"] = ArrayRecord(parts)
    body["metrics"] = MetricRecord(
        {"num-examples": 1.0, "train_loss": 0.5, "weight/supervised": 1.0, "weight/unlabeled": 8.0}
    )
    assert schema.read(body, 0)
    for key, value in (("num_batches_tracked", torch.tensor(10**6)), ("running_var", -torch.ones(3))):
        body["arrays"] = ArrayRecord({**parts, f"unlabeled/{key}": value})
        with pytest.raises(Refused, match=f"unlabeled/{key}"):
            schema.read(body, 0)


def test_a_far_update_is_one_of_trained_parameters() -> None:
    """Running statistics move by what a client's samples are, however little it learns."""
    schema, body = normed()
    put("arrays", "1.0.running_mean", array(1000 * ONES))(body)
    put("arrays", "1.0.running_var", array(1000 * ONES))(body)
    assert schema.read(body, 0)
    put("arrays", "1.0.bias", array(2 * ONES))(body)
    with pytest.raises(Refused, match=r"TooFar: its model is 3.46\d* from the one it was sent"):
        schema.read(body, 0)


def test_a_far_update_is_refused_if_a_bound_is_set() -> None:
    """w goes from 1 to 3, 1, 1 and b from 0 to 1.5: distance sqrt(4 + 2.25) = 2.5; the integer n does not count."""
    body = content()
    put("arrays", "w", array(np.array([3, 1, 1], np.float32)))(body)
    put("arrays", "b", array(np.array(1.5, np.float32)))(body)
    put("arrays", "n", array(np.array(1000)))(body)
    assert reader_of(schema_of(max_update_norm=2.51)).read(body, 0)
    with pytest.raises(Refused, match="TooFar: its model is 2.5 from the one it was sent"):
        reader_of(schema_of(max_update_norm=2.49)).read(body, 0)
    put("arrays", "w", array(1000 * ONES))(body)
    assert reader_of().read(body, 0)  # without a bound, weights are the strategy's affair


# ----------------------------------------------------------------------------------------------------------- statistics

HELD = Limits(samples=10, annotators=0, steps=2, examples=8)


def refuses(method: Method, statistics: dict[str, Any], shared: State, reason: str, limits: Limits = HELD) -> None:
    tensors = {name: torch.as_tensor(value, dtype=torch.float64) for name, value in statistics.items()}
    with pytest.raises(ValueError, match=reason):
        recipe_of(method).shared.check_statistics(tensors, shared, limits)


def takes(method: Method, statistics: dict[str, Any], shared: State, limits: Limits = HELD) -> None:
    tensors = {name: torch.as_tensor(value, dtype=torch.float64) for name, value in statistics.items()}
    recipe_of(method).shared.check_statistics(tensors, shared, limits)


def test_ill_counts_are_at_least_0_and_no_more_than_the_samples() -> None:
    method, one = ILL(), torch.eye(3)[None]
    shared = recipe_of(method).shared.start()
    takes(method, {"counts": one * 10 / 3}, shared)
    refuses(method, {"counts": one * 11 / 3}, shared, "counts counts 11 samples, and it can have 10")
    refuses(method, {"counts": one * 1e6}, shared, r"counts counts 3e\+06 samples")
    refuses(method, {"counts": one - 0.01}, shared, r"counts has a count below 0 \(=-0.01\)")
    takes(method, {"counts": one * 10}, shared, HELD._replace(annotators=3))  # three labels a sample


def test_ills_logits_go_no_further_than_its_steps() -> None:
    """Of 4 noisy samples, 2 steps of lr .1: |logit - start| <= .2, so the sum over the samples <= .8 from 4 * start."""
    method = ILL(noise=NoiseMatrix(form="gradient"))
    shared = recipe_of(method).shared.start()
    start = 4 * shared["logits"]
    takes(method, {"logits": start + 0.79, "noisy_samples": 4.0}, shared)
    refuses(method, {"logits": start + 0.85, "noisy_samples": 4.0}, shared, "further from what was sent")
    refuses(method, {"logits": start * 1e6, "noisy_samples": 4e6}, shared, r"noisy_samples counts 4e\+06 samples")
    refuses(method, {"logits": start, "noisy_samples": 0.0}, shared, "further from what was sent")
    takes(method, {"logits": start * 0, "noisy_samples": 0.0}, shared)


def test_freematch_averages_are_of_one_client() -> None:
    method, third = FreeMatch(), [0.2, 0.3, 0.5]
    good = {"threshold": 0.4, "class_mean": third, "class_share": third, "clients": 1.0}
    takes(method, good, {})
    takes(method, {name: np.multiply(value, 0) for name, value in good.items()}, {})
    refuses(method, {**good, "clients": 1000.0}, {}, "clients must hold only 0 and 1")
    refuses(method, {**good, "threshold": 1.5}, {}, r"threshold \(=1.5\) must lie in \[0, 1\]")
    refuses(method, {**good, "class_mean": [2.0, 3.0, 5.0]}, {}, "class_mean must be probabilities")
    refuses(method, {**good, "class_share": [-0.2, 0.7, 0.5]}, {}, "class_share must be probabilities")
    refuses(method, {**good, "clients": 0.0}, {}, r"threshold \(=0.4\)")


def test_cbafed_counts_are_no_more_than_the_samples() -> None:
    method = FixMatch(mask=Mask(kind="cbafed"))
    takes(method, {"class_counts": [4.0, 4.0, 2.0]}, {})
    refuses(method, {"class_counts": [4.0, 4.0, 3.0]}, {}, "class_counts counts 11 samples, and it can have 10")


def test_forward_reports_one_row_a_class() -> None:
    method = Forward()
    rows = [[0.5, 0.5, 0.0], [0.0, 0.0, 0.0], [0.0, 0.1, 0.9]]
    takes(method, {"anchor_rows": rows, "anchor_counts": [1.0, 0.0, 1.0]}, {})
    refuses(method, {"anchor_rows": rows, "anchor_counts": [1.0, 1.0, 1.0]}, {}, "anchor_rows must be probabilities")
    refuses(method, {"anchor_rows": np.multiply(rows, 9), "anchor_counts": [9.0, 0.0, 9.0]}, {}, "only 0 and 1")


def test_dp_ssl_votes_add_up_to_its_samples_for_every_function() -> None:
    method = DPSSL(functions="written", num_functions=2)
    votes = np.zeros((2, 4, 3))
    votes[:, 0, 0], votes[:, 3, 1] = 4, 6
    good = {"vote_counts": votes, "class_counts": [4.0, 6.0, 0.0]}
    takes(method, good, {})
    refuses(method, {**good, "class_counts": [4.0, 7.0, 0.0]}, {}, "class_counts counts 11 samples")
    refuses(method, {**good, "class_counts": [5.0, 5.0, 0.0]}, {}, "does not add up to class_counts")
    refuses(method, {**good, "vote_counts": votes * 1e6}, {}, r"vote_counts counts 2e\+07 samples")
    votes[0, 0, 0] = -4
    refuses(method, good, {}, r"vote_counts has a count below 0 \(=-4\)")


def test_dp_ssl_losses_are_bounded_by_sample() -> None:
    method = DPSSL(num_functions=2)
    good = {"head_losses": [[2.0, 100.0, 0.0], [1.0, 1.0, 0.0]], "class_samples": [4.0, 1.0, 0.0]}
    takes(method, good, {})
    refuses(
        method, {**good, "head_losses": [[2.0, 101.0, 0.0], [1.0, 1.0, 0.0]]}, {}, r"head_losses must lie in \[0, 100\]"
    )
    refuses(method, {**good, "head_losses": [[2.0, 9.0, 0.1], [1.0, 1.0, 0.0]]}, {}, "head_losses")
    refuses(method, {**good, "class_samples": [4e6, 1.0, 0.0]}, {}, r"class_samples counts 4e\+06 samples")


def ill_round() -> ReplyReader:
    recipe = recipe_of(ILL())
    return reader_of(ResultSchema(MODEL, recipe, TRAINING, lambda client: SAMPLES, CLASSES), recipe.shared.start())


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, r"its statistic counts is missing or has another shape than \[1, 3, 3\]"),
        ("counts", "its statistic counts is missing"),
        ([3.0, 1.0, 3.0, 3.0, *[0.0] * 8], "its statistic counts has 12 numbers, not 13"),
        ([2.0, 3.0, 3.0, *[0.0] * 9], "its statistic counts is missing or has another shape"),
        ([3.0, 1.0, 3.0, 3.0, *[1e300] * 9], "NotFinite: its statistic counts holds"),
        ([3.0, 1.0, 3.0, 3.0, *[float("nan")] * 9], "NotFinite: its statistic counts holds"),
        ([3.0, 1.0, 3.0, 3.0, *["1"] * 9], "its statistic counts is no list of floats"),
        ([3.0, 1.0, 3.0, 3.0, *[2.0] * 9], "BadReply: its statistic counts counts 18 samples, and it can have 10"),
    ],
)
def test_odd_statistics_are_refused(value: Any, reason: str) -> None:
    body = content()
    put("metrics", "num-examples", 1.0)(body)
    put("statistics", "counts", value)(body)
    if value is None:
        drop("statistics", "counts")(body)
    with pytest.raises(Refused, match=reason):
        ill_round().read(body, 0)
    put("statistics", "counts", [3.0, 1.0, 3.0, 3.0, *[1.0] * 9])(body)
    assert torch.equal(ill_round().read(body, 0).statistics["counts"], torch.ones(1, 3, 3, dtype=torch.float64))


# ---------------------------------------------------------------------------------------------------------------- words


def test_a_text_of_someone_else_is_harmless() -> None:
    assert harmless("Fehler: \u00e4 [bold]x[/bold]\nline two") == "Fehler: \u00e4 [bold]x[/bold]\nline two"
    assert harmless("a\x1b[31m\x07\r\x9b\u202eb\ud800") == r"a\x1b[31m\x07\r\x9b\u202eb\ud800"
    assert harmless("x" * 10_000_000, 5) == "xxxxx…"


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (None, "lacks the record `identity`"),
        (MetricRecord({"partition-id": 0}), "lacks the record `identity`"),
        (ConfigRecord({"source-hash": "x"}), r"partition-id \(=None\) is no number"),
        (ConfigRecord({"partition-id": "0", "source-hash": "x"}), r"partition-id \(=0\) is no number"),
        (ConfigRecord({"partition-id": True, "source-hash": "x"}), r"partition-id \(=True\) is no number"),
        (ConfigRecord({"partition-id": -1, "source-hash": "x"}), r"partition-id \(=-1\) is no number of at least 0"),
        (ConfigRecord({"partition-id": [0], "source-hash": "x"}), r"partition-id \(=\[0\]\) is no number"),
        (ConfigRecord({"partition-id": 0}), "lacks `source-hash`"),
        (ConfigRecord({"partition-id": 0, "source-hash": b"x"}), "lacks `source-hash`"),
        (ConfigRecord({"partition-id": 0, "source-hash": "x", "num-samples": 1e9}), r"num-samples \(=1000000000.0\)"),
        (ConfigRecord({"partition-id": 0, "source-hash": "x", "num-samples": -5}), r"num-samples \(=-5\)"),
    ],
)
def test_an_identity_that_makes_no_sense_is_refused(record: Any, reason: str) -> None:
    with pytest.raises(Refused, match=reason):
        read_identity(RecordDict({} if record is None else {"identity": record}))


def test_an_identity_is_read() -> None:
    answer = ConfigRecord({"partition-id": 3, "source-hash": "ab\x1b", "num-samples": 60})
    assert read_identity(RecordDict({"identity": answer})) == (3, r"ab\x1b", 60)
