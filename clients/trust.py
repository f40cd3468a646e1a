"""What a node lets a server do with it, and what it says when it refuses. See docs/trust.md.

A node does what is in its own code, and nothing else, unless its operator allows it: the configuration comes from the
server, and may name neither a file, nor a module, nor an address of the node. The rule is that a text is refused,
so a new key of the configuration is refused until somebody says in `NAMES` or `CHOICES` that it opens nothing.
"""

from __future__ import annotations

import builtins
import logging
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import lru_cache
from typing import Any

from flwr.app import Context, Error, Message
from flwr.common.constant import ErrorCode

from fedlabel.config import ExperimentConfig, parse_config
from fedlabel.config_schema import default_of
from fedlabel.config_text import ConfigError, Plain, as_yaml, parse_yaml
from fedlabel.data.sets.config import NODES, SETS
from fedlabel.methods import METHODS
from fedlabel.models import MODELS, is_foreign
from fedlabel.models.own import TORCHVISION
from fedlabel.shown import shown

logger = logging.getLogger("fedlabel")

NAMES = frozenset(
    {
        *("data.positive_classes", "data.label_column", "data.categorical", "data.drop_columns", "data.aside_columns"),
        *("data.missing", "partition.column", "labeled_partition.column", "supervision.labels_keys"),
        *("supervision.bag_column", "supervision.bag_feature", "skew.unlabeled_only_classes", "devices.rare_classes"),
        "model.embedding",
    }
)
"""Keys that hold names of classes, columns, arrays or layers, or marks: they are compared with what there is."""
CHOICES = frozenset(
    {
        *("device", "data.name", "data.decimal", "partition.kind", "labeled_partition.kind"),
        *("supervision.kind", "supervision.candidates", "supervision.noise", "supervision.on_error"),
        *("supervision.labels_at", "supervision.mix_over", "skew.feature_shift", "model.norm"),
        *("training.optimizer", "training.weight_by", "training.precision", "sampling.kind", "pacing.kind"),
        *("privacy.kind", "attack.kind", "prior.kind", "supervision.audit_action", "tracking.level"),
        *("devices.kind", "devices.profile", "compression.up", "compression.down"),
        *("grid.kind", "grid.stack", "evaluation.at", "evaluation.split", "evaluation.select"),
    }
)
"""Keys with a fixed set of values, checked when the configuration is read; those of our own methods are such, too."""
GUARDED = frozenset(
    {
        *("data.root", "data.test_file", "data.download", "data.schema", "data.test", "method.name", "devices.trace"),
        *("supervision.labels_file", "supervision.bags_file", "supervision.module", "supervision.audit"),
        *("partition.partitioner_args", "labeled_partition.partitioner_args"),
        *("model.name", "model.args", "model.weights", "model.trainable"),
    }
)
"""Keys that name files or code, make a node connect to others, go to other packages' code unread, or can take any time
(a regular expression). A key with a text that is in no table is treated as one of these."""
UNUSED = frozenset({"strategy.name", "strategy.args"})
"""Keys that a node does not act on: the server's, which checks them when it builds its strategy."""

Allowed = frozenset[tuple[str, str]]
"""(key, value) of what an operator allows."""


class Refusal(Exception):
    """A node refuses a request. The text is sent: it holds what the server itself has sent, and nothing of the node."""


def allowed_by(context: Context) -> Allowed:
    """Returns what the node's operator allows: `allow` in its `--node-config`, key=value separated by spaces.

    Raises:
        Refusal: it is written otherwise.
    """
    try:
        pairs = [text.partition("=") for text in shlex.split(str(context.node_config.get("allow", "")))]
    except ValueError:  # a quote that is not closed
        pairs = [("", "", "")]
    if not all(key and equals for key, equals, _ in pairs):
        raise Refusal(
            "this node's own `allow` cannot be read: its operator writes "
            "--node-config 'allow=\"KEY=VALUE KEY=VALUE\"', with spaces between"
        )
    return frozenset((key, value) for key, _, value in pairs)


