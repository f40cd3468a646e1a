"""README and docs/: generated parts are up to date, and every command and every example is one that works.

A block of commands is checked line by line: the real command line parses it, and its configuration builds. What cannot
be checked so (programs of others, a download) needs a comment before the block: `<!-- not run: why -->`; or the page
says once `<!-- blocks run by tests/... -->`. Python is executed. A few pages are really run, see `REALLY_RUN`.
"""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import click
import pytest
import typer.main
import yaml
from flwr.common.config import parse_config_args
from typer.testing import CliRunner

from fedlabel.cli.listing import about
from fedlabel.cli.main import app
from fedlabel.config import load_config
from fedlabel.errors import is_file
from fedlabel.methods import METHODS
from fedlabel.study.sweep import SweepConfig, load_sweep, plan_sweep
from server.strategy import strategy_names

ROOT = Path(__file__).resolve().parents[1]
REPORTS = "_"
"""In the names of pages in docs/results/ that `fedlabel compare` wrote."""
PAGES = sorted(
    str(path.relative_to(ROOT))
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"))
    if path.name != "CHANGELOG.md" and not (path.parent.name == "results" and REPORTS in path.name)
)
REALLY_RUN = ("README.md", "docs/quickstart.md", "docs/configuration.md", "docs/extend.md")
"""Pages whose commands, also those in tables, are run one after the other in one folder, with fewer rounds and steps,
but for those marked, and those that need data which do not come with the installation."""
NODE_OPTIONS = {
    *("partition-id", "num-partitions", "data", "client", "memory", "min-count", "allow", "audit"),
    "share-evaluation",
}
COMMAND_LINE = typer.main.get_command(app)
SHELL = re.compile(r"(?<![\w-])(fedlabel|fedlabel-node|flwr|flower-\w+|pip|bash|python)\s")


class Block(NamedTuple):
    language: str
    text: str
    reason: str
    """Why it is not run; empty: it is."""

    @property
    def lines(self) -> list[str]:
        """Commands, without comments, each in one line."""
        joined = self.text.replace("\\\n", " ").splitlines()
        return [line for line in joined if line.strip() and not line.lstrip().startswith("#")]

    @property
    def file(self) -> str | None:
        """The name of the file that it is, as its first line says."""
        found = re.match(r"# ([\w./]+\.(?:py|yaml))\n", self.text)
        return found[1] if found else None


