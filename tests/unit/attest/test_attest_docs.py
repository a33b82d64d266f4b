"""docs/evidence.md against the code: its codes are all codes, its tables are those of the kinds and
presets, its policies load.

To see what a table should be: ``python tests/unit/attest/test_attest_docs.py``.
"""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

import casemate.attest
from casemate.attest.kinds import KINDS
from casemate.attest.trust import PRESETS, TERMS, Trust, preset_table
from casemate.attest.verdict import EXITS, STAGES, Unchecked, stage

PAGE = Path(__file__).resolve().parents[3] / "docs" / "evidence.md"
DOC = PAGE.read_text(encoding="utf-8")
ATTEST = Path(casemate.attest.__file__).parent

Functions = ast.FunctionDef | ast.AsyncFunctionDef
# A function that makes a code of a parameter: where it stands, the parameter's place and name, and
# what stands around it in the code.
Helper = tuple[Path, str, int, str, str, str]


class Codes:
    """Codes that the source may give to ``refusal``; ``*`` for a part that only runs decide."""

    def __init__(self) -> None:
        self.found: set[str] = set()
        self.helpers: set[Helper] = set()
        self.trees = {p: ast.parse(p.read_text()) for p in sorted(ATTEST.rglob("*.py"))}
        for path, tree in self.trees.items():
            for function, call in calls(tree):
                if called(call) == "refusal" and call.args:
                    self.take(path, function, call.args[0], "", "")
        seen: set[Helper] = set()
        while self.helpers - seen:
            helper = (self.helpers - seen).pop()
            seen.add(helper)
            self.follow(helper)

    def follow(self, helper: Helper) -> None:
        home, name, at, parameter, before, after = helper
        for path, tree in self.trees.items():
            if path != home and name.startswith("_"):
                continue
            for function, call in calls(tree):
                if called(call) != name:
                    continue
                named = [k.value for k in call.keywords if k.arg == parameter]
                for given in named or call.args[at : at + 1]:
                    self.take(path, function, given, before, after)

    def take(self, path: Path, function: Functions | None, of: ast.expr, before: str, after: str):
        """The codes that an expression in ``function`` may be."""
        match of:
            case ast.Constant(value=str(text)):
                self.found.add(before + text + after)
            case ast.IfExp(body=one, orelse=other):
                self.take(path, function, one, before, after)
                self.take(path, function, other, before, after)
            case ast.BoolOp(values=values):
                for one in values:
                    self.take(path, function, one, before, after)
            case ast.JoinedStr(values=[ast.Constant(value=str(text)), *rest]):
                tail = rest[1].value if len(rest) == 2 and isinstance(rest[1], ast.Constant) else ""
                if rest and isinstance(rest[0], ast.FormattedValue) and len(rest) <= 2:
                    self.take(path, function, rest[0].value, before + text, str(tail) + after)
            case ast.Name(id=name) if function is not None:
                arguments = [*function.args.posonlyargs, *function.args.args]
                names = [a.arg for a in arguments + function.args.kwonlyargs]
                if name in names:
                    place = names.index(name)
                    self.helpers.add((path, function.name, place, name, before, after))
                    for default in defaults(function, name):
                        self.take(path, function, default, before, after)
                    return
                values = [
                    node.value
                    for node in ast.walk(function)
                    if isinstance(node, ast.Assign)
                    and any(isinstance(t, ast.Name) and t.id == name for t in node.targets)
                ]
                for value in values:
                    self.take(path, function, value, before, after)
                if not values:
                    self.found.add(f"{before}*{after}")
            case ast.Attribute(attr="code"):
                for _, call in calls(self.trees[path]):
                    for keyword in call.keywords:
                        if keyword.arg == "code" and isinstance(keyword.value, ast.Constant):
                            self.take(path, function, keyword.value, before, after)
            case ast.Call(func=ast.Attribute(attr="get", value=table), args=[_, default]):
                self.take(path, function, default, before, after)
                for value in entries(self.trees[path], table):
                    self.take(path, function, value, before, after)
            case _:
                self.found.add(f"{before}*{after}")


def calls(tree: ast.AST, function: Functions | None = None) -> Iterator:
    """Every call, with the function that it stands in."""
    for node in ast.iter_child_nodes(tree):
        inner = node if isinstance(node, Functions) else function
        if isinstance(node, ast.Call):
            yield function, node
        yield from calls(node, inner)


