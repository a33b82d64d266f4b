"""A folder of evidence: read within limits, judged without raising, freshness by the nonce."""

from __future__ import annotations

import random

import pytest

from casemate.attest import folder
from casemate.attest.kind import Claims
from casemate.attest.trust import Trust
from casemate.attest.verdict import Checks, Refused, Unchecked
from support import nitro
from support.evidence import NOW, attestation, tee
from support.mutation import mutated

FILES = attestation().evidence.files


def judge(files=FILES, **given):
    return folder.judge(files, now=NOW, **given)


def trusted(**given):
    return judge(trust=Trust.simulated(tee().root), **given)


def test_what_others_state_is_not_read(tmp_path):
    (tmp_path / "report.bin").write_bytes(b"r")
    (tmp_path / "about.json").write_text("{}")
    (tmp_path / "more").mkdir()
    assert folder.read(tmp_path) == {"report.bin": b"r"}


def test_a_folder_is_read_within_limits(tmp_path):
    for n in range(folder.MAX_FILES + 1):
        (tmp_path / f"{n}.bin").write_bytes(b"")
    with pytest.raises(Refused) as e:
        folder.read(tmp_path)
    assert e.value.code == "evidence.parse-too-large"
    with pytest.raises(Refused) as e:
        folder.read(tmp_path / "0.bin")
    assert e.value.code == "evidence.parse-folder"
    found = folder.unread(e.value)
    assert (found.decision, found.crypto, found.stage) == ("reject", "invalid", "parse")


def test_without_a_policy_the_kinds_default_holds():
    found = judge()
    assert (found.code, found.crypto, found.simulated) == (
        "evidence.root-unknown",
        "invalid",
        False,
    )


def test_simulation_is_accepted_by_name_and_said():
    found = trusted()
    assert (found.decision, found.crypto, found.simulated) == ("accept", "valid", True)
    assert found.to_json()["ar4si"]["status"] == "contraindicated"
    assert found.to_json()["claims"]["measurement"] == tee().measurement


def test_the_policys_own_terms_hold():
    names = [c.name for c in trusted().checks]
    assert names[-4:] == ["collateral-age", "advisories", "physical-access", "freshness"]


def test_a_kind_that_the_policy_does_not_name():
    found = judge({"document.cose": nitro.document()}, trust=Trust.simulated(tee().root))
    assert (found.tee, found.code) == ("nitro", "evidence.tee-not-trusted")


def test_nothing_is_no_evidence():
    for files in ({}, {"notes.txt": b"x"}):
        assert (judge(files).code, judge(files).tee) == ("evidence.tee-unknown", "")


def test_freshness():
    assert [c.outcome for c in trusted().checks][-1] == "unchecked"
    bound = trusted().claims.bound
    assert trusted(nonce=bound).checks[-1].outcome == "passed"
    assert trusted(nonce=b"n" * 32).code == "evidence.freshness-mismatch"
    assert trusted(nonce=b"").code == "evidence.freshness-nonce"


def test_an_empty_nonce_is_none_even_where_the_evidence_has_it():
    claims = Claims(bound=b"", fresh=(b"",), product="", root="", measurement="", chip_id="",
                    tcb={}, other={})  # fmt: skip
    with pytest.raises(Refused):
        folder.fresh(claims, b"", Checks())
    folder.fresh(claims, Unchecked("a test"), Checks())


def test_whatever_the_files_hold_there_is_a_judgement():
    draw = random.Random(0)
    for _ in range(400):
        name = draw.choice(sorted(FILES))
        found = trusted() if draw.random() < 0.02 else judge(
            {**FILES, name: mutated(FILES[name], draw)}, trust=Trust.simulated(tee().root)
        )  # fmt: skip
        assert found.decision in ("accept", "reject", "needs-collateral")
        found.to_json()