def blocks(page: str) -> list[Block]:
    text = (ROOT / page).read_text()
    assert not re.search(r"^[ >]+```", text, re.MULTILINE), "a block that is indented is not found here"
    found = re.findall(r"(?:^<!-- not run: ([^\n]+) -->\n)?^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert 2 * len(found) == len(re.findall("^```", text, re.MULTILINE))
    return [Block(language, body, reason) for reason, language, body in found]


def test_the_readme_is_a_page() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 120
    assert len(text.split()) <= 700
    assert f"{len(METHODS)} methods" in text


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_links_of_pages_that_are_not_on_the_site(page: str) -> None:
    """Those of docs/ are checked when the site is built."""
    links = re.findall(r"\]\(([^)#\s:]+)(?:#([^)]+))?\)", (ROOT / page).read_text())
    assert links
    for target, anchor in links:
        assert (ROOT / target).exists(), target
        headings = re.findall(r"^#+ (.+)$", (ROOT / target).read_text(), re.MULTILINE) if anchor else []
        assert not anchor or anchor in {re.sub(r"[^\w -]", "", each).lower().replace(" ", "-") for each in headings}


def load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / f"scripts/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---------------------------------------------------------------------------------------------------- generated parts


def test_generated_parts_are_as_the_code_is() -> None:
    make_docs = load_script("make_docs")
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        assert make_docs.made(text) == text, f"{page}: run python scripts/make_docs.py"


def test_a_docstring_becomes_markdown() -> None:
    markdown_of = load_script("make_docs").markdown_of
    docstring = "Steps <1>:\n  A. one    (1)\n  B. two\nWhy:\n- a `<b>`\n  goes on\n- c\nEnd."
    assert list(markdown_of(docstring)) == [
        *("Steps &lt;1>:", "", "```text", "  A. one    (1)", "  B. two", "```", "", "Why:", "", "- a `<b>`"),
        *("  goes on", "- c", "", "End.", ""),
    ]


# ----------------------------------------------------------------------------------------------------------- commands


def check_command(line: str) -> bool:
    """Checks one line of a shell. Returns whether it is of a kind that can be checked."""
    words = shlex.split(line, comments=True)
    if not words:
        return True
    program, *arguments = words
    if program == "fedlabel":
        check_fedlabel(arguments)
    elif program == "fedlabel-node":
        check_node(arguments)
    elif program == "flwr" and arguments[0] == "run":
        check_flwr(arguments)
        return False
    elif program in ("bash", "python") and arguments[0].startswith("scripts/"):
        text = (ROOT / arguments[0]).read_text()
        for option in arguments[1:]:
            assert not option.startswith("--") or option.partition("=")[0] in text, f"{arguments[0]} has no {option}"
    elif words[:2] == ["pip", "install"]:
        check_install(arguments[1:])
        return False
    else:
        return False
    return True


def parse(command: click.Command, name: str, arguments: Sequence[str]) -> tuple[str, dict[str, object]]:
    """Returns the full name of the command and the values of its parameters."""
    if not isinstance(command, click.Group):
        return name, dict(command.make_context(name, list(arguments)).params)
    if arguments[0].startswith("--"):
        assert arguments[0] in {option for each in command.params for option in each.opts} | {"--help"}
        return name, {}
    assert arguments[0] in command.commands, f"there is no `{name} {arguments[0]}`"
    return parse(command.commands[arguments[0]], f"{name} {arguments[0]}", arguments[1:])


def check_fedlabel(arguments: Sequence[str]) -> None:
    command, values = parse(COMMAND_LINE, "fedlabel", arguments)
    items = list(values.get("items") or ())  # type: ignore[call-overload]
    configs = [item for item in items if "=" not in item or is_file(item)]
    overrides = [item for item in items if item not in configs]
    if command in ("fedlabel run", "fedlabel partition"):
        load_config(configs, overrides)
    elif command == "fedlabel sweep":
        check_sweep(load_sweep(str(values["file"]), overrides))
    elif command == "fedlabel audit":
        load_config([], ["method.name=supervised", *overrides])
    elif command == "fedlabel list" and values["name"] and not str(values["name"]).isupper():
        assert list(about(str(values["name"]), 80, strategy_names()))


def check_sweep(sweep: SweepConfig) -> None:
    """The first method in the first setting is possible."""
    methods, settings = (dict(list(each.items())[:1]) for each in (sweep.methods, sweep.settings))
    small = SweepConfig(sweep.configs, sweep.overrides, methods, settings, seeds=[0])
    for group in plan_sweep(small):
        for (cell,) in group.final.values():
            assert not cell.error, cell.error


def check_node(arguments: Sequence[str]) -> None:
    """All that `--node-config` sets is something that a node reads."""
    given = [arguments[place + 1] for place, each in enumerate(arguments) if each == "--node-config"]
    if given and "$" not in given[0]:
        assert set(parse_config_args(given)) <= NODE_OPTIONS


def check_flwr(arguments: Sequence[str]) -> None:
    """The configuration in `--run-config` builds, but for files of the reader's own."""
    (given,) = [arguments[place + 1] for place, each in enumerate(arguments) if each == "--run-config"]
    settings = parse_config_args([given])
    assert set(settings) <= {"configs", "overrides", "name", "resume"}
    configs = [each for each in str(settings.get("configs", "")).split(",") if each and "$" not in each]
    load_config(configs, shlex.split(str(settings.get("overrides", ""))))


def check_install(arguments: Sequence[str]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for names in re.findall(r"\[([\w,]+)\]", " ".join(arguments)):
        assert set(names.split(",")) <= set(extras)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("fedlabel rum", "there is no"),
        ("fedlabel run trainin.lr=1", "Did you mean training"),
        ("fedlabel run experiment/digitz.yaml", "digitz"),
        ("fedlabel run --profil", "No such option"),
        ("fedlabel sweep sweep/digits.yaml numrounds=2", "numrounds"),
        ("fedlabel list fixmtch", "Did you mean fixmatch"),
        ("fedlabel-node --node-config 'partition=0'", "partition"),
        ("flwr run . x --run-config 'overrides=\"num_round=2\"'", "num_round"),
        ("python scripts/bench_augment.py --fast", "has no --fast"),
        ("pip install 'fedlabel[extra]'", "extra"),
    ],
)
def test_a_wrong_command_is_found(line: str, words: str) -> None:
    with pytest.raises((AssertionError, ValueError, click.ClickException, FileNotFoundError), match=re.escape(words)):
        check_command(line)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder to be in, from which modules are imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.mark.parametrize("page", PAGES)
def test_commands_parse_and_configurations_build(page: str, folder: Path) -> None:
    text = (ROOT / page).read_text()
    elsewhere = re.search(r"<!-- blocks run by (\S+) -->", text)
    if elsewhere:
        assert Path(page).name in (ROOT / elsewhere[1]).read_text()
    for block in blocks(page):
        if block.file is not None:
            (folder / block.file).write_text(block.text)
        if block.language == "bash":
            checked = [check_command(line) for line in block.lines]
            assert all(checked) or block.reason or elsewhere, f"neither checked nor marked:\n{block.text}"
        elif block.language == "yaml":
            check_yaml(block.text)
        elif block.language in ("", "text"):
            assert not any(SHELL.match(line) for line in block.lines), f"commands are in ```bash:\n{block.text}"
    for indented in re.findall(r"\n\n((?: {4}.*\n)+)", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)):
        assert not any(SHELL.match(line.strip()) for line in indented.splitlines()), f"in ```bash:\n{indented}"


