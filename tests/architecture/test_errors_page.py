"""docs/errors.md lists every stable error code of src with its HTTP status, and no other."""

from __future__ import annotations

import ast
import functools
import re
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

from casemate.server.throttle import Busy
from casemate.spec.data import DatasetInfo
from casemate.spec.errors import FAMILIES
from casemate.spec.job import JobStatus

ROOT = Path(__file__).parents[2]
SRC = ROOT / "src" / "casemate"
PAGE = ROOT / "docs" / "errors.md"
ELSEWHERE = {"evidence"}  # docs/evidence.md has its own table and its own test

FAMILY = "|".join(FAMILIES)
CODE = re.compile(rf"({FAMILY})\.[a-z0-9]+(-[a-z0-9]+)*")
PREFIX = re.compile(rf"({FAMILY})\.([a-z0-9]+-)*")
MAKES = re.compile(rf"""f["']({FAMILY})\.""")  # a module without one has no helper of its own
# Shaped like codes, but names of files and of fields.
FILES = re.compile(r".*\.(json|toml|py|csv|tsv|png|svg|der|pem|bin)")
FIELDS = {"plan.events", "plan.units"}
CLASS_STATUS = {kind.__name__: kind.status for kind in (*FAMILIES.values(), Busy)}
# Where the status is the framework's own.
STATUS_ELSEWHERE = {"format.route": {404, 405}}


def _states(kind: type, *others: str) -> set[str]:
    return set(typing.get_args(typing.get_type_hints(kind)["state"])) - set(others)


# Codes that end in a state: the f-string's prefix -> what may follow.
STATES = {
    "policy.": _states(DatasetInfo, "ready"),
    "job.": _states(JobStatus, "queued", "running", "done"),
}
# A function that makes a code of one of its parameters: (prefix, the parameter's place).
Helper = tuple[str, int]


class Site(NamedTuple):
    code: str
    status: int | None  # None where the literal stands apart from the error that is made of it
    place: str


def _called(node: ast.Call) -> str:
    f = node.func
    return f.id if isinstance(f, ast.Name) else f.attr if isinstance(f, ast.Attribute) else ""


def _prefix(node: ast.AST) -> tuple[str, ast.expr] | None:
    """The prefix of an f-string ``f"family.{value}"`` and the value."""
    if isinstance(node, ast.JoinedStr) and len(node.values) == 2:
        head, tail = node.values
        text = str(head.value) if isinstance(head, ast.Constant) else ""
        if isinstance(tail, ast.FormattedValue) and PREFIX.fullmatch(text):
            return text, tail.value
    return None


def _helpers(tree: ast.Module, imported: Mapping[str, Helper]) -> dict[str, Helper]:
    found = dict(imported)
    for _ in range(2):  # a helper may call a helper
        for function in ast.walk(tree):
            if not isinstance(function, ast.FunctionDef):
                continue
            names = [a.arg for a in function.args.args if a.arg != "self"]
            for node in ast.walk(function):
                made = _prefix(node)
                if isinstance(node, ast.Call) and _called(node) in found and node.args:
                    prefix, at = found[_called(node)]
                    made = (prefix, node.args[at]) if at < len(node.args) else None
                if made and isinstance(made[1], ast.Name) and made[1].id in names:
                    found[function.name] = (made[0], names.index(made[1].id))
    return found


def _imported(
    tree: ast.Module, all_helpers: Mapping[str, Mapping[str, Helper]]
) -> dict[str, Helper]:
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            theirs = all_helpers.get(node.module, {})
            found |= {a.asname or a.name: theirs[a.name] for a in node.names if a.name in theirs}
    return found


def _given_statuses(tree: ast.Module) -> dict[int, int]:
    """id(node of the code) -> the status of the error that is made of it."""
    out = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and node.args and _called(node) in CLASS_STATUS:
            out[id(node.args[0])] = CLASS_STATUS[_called(node)]
            for word in node.keywords:
                if word.arg == "status" and isinstance(word.value, ast.Constant):
                    out[id(node.args[0])] = int(str(word.value.value))
    return out


def codes(source: str, place: str, imported: Mapping[str, Helper] | None = None) -> list[Site]:
    """Every code in one module: literals, and what helpers make of their first word."""
    tree = ast.parse(source)
    # Docstrings, and codes that are looked at, not made.
    passed = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            passed |= {id(n) for n in ast.walk(node)}
    helpers = _helpers(tree, imported or {}) if imported or MAKES.search(source) else {}
    given = _given_statuses(tree)
    out = []

    def add(code: str, at: ast.expr) -> None:
        out.append(Site(code, given.get(id(at)), f"{place}:{at.lineno}"))

    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = node.value
            code = CODE.fullmatch(text) and not FILES.fullmatch(text) and text not in FIELDS
            if code and id(node) not in passed:
                add(text, node)
        elif isinstance(node, ast.Call) and _called(node) in helpers:
            prefix, index = helpers[_called(node)]
            for at in node.args[index : index + 1]:
                for word in _words(at):
                    add(prefix + word, at)
        elif isinstance(node, ast.JoinedStr) and (found := _prefix(node)) is not None:
            prefix, value = found
            if isinstance(value, ast.Attribute) and value.attr == "state":
                for state in STATES[prefix]:
                    add(prefix + state, node)
            else:
                assert isinstance(value, ast.Name), f"{place}:{node.lineno}: which codes?"
    return out


