"""The table of all metrics of a run: tag, title, unit, direction, and whether clients may send it.

`server/schema.py` takes only what stands here as a client's, and only in the range that stands here. A method from
outside declares its own tags in `Method.metrics`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from fedlabel.data.labels.supervision import KIND_NAMES
from fedlabel.spans import PARTS

LARGEST_MEAN = 1e9
"""Of a metric without a narrower range: a loss per sample beyond +-this is of a training that diverged."""
LEARNING, PSEUDO_LABELS, CLIENTS = "Learning", "Pseudo-labels", "Clients"
SUPERVISION, SYSTEM, COMMUNICATION = "Supervision", "System", "Communication"
PAGES = (LEARNING, PSEUDO_LABELS, CLIENTS, SUPERVISION, SYSTEM, COMMUNICATION)
HIGHER, LOWER, NEITHER = "higher", "lower", "neither"
DIRECTIONS = (HIGHER, LOWER, NEITHER)
FIGURE = "figure"
"""The unit of what is no number: figures, histograms and tables in TensorBoard."""
_NAME = re.compile(r"[a-z]+/[A-Za-z][A-Za-z0-9_]{0,39}")
_SERVERS_GROUPS = ("comm/", "eval/", "interim/", "privacy/", "select/", "system/")
_PLACE = re.compile(r"\{[a-z]+\}")


@dataclass(frozen=True)
class Tag:
    """A metric of a run.

    Raises:
        ValueError: a page, direction or range that there is not.
    """

    name: str
    """As in metrics.jsonl and TensorBoard: "group/name". `{what}` in it is a placeholder for a number."""
    title: str
    """A short title."""
    unit: str
    """share, nats, samples, classes, s, bytes, ..."""
    page: str
    """TensorBoard page: one of `PAGES`."""
    direction: str = NEITHER
    """Which values are good: higher | lower | neither."""
    by_client: bool = False
    """Whether clients send it, as (sum, count). Those that a method declares itself all are."""
    least: float = -LARGEST_MEAN
    """Smallest possible mean at one client. Clients' means below it are rejected."""
    largest: float | Callable[[int], float] = LARGEST_MEAN
    """Largest possible mean; or a function of the number of classes."""
    of_pairs: bool = False
    """Whether it is a mean over pairs of samples."""

    def __post_init__(self) -> None:
        if self.page not in PAGES:
            raise ValueError(f"`page` (={self.page}) of metric {self.name} must be one of {', '.join(PAGES)}.")
        if self.direction not in DIRECTIONS:
            allowed = ", ".join(DIRECTIONS)
            raise ValueError(f"`direction` (={self.direction}) of metric {self.name} must be one of {allowed}.")
        least, largest = self.range(2)
        if not -math.inf < least < largest < math.inf:
            raise ValueError(
                f"`least` (={least:g}) and `largest` (={largest:g}) of metric {self.name} must be finite and in rising "
                "order."
            )

    def range(self, num_classes: int) -> tuple[float, float]:
        """Returns the smallest and the largest possible mean of a client."""
        return self.least, self.largest(num_classes) if callable(self.largest) else self.largest


def _server(page: str, unit: str, direction: str, *named: tuple[str, str]) -> list[Tag]:
    """Returns tags that the server computes itself, of (name, title)."""
    return [Tag(name, title, unit, page, direction) for name, title in named]


def _losses(*named: tuple[str, str]) -> list[Tag]:
    return [Tag(f"train/{name}", title, "nats", LEARNING, LOWER, by_client=True) for name, title in named]


def _shares(page: str, direction: str, *named: tuple[str, str]) -> list[Tag]:
    """Returns tags of client metrics in which every sample counts between 0 and 1."""
    return [Tag(name, title, "share", page, direction, by_client=True, least=0.0, largest=1.0) for name, title in named]


