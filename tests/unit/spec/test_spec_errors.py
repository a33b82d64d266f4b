"""The tree of errors: one shape on the wire, one exit code for each family."""

import ast
import re
from pathlib import Path

import pytest

import casemate
from casemate.spec import errors
from casemate.spec.errors import FAMILIES, CasemateError, NetError

SOURCE = Path(casemate.__file__).parent


def test_the_families_are_all_there_and_apart():
    kinds = set(CasemateError.__subclasses__())
    assert kinds == set(FAMILIES.values())
    assert all(FAMILIES[kind.family] is kind for kind in kinds)
    exits = [kind.exit_code for kind in kinds]
    assert len(set(exits)) == len(exits) and 0 not in exits
    assert all(400 <= kind.status <= 599 for kind in kinds)


def test_the_docstring_tells_the_tree():
    told = {
        family: (name, int(code))
        for name, family, code in re.findall(
            r"\+- (\w+)\s+(\w+)\.\*\s+exit (\d+)", errors.__doc__ or ""
        )
    }
    assert told == {f: (k.__name__, k.exit_code) for f, k in FAMILIES.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_wire_shape_comes_back(family):
    error = FAMILIES[family](f"{family}.some-reason", "What.", mend="Do.", where="a.b", status=418)
    again = CasemateError.from_wire(error.to_wire(), 418)
    assert type(again) is type(error)
    assert again.to_wire() == error.to_wire() and again.status == 418
    assert str(error) == f"{family}.some-reason [a.b]: What. Do."


@pytest.mark.parametrize(
    "code", ["", "auth", "auth.", "auth.X", "auth.a b", "auth.a\n", "budget.x", ".x", "auth.-x"]
)
def test_codes_have_one_form(code):
    with pytest.raises(ValueError):
        errors.AuthError(code, "x", mend="y")


GOOD = {"code": "auth.x", "message": "m", "mend": "n", "where": ""}


@pytest.mark.parametrize(
    "body",
    [
        None, 1, "x", [], {}, {"error": None}, {"error": {}}, {"error": GOOD | {"more": "x"}},
        {"error": GOOD | {"code": "nobody.x"}}, {"error": GOOD | {"code": "auth.X"}},
        {"error": GOOD | {"code": 1}}, {"error": GOOD | {"message": None}},
        {"error": GOOD | {"message": "x" * 4097}}, {"detail": "Not Found"},
    ],
)  # fmt: skip
def test_other_bodies_are_a_broken_server(body):
    error = CasemateError.from_wire(body, 500)
    assert isinstance(error, NetError) and error.code == "net.bad-error"


def test_a_hostile_server_cannot_write_to_the_terminal():
    body = {"error": GOOD | {"message": "\x1b[2Jgone\r\n\x07", "where": "\x9b31m"}}
    assert str(CasemateError.from_wire(body)).isprintable()


def raised_codes():
    """Every literal first argument of a construction of an error class in the source."""
    kinds = {kind.__name__: family for family, kind in FAMILIES.items()}
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and node.args:
                name = ast.unparse(node.func).split(".")[-1]
                code = node.args[0]
                ours = any(k.arg == "mend" for k in node.keywords)  # click has a UsageError too
                if ours and name in kinds and isinstance(code, ast.Constant):
                    yield f"{path.relative_to(SOURCE)}:{node.lineno}", kinds[name], code.value


def test_every_code_in_the_source_is_well_formed_and_of_its_family():
    found = list(raised_codes())
    assert len(found) > 20
    for place, family, code in found:
        assert errors._CODE.match(code) and code.split(".")[0] == family, (place, code)
