"""Overrides that people, scripts and sweeps may write: any key, any value, in files or on the command line.

Each is either a configuration of which an experiment can be set up (on the embedded digits), or one sentence of ours.
"""

from __future__ import annotations

import random
import re
import resource
import warnings
from functools import cache
from pathlib import Path

from fedlabel.config import ConfigError, ExperimentConfig, load_config, parse_config, to_yaml
from fedlabel.config_names import CALLED_ELSEWHERE, all_keys, inner_schema
from fedlabel.config_schema import fields_of, hints
from fedlabel.data.sets.config import DataError
from fedlabel.experiment import Experiment
from fedlabel.methods import METHODS
from server.strategy import build_strategy, strategy_names

VALUES = """
0|1|2|3|-1|0.5|0.1|1.0|1.5|-0.5|1e-5|1e3|1e9|1e30|1e300|1e999|-1e999|.inf|-.inf|.nan|inf|nan|NaN|-0.0
1e-320|010|0x10|1_000|9007199254740992|9223372036854775807|9223372036854775808|-9223372036854775808
1000000000|100000|4097|1000000000000000000000|true|false|yes|no|on|off|True|null|~||''|""|none|None|'1'
"0.5"|'true'|abc|a b|ä|日本|😀|../..|/dev/null|/|.|C:\\x|%s|{0}|[]|[1]|[1,2]|[1,2,3]|[a]|[null]|[[1]]
[[0.5,0.5],[0.5,0.5]]|[1e9]|[1.5]|[-1]|[true]|['']|[1,1]|[10]|[3,8]|[8,8]|[1000000000]|{}|{a: 1}
{a: {b: c}}|{1: 2}|[{share: 0.5}]|[{share: 0.5, kind: full}, 1]|[{share: .nan}]|[{a: b}]|{share: 1}
[{share: 2}]|[1|{a: 1|'a|"a|a: b: c|- a|a: b|!!float x|!!python/object/apply:os.system [ls]|!x 1|&a 1|*a
&a [*a]|${x}|${oc.env:HOME}|???|${|$x|a #b|#b|@a|`a`|%a|,|]|}|:|: a|? a|| a|> a|---|--- 1|...|a\tb|\t1
a\nb|1\n2|{a: 1, a: 2}|<<|<<: {a: 1}|=|==1|2020-01-01|12:30:45|1:2|0b1|0o7|+1|1.|.5|1e|e1|1e+5|[red]x|[/]
\\u0000|\x1b[31m|\x00|\ud800|\u2028|\u202e|\ufeff1
"""
BY_LINE = [value for line in VALUES.strip("\n").split("\n") for value in line.split("|")]
NESTED = ["[[]]", "[[1]]", "[[a]]", "[[[1]]]", "[{a: 1}]", "[{}]", "[null]", "[1,[2]]", "[[1,2],3]", "[a,{b: [1]}]"]
"""For keys that hold a list."""
NASTY = [*BY_LINE, *NESTED, "a\nb", "1\n2", "a: 1\n- b", "a" * 5000, "9" * 5000, "[" * 500, "[" * 500 + "]" * 500]
NUMBERS = [
    *("0", "1", "2", "3", "7", "10", "11", "64", "100", "4096", "65536", "1048576", "1000000000", "9007199254740992"),
    *("-1", "0.0", "0.5", "0.999", "1.0", "1.5", "2.5", "1e-300", "1e-7", "1e7", "1e300", "inf", "-inf"),
]
SETTINGS = [
    [],
    ["supervision.kind=bags", "supervision.bag_size=8", "data.positive_classes=[3,8]"],
    ["supervision.kind=bags", "supervision.bag_size=8"],
    ["supervision.kind=partial", "supervision.partial_ratio=0.3"],
    ["supervision.kind=noisy", "supervision.noise_rate=0.3"],
    ["supervision.labels_per_class=4"],
    ["supervision.labels_at=server", "supervision.labels_total=70"],
    ["supervision.labels_at=some_clients", "supervision.labeled_clients=3"],
    ["labeled_partition.kind=iid"],
    ["data.name=breast_cancer", "model.name=mlp"],
    ["supervision.mix=[{share: 0.5, kind: partial, partial_ratio: 0.3}, {share: 0.5, kind: full}]"],
    ["strategy.name=FedAdam"],
]
"""Where numbers are tried."""
NAMES = [
    "os:system",
    "builtins:dict",
    "json:JSONDecoder",
    "x.y:Z",
    "a:b:c",
    ".a:B",
    ":",
    "os:",
    ":x",
    "fedlabel.cli.main:app",
]
SENSIBLE = {
    "method.name": [*METHODS, *NAMES, "fedlabel.methods.recipe:Method", "FedLabel", "fixmtch"],
    "model.name": ["cnn", "mlp", "resnet8", "resnet9", "wrn28_2", "torchvision:squeezenet1_1", "torchvision:x", "CNN"],
    "partition.kind": ["iid", "dirichlet", "dirichlet_per_class", "classes_per_client", "quantity_skew", "Dirichlet"],
    "supervision.kind": ["few_labels", "full", "partial", "noisy", "partial_and_noisy", "bags", "labeling_functions"],
    "supervision.noise": ["symmetric", "asymmetric", "pair_flip", "file"],
    "supervision.labels_at": ["clients", "server", "some_clients"],
    "strategy.name": strategy_names(),
    "data.name": ["digits", "breast_cancer", "npz", "table", "image_folder", "cifar10", "MNIST"],
    "training.optimizer": ["sgd", "adamw", "adam"],
    "evaluation.select": ["bag_mae", "instance_accuracy", "instance_auc"],
}
FORMS = ("{k}={v}",) * 40 + (
    "+{k}={v}", "++{k}={v}", "~{k}", "{k}", "{k} = {v}", "{k}:={v}", "{k}:{v}", "{k}.={v}", ".{k}={v}", "{k}[0]={v}",
    "{k}.0={v}", "{k}.x={v}", "{k}..x={v}", "={v}", "--{k}={v}", "{k}=={v}", "'{k}'={v}", "{k}-x={v}", "{k}/x={v}",
    "x@{k}={v}",
)  # fmt: skip
FOREIGN = re.compile(
    r"Traceback|omegaconf|full_key|object_type|while (parsing|scanning|constructing)|mapping values|line \d+, column|"
    r"could not (convert|determine|find expected)|NoneType|unexpected keyword|positional argument|object is not|"
    r"unsupported operand|invalid literal|has no attribute|<class |<built-in|dtype|Expected|expected (a|<|')|"
    r"RuntimeError|TypeError|OverflowError|IndexError|enforce fail|size mismatch|high is out|too large to convert|"
    r"__\w+__"
)
OURS = (ValueError, ConfigError, DataError)
"""Not UnicodeError and others that are kinds of ValueError."""
LIMIT = 6 * 2**30
"""Bytes of address space that a case may take beside what the process has."""


