"""The only entry point for the bytes of real nodes: records in, a checked result or a rejection out.

What is expected follows from the method and the model: which arrays of which type and shape, which metrics, counts and
statistics of which length. Nothing behind this door can raise on what a client sent. The values are then checked as a
simulated client's are, see `server/schema.py`. Errors of Flower's decoder, before this door, are dealt with in
`server/exchange.py`.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Mapping
from io import BytesIO
from typing import NamedTuple

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import Tensor

from fedlabel.cohort import ClientResult
from fedlabel.compression import INDICES, LEVELS, SCALES, VALUES, Codec
from fedlabel.learning.metrics import Counts
from fedlabel.methods.batch import State, StateDict
from fedlabel.methods.uploads import ModelPart
from server.npy import npy_header
from server.schema import Refused, RoundSchema, check_loss, harmless, listed, training_loss, weight_name

_RECORDS = {
    "arrays": ArrayRecord,
    "metrics": MetricRecord,
    "sums": ConfigRecord,
    "counts": ConfigRecord,
    "statistics": ConfigRecord,
}


class ArrayForm(NamedTuple):
    """The expected form of one array of a model."""

    dtype: np.dtype
    shape: tuple[int, ...]
    header: bytes
    """The header of numpy.save for such an array."""
    type_name: str
    """Of the dtype."""

    @classmethod
    def like(cls, value: Tensor) -> ArrayForm:
        """Returns the form of a tensor."""
        dtype, shape, file = torch.empty(0, dtype=value.dtype).numpy().dtype, tuple(value.shape), BytesIO()
        about = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, about)
        return cls(dtype, shape, file.getvalue(), str(dtype))

    def read(self, name: str, array: Array) -> np.ndarray:
        """Returns the array as a read-only view of its bytes; `name` is the server's own name for it.

        Raises:
            Refused: it is of another type or shape.
        """
        what = f"{name} of its model"
        if array.stype != "numpy.ndarray":
            raise Refused(f"BadReply: {what} cannot be read: it is serialised as {listed([str(array.stype)])}")
        if array.dtype != self.type_name:
            raise Refused(f"BadReply: {what} is {listed([str(array.dtype)])}, not {self.dtype}")
        if array.shape != self.shape:
            raise Refused(f"BadReply: {what} has shape {listed([str(array.shape)])}, not {self.shape}")
        start, order = self._start(what, array.data)
        size = math.prod(self.shape)
        if len(array.data) - start != size * self.dtype.itemsize:
            raise Refused(
                f"BadReply: {what} has {len(array.data) - start} bytes, not {size * self.dtype.itemsize} of "
                f"{self.dtype} {self.shape}"
            )
        values = np.frombuffer(array.data, self.dtype, size, start)
        if self.dtype.kind == "b" and size and values.view(np.uint8).max() > 1:
            raise Refused(f"BadReply: {what} holds what is neither true nor false")
        return values.reshape(self.shape, order=order)  # type: ignore[call-overload]

    def _start(self, what: str, data: bytes) -> tuple[int, str]:
        """Returns the offset of the values and their order. A client's bytes are never evaluated as code."""
        if data.startswith(self.header):
            return len(self.header), "C"
        found = npy_header(data)
        if found is None:
            raise Refused(f"BadReply: {what} cannot be read: it is no file of numpy.save")
        if found.descr != np.lib.format.dtype_to_descr(self.dtype) or found.shape != self.shape:
            raise Refused(f"BadReply: {what} holds {found.descr} {found.shape}, not {self.dtype} {self.shape}")
        return found.start, found.order