TAGS: tuple[Tag, ...] = (
    # how well the global model does
    *_server(
        LEARNING,
        "share",
        HIGHER,
        ("eval/accuracy", "accuracy"),
        ("eval/balanced_accuracy", "balanced accuracy"),
        ("eval/auc", "area under the ROC curve"),
        ("eval/class_accuracy", "accuracy per class"),
        ("eval/rare_class_accuracy", "mean accuracy of the rare classes"),
        ("interim/accuracy", "accuracy of what is no end model yet"),
        ("select/accuracy", "accuracy, validation split"),
        ("select/auc", "area under the ROC curve, validation split"),
    ),
    *_server(
        LEARNING,
        "share",
        LOWER,
        ("eval/ece", "calibration error"),
        ("eval/bag_mae", "error of the bags' shares"),
        ("select/bag_mae", "error of the bags' shares, validation split"),
    ),
    *_server(LEARNING, "nats", LOWER, ("eval/loss", "loss"), ("select/loss", "loss, validation split")),
    *_server(
        LEARNING, FIGURE, NEITHER, ("eval/confusion", "confusion matrix"), ("eval/classes", "classes over the rounds")
    ),
    # what clients' training says
    *_losses(
        ("loss", "training loss"),
        ("loss_supervised", "loss on labels"),
        ("loss_unsupervised", "loss on unlabelled samples"),
        ("loss_consistency", "consistency loss"),
        ("loss_inter_client", "divergence from other clients' models"),
        ("loss_em", "loss to the posterior"),
        ("loss_forward", "loss through the noise matrix"),
        ("loss_mix", "loss on mixed samples"),
        ("loss_fairness", "fairness loss"),
        ("loss_vat", "loss on adversarial samples"),
        ("loss_beliefs", "loss to the beliefs"),
        ("loss_aggregate", "loss on bags"),
    ),
    *_shares(SUPERVISION, NEITHER, ("train/kept", "labelled samples that are trusted")),
    # clients
    *_server(
        CLIENTS,
        "share",
        HIGHER,
        ("eval/client_accuracy", "accuracy per client"),
        ("eval/mean_client_accuracy", "mean accuracy of clients"),
        ("eval/worst_client_accuracy", "accuracy of the worst client"),
        ("eval/worst_10pct_client_accuracy", "accuracy of the worst 10 % of clients"),
        ("eval/best_10pct_client_accuracy", "accuracy of the best 10 % of clients"),
        ("pseudo/client_accuracy", "accuracy of pseudo-labels per client"),
        ("pseudo/lowest_10pct_client_accuracy", "accuracy of pseudo-labels, lowest 10 % of clients"),
        ("pseudo/highest_10pct_client_accuracy", "accuracy of pseudo-labels, highest 10 % of clients"),
    ),
    *_server(
        CLIENTS,
        "share",
        NEITHER,
        ("pseudo/client_coverage", "coverage of pseudo-labels per client"),
        ("pseudo/lowest_10pct_client_coverage", "coverage of pseudo-labels, lowest 10 % of clients"),
        ("pseudo/highest_10pct_client_coverage", "coverage of pseudo-labels, highest 10 % of clients"),
        ("pseudo/client_from_global", "pseudo-labels from the global model per client"),
    ),
    *_server(
        CLIENTS,
        "nats",
        LOWER,
        ("train/client_loss", "training loss per client"),
        ("train/lowest_10pct_client_loss", "training loss, lowest 10 % of clients"),
        ("train/highest_10pct_client_loss", "training loss, highest 10 % of clients"),
    ),
    *_server(CLIENTS, "share", LOWER, ("eval/client_accuracy_sd", "spread of accuracy over clients")),
    *_server(CLIENTS, "index", HIGHER, ("eval/jain_index", "Jain's fairness index")),
    *_server(
        CLIENTS,
        FIGURE,
        NEITHER,
        ("eval/clients", "accuracy of clients"),
        ("eval/clients_over_rounds", "clients over the rounds"),
        ("partition", "who holds what"),
    ),
    # pseudo-labels: what clients see of them, and what the evaluator does
    *_shares(
        PSEUDO_LABELS,
        NEITHER,
        ("pseudo/coverage", "coverage of pseudo-labels"),
        ("pseudo/confidence", "confidence of pseudo-labels"),
        ("pseudo/from_global", "pseudo-labels from the global model"),
        ("pseudo/agreement", "global and local model agree"),
        ("pseudo/threshold", "confidence threshold"),
    ),
    *_server(
        PSEUDO_LABELS,
        "share",
        HIGHER,
        ("pseudo/accuracy", "accuracy of pseudo-labels"),
        ("pseudo/accuracy_local", "accuracy of the local model's"),
        ("pseudo/accuracy_global", "accuracy of the global model's"),
        ("pseudo/class_accuracy", "accuracy of pseudo-labels per class"),
        ("pseudo/class_accuracy_local", "accuracy of the local model's per class"),
        ("pseudo/class_accuracy_global", "accuracy of the global model's per class"),
    ),
    *_server(
        PSEUDO_LABELS,
        "share",
        NEITHER,
        ("pseudo/coverage_local", "coverage of the local model's"),
        ("pseudo/coverage_global", "coverage of the global model's"),
        ("pseudo/confidence_local", "confidence of the local model's"),
        ("pseudo/confidence_global", "confidence of the global model's"),
        ("pseudo/class_coverage", "coverage of pseudo-labels per class"),
        ("pseudo/class_coverage_local", "share of each class that the local model labels"),
        ("pseudo/class_coverage_global", "share of each class that the global model labels"),
    ),
    *_server(PSEUDO_LABELS, "ratio", HIGHER, ("pseudo/correct_wrong_ratio", "right / wrong")),
    *_server(
        PSEUDO_LABELS,
        "share",
        LOWER,
        ("pseudo/ece", "calibration error of pseudo-labels"),
        ("pseudo/ece_kept", "calibration error of kept pseudo-labels"),
    ),
    *_server(
        PSEUDO_LABELS,
        FIGURE,
        NEITHER,
        ("pseudo/confidences", "confidences of pseudo-labels"),
        ("pseudo/beliefs", "beliefs in class 1"),
        ("pseudo/reliability", "reliability of pseudo-labels"),
        ("pseudo/precision_coverage", "precision of pseudo-labels against their coverage"),
        ("pseudo/experts", "which model labels which class"),
        ("pseudo/samples", "pseudo-labelled samples"),
        ("pseudo/samples_wrong", "pseudo-labels that are wrong, most confident first"),
        ("pseudo/samples_newly_kept", "samples that were dropped and then kept"),
        ("pseudo/samples_dropped", "samples that are dropped, most confident first"),
        ("pseudo/samples_disputed", "samples on which local and global model disagree"),
    ),
    # imprecise and noisy labels
    Tag(
        "posterior/entropy", "entropy of the posterior", "nats", SUPERVISION, by_client=True, least=0, largest=math.log
    ),
    *(
        Tag(f"posterior/{name}", title, "classes", SUPERVISION, by_client=True, least=1, largest=float)
        for name, title in (("candidates", "candidates"), ("effective_classes", "classes that the posterior leaves"))
    ),
    *_server(
        SUPERVISION,
        "share",
        HIGHER,
        *((f"posterior/accuracy_{kind.replace(' ', '_')}", f"accuracy of labels from: {kind}") for kind in KIND_NAMES),
    ),
    *_shares(SUPERVISION, HIGHER, ("transition/own_dominant", "rows with a dominant diagonal")),
    *_server(SUPERVISION, "share", HIGHER, ("transition/smallest_diagonal", "smallest diagonal of the noise matrix")),
    *_server(
        SUPERVISION,
        "share",
        LOWER,
        ("transition/largest_error", "largest error of a noise matrix"),
        ("transition/mean_error", "mean error of the noise matrices"),
    ),
    *_server(
        SUPERVISION,
        FIGURE,
        NEITHER,
        ("transition", "noise matrix"),
        ("transition/{annotator}", "noise matrix of an annotator"),
    ),
    # bags
    *_shares(SUPERVISION, LOWER, ("bag/share_error", "error of the bags' shares, training")),
    *_shares(SUPERVISION, HIGHER, ("belief/converged", "beliefs that converged")),
    *(
        Tag(f"belief/{name}", title, unit, SUPERVISION, LOWER, by_client=True, least=0.0)
        for name, title, unit in (
            ("iterations", "iterations of belief propagation", "iterations"),
            ("residual", "last change of a belief", "log-odds"),
            ("bag_residual", "samples by which a bag's count is missed", "samples"),
        )
    ),
    Tag(
        "graph/homophily",
        "neighbours of the same class",
        "share",
        SUPERVISION,
        HIGHER,
        by_client=True,
        least=0.0,
        largest=1.0,
        of_pairs=True,
    ),
    *_server(SUPERVISION, FIGURE, NEITHER, ("eval/bags", "shares of classes in bags, predicted and counted")),
    # labelling functions
    *_shares(
        SUPERVISION,
        NEITHER,
        ("functions/kept", "votes of heads that are trained on"),
        ("functions/abstained", "abstentions of heads"),
    ),
    Tag("functions/log_likelihood", "log-likelihood of the votes", "nats", SUPERVISION, HIGHER, by_client=True),
    *_server(
        SUPERVISION,
        "share",
        HIGHER,
        ("functions/coverage", "coverage of a labelling function"),
        ("functions/accuracy", "accuracy of a labelling function"),
        ("functions/voted", "samples with a vote"),
        ("functions/majority_accuracy", "accuracy of the majority"),
        ("functions/normalized_vote_accuracy", "accuracy by share of votes"),
        ("functions/estimated_accuracy", "estimated accuracy of a labelling function"),
    ),
    *_server(
        SUPERVISION,
        "share",
        NEITHER,
        ("functions/overlap", "votes that another function shares a sample with"),
        ("functions/conflict", "votes that another function contradicts"),
    ),
    *_server(SUPERVISION, "share", LOWER, ("functions/estimation_error", "error of the estimated accuracy")),
    *_server(SUPERVISION, "classes", NEITHER, ("functions/classes", "classes that a function votes for")),
    *_server(
        SUPERVISION,
        FIGURE,
        NEITHER,
        ("functions", "labelling functions"),
        ("functions/clients", "labelling functions by client"),
    ),
    # cost
    *_server(
        SYSTEM,
        "samples",
        LOWER,
        ("train/forward_samples", "samples sent through a model"),
        ("train/backward_samples", "samples propagated back"),
    ),
    *_server(SYSTEM, "s", LOWER, ("system/round_seconds", "seconds of a round")),
    *_server(
        SYSTEM,
        "s",
        LOWER,
        *((f"system/seconds_{part}", f"seconds: {title}") for part, title in PARTS.items()),
        *((f"system/worker_seconds_{part}", f"seconds of workers: {title}") for part, title in PARTS.items()),
    ),
    *_server(SYSTEM, "nats", LOWER, ("privacy/epsilon", "epsilon of differential privacy")),
    *_server(SYSTEM, "s", LOWER, ("system/virtual_seconds", "simulated time")),
    *_server(
        SYSTEM,
        "clients",
        LOWER,
        ("system/failed_clients", "failed clients"),
        ("system/late_clients", "clients that were too late"),
        ("system/dropped_clients", "clients that dropped out"),
    ),
    *_server(SYSTEM, "clients", NEITHER, ("system/clients_in_flight", "clients that still train")),
    *_server(SYSTEM, "updates", LOWER, ("system/staleness", "updates since a reply's model")),
    *_server(
        SYSTEM,
        "share",
        HIGHER,
        ("system/work_share", "share of their steps that clients take"),
        ("system/slow_half_share", "share of the replies that the slower half of the clients gave"),
    ),
    *_server(SYSTEM, "replies", LOWER, ("system/refused_replies", "refused replies")),
    *_server(SYSTEM, "clients", NEITHER, ("system/stacked_clients", "clients that trained in a stack of several")),
    *_server(
        SYSTEM,
        FIGURE,
        NEITHER,
        ("config", "configuration"),
        ("clients", "which clients are shown"),
        ("failures", "failed clients"),
    ),
    *_server(SUPERVISION, FIGURE, NEITHER, ("about/label_card", "labels of the federation")),
    *(Tag(f"about/how_to_read_{page.lower()}", f"how to read: {page}", FIGURE, page) for page in PAGES),
    *_server(
        COMMUNICATION,
        "bytes",
        LOWER,
        ("comm/bytes_up", "bytes up"),
        ("comm/bytes_down", "bytes down"),
        ("comm/claimed_bytes_up", "bytes up, as the paper counts"),
        ("comm/claimed_bytes_down", "bytes down, as the paper counts"),
    ),
)
"""All tags but those that methods from outside declare. Lists (per class, per client) are in metrics.jsonl as lists."""