@cache
def keys() -> list[str]:
    """All keys, of every method, and some that there are not."""
    known = [key for method in METHODS.values() for key in all_keys(ExperimentConfig, method)]
    sections = ["training", "supervision", "method", "model", "labeled_partition", "grid", "strategy.args.eta"]
    kept = [key for key in dict.fromkeys(known) if key not in ("data.download", "data.root")]
    return (
        kept + sections + [f"{where}{name}" for name in CALLED_ELSEWHERE for where in ("", "training.", "method.")][::5]
    )


@cache
def list_keys() -> list[str]:
    """The keys that hold a list, of every method."""
    return sorted({key for method in METHODS.values() for key in _lists_below(ExperimentConfig, method, "")})


def _lists_below(schema: type, method: type, prefix: str) -> list[str]:
    found = []
    for name in fields_of(schema):
        kind = method if name == "method" and not prefix else inner_schema(hints(schema)[name])
        if kind is not None:
            found += _lists_below(kind, method, f"{prefix}{name}.")
        elif re.search(r"\b(tuple|list)\[", str(hints(schema)[name])):
            found.append(f"{prefix}{name}")
    return found


def override(rng: random.Random) -> str:
    """One override."""
    if rng.random() < 0.1:
        return f"{rng.choice(list_keys())}={rng.choice(NESTED)}"
    if rng.random() < 0.25:
        key = rng.choice(list(SENSIBLE))
        return f"{key}={rng.choice(SENSIBLE[key])}"
    key, value = rng.choice(keys()), rng.choice(NASTY)
    if rng.random() < 0.05:
        place = rng.randrange(len(key))
        key = key[:place] + rng.choice("_x.é 9") + key[place + 1 :]
    return rng.choice(FORMS).format(k=key, v=value)