def check_yaml(text: str) -> None:
    path = Path("block.yaml")
    path.write_text(text)
    if "methods" in yaml.safe_load(text):
        check_sweep(load_sweep(str(path), []))
    else:
        load_config([str(path)], [])


@pytest.mark.parametrize("page", PAGES)
def test_commands_in_the_text_parse(page: str, folder: Path) -> None:
    """Those with arguments, in `...`; they may leave out which run or file is meant, and what capitals stand for."""
    prose = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    for block in blocks(page):
        if block.file is not None:
            (folder / block.file).write_text(block.text)
    for line in re.findall(r"`((?:fedlabel|python|bash|pip) [^`]+)`", prose):
        if not re.search(r"…|\.\.\.|[ =][A-Z]+\b(?<!DATA)", line):
            with suppress(click.MissingParameter):
                check_command(" ".join(line.split()))


# ------------------------------------------------------------------------------------------------- what is really run


def quick(text: str) -> str:
    """Returns a text with a fifth of the rounds, at least two; but for DP-SSL, whose stages have their own numbers."""
    fewer = lambda found: f"num_rounds={max(2, int(found[1]) // 5)}"  # noqa: E731
    return text if "dp_ssl" in text else re.sub(r"num_rounds=(\d+)", fewer, text)


def execute(block: Block, names: dict[str, object]) -> None:
    if block.file is None:
        exec(compile(quick(block.text), "example", "exec"), names)


@pytest.mark.parametrize("page", [page for page in PAGES if page not in REALLY_RUN])
def test_examples_in_python_run(page: str, folder: Path) -> None:
    names: dict[str, object] = {"__name__": "example"}
    for block in blocks(page):
        if block.language == "python":
            execute(block, names)