def entries(tree: ast.AST, table: ast.expr) -> list[ast.expr]:
    """The values of a dictionary that a module names."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.AnnAssign | ast.Assign) and isinstance(node.value, ast.Dict):
            target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
            if ast.dump(target).replace("Store", "Load") == ast.dump(table):
                return node.value.values
    return []


def called(call: ast.Call) -> str:
    f = call.func
    return f.id if isinstance(f, ast.Name) else f.attr if isinstance(f, ast.Attribute) else ""


def defaults(function: Functions, name: str) -> Iterator[ast.expr]:
    arguments = function.args
    for one, value in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        if one.arg == name and value is not None:
            yield value
    if arguments.defaults:
        for one, value in zip(
            arguments.args[-len(arguments.defaults) :], arguments.defaults, strict=True
        ):
            if one.arg == name:
                yield value


def source() -> set[str]:
    return {code for code in Codes().found if code.strip("*")}


def rows(text: str, cells: int) -> list[list[str]]:
    """The rows of the tables in a section, without heads."""
    found = [line for line in text.splitlines() if line.startswith("| ")]
    split = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in found]
    return [r for r in split if len(r) == cells and not set(r[0]) <= set("- :|")]


def section(title: str) -> str:
    return re.split(r"^## ", DOC.split(f"## {title}\n", 1)[1], maxsplit=1, flags=re.M)[0]


def table() -> list[str]:
    return [r[0] for r in rows(section("Codes"), 2) if r[0] != "code"]


def test_every_code_is_on_the_page():
    known = table()
    missing = {
        c
        for c in source()
        if not any(fnmatchcase(c, row) or ("*" in c and fnmatchcase(row, c)) for row in known)
    }
    assert not missing


def test_every_row_is_a_code():
    found = source()
    patterns = {c for c in found if "*" in c}
    stray = {
        row
        for row in table()
        if row not in found
        and not any(fnmatchcase(row, p) for p in patterns)
        and not ("*" in row and any(fnmatchcase(c, row) for c in found))
    }
    assert not stray


def test_no_row_stands_twice_and_each_has_its_stage():
    known = table()
    assert len(known) == len(set(known))
    for part in re.split(r"^### ", section("Codes"), flags=re.M)[1:]:
        name = part.split(":")[0].split("\n")[0].strip()
        for row in (r[0] for r in rows(part, 2) if r[0] != "code"):
            assert stage(row) == ("" if name == "none" else name), row


def test_the_search_finds_codes():
    found = source()
    assert len(found) > 150
    assert {"parse-report-length", "chain-signature", "binding-tls", "needs-vcek"} <= found


def test_stages_and_exits():
    told = {r[0]: r[1:] for r in rows(section("The answer"), 3)}
    for name, exit_code in EXITS.items():
        words = {word for word, of in STAGES.items() if of == name}
        assert told[name][1] == str(exit_code)
        assert words <= set(re.findall(r"`([a-z]+)-", told[name][0])), name


def test_the_table_of_bindings():
    told = {r[0].strip("`"): r[1] for r in rows(section("What is bound"), 2)}
    for tee, kind in KINDS.items():
        assert told[tee] == kind.field


# Policies and presets, field by field.


def shown(value: object) -> str:
    """A field of a preset, as the page shows it."""
    if isinstance(value, dict) and set(value) == {"unchecked"}:
        return f"open: {value['unchecked']}"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return ", ".join(f"{k} {shown(v)}" for k, v in value.items())
    if isinstance(value, list):
        return ", ".join(map(shown, value))
    text = str(value)
    return "zeros" if len(text) > 40 and not text.strip("0") else text.partition("::")[0][:40]


def inside(policy: object, given: dict) -> Iterator[tuple[str, object, object]]:
    """Fields of a section and of the parts in it, with what a preset gives."""
    default = policy
    for f in dataclasses.fields(default):
        value = getattr(default, f.name)
        if dataclasses.is_dataclass(value) and not isinstance(value, Unchecked):
            for name, *rest in inside(value, given.get(f.name, {})):
                yield f"{f.name}.{name}", *rest
        else:
            yield f.name, value, given.get(f.name)


def preset_page(name: str) -> str:
    """A preset as the page shows it."""
    found = preset_table(name)
    lines = ["| field | value |", "| --- | --- |"]
    lines += [f"| {term} | {shown(found[term])} |" for term in TERMS]
    for tee in (t for t in found if t in KINDS):
        given = found[tee]
        for field, _, value in inside(KINDS[tee].default(), given):
            own = field.rpartition(".")[2]
            if own in ("roots", "rim_roots", "revoked"):
                continue
            where = f"{tee}: {field}"
            lines.append(f"| {where} | {'**give it**' if value is None else shown(value)} |")
        lines += [
            f"| {tee}: {part}products | {shown(lines_)} |" for part, lines_ in products(given)
        ]
    return "\n".join(lines)


def products(given: dict) -> Iterator[tuple[str, object]]:
    if "products" in given:
        yield "", given["products"]
    for name, value in given.items():
        if isinstance(value, dict) and "products" in value:
            yield f"{name}.", value["products"]


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_shown_field_by_field(name):
    part = section("Presets").split(f"### {name}\n", 1)[1].split("\n### ", 1)[0]
    assert preset_page(name) in part


def test_no_other_preset_is_shown():
    assert set(re.findall(r"^### (.*)$", section("Presets"), re.M)) == set(PRESETS)


def fields_of(tee: str) -> list[str]:
    return [f.name for f in dataclasses.fields(KINDS[tee].policy)]


@pytest.mark.parametrize("tee", list(KINDS))
def test_every_field_of_every_section_is_explained(tee):
    part = section("Sections, field by field").split(f"### {tee}\n", 1)[1].split("\n### ", 1)[0]
    told = {name for row in rows(part, 2) for name in re.findall(r"`([a-z0-9_]+)`", row[0])} | set(
        re.findall(r"\[as ([a-z-]+)\]", part)
    )
    inherited = {n for other in told & set(KINDS) for n in fields_of(other)}
    assert set(fields_of(tee)) <= told | inherited
    assert told - set(KINDS) <= set(fields_of(tee)) | {"products"}


@pytest.mark.parametrize("text", re.findall(r"```toml\n(.*?)```", DOC, re.S))
def test_the_policies_load(tmp_path, text):
    path = tmp_path / "trust.toml"
    path.write_text(text)
    assert not Trust.load(path).simulation


if __name__ == "__main__":
    for preset in PRESETS:
        print(f"\n### {preset}\n\n{preset_page(preset)}")
    print(*sorted(source(), key=lambda c: (stage(c), c)), sep="\n")