class ReplyReader:
    """Reads the replies to one round; round_schema: limits of the values in them."""

    def __init__(self, round_schema: RoundSchema) -> None:
        self._round, schema = round_schema, round_schema.schema
        self._parts = schema.parts
        self._prefixes = {part: f"{part}/" if len(self._parts) > 1 else "" for part in self._parts}
        forms = {name: ArrayForm.like(value) for name, value in schema.sent.items()}
        self._forms = {prefix + name: form for prefix in self._prefixes.values() for name, form in forms.items()}
        self._names = list(forms)
        received = round_schema.received if schema.codec.kind != "none" else {}
        self._received = {name: value.cpu() for name, value in received.items()}
        nobody = schema.recipe.memory.start(torch.ones(1, schema.num_classes, dtype=torch.bool))
        sample = schema.recipe.shared.statistics({**nobody, **round_schema.shared})
        self._statistics = {name: tuple(value.shape) for name, value in sample.items()}
        """Name -> shape of the results of `Shared.statistics` in this round."""
        self._counts = {name: length for group in schema.counts for name, length in group.items()}

    def read(self, content: RecordDict, client: int) -> ClientResult:
        """Returns the checked content of a client's reply.

        Raises:
            Refused: it is not what a client that follows the method can have sent; nothing else is ever raised.
        """
        for name, kind in _RECORDS.items():
            if not isinstance(content.get(name), kind):
                raise Refused(f"BadReply: it lacks the record `{name}`")
        if further := [name for name in content if name not in _RECORDS]:
            raise Refused(f"BadReply: it has records that were not requested, {listed(further)}")
        schema = self._round.schema
        weights, loss = self._read_metrics(content["metrics"])  # type: ignore[arg-type]
        sums = self._read_sums(content["sums"])  # type: ignore[arg-type]
        counts = self._read_counts(content["counts"])  # type: ignore[arg-type]
        statistics = self._read_statistics(content["statistics"])  # type: ignore[arg-type]
        arrays = self._read_arrays(content["arrays"])  # type: ignore[arg-type]
        parts = {}
        for part, prefix in self._prefixes.items():
            sent = {name: arrays[prefix + name] for name in self._names}
            check_encoded(prefix, sent, schema.codec, schema.model)
            parts[part] = ModelPart(schema.codec.model(sent, self._received), weights[part])
        result = ClientResult(client, parts, sums, counts, statistics, {})
        checked = self._round.check(result)
        if loss != training_loss(sums):
            raise Refused(f"BadReply: `train_loss` (={loss:g}) is not the mean of its metric train/loss")
        return checked

    def _read_metrics(self, record: MetricRecord) -> tuple[dict[str, float], float]:
        """Returns the weights of the parts and the training loss."""
        names = {part: weight_name(part, len(self._parts)) for part in self._parts}
        expected = list(dict.fromkeys(["num-examples", "train_loss", *names.values()]))
        if missing := [name for name in expected if name not in record]:
            raise Refused(f"BadReply: its metrics lack `{missing[0]}`")
        if further := [name for name in record if name not in expected]:
            raise Refused(f"BadReply: its metrics have entries that were not requested, {listed(further)}")
        values: dict[str, float] = {}
        for name in expected:
            value = record[name]
            if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:  # type: ignore[arg-type]
                raise Refused(f"BadReply: `{name}` (={listed([str(value)])}) must be a finite number")
            values[name] = float(value)  # type: ignore[arg-type]
        if len(self._parts) > 1 and values["num-examples"] != 1:
            raise Refused(f"BadReply: `num-examples` (={values['num-examples']}) must be 1 beside weights of parts")
        check_loss(values["train_loss"], self._round.schema.bounds)
        return {part: values[name] for part, name in names.items()}, values["train_loss"]

    def _read_sums(self, record: ConfigRecord) -> Counts:
        unknown = [name for name in record if name not in self._round.schema.tags]
        if unknown:
            raise Refused(f"BadReply: its metric {listed(unknown[:1])} is none that a client may write")
        return {name: _numbers("metric", name, pair, 2) for name, pair in record.items()}

    def _read_counts(self, record: ConfigRecord) -> Counts:
        if further := [name for name in record if name not in self._counts]:
            raise Refused(f"BadReply: its counts have entries that were not requested, {listed(further)}")
        for group in self._round.schema.counts:
            missing = [name for name in group if name not in record]
            needed = "passes" in group and not self._round.is_silent
            if missing and (len(missing) < len(group) or needed):
                raise Refused(f"BadReply: its counts lack {missing[0]}")
        return {name: _numbers("count", name, values, self._counts[name]) for name, values in record.items()}

    def _read_statistics(self, record: ConfigRecord) -> State:
        if further := [name for name in record if name not in self._statistics]:
            raise Refused(f"BadReply: it has statistics that were not requested, {listed(further)}")
        found: State = {}
        for name, shape in self._statistics.items():
            header = [float(len(shape)), *map(float, shape)]
            value = record.get(name)
            if type(value) is not list or value[: len(header)] != header:
                raise Refused(f"BadReply: its statistic {name} is missing or has another shape than {list(shape)}")
            numbers = _numbers("statistic", name, value, len(header) + math.prod(shape))
            found[name] = torch.tensor(numbers[len(header) :], dtype=torch.float64).reshape(shape)
        return found

    def _read_arrays(self, record: ArrayRecord) -> Mapping[str, Tensor]:
        if record.keys() != self._forms.keys():
            wrong = [name for name in self._forms if name not in record]
            wrong += [name for name in record if name not in self._forms]
            raise Refused(f"BadReply: its model has missing or unexpected arrays: {listed(wrong)}")
        with warnings.catch_warnings(action="ignore"):  # the bytes are read only, and nobody writes to them
            return {name: torch.from_numpy(form.read(name, record[name])) for name, form in self._forms.items()}


