"""Sends messages and gathers their replies; a reply that cannot be decoded is rejected without affecting the others.

`send_and_receive` of Flower's own grids pulls all replies at once and decodes what clients uploaded. One malformed
object raises whatever its decoder happens to raise (DecodeError, AttributeError, KeyError, ...) when the SuperLink has
already been told that the replies are received: all of them are lost. So replies are pulled here, message by message.
(Checked with flwr 1.41.)
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import httpx  # Flower's grid talks to the SuperLink with it
from flwr.app import Error, Message
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from fedlabel.errors import RunError
from server.schema import harmless

BAD_REPLY = 1000
"""Code of the error in place of a reply that cannot be read; Flower's own codes are below 10."""
TRIES = 3
"""How often a reply is pulled in vain before it is refused: an error of the SuperLink's own may pass."""
SHORTEST, LONGEST = 0.1, 3.0
"""Seconds between two rounds of pulling; in Flower's own loop always the second."""
_GONE = (ErrorCode.MESSAGE_UNAVAILABLE, ErrorCode.REPLY_MESSAGE_UNAVAILABLE)
"""Codes of the SuperLink's errors where it has deleted a message or its reply, as it does when a reply was pulled."""


class Asked:
    """Matches a reply to its message. The reply's sender is not used: an error that Flower's SuperLink makes in place
    of a lost node names the SuperLink.
    """

    def __init__(self, messages: Sequence[Message]) -> None:
        """Takes the messages as they were sent: a grid gives them their ids."""
        self._by_id = {message.metadata.message_id: message for message in messages if message.metadata.message_id}

    def of(self, reply: Message) -> Message | None:
        """Returns the message of a reply; None if it belongs to none of these."""
        return self._by_id.get(reply.metadata.reply_to_message_id)


class Exchange:
    """Messages that were sent, and their replies as they arrive.

    Args:
        grid: carries the messages and gives them their ids.
    """

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self.waiting: dict[str, Message] = {}
        """Id -> the message, of those without a reply."""
        self._arrived: list[Message] = []
        self._faults: dict[str, str] = {}
        self._tries: dict[str, int] = {}
        self._began = self._pulling = time.monotonic()

    def send(self, messages: Sequence[Message]) -> None:
        """Sends messages; in place of the reply to one that the SuperLink did not take, there is an error.

        Raises:
            RunError: the SuperLink cannot be reached, or it refuses all messages.
        """
        sent = _push(self._grid, messages)
        self._began = time.monotonic()
        for message in messages:
            key = message.metadata.message_id
            if key in sent:
                self.waiting[key], self._tries[key] = message, 0
            else:
                reason = "NotSent: the SuperLink did not take the message to this client"
                self._arrived.append(Message(Error(ErrorCode.MESSAGE_UNAVAILABLE, reason), reply_to=message))

    def drop(self, message: Message) -> None:
        """Stops to wait for the reply to a message: whatever still comes is never read."""
        self.waiting.pop(message.metadata.message_id, None)

    def pull(self) -> list[Message]:
        """Asks for each missing reply once, never for two at a time, and returns those that are there.

        While one client's upload stops half-way, pulling its reply can take minutes.

        Raises:
            RunError: the SuperLink cannot be reached.
        """
        self._pulling = time.monotonic()
        replies, self._arrived, faults = self._arrived, [], self._faults
        for key, message in list(self.waiting.items()):
            try:
                pulled = list(self._grid.pull_messages([key]))
            except httpx.RequestError as error:
                raise RunError(unreachable(error)) from error
            except Exception as error:
                # Asked for again: the SuperLink may hand out another message with the reply, and that be the bad one.
                faults.setdefault(key, _fault(error))
                self._tries[key] += 1
                pulled = [_refused(message, faults[key])] if self._tries[key] == TRIES else []
            answers = [reply for reply in pulled if reply.metadata.reply_to_message_id == key]
            if key in faults and any(reply.has_error() and reply.error.code in _GONE for reply in answers):
                pulled = [_refused(message, faults[key])]
            replies += pulled
            if answers:
                del self.waiting[key]
        return replies

    def sleep(self, left: float) -> None:
        """Waits until it is time to pull again, at most `left` seconds."""
        now = time.monotonic()
        # Flower's grid of a simulation has an interval of its own.
        time.sleep(min(left, getattr(self._grid, "pull_interval", pause(now - self._began, now - self._pulling))))

    def unread(self) -> list[Message]:
        """Returns an error in place of each reply that is there, or was, and could not be read so far."""
        return [_refused(message, self._faults[key]) for key, message in self.waiting.items() if key in self._faults]


def replies_to(grid: Grid, messages: Sequence[Message], timeout: float) -> list[Message]:
    """Sends messages and returns their replies.

    Args:
        grid: carries the messages and gives them their ids.
        messages: what to send.
        timeout: seconds to wait; a reply that comes later is missing.

    Returns:
        The replies in order of arrival. In place of one that cannot be read there is an error with the code
        `BAD_REPLY`.

    Raises:
        RunError: the SuperLink cannot be reached, or it refuses all messages.
    """
    exchange, deadline, replies = Exchange(grid), time.monotonic() + timeout, []
    exchange.send(messages)
    while True:
        replies += exchange.pull()
        left = deadline - time.monotonic()
        if not exchange.waiting or left <= 0:
            return replies + exchange.unread()
        exchange.sleep(left)


def pause(waited: float, pulling: float) -> float:
    """Returns the seconds until replies are pulled again: a tenth of the time that the messages are under way, so that
    no round takes a tenth longer for it, and as long as pulling takes, so that the SuperLink has half of its time.
    """
    return min(LONGEST, max(SHORTEST, waited / 10, pulling))


def _push(grid: Grid, messages: Sequence[Message]) -> set[str]:
    """Sends messages; returns the ids of those that the grid accepted (Flower has None or "" in place of the
    others).
    """
    try:
        return {key for key in grid.push_messages(messages) if key}
    except httpx.HTTPStatusError as error:
        raise RunError(
            f"Flower's SuperLink refuses the messages (HTTP status {error.response.status_code}); its log says why. "
            "Checkpoints stay."
        ) from error
    except httpx.RequestError as error:
        raise RunError(unreachable(error)) from error


def unreachable(error: httpx.RequestError) -> str:
    """Returns the message for an unreachable SuperLink. Flower itself retries refused and broken connections endlessly;
    this handles the errors on which it gives up.
    """
    return (
        f"Flower's SuperLink cannot be reached ({_line(error)}), so the run stops; its checkpoints stay. Check that it "
        "runs, and its certificate."
    )


def _fault(error: Exception) -> str:
    if isinstance(error, httpx.HTTPStatusError):
        return f"the SuperLink answers with HTTP status {error.response.status_code} when asked for it"
    return f"it cannot be decoded ({_line(error)})"


def _refused(message: Message, fault: str) -> Message:
    return Message(Error(BAD_REPLY, f"BadReply: {fault}"), reply_to=message)


def _line(error: Exception) -> str:
    return harmless(f"{type(error).__name__}: {error}".partition("\n")[0])
