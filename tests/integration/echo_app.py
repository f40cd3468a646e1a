"""A client app without data or model, for the grids' own tests; workers import it by name."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Counts its calls in `context.state`; the client that is told to, sleeps, raises or kills its process."""
    order = message.content.config_records["order"]
    client = int(context.node_config["partition-id"])
    memory = context.state.config_records.setdefault("memory", ConfigRecord({"calls": 0}))
    memory["calls"] = calls = int(memory["calls"]) + 1  # type: ignore[arg-type]  # changed in place
    if order.get("dies") == client:
        marks = Path(str(order["marks"]))
        deaths = len(list(marks.iterdir()))
        if deaths < int(order["deaths"]):  # type: ignore[arg-type]
            (marks / str(deaths)).touch()
            os.kill(os.getpid(), signal.SIGKILL)
    if order.get("raises") == client:
        raise KeyError("told to")
    if order.get("sleeps") == client:
        time.sleep(60)
    partitions = int(context.node_config["num-partitions"])
    answer = ConfigRecord({"client": client, "clients": partitions, "calls": calls, "process": os.getpid()})
    return Message(RecordDict({"echo": answer}), reply_to=message)