@lru_cache(maxsize=4)
def check_request(text: str, allowed: Allowed) -> None:
    """Checks the configuration that a server sent, before anything in it is imported, opened or built.

    Args:
        text: the configuration as YAML.
        allowed: see `allowed_by`.

    Raises:
        Refusal: it names what the node does not allow, or is no configuration.
    """
    name = ""
    try:
        raw = parse_yaml(text, "The configuration")
        name, model = _name_in(raw, "method"), _name_in(raw, "model")
        if name and name not in METHODS and ("method.name", name) not in allowed:
            raise _refusal("method.name", name)  # before it is imported
        ours = model in MODELS or model.startswith(TORCHVISION)
        if model and not ours and ("model.name", model) not in allowed:
            raise _refusal("model.name", model)  # before a message says which file here it may mean
        config = parse_config(text)
    except ConfigError as error:
        if name and name not in METHODS:  # the message may quote a file of the node
            raise Refusal(f"the configuration does not fit the node's own method {shown(name, 100)}") from error
        raise Refusal(f"the configuration is none: {shown(str(error), 500)}") from error
    for key, value, default in _settings(config):
        if _opens(key, value, default, config) and (key, _text(value)) not in allowed:
            raise _refusal(key, value)


def _name_in(raw: Any, section: str) -> str:
    """Returns the `name` of a section of a parsed configuration, "" if it is not given."""
    keys = raw.get(section) if isinstance(raw, Mapping) else None
    name = keys.get("name", "") if isinstance(keys, Mapping) else ""
    return name.text if isinstance(name, Plain) else name if isinstance(name, str) else ""


def _settings(node: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yields key, value and default of everything in a configuration; a part in a list counts as its owner."""
    for each in fields(node):
        if not each.init:
            continue
        key, value = prefix + each.name, getattr(node, each.name)
        if is_dataclass(value):
            yield from _settings(value, f"{key}.")
        elif isinstance(value, tuple) and any(map(is_dataclass, value)):
            for part in value:
                yield from _settings(part, prefix)
        else:
            yield key, value, default_of(each)


def _opens(key: str, value: Any, default: Any, config: ExperimentConfig) -> bool:
    """Returns whether a value could open something at a node."""
    if key in UNUSED:
        return False
    own_method = config.method.name not in METHODS
    if key == "method.name":
        return own_method
    if key == "model.name":
        return is_foreign(config.model.name)
    if key == "data.root" and SETS[config.data.name].own and config.data.name != NODES:
        return True  # the default, too, is a folder of whoever started the node
    harmless = key in NAMES or key in CHOICES or (key.startswith("method.") and not own_method)
    return value != default and (key in GUARDED or (_has_text(value) and not harmless))


def _has_text(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_has_text, (*value, *value.values())))
    return any(map(_has_text, value)) if isinstance(value, (tuple, list)) else isinstance(value, str)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else as_yaml(value)


def _refusal(key: str, value: Any) -> Refusal:
    asked = shown(_text(value), 200)
    return Refusal(
        f"this node does not allow `{key}` (={asked}), which could open a file or run code there; its operator may, "
        f"with --node-config 'allow=\"{key}={asked}\"'"
    )


def min_count_of(context: Context) -> int:
    """Returns the node's own `privacy.min_count`, `min-count` in its `--node-config`; by default 1.

    Raises:
        Refusal: it is no number of at least 1.
    """
    found = context.node_config.get("min-count", 1)
    if type(found) is not int or found < 1:
        raise Refusal("this node's own `min-count` must be a whole number of at least 1: its operator changes it")
    return found


def may_audit(context: Context, asked: object) -> bool:
    """Returns whether pseudo-labels may be compared with hidden labels: only at a simulated client. What the server
    asks for does not count alone: it needs `audit=true` in the node's own `--node-config`, or a worker of Flower's
    simulation runtime.
    """
    return asked is True and (context.node_config.get("audit") is True or is_simulation_worker())


def is_simulation_worker() -> bool:
    """Returns whether this process is an actor of Ray, as the clients of Flower's simulation runtime are: its operator
    is the one who wrote the configuration. A process that only uses Ray is none.
    """
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized()) and ray.get_runtime_context().get_actor_id() is not None


def discreet(message: Message, context: Context, call_next: Callable[[Message, Context], Message]) -> Message:
    """Makes the reply of a client that failed: a mod around all others. What it says is ours. The error itself, which
    may quote data, paths or the environment, goes to the node's own log.
    """
    state = context.state
    try:
        return call_next(message, context)
    except Exception as error:
        context.state = state  # Flower keeps it where a client replies, if only with an error
        return error_reply(message, error)


def error_reply(message: Message, error: Exception) -> Message:
    """Returns the reply of a client that failed with this error, see `discreet`, and logs the error."""
    if isinstance(error, Refusal):
        logger.warning("Refused: %s", error)
        reason = f"Refused: {error}"
    else:
        logger.error("The client failed", exc_info=error)
        kind = next(each.__name__ for each in type(error).__mro__ if each.__module__ == builtins.__name__)
        reason = f"{kind}: the client failed; the node's own log says why"
    return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)
