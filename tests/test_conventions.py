"""The house's rules as tests, so that one pytest is the gate.

Linters, the pinned interface, what a module may be called and how long it may be, what each
command may import, and how tests are written.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

import sdtool
from sdtool.cli.app import COMMANDS

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "sdtool"
TESTS = ROOT / "tests"

MAX_LINES = 600
FORBIDDEN_NAMES = frozenset({"utils", "helpers", "common", "constants", "managers"})

MODULES = sorted(PACKAGE.rglob("*.py"))
TEST_FILES = sorted(TESTS.rglob("*.py"))


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a tool in the repository and keep what it says."""
    return subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def name_of(path: Path) -> str:
    """A path as a test's name."""
    return str(path.relative_to(ROOT))


# Linters -------------------------------------------------------------------------------------

LINTERS = {
    "ruff check": (sys.executable, "-m", "ruff", "check", "."),
    "ruff format": (sys.executable, "-m", "ruff", "format", "--check", "."),
    "mypy": (sys.executable, "-m", "mypy"),
    "import-linter": (f"{sysconfig.get_path('scripts')}/lint-imports",),
}


@pytest.mark.parametrize("command", LINTERS.values(), ids=LINTERS.keys())
def test_linter_is_content(command: tuple[str, ...]) -> None:
    """As pyproject.toml configures it; its own words when it is not."""
    done = run(*command)
    if done.returncode != 0:
        pytest.fail(f"{done.stdout}{done.stderr}", pytrace=False)


# The interface -------------------------------------------------------------------------------


def test_package_exports_what_it_promises() -> None:
    """The library's API; the lazy names too can be had."""
    promised = {"Host", "ListFilter", "Scope", "StopOptions", "__version__", "errors", "model"}
    assert promised == set(sdtool.__all__)
    assert [] == [name for name in promised if not hasattr(sdtool, name)]


def test_package_has_no_other_lazy_name() -> None:
    """A typing error in a name is an AttributeError, as everywhere."""
    with pytest.raises(AttributeError, match="Hots"):
        _ = sdtool.Hots


def readme_commands() -> list[str]:
    """The first word of each row of the table below "## Commands", in its order."""
    section = (ROOT / "README.md").read_text().partition("\n## Commands\n")[2]
    return re.findall(r"^\| `([a-z]+)", section.partition("\n## ")[0], re.MULTILINE)


def help_commands() -> list[str]:
    """The commands that --help lists, in its order."""
    listed = run(sys.executable, "-m", "sdtool", "--help").stdout.partition("Commands:\n")[2]
    return re.findall(r"^  ([a-z]+) ", listed, re.MULTILINE)


def test_readme_has_the_commands_of_the_help() -> None:
    """The same commands in the same order: neither may have one that the other lacks."""
    assert list(COMMANDS) == help_commands()
    assert help_commands() == readme_commands()


# Modules -------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_module_is_of_a_size_to_read(path: Path) -> None:
    """Past that, split it by meaning."""
    assert len(path.read_text().splitlines()) <= MAX_LINES


def test_no_module_is_named_after_nothing() -> None:
    """A name says what a module owns."""
    parts = {part for path in MODULES for part in path.relative_to(ROOT).with_suffix("").parts}
    assert set() == parts & FORBIDDEN_NAMES


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_everything_public_has_a_docstring(path: Path) -> None:
    """Modules, classes and functions; ruff judges their form."""
    bare = [node.name for node in public_definitions(path) if ast.get_docstring(node) is None]
    assert ([], True) == (bare, ast.get_docstring(ast.parse(path.read_text())) is not None)


