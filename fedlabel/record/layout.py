"""TensorBoard's Custom Scalars tab: a page for each of `metric_tags.PAGES`, and what its charts show."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import summary as summaries

from fedlabel.metric_tags import (
    CLIENTS,
    COMMUNICATION,
    LEARNING,
    PAGES,
    PSEUDO_LABELS,
    SUPERVISION,
    SYSTEM,
    TAGS,
    Tag,
    find_tag,
)


class Margin(NamedTuple):
    """A chart of a line inside a band."""

    value: str
    lower: str
    upper: str


def _of(group: str, start: str) -> tuple[str, ...]:
    """Returns the table's tags of a group whose name begins with `start`, in the table's order."""
    return tuple(tag.name for tag in TAGS if tag.name.startswith(f"{group}/{start}"))


CHARTS: Mapping[str, Mapping[str, Sequence[str] | Margin]] = {
    LEARNING: {
        "accuracy": ("eval/accuracy", "eval/balanced_accuracy", "interim/accuracy", "eval/rare_class_accuracy"),
        "loss: evaluation and training (nats)": ("eval/loss", "train/loss"),
        "parts of the training loss (nats)": _of("train", "loss_"),
        "validation split": ("select/accuracy", "select/auc", "select/bag_mae"),
    },
    PSEUDO_LABELS: {
        "coverage: mean, lowest and highest tenth of clients": Margin(
            "pseudo/coverage", "pseudo/lowest_10pct_client_coverage", "pseudo/highest_10pct_client_coverage"
        ),
        "accuracy: mean, lowest and highest tenth of clients": Margin(
            "pseudo/accuracy", "pseudo/lowest_10pct_client_accuracy", "pseudo/highest_10pct_client_accuracy"
        ),
        "accuracy by expert": ("pseudo/accuracy", "pseudo/accuracy_local", "pseudo/accuracy_global"),
        "coverage by expert": ("pseudo/coverage", "pseudo/coverage_local", "pseudo/coverage_global"),
        "who labels, and do the experts agree": ("pseudo/from_global", "pseudo/agreement"),
        "confidence and threshold": (
            *("pseudo/confidence", "pseudo/confidence_local", "pseudo/confidence_global"),
            "pseudo/threshold",
        ),
        "calibration error": ("pseudo/ece", "pseudo/ece_kept"),
    },
    CLIENTS: {
        "accuracy: mean, worst and best tenth of clients": Margin(
            "eval/mean_client_accuracy", "eval/worst_10pct_client_accuracy", "eval/best_10pct_client_accuracy"
        ),
        "accuracy: mean, worst tenth, worst client": (
            "eval/mean_client_accuracy",
            "eval/worst_10pct_client_accuracy",
            "eval/worst_client_accuracy",
        ),
        "training loss: mean, lowest and highest tenth of clients (nats)": Margin(
            "train/loss", "train/lowest_10pct_client_loss", "train/highest_10pct_client_loss"
        ),
    },
    SUPERVISION: {
        "accuracy of labels by their kind": _of("posterior", "accuracy_"),
        "what the posterior leaves (classes)": ("posterior/candidates", "posterior/effective_classes"),
        "noise matrix T: diagonal": ("transition/smallest_diagonal", "transition/own_dominant"),
        "noise matrix T: error": ("transition/largest_error", "transition/mean_error"),
        "bags: how far their counts are missed": ("bag/share_error", "belief/bag_residual"),
        "labelling functions: accuracy, true and estimated": (
            "functions/accuracy",
            "functions/estimated_accuracy",
            "functions/majority_accuracy",
            "functions/normalized_vote_accuracy",
        ),
        "labelling functions: votes": (
            *("functions/coverage", "functions/voted", "functions/overlap", "functions/conflict"),
            *("functions/kept", "functions/abstained"),
        ),
    },
    SYSTEM: {
        "seconds of a round, by part": ("system/round_seconds", *_of("system", "seconds_")),
        "seconds of the workers, by part": _of("system", "worker_seconds_"),
        "clients that gave no result": ("system/failed_clients", "system/late_clients", "system/dropped_clients"),
        "samples sent through a model": ("train/forward_samples", "train/backward_samples"),
    },
    COMMUNICATION: {
        "bytes of a round": ("comm/bytes_up", "comm/bytes_down"),
        "bytes of a round, as the paper counts": ("comm/claimed_bytes_up", "comm/claimed_bytes_down"),
    },
}
"""Page -> title -> the tags of a chart. A metric that is in none has a chart of its own, under its title."""
HOW_TO_READ: Mapping[str, str] = {
    LEARNING: (
        "**Is it learning?** `eval/accuracy` is of the global model on the evaluation split. A flat curve beside a "
        "falling `train/loss`: clients fit their own labels and their models do not add up (partition, learning rate, "
        "local steps). Accuracy above balanced accuracy: rare classes are left behind; Images → `eval/classes` says "
        "which, `eval/confusion` what they are taken for (a click on a picture shows it in full size). "
        "`interim/accuracy` is of a model that is no end model yet. "
        "`eval/ece`: how far confidence is from accuracy; compare it with `pseudo/ece`."
    ),
    PSEUDO_LABELS: (
        "**Which model labels what, and is it right?** Coverage: share of the unlabelled samples drawn that are used. "
        "Accuracy: of these, the share that is right (only in a simulation, which knows). Both should rise; coverage "
        "that rises while accuracy falls is confirmation of errors: raise the threshold. `from_global`: share whose "
        "expert is the global model; Images → `pseudo/experts` has it per class. `pseudo/reliability`: bars below the "
        "diagonal are over-confident. `pseudo/precision_coverage`: what another threshold would give. The band is "
        "from the lowest to the highest tenth of the clients that trained."
    ),
    CLIENTS: (
        "**Who is left behind?** The band is from the worst to the best tenth of the clients, each judged on its own "
        "share of the evaluation split; a mean that rises over a flat lower edge helps only some. Images → "
        "`eval/clients_over_rounds` has a small chart for each client, the worst first; `partition` says who holds "
        "what. Lists with a number per client are histograms here, and lists in metrics.jsonl."
    ),
    SUPERVISION: (
        "**Where are labels wrong?** `about/label_card` (Text) says which kinds of label there are. Accuracy by kind: "
        "what the method makes of each. Noise matrix T: the smallest diagonal falling below its row's largest entry "
        "means two classes have been exchanged (Images → `transition`, beside the true one in a simulation). Bags: how "
        "far predicted counts are from the known ones (Images → `eval/bags`). Labelling functions: estimated accuracy "
        "should follow the true one (Images → `functions`; labeling_functions.csv has a row for each)."
    ),
    SYSTEM: (
        "**Where does time go?** `system/round_seconds` is of the clock on the wall; with `--profile` its parts, and "
        "trace.json for Perfetto. Failed clients are named in Text → `failures`, with tracebacks in failures.log. "
        "`system/virtual_seconds` is the simulated clock of `devices`."
    ),
    COMMUNICATION: (
        "**Where do bytes go?** Per round, over all clients of the cohort: what is encoded and sent. Those that the "
        "paper counts leave out what a real message needs beside the weights."
    ),
}
"""Page -> what to look at first, in Markdown."""


def layout(present: Collection[str], own: Sequence[Tag] = ()) -> Summary:
    """Returns the pages with those charts that have something to show, each the same in every run that has it:
    TensorBoard shows a chart once for all runs that have an equal one.

    Args:
        present: the metrics of the run.
        own: what the run's method declares, see `Method.metrics`.
    """
    pages = {
        page: {
            title: ["Margin", list(names)] if isinstance(names, Margin) else ["Multiline", [_only(n) for n in names]]
            for title, names in charts.items()
        }
        for page, charts in shown_charts(present, own).items()
    }
    return summaries.custom_scalars(pages)


def shown_charts(present: Collection[str], own: Sequence[Tag] = ()) -> dict[str, dict[str, Sequence[str] | Margin]]:
    """Returns page -> title -> the tags of a chart: those of `CHARTS` that have something to show, and one for each
    further metric, under its title.

    Args:
        present: the metrics of the run.
        own: what the run's method declares, see `Method.metrics`.
    """
    pages = {page: {t: names for t, names in CHARTS[page].items() if _is_shown(names, present)} for page in PAGES}
    shown = {name for charts in pages.values() for names in charts.values() for name in names}
    for name in sorted(set(present) - shown):
        tag = find_tag(name, own)
        if tag is not None:
            title = tag.title if tag.unit in ("share", "index") else f"{tag.title} ({tag.unit})"
            pages[tag.page].setdefault(title, (name,))
    return pages


def _is_shown(names: Sequence[str] | Margin, present: Collection[str]) -> bool:
    """Returns whether a chart has something to show: a band needs all three of its metrics."""
    return (all if isinstance(names, Margin) else any)(name in present for name in names)


def _only(name: str) -> str:
    """Returns the regular expression of one tag."""
    return f"{re.escape(name)}$"