def numbers(rng: random.Random) -> list[str]:
    """Any number for a key of a setting that is possible without."""
    method = rng.choice(list(METHODS))
    kind = METHODS[method]
    known = [key for key in all_keys(ExperimentConfig, kind) if not key.startswith("data.") or "fraction" in key]
    own = [key for key in known if key.startswith("method.")]
    keys = [rng.choice(own if rng.random() < 0.4 else known) for _ in range(rng.choice((1, 1, 2)))]
    return [f"method.name={method}", *rng.choice(SETTINGS), *(f"{key}={rng.choice(NUMBERS)}" for key in keys)]


def as_file(rng: random.Random, overrides: list[str], path: Path) -> None:
    """Writes overrides as a file, mostly as YAML would have them, sometimes broken."""
    lines = []
    for each in overrides:
        key, _, value = each.partition("=")
        section, _, name = key.partition(".")
        lines.append(f"{section}:\n  {name}: {value}" if name and rng.random() < 0.9 else f"{key}: {value}")
    content = "\n".join(lines).encode("utf-8", "surrogatepass")
    match rng.randrange(12):
        case 0:
            content = content[: rng.randrange(len(content) + 1)]
        case 1:
            place = rng.randrange(len(content) + 1)
            content = content[:place] + rng.randbytes(3) + content[place:]
        case 2:
            content = content.decode("utf-8", "replace").encode("utf-16")
        case 3:
            content = content.replace(b"  ", b"\t")
        case 4:
            content = b"a: &a [x,x]\nb: &b [*a,*a]\nc: &c [*b,*b]\n" + content
    path.write_bytes(content)


def case(seed: int, folder: Path) -> str | None:
    """See `tests/fuzzing/__init__.py`."""
    rng = random.Random(seed)
    overrides = numbers(rng) if rng.random() < 0.5 else [override(rng) for _ in range(rng.choice((1, 1, 2, 3)))]
    files = []
    if rng.random() < 0.2:
        files = [folder / "a.yaml"]
        as_file(rng, overrides, files[0])
        overrides = []
    what = repr(files[0].read_bytes() if files else overrides)[:300]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            set_up(files, overrides)
    except ValueError as error:
        return blame(str(error), what) if type(error) in OURS else f"{error!r} for {what}"[:600]
    except Exception as error:
        return f"{error!r} for {what}"[:600]
    return None


def set_up(files: list[Path], overrides: list[str]) -> None:
    """Does what comes before the first round."""
    config = load_config(files, overrides)
    text = to_yaml(config)
    assert parse_config(text) == config, "does not read back equal"
    build_strategy(config.strategy)
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (taken() + LIMIT, before[1]))  # fails instead of filling the machine
    try:
        Experiment(config)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def taken() -> int:
    """Bytes of address space that this process has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else 2**24
    return pages * resource.getpagesize()


def blame(message: str, what: str) -> str | None:
    """Returns what is wrong with a message, or None."""
    if "\n" in message or not message.isprintable():
        return f"several lines, or control characters: {message!r}, {what}"
    said = re.sub(r"\(=.*?\)|`[^`]*`|ImportError.*|ModuleNotFoundError.*", "", message)  # our words, without the user's
    if found := FOREIGN.search(said):
        return f"foreign words ({found[0]}): {message[:400]}, {what}"
    if len(message) > 2000 or not message.rstrip().endswith((".", "?", ")")):
        return f"too long, or no sentence: {message[:300]}, {what}"
    return None