def public_definitions(
    path: Path,
) -> Iterator[ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """The public classes of a module with their public methods, and its public functions."""
    waiting: list[ast.AST] = [ast.parse(path.read_text())]
    while waiting:
        for node in ast.iter_child_nodes(waiting.pop()):
            if isinstance(
                node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
            ) and not node.name.startswith("_"):
                yield node
                if isinstance(node, ast.ClassDef):
                    waiting.append(node)


# Imports -------------------------------------------------------------------------------------

HEAVY = ("asyncio", "dbus_next", "dbus_fast", "psutil", "rich")

PROBE = f"""
import sys
from sdtool.cli import main
main(sys.argv[1:])
sys.stdout.flush()
print("loaded:", *(name for name in {HEAVY} if name in sys.modules))
"""

NOTHING: frozenset[str] = frozenset()
BUS = frozenset({"dbus_next"})
NO_UNIT = "sdtool-no-such-unit"

IMPORTS: dict[str, tuple[frozenset[str], frozenset[str]]] = {
    "--version": (NOTHING, NOTHING),
    "--help": (NOTHING, NOTHING),
    "stop --help": (NOTHING, NOTHING),
    "pid 0 --json": (NOTHING, NOTHING),
    "port 1/tcp --json": (frozenset({"asyncio"}), NOTHING),
    # Where a manager or a .socket unit has a listener, it is asked for its .socket units.
    "ports --json": (frozenset({"asyncio"}), BUS),
    # Where a unit has PID 1, the manager is asked about that unit.
    "pid 1 --json": (frozenset({"asyncio", "psutil"}), BUS),
    "list --json": (frozenset({"asyncio"}) | BUS, NOTHING),
    f"trace {NO_UNIT} --json": (frozenset({"asyncio"}) | BUS, NOTHING),
    f"stop {NO_UNIT} --json": (frozenset({"asyncio"}) | BUS, NOTHING),
    "doctor --json": (frozenset({"asyncio"}) | BUS, NOTHING),
    "doctor": (frozenset({"asyncio", "rich"}) | BUS, NOTHING),
}
"""What a command loads of the heavy modules, always and on some machines only."""


def loaded(command: str, **environment: str) -> frozenset[str]:
    """The heavy modules that are loaded when a command has run."""
    done = run(sys.executable, "-c", PROBE, *command.split(), **environment)
    assert done.returncode == 0, done.stderr
    return frozenset(done.stdout.splitlines()[-1].split()[1:])


@pytest.mark.parametrize("command", IMPORTS)
def test_command_loads_only_what_it_needs(command: str) -> None:
    """Start-up time is a feature: asyncio, D-Bus, psutil and rich are each 15 to 60 ms."""
    always, sometimes = IMPORTS[command]
    found = loaded(command, SDTOOL_DBUS="next")
    assert always == found - (sometimes - always)


@pytest.mark.parametrize(("forced", "library"), [("next", "dbus_next"), ("fast", "dbus_fast")])
def test_only_one_dbus_library_is_loaded(forced: str, library: str) -> None:
    """The one that SDTOOL_DBUS names."""
    found = loaded("doctor --json", SDTOOL_DBUS=forced)
    assert {library} == found & {"dbus_next", "dbus_fast"}


# Tests ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", TEST_FILES, ids=name_of)
def test_test_says_in_a_sentence_what_it_proves(path: Path) -> None:
    """One paragraph that ends with a full stop."""
    tests = [node for node in public_definitions(path) if node.name.startswith("test_")]
    texts = {node.name: ast.get_docstring(node) or "" for node in tests}
    assert [] == [name for name, text in texts.items() if "\n\n" in text or not text.endswith(".")]


@pytest.mark.parametrize("path", TEST_FILES, ids=name_of)
def test_no_test_skips_by_itself(path: Path) -> None:
    """Only tests/conftest.py skips: a whole tier, or for a capability on its short list."""
    skips = [call for call in calls(path) if re.search(r"\b(skip|skipif|importorskip)$", call[0])]
    reasons = [reason for _, reason in skips]
    assert all(reasons)
    assert path == TESTS / "conftest.py" or not skips


@pytest.mark.parametrize("path", TEST_FILES, ids=name_of)
def test_expected_failure_has_its_reason(path: Path) -> None:
    """What is known to be wrong says what it is."""
    marks = [reason for name, reason in calls(path) if name.endswith("xfail")]
    assert all(marks)
    assert "mark.xfail\n" not in path.read_text()


@pytest.mark.parametrize("path", TEST_FILES, ids=name_of)
def test_no_test_sleeps_to_synchronise(path: Path) -> None:
    """A sleep stands only in a loop, between two looks at what is waited for."""
    tree = ast.parse(path.read_text())
    loops = [node for node in ast.walk(tree) if isinstance(node, ast.While | ast.For)]
    polls = {id(node) for loop in loops for node in ast.walk(loop)}
    sleeps = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and _sleeps(node)]
    assert [] == [node.lineno for node in sleeps if id(node) not in polls]


def _sleeps(call: ast.Call) -> bool:
    """Whether a call waits for time to pass; ``asyncio.sleep(0)`` only gives way to others."""
    name = ast.unparse(call.func)
    return name in ("sleep", "time.sleep", "asyncio.sleep") and [
        ast.unparse(a) for a in call.args
    ] != ["0"]


def calls(path: Path) -> list[tuple[str, bool]]:
    """(what is called, whether with an argument) for each call in a file."""
    nodes = ast.walk(ast.parse(path.read_text()))
    return [
        (ast.unparse(node.func), bool(node.args or node.keywords))
        for node in nodes
        if isinstance(node, ast.Call)
    ]
