"""Events for TensorBoard: a file of them, histograms and figures in it, and reading the figures again."""

from __future__ import annotations

import os
import secrets
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from google.protobuf.message import DecodeError
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import summary as summaries

from fedlabel.errors import naming

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_POSITIVE = 1e-12 * 1.1 ** np.arange(775)
_LIMITS = np.concatenate([-_POSITIVE[::-1], [0.0], _POSITIVE])
"""Limits of the bins of TensorBoard's histograms."""


class EventFile:
    """A new file of events for TensorBoard.

    Not `torch.utils.tensorboard.SummaryWriter`: it writes in a thread, so that a full disk shows as a traceback of that
    thread and, at the next call, as an error that names no file.
    """

    def __init__(self, folder: Path, purge_step: int | None = None) -> None:
        """Creates the file; `purge_step`: TensorBoard hides entries of earlier files from this step on."""
        # TensorBoard reads the files of a folder in the order of their names, and takes what has "tfevents" in it.
        name = (
            f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(4)}"
        )
        self.path = folder / name
        with naming(self.path):
            self._file = open(self.path, "xb")  # noqa: SIM115
        self._records = RecordWriter(self._file)
        self._write(Event(file_version="brain.Event:2"), None)
        if purge_step is not None:
            self._write(Event(session_log=SessionLog(status=SessionLog.START)), purge_step)

    def add(self, summary: Summary, step: int | None = None) -> None:
        """Adds a summary made by `torch.utils.tensorboard.summary`."""
        self._write(Event(summary=summary), step)

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        """Adds a number."""
        self.add(summaries.scalar(tag, value), step)

    def add_histogram(self, tag: str, values: np.ndarray, step: int) -> None:
        """Adds the histogram of the finite ones among (n,) numbers; without any it adds nothing."""
        finite = values[np.isfinite(values)]
        if len(finite):
            self.add(summaries.histogram(tag, finite, _LIMITS), step)

    def add_bins(self, tag: str, counts: np.ndarray, step: int) -> None:
        """Adds a histogram of values in [0, 1], from how many are in each of n equal parts, (n,)."""
        limits = np.linspace(0, 1, len(counts) + 1)[1:]
        middles = limits - 0.5 / len(counts)
        histogram = summaries.histogram_raw(
            tag,
            min=0.0,
            max=1.0,
            num=float(counts.sum()),
            sum=float(counts @ middles),
            sum_squares=float(counts @ middles**2),
            bucket_limits=limits.tolist(),
            bucket_counts=counts.tolist(),
        )
        self.add(histogram, step)

    def add_figure(self, tag: str, figure: Figure, step: int) -> None:
        """Adds a figure, as an image."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # here: of no use where there are no figures

        # Not through pyplot, which keeps global state and looks for a display.
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        pixels = np.asarray(canvas.buffer_rgba())[..., :3]
        self.add(summaries.image(tag, pixels, dataformats="HWC"), step)

    def add_text(self, tag: str, text: str, step: int) -> None:
        """Adds Markdown."""
        self.add(summaries.text(tag, text), step)

    def flush(self) -> None:
        """Writes buffered events to the operating system."""
        with naming(self.path):
            self._file.flush()

    def close(self) -> None:
        """Closes the file; a second call does nothing."""
        with naming(self.path):
            self._file.close()

    def _write(self, event: Event, step: int | None) -> None:
        event.wall_time = time.time()
        if step is not None:
            event.step = step
        with naming(self.path):
            self._records.write(event.SerializeToString())


class NoEvents(EventFile):
    """Takes events and writes none."""

    def __init__(self) -> None:
        pass

    def add(self, summary: Summary, step: int | None = None) -> None:
        """Does nothing."""

    def flush(self) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


class Picture(NamedTuple):
    """A figure in an event file."""

    step: int
    """Its round."""
    png: bytes
    width: int
    height: int


def read_pictures(folder: Path) -> dict[str, Picture]:
    """Returns tag -> its latest picture, in a folder's event files; empty without any.

    What a process that was killed has not written to its end is left out, and so are, as in TensorBoard, pictures of
    rounds that a resumed run has done again.
    """
    found: dict[str, Picture] = {}
    for file in sorted(folder.glob("events.out.tfevents.*")):
        for event in _events(file):
            if event.session_log.status == SessionLog.START:
                found = {tag: picture for tag, picture in found.items() if picture.step < event.step}
            for value in event.summary.value:
                if value.HasField("image"):
                    image = value.image
                    picture = Picture(event.step, image.encoded_image_string, image.width, image.height)
                    found[value.tag] = picture
    return found


_HEADER = struct.Struct("<QI")
"""Of a record: its length, and a checksum of that; behind the record there is one of four bytes, too."""


def _events(file: Path) -> Iterator[Event]:
    """Yields the events of a file up to the first that is incomplete or damaged."""
    with naming(file):
        data = memoryview(file.read_bytes())
    place = 0
    while place + _HEADER.size <= len(data):
        start = place + _HEADER.size
        place = start + _HEADER.unpack_from(data, place)[0] + 4
        if place > len(data):
            return
        try:
            event = Event.FromString(data[start : place - 4].tobytes())
        except DecodeError:
            return
        yield event


def wait_for_later_name(path: Path) -> None:
    """Waits until a new event file sorts after the old ones, as TensorBoard reads them by name (second, host, pid)."""
    stamps = [int(file.name.split(".")[3]) for file in path.glob("events.out.tfevents.*")]
    wait = max(stamps, default=0) + 1 - time.time()
    if 0 < wait <= 1:  # more: the clock was set back, or the folder comes from elsewhere
        time.sleep(wait)