def _words(at: ast.expr) -> list[str]:
    """The words that an argument may be: a literal, or one of two."""
    if isinstance(at, ast.IfExp):
        return _words(at.body) + _words(at.orelse)
    return [at.value] if isinstance(at, ast.Constant) and isinstance(at.value, str) else []


@functools.cache
def all_codes() -> list[Site]:
    trees = {
        "casemate." + p.relative_to(SRC).with_suffix("").as_posix().replace("/", "."): p
        for p in sorted(SRC.rglob("*.py"))
    }
    sources = {name: path.read_text() for name, path in trees.items()}
    parsed = {name: ast.parse(source) for name, source in sources.items()}
    helpers = {n: _helpers(t, {}) if MAKES.search(sources[n]) else {} for n, t in parsed.items()}
    return [
        site
        for name, path in trees.items()
        for site in codes(
            path.read_text(),
            path.relative_to(SRC).as_posix(),
            _imported(parsed[name], helpers),
        )
    ]


Rows = dict[str, tuple[set[int], tuple[str, str]]]


def page(text: str) -> Rows:
    """code -> (HTTP statuses, (meaning, mend)) of the page's tables."""
    out: Rows = {}
    for line in text.splitlines():
        cells = [c.strip() for c in line.strip().strip("|").split("|")]
        if line.startswith("| ") and CODE.fullmatch(cells[0]):
            code, http, *words = cells
            assert len(words) == 2, line
            assert code not in out, f"{code} stands twice"
            own = {FAMILIES[code.split(".")[0]].status}
            out[code] = {int(s) for s in http.split(",") if s} or own, (words[0], words[1])
    return out


def compare(sites: list[Site], rows: Rows) -> list[str]:
    """What is wrong between source and page."""
    made: dict[str, set[int]] = {}
    for site in sites:
        if site.code.split(".")[0] not in ELSEWHERE:
            made.setdefault(site.code, set()).update({site.status} - {None})
    wrong = [f"not on the page: {c}" for c in sorted(made.keys() - rows.keys())]
    wrong += [f"not in the source: {c}" for c in sorted(rows.keys() - made.keys())]
    for code in sorted(made.keys() & rows.keys()):
        own = {FAMILIES[code.split(".")[0]].status}
        statuses = STATUS_ELSEWHERE.get(code) or made[code] or own
        if statuses != rows[code][0]:
            wrong.append(
                f"{code} answers {sorted(statuses)}, the page says {sorted(rows[code][0])}"
            )
        if not all(rows[code][1]):
            wrong.append(f"{code} has no meaning or no mend")
    return wrong


def test_page_and_source_are_in_step() -> None:
    assert compare(all_codes(), page(PAGE.read_text())) == []


def test_each_family_says_its_exit_code_and_status() -> None:
    heads = re.findall(r"^## (\w+): exit (\d+), HTTP (\d+), `(\w+)`$", PAGE.read_text(), re.M)
    assert {h[0]: (int(h[1]), int(h[2]), h[3]) for h in heads} == {
        name: (kind.exit_code, kind.status, kind.__name__) for name, kind in FAMILIES.items()
    }


HELPERS = """
def no(reason):
    return DataError(f"data.{reason}", "")

class A:
    def bad(self, reason):
        raise no(reason)

no("one")
A().bad("two" if x else "three")
"""


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("raise DataError('data.new', 'x', mend='y')", {("data.new", 422)}),
        ("raise DataError('data.new', 'x', mend='y', status=404)", {("data.new", 404)}),
        ("raise Busy('limit.new', 'x', mend='y', retry_after=1.0)", {("limit.new", 503)}),
        ("RULES = ((True, 'policy.new', 'x'),)", {("policy.new", None)}),
        (HELPERS, {("data.one", None), ("data.two", None), ("data.three", None)}),
        ("f'policy.{found.state}'", {(f"policy.{s}", None) for s in STATES["policy."]}),
        ("if e.code == 'data.new':\n    open('receipt.json')", set()),
        ("'data.new'", set()),
    ],
)
def test_the_search_finds(source: str, found: set[tuple[str, int | None]]) -> None:
    assert {(s.code, s.status) for s in codes(source, "x.py")} == found


def test_a_code_that_cannot_be_told_is_refused() -> None:
    with pytest.raises(AssertionError, match="which codes"):
        codes("DataError(f'data.{a + b}', 'x', mend='y')", "x.py")


def test_differences_are_found() -> None:
    sites, rows = all_codes(), page(PAGE.read_text())
    new = Site("data.never-heard-of", 422, "x.py:1")
    assert compare([*sites, new], rows) == ["not on the page: data.never-heard-of"]
    gone = [s for s in sites if s.code != "data.csv-ragged"]
    assert compare(gone, rows) == ["not in the source: data.csv-ragged"]
    moved = [s._replace(status=418) if s.code == "data.size" else s for s in sites]
    assert compare(moved, rows) == ["data.size answers [418], the page says [422]"]
