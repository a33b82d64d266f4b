"""Every captured case, as an owner would judge it: `casemate enclave verify --evidence`, with the
answers that the collection states, at the time that it states, and none taken from it."""

from __future__ import annotations

import json
import shutil
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from casemate.attest import folder
from casemate.attest.verdict import EXITS, stage
from casemate.cli.enclave import enclave

ALL = Path(__file__).resolve().parents[3] / "shared" / "evidence"
pytestmark = pytest.mark.skipif(not ALL.is_dir(), reason="no captured evidence beside the project")
CASES = sorted(str(p.parent.relative_to(ALL)) for p in ALL.glob("*/*/about.json"))


def about(case: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ALL / case / "about.json").read_text())
    return found


def at(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def stated_time(stated: dict[str, Any]) -> str:
    """What has no signature has no time: any will do."""
    return str(stated.get("verify_at", "2026-06-01T00:00:00Z"))


def said(*args: str) -> tuple[int, dict[str, Any]]:
    result = CliRunner().invoke(enclave, [*args, "--format", "json"])
    return result.exit_code, json.loads(result.stdout)


@pytest.mark.parametrize("case", CASES)
def test_the_answers_are_the_stated_ones(case: str) -> None:
    stated = about(case)
    expect = stated["expect"]
    code, found = said("verify", "--evidence", str(ALL / case), "--at", stated_time(stated))
    assert found["crypto"] == expect["crypto"].split()[0].rstrip(":"), found
    assert found["decision"] == expect["default_policy"].split()[0].rstrip(":"), found
    if expect.get("tcb_status"):
        assert (found["tcb_status"] or "") == expect["tcb_status"], found
    if expect.get("advisory_ids") is not None:
        assert sorted(found["advisories"]) == sorted(expect["advisory_ids"]), found
    accepted = found["decision"].startswith("accept")
    assert (code == 0) == accepted == (found["code"] is None)
    if not accepted:
        assert code == EXITS.get(stage(found["code"]), 10)
        assert found["message"]
        assert found["mend"]
        assert any(c["code"] == found["code"] for c in found["checks"])
    assert [c for c in found["checks"] if c["name"] == "freshness"] == (
        [{"name": "freshness", "outcome": "unchecked", "detail": "evidence folder", "code": ""}]
        if accepted
        else []
    )


@pytest.mark.parametrize("case", CASES)
def test_what_others_state_is_not_read(case: str, tmp_path: Path) -> None:
    copied = tmp_path / "evidence"
    shutil.copytree(ALL / case, copied)
    now = at(stated_time(about(case)))
    before = folder.judge(folder.read(copied), now=now)
    (copied / "about.json").unlink()
    assert folder.judge(folder.read(copied), now=now) == before


@pytest.mark.parametrize("case", CASES)
def test_every_field_can_be_shown(case: str) -> None:
    code, found = said("show", str(ALL / case))
    assert code == 0
    assert found["fields"]


@pytest.mark.parametrize("case", CASES)
def test_a_nonce_of_another_is_refused(case: str) -> None:
    stated = about(case)
    if not stated["expect"]["default_policy"].startswith("accept"):
        pytest.skip("it is refused before its freshness matters")
    args = ("verify", "--evidence", str(ALL / case), "--at", stated_time(stated), "--nonce")
    code, found = said(*args, "ab" * 32)
    assert (code, found["code"]) == (EXITS["freshness"], "evidence.freshness-mismatch")
    for nonce in folder.judge(folder.read(ALL / case), now=at(stated_time(stated))).claims.fresh:
        code, found = said(*args, nonce.hex())
        assert (code, found["decision"].split("-")[0]) == (0, "accept")


@pytest.mark.parametrize("case", CASES)
def test_another_time_is_refused(case: str) -> None:
    """Well before and long after, nothing signed is accepted."""
    stated = about(case)
    if not stated["expect"]["default_policy"].startswith("accept"):
        pytest.skip("it is refused at any time")
    if not stated.get("valid", {}).get("to"):
        pytest.skip("it has no end")
    for when in ("2009-01-01T00:00:00Z", "2090-01-01T00:00:00Z"):
        code, found = said("verify", "--evidence", str(ALL / case), "--at", when)
        assert code == EXITS["validity"], found