_BY_NAME = {tag.name: tag for tag in TAGS}
_PATTERNS = {
    re.compile(r"\d+".join(map(re.escape, _PLACE.split(tag.name)))): tag for tag in TAGS if _PLACE.search(tag.name)
}


def find_tag(name: str, own: Sequence[Tag] = ()) -> Tag | None:
    """Returns the tag of a name; None if it is not declared.

    Args:
        name: as in metrics.jsonl.
        own: what the run's method declares, see `Method.metrics`.
    """
    if name in _BY_NAME:
        return _BY_NAME[name]
    of_pattern = next((tag for pattern, tag in _PATTERNS.items() if pattern.fullmatch(name)), None)
    return of_pattern or next((tag for tag in own if tag.name == name), None)


def client_tags(own: Sequence[Tag] = ()) -> Mapping[str, Tag]:
    """Returns name -> tag of all metrics that a client may send.

    Args:
        own: what the run's method declares, see `Method.metrics`.

    Raises:
        ValueError: what it declares is no tag, is declared here already, or is in a group of the server's.
    """
    found = {tag.name: tag for tag in TAGS if tag.by_client}
    for tag in own:
        if not isinstance(tag, Tag):
            raise ValueError(f"`metrics` (={tag!r}) must be a tuple of fedlabel.metric_tags.Tag.")
        if find_tag(tag.name) is not None or tag.name in found:
            raise ValueError(f"`metrics`: {tag.name} is declared already (fedlabel/metric_tags.py). Take another name.")
        if not _NAME.fullmatch(tag.name) or tag.name.startswith(_SERVERS_GROUPS):
            raise ValueError(
                f"`metrics`: {tag.name} must be a group in lower case, / and a name of letters, digits and _ (at most "
                f"40), such as pseudo/margin; the groups {', '.join(_SERVERS_GROUPS)} are the server's."
            )
        found[tag.name] = tag
    return found
