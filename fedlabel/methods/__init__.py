"""One file per paper; `METHODS` lists them."""

from __future__ import annotations

import ast

from fedlabel.importing import describe_error, form_hint, import_attribute, names_file
from fedlabel.methods.cc import CC
from fedlabel.methods.co_teaching import CoTeaching
from fedlabel.methods.count_likelihood import CountLikelihood
from fedlabel.methods.dllp import DLLP
from fedlabel.methods.dp_ssl import DPSSL
from fedlabel.methods.easy_llp import EasyLLP
from fedlabel.methods.elr import ELR
from fedlabel.methods.fedlabel import FedLabel
from fedlabel.methods.fedlc import FedLC
from fedlabel.methods.fedmatch import FedMatch
from fedlabel.methods.fedrod import FedRoD
from fedlabel.methods.fedrs import FedRS
from fedlabel.methods.fedtrinet import FedTriNet
from fedlabel.methods.fixmatch import FixMatch
from fedlabel.methods.forward import Forward
from fedlabel.methods.freematch import FreeMatch
from fedlabel.methods.gce import GCE
from fedlabel.methods.gen_bags import GenBags
from fedlabel.methods.ill import ILL
from fedlabel.methods.llp_bp import LLPBP
from fedlabel.methods.llp_vat import LLPVAT
from fedlabel.methods.lws import LWS
from fedlabel.methods.proden import PRODEN
from fedlabel.methods.pseudo_label import PseudoLabel
from fedlabel.methods.recipe import Method, Recipe, Task
from fedlabel.methods.sage import SAGE
from fedlabel.methods.semifl import SemiFL
from fedlabel.methods.supervised import Supervised
from fedlabel.methods.top_count import TopCount
from fedlabel.methods.uda import UDA
from fedlabel.metric_tags import client_tags
from fedlabel.names import did_you_mean, near, simple

METHODS: dict[str, type[Method]] = {
    "supervised": Supervised,
    "fedlc": FedLC,
    "fedrs": FedRS,
    "fedrod": FedRoD,
    "pseudo_label": PseudoLabel,
    "uda": UDA,
    "fixmatch": FixMatch,
    "freematch": FreeMatch,
    "fedlabel": FedLabel,
    "sage": SAGE,
    "fedmatch": FedMatch,
    "fedtrinet": FedTriNet,
    "semifl": SemiFL,
    "ill": ILL,
    "proden": PRODEN,
    "cc": CC,
    "lws": LWS,
    "forward": Forward,
    "gce": GCE,
    "elr": ELR,
    "co_teaching": CoTeaching,
    "dp_ssl": DPSSL,
    "llp_bp": LLPBP,
    "dllp": DLLP,
    "easy_llp": EasyLLP,
    "gen_bags": GenBags,
    "count_likelihood": CountLikelihood,
    "top_count": TopCount,
    "llp_vat": LLPVAT,
}

CALLED_ELSEWHERE = {
    "fedavg": "Take supervised, which is FedAvg on the labelled samples",
    "fedsgd": "Take supervised with training.local_steps=1, which is FedSGD on the labelled samples, by mini-batches",
    "fedprox": "Take supervised with training.prox_mu, which is FedProx on the labelled samples",
    **dict.fromkeys(
        ("fedavgm", "fedadam", "fedyogi", "fedadagrad", "fedopt"),
        "That is how the server combines models: set strategy.name",
    ),
}
"""Simple names of algorithms that people look for among the methods -> what to take."""


def method_class(name: str) -> type[Method]:
    """Returns the class of a method by its name in `METHODS`, or by "package.module:Class".

    Raises:
        ValueError: no such method, module or class, or the class is no `Method`, no dataclass of its own, or declares
            impossible `metrics`.
    """
    if name in METHODS:
        return METHODS[name]
    if ":" not in name:
        known = CALLED_ELSEWHERE.get(simple(name))
        hint = f" {known}." if known else form_hint(name, ast.ClassDef) or did_you_mean(name, METHODS)
        raise ValueError(
            f"`method.name` (={name}) must be one of {', '.join(METHODS)}, or package.module:Class for your own.{hint}"
        )
    module_name, _, attribute = name.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), attribute)) or names_file(name):
        raise ValueError(
            f"`method.name` (={name}) must have the form package.module:Class, with the names that Python imports."
            f"{form_hint(name, ast.ClassDef)}"
        )
    found = import_attribute("method.name", name)
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise ValueError(
            f"`method.name` (={name}) must be a subclass of fedlabel.methods.recipe.Method; see docs/extend.md."
        )
    if "__dataclass_fields__" not in vars(found):  # it would have the fields of its base alone
        raise ValueError(
            f"`method.name` (={name}) is no dataclass of its own: write @dataclass(frozen=True) above the class."
        )
    if found.recipe is Method.recipe:
        meant = near("recipe", [each for each in vars(found) if not each.startswith("_")])
        raise ValueError(
            f"`method.name` (={name}) does not define `recipe`: its class needs a method recipe(self, task) that "
            f"returns a Recipe.{f' Rename {meant[0]}, if that is it.' if meant else ''}"
        )
    try:
        client_tags(found.metrics)
    except ValueError as error:
        raise ValueError(f"`method.name` (={name}): {error}") from error
    return found


def recipe_of(method: Method, task: Task) -> Recipe:
    """Returns a method's recipe for a task.

    Raises:
        ValueError: the method cannot learn this task, or a user's own one fails.
    """
    try:
        return method.recipe(task)
    except ValueError:
        raise
    except Exception as error:
        if method.name in METHODS:  # a bug of ours: show where
            raise
        raise ValueError(
            f"`recipe` of `method.name` (={method.name}) fails: {describe_error(error)}; what a recipe needs is in "
            "docs/extend.md."
        ) from error
