"""How many bytes travel in a round, as Flower counts its records, without making them (checked with flwr 1.41).

A record counts for its keys and values: arrays with the header of numpy.save, 8 bytes a number. The configuration is
left out: its text names the grid, so the same run would count differently on another one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from io import BytesIO

import numpy as np
import torch

from fedlabel.cohort import ClientResult, Invitation
from fedlabel.methods.batch import State, StateDict
from server.schema import ResultSchema, weight_name

_NUMBER = 8


def invitation_bytes(invitation: Invitation, cohort: Sequence[int]) -> int:
    """Returns the size of what is sent to a cohort."""
    sent = invitation.on_the_way
    everybody = model_bytes(sent.model) + model_bytes(sent.previous) + _statistics_bytes(sent.shared)
    own = sum(model_bytes(model) for client in cohort for model in sent.helpers.get(client, {}).values())
    return len(cohort) * everybody + own


class ResultBytes:
    """The size of results; their models are all of one size."""

    def __init__(self, schema: ResultSchema) -> None:
        self._only_models = schema.privacy.is_on
        parts = schema.parts
        prefixes = [f"{part}/" if len(parts) > 1 else "" for part in parts]
        arrays = sum(model_bytes(schema.sent, prefix) for prefix in prefixes)
        metrics = {"num-examples", "train_loss", *(weight_name(part, len(parts)) for part in parts)}
        self.models = arrays + sum(len(name) + _NUMBER for name in metrics)
        """Of models and weights alone, which is the same for all clients."""

    def of(self, result: ClientResult) -> int:
        """Returns the size of a result, whether or not its model is still in it. Under `privacy` a client sends no more
        than its model; what else is there is the evaluator's.
        """
        if self._only_models:
            return self.models
        numbers = _lists_bytes(result.sums) + _lists_bytes(result.counts)
        return self.models + numbers + _statistics_bytes(result.statistics)


def model_bytes(model: StateDict, prefix: str = "") -> int:
    """Returns the size of a model whose arrays' names have a prefix."""
    return sum(
        len(prefix) + len(name) + _header_bytes(value.dtype, tuple(value.shape)) + value.nbytes
        for name, value in model.items()
    )


def _statistics_bytes(state: State) -> int:
    """Of lists of numbers that begin with the shape, see `state_to_lists`."""
    return sum(len(name) + _NUMBER * (1 + value.dim() + value.numel()) for name, value in state.items())


def _lists_bytes(lists: Mapping[str, Sequence[float]]) -> int:
    return sum(len(name) + _NUMBER * len(values) for name, values in lists.items())


@lru_cache(maxsize=4096)
def _header_bytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    file = BytesIO()
    descr = np.lib.format.dtype_to_descr(torch.empty(0, dtype=dtype).numpy().dtype)
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
    return file.tell()