def run_commands(lines: Iterable[str]) -> None:
    """Runs those of this program that need no file which is not there."""
    for line in lines:
        program, *arguments = shlex.split(quick(line), comments=True)
        if program != "fedlabel" or re.search(r"/path/to/|data\.root=(?!my_data)", line):
            continue
        if arguments[0] == "run" and "--resume" not in arguments:
            arguments += ["training.local_steps=1", *["num_rounds=2"] * ("num_rounds" not in line)]
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, (line, done.output, done.exception)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", REALLY_RUN)
def test_a_page_runs_from_top_to_bottom(page: str, folder: Path) -> None:
    names: dict[str, object] = {"__name__": "example"}
    for block in blocks(page):
        if block.file is not None:
            (folder / block.file).write_text(block.text)
        elif block.language == "python":
            execute(block, names)
        elif block.language == "bash" and not block.reason:
            run_commands(block.lines)
    run_commands(re.findall(r"^\|.*`(fedlabel run .+?)`.*\|$", (ROOT / page).read_text(), re.MULTILINE))
    assert list((folder / "runs").iterdir())


# ----------------------------------------------------------------------------------------------------------- the site


@pytest.fixture
def hooks() -> ModuleType:
    pytest.importorskip("mkdocs")
    return load_script("docs_hooks")


@pytest.mark.parametrize(
    ("link", "shown"),
    [
        ("[rounds.py](../server/rounds.py)", "`server/rounds.py`"),
        ("[the rounds](../server/rounds.py)", "the rounds (`server/rounds.py`)"),
        ("[labels](labels.md#bags)", "[labels](labels.md#bags)"),
        ("[Flower](https://flower.ai)", "[Flower](https://flower.ai)"),
        ("![picture](figures/x.png)", "![picture](figures/x.png)"),
    ],
)
def test_links_into_the_source_become_paths(hooks: ModuleType, link: str, shown: str) -> None:
    page = SimpleNamespace(file=SimpleNamespace(src_uri="index.md"))
    assert hooks.on_page_markdown(link, page) == shown


def test_numbers_in_tables_are_marked(hooks: ModuleType) -> None:
    marked = hooks.on_page_content("<td>61.1 ± 1.0</td><td>60.0 / 93.0</td><td>2 clients</td>")
    assert marked == '<td class="number">61.1 ± 1.0</td><td class="number">60.0 / 93.0</td><td>2 clients</td>'


@pytest.mark.parametrize("target", ["../server/no_rounds.py", "../../elsewhere.md"])
def test_a_link_to_a_file_that_is_not_there(hooks: ModuleType, target: str) -> None:
    page = SimpleNamespace(file=SimpleNamespace(src_uri="index.md"))
    with pytest.raises(Exception, match="there is no"):
        hooks.on_page_markdown(f"[x]({target})", page)


@pytest.mark.parametrize(
    ("name", "text", "refused"),
    [
        ("a.html", '<script src="https://cdn.example/x.js"></script>', True),
        ("a.html", "<img alt=x src=//example/x.png>", True),
        ("a.html", '<link rel="stylesheet" href="https://fonts.example/css">', True),
        ("a.css", "@import url(https://fonts.example/css);", True),
        ("a.html", '<a href="https://flower.ai">Flower</a><script src="x.js"></script>', False),
        ("a.html", '<link rel="canonical" href="https://example/">', False),
        ("a.css", "a { background: url(data:image/svg+xml,x) }", False),
    ],
)
def test_pages_load_nothing_from_the_network(
    hooks: ModuleType, tmp_path: Path, name: str, text: str, refused: bool
) -> None:
    (tmp_path / name).write_text(text)
    config = SimpleNamespace(site_dir=str(tmp_path))
    if refused:
        with pytest.raises(Exception, match="load from the network"):
            hooks.on_post_build(config)
    else:
        hooks.on_post_build(config)