def check_encoded(prefix: str, arrays: StateDict, codec: Codec, like: StateDict) -> None:
    """Checks an encoded update whose arrays have the right types and shapes, so that it can be decoded.

    Args:
        prefix: of the arrays' names in messages.
        arrays: the update's.
        codec: that it is decoded with.
        like: a model.

    Raises:
        Refused: no client encodes an update like this.
    """
    names = codec.names(like)
    if codec.kind == "top_k" and names:
        numbers, places = codec.numbers(like), arrays[INDICES].long()
        if int(places[0]) < 0 or int(places[-1]) >= numbers:
            raise Refused(f"BadReply: {prefix}{INDICES} of its model names a weight that is none of {numbers}")
        if not (places.diff() > 0).all():
            raise Refused(f"BadReply: {prefix}{INDICES} of its model does not rise")
        if not arrays[VALUES].isfinite().all():
            raise Refused(f"NotFinite: {prefix}{VALUES} of its model holds NaN or infinity")
    if codec.kind == "int8" and names:
        if not arrays[SCALES].isfinite().all():
            raise Refused(f"NotFinite: {prefix}{SCALES} of its model holds NaN or infinity")
        if (arrays[SCALES] < 0).any():
            raise Refused(f"BadReply: {prefix}{SCALES} of its model holds a number below 0")
        for name in names:
            if (arrays[name] < -LEVELS).any():
                raise Refused(f"BadReply: {prefix}{name} of its model holds a number below -{LEVELS}")


def _numbers(what: str, name: str, value: object, length: int) -> list[float]:
    """Returns a list of `length` floats; `name` is safe to show.

    Raises:
        Refused: it is anything else.
    """
    if type(value) is not list or set(map(type, value)) - {float}:
        raise Refused(f"BadReply: its {what} {name} is no list of floats")
    if len(value) != length:
        raise Refused(f"BadReply: its {what} {name} has {len(value)} numbers, not {length}")
    return value


class Identity(NamedTuple):
    """A node's answer to the query before the first round."""

    client: int
    source_hash: str
    samples: int | None
    """None if its code differs from the server's."""


def read_identity(content: RecordDict) -> Identity:
    """Returns a node's answer to the query, checked.

    Raises:
        Refused: it says nothing that makes sense.
    """
    record = content.get("identity")
    if not isinstance(record, ConfigRecord):
        raise Refused("its answer lacks the record `identity`")
    client, code, samples = (record.get(name) for name in ("partition-id", "source-hash", "num-samples"))
    if type(client) is not int or client < 0:
        raise Refused(f"its partition-id (={listed([str(client)])}) is no number of at least 0")
    if type(code) is not str:
        raise Refused("its answer lacks `source-hash`")
    if samples is not None and (type(samples) is not int or samples < 0):
        raise Refused(f"its num-samples (={listed([str(samples)])}) is no number of at least 0")
    return Identity(client, harmless(code, 64), samples)
