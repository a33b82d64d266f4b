"""Signatures, chains, revocation, windows and evaluations, on evidence made up with our own keys:
each part forged, swapped, stale or missing, and the code that says so."""

import datetime as dt
from dataclasses import replace

import pytest

from casemate.attest import folder, x509
from casemate.attest.dcap import abi
from casemate.attest.verdict import Unchecked
from support import dcap
from support.dcap import CA, NOW, PCK, ROOT, SIGNER, Case

DAY = dt.timedelta(days=1)
FORMS = {
    "sgx-3": Case(version=3),
    "tdx-4": Case(),
    "tdx-5-10": Case(version=5),
    "tdx-5-15": Case(version=5, body_type=3, body=dcap.td(True)),
}


def judge(case, now=dcap.AT, changed=None, **policy):
    files = {k: v for k, v in (case.files() | (changed or {})).items() if v is not None}
    policies = {
        "sgx": dcap.sgx(**(policy if case.tee == "SGX" else {})),
        "tdx": dcap.tdx(**(policy if case.tee == "TDX" else {})),
    }
    return folder.judge(files, now=now, policies=policies)


def code(case, **kwargs):
    judged = judge(case, **kwargs)
    return judged.crypto, judged.code.removeprefix("evidence.")


def outcome(judged, name):
    return next((c.outcome, c.detail) for c in judged.checks if c.name == name)


@pytest.mark.parametrize("name", FORMS)
def test_good_evidence_is_accepted(name):
    judged = judge(FORMS[name])
    assert (judged.crypto, judged.decision, judged.tcb_status) == ("valid", "accept", "UpToDate")
    assert judged.claims.bound == b"r" * 64
    assert judged.claims.chip_id == dcap.PPID.hex()
    assert judged.claims.root == dcap.pin()[0]
    assert all(check.outcome != "failed" for check in judged.checks)


@pytest.mark.parametrize("name", FORMS)
def test_intels_root_is_the_default(name):
    judged = folder.judge(FORMS[name].files(), now=dcap.AT)
    assert (judged.crypto, judged.code) == ("invalid", "evidence.root-unknown")


def test_any_root_where_the_policy_says_so():
    judged = judge(Case(), roots=Unchecked("a test"))
    assert judged.decision == "accept"
    assert outcome(judged, "root") == ("unchecked", f"a test ({dcap.pin()[0]})")


# --- the quote -----------------------------------------------------------------------------------


def chain(*pems):
    return b"".join(pems)


def leaf(**kwargs):
    return dcap.certificate(PCK, CA, value=dcap.extension(), **kwargs)


QUOTES = {
    "chain-signature": [
        Case(chain=chain(leaf(by="x"), dcap.authority(), dcap.root())),
        Case(chain=chain(leaf(), dcap.certificate(CA, ROOT, by="x"), dcap.root())),
    ],
    "chain-name": [
        Case(chain=chain(leaf(), dcap.root())),
        Case(chain=chain(leaf(), dcap.signer(), dcap.root())),
        Case(chain=chain(dcap.certificate(SIGNER, ROOT), dcap.root())),
    ],
    "chain-issuer": [
        Case(chain=chain(leaf(), dcap.certificate("Intel SGX PCK Processor CA", ROOT), dcap.root()))
    ],
    "parse-pck": [Case(chain=chain(dcap.certificate(PCK, CA), dcap.authority(), dcap.root()))],
    "signature-qe-report": [Case(qe_by="x"), Case(version=3, qe_by=CA)],
    "endorsement-attestation-key": [Case(qe={"report_data": b"h" * 32})],
    "signature-quote": [Case(quoted_by="x"), Case(version=3, quoted_by=PCK)],
}


@pytest.mark.parametrize(
    ("wanted", "case"), [(wanted, case) for wanted, cases in QUOTES.items() for case in cases]
)
def test_forged_quotes(wanted, case):
    assert code(case) == ("invalid", wanted)


def test_an_attestation_key_that_is_no_point():
    quote = Case().quote()
    at = 48 + 584 + 4 + 64
    assert abi.parse(quote).attestation_key == quote[at : at + 64]
    forged = Case(qe={"report_data": dcap.hashlib.sha256(b"\1" * 64 + bytes(range(32))).digest()})
    raw = forged.quote()
    judged = judge(Case(), changed={"quote.bin": raw[:at] + b"\1" * 64 + raw[at + 64 :]})
    assert judged.code == "evidence.signature-key"


def test_a_quote_that_only_names_its_pck():
    encrypted = Case(version=3, certification=(3, bytes(404)))
    judged = judge(encrypted)
    assert (judged.crypto, judged.decision) == ("unknown", "needs-collateral")
    assert judged.code == "evidence.needs-pck-chain"
    beside = replace(encrypted, parts={"pck_certificate_chain": Case().pck_chain.decode()})
    assert judge(beside).decision == "accept"


def test_the_chain_beside_a_quote_must_be_its_own():
    other = chain(leaf(keyed="x"), dcap.authority(), dcap.root())
    for beside, wanted in ((Case().pck_chain, ""), (other, "chain-pck")):
        case = Case(parts={"pck_certificate_chain": beside.decode()})
        assert code(case)[1] == wanted
    broken = chain(leaf(), dcap.certificate(CA, ROOT, by="x"), dcap.root())
    assert code(Case(chain=broken, parts={"pck_certificate_chain": Case().pck_chain.decode()})) == (
        "invalid", "chain-signature",
    )  # fmt: skip


def test_the_root_may_be_left_out_only_of_intels_chains():
    assert code(Case(chain=chain(leaf(), dcap.authority())))[0] == "invalid"


@pytest.mark.parametrize("name", [PCK, CA, ROOT])
def test_a_chain_outside_its_validity(name):
    for before, after, wanted in (
        (NOW + DAY, NOW + 9 * DAY, "validity-not-yet"),
        (NOW - 9 * DAY, NOW - DAY, "validity-expired"),
    ):
        window = {"before": before, "after": after}
        pems = {
            PCK: leaf(**(window if name == PCK else {})),
            CA: dcap.certificate(CA, ROOT, **(window if name == CA else {})),
            ROOT: dcap.certificate(ROOT, ROOT, **(window if name == ROOT else {})),
        }
        assert code(Case(chain=chain(*pems.values()))) == ("valid", wanted)


def test_the_twin_of_a_signature_gets_the_same_answer():
    case = Case()
    files = case.files()
    quote = files["quote.bin"]
    at = 48 + 584 + 4

    def twin(raw, at):
        s = abi.P256_ORDER - int.from_bytes(raw[at + 32 : at + 64], "big")
        return raw[: at + 32] + s.to_bytes(32, "big") + raw[at + 64 :]

    for where in (at, at + 134 + 384):
        judged = judge(case, changed={"quote.bin": twin(quote, where)})
        assert judged.decision == "accept"
    members = case.collateral()
    for name in ("tcb_info_signature", "qe_identity_signature"):
        forged = twin(bytes.fromhex(members[name]), 0).hex()
        assert judge(Case(parts=members | {name: forged})).decision == "accept"


# --- collateral ----------------------------------------------------------------------------------


def forged(name, by):
    text = Case().collateral()[name]
    return {name: text, f"{name}_signature": dcap.raw(by, text.encode()).hex()}


@pytest.mark.parametrize("name", ["tcb_info", "qe_identity"])
def test_forged_documents(name):
    assert code(Case(parts=forged(name, SIGNER))) == ("valid", "")
    assert code(Case(parts=forged(name, "x"))) == ("valid", "collateral-signature")
    text = Case().collateral()[name]
    spaced = {name: text.replace(":", ": ", 1)}
    assert code(Case(parts=spaced)) == ("valid", "collateral-signature")
    # The key of a PCK is no secret to who holds a broken platform: it must not sign documents.
    by_pck = {f"{name}_issuer_chain": Case().pck_chain.decode()} | forged(name, PCK)
    assert code(Case(parts=by_pck)) == ("valid", "chain-name")
    named = chain(dcap.certificate(SIGNER, CA, keyed=PCK), dcap.root()).decode()
    assert code(Case(parts=by_pck | {f"{name}_issuer_chain": named})) == ("valid", "chain-issuer")
    foreign = chain(
        dcap.certificate(SIGNER, ROOT, by="x", keyed="x"),
        dcap.certificate(ROOT, ROOT, by="x", keyed="x"),
    ).decode()
    by_other = forged(name, "x") | {f"{name}_issuer_chain": foreign}
    assert code(Case(parts=by_other)) == ("valid", "root-unknown")
    assert code(Case(parts=by_other), roots=Unchecked("a test")) == ("valid", "root-unknown")


@pytest.mark.parametrize(
    ("parts", "wanted"),
    [
        ({"pck_crl": dcap.revoked(CA, by="x").hex()}, "chain-signature"),
        ({"pck_crl": dcap.revoked(ROOT).hex()}, "chain-issuer"),
        ({"root_ca_crl": dcap.revoked(CA).hex()}, "chain-issuer"),
        ({"root_ca_crl": dcap.revoked(ROOT, by=CA).hex()}, "chain-signature"),
        ({"pck_crl_issuer_chain": dcap.Case().pck_chain.decode()}, "chain-name"),
        ({"pck_crl": dcap.revoked(CA, [13]).hex()}, "revocation-revoked"),
        ({"root_ca_crl": dcap.revoked(ROOT, [12]).hex()}, "revocation-revoked"),
        ({"root_ca_crl": dcap.revoked(ROOT, [14]).hex()}, "revocation-revoked"),
        ({"root_ca_crl": dcap.revoked(ROOT, [11]).hex()}, "revocation-revoked"),
        ({"root_ca_crl": dcap.revoked(ROOT, [13]).hex()}, ""),  # other issuers' numbers
        ({"pck_crl": dcap.revoked(CA, [11, 12, 14]).hex()}, ""),
    ],
)
def test_revocation(parts, wanted):
    assert code(Case(parts=parts)) == ("valid", wanted)


@pytest.mark.parametrize(
    "name", ["tcb_info", "qe_identity", "pck_crl", "pck_crl_issuer_chain", "root_ca_crl"]
)
def test_missing_parts(name):
    judged = judge(Case(parts={name: None}))
    assert (judged.crypto, judged.decision) == ("valid", "needs-collateral")
    assert judged.code == f"evidence.needs-{name.replace('_', '-')}"
    assert (judged.tcb_status, judged.claims) == ("", None)
    judged = judge(Case(), changed={"collateral.json": None})
    assert judged.code == "evidence.needs-tcb-info"


def test_a_missing_part_hides_no_bad_one():
    revoked = {"pck_crl": dcap.revoked(CA, [13]).hex()}
    assert code(Case(parts=revoked | {"tcb_info": None})) == ("valid", "revocation-revoked")
    assert (
        code(Case(parts=forged("tcb_info", "x") | {"pck_crl": None}))[1] == "collateral-signature"
    )
    for case in (Case(body=dcap.td(tdattributes=b"\1\0\0\x10" + bytes(4))),
                 Case(version=3, body=dcap.enclave(attributes=b"\7" + bytes(15)))):  # fmt: skip
        judged = judge(case, changed={"collateral.json": None})
        assert (judged.decision, judged.code) == ("reject", "evidence.appraise-debug")
        judged = judge(case)
        assert (judged.code, judged.tcb_status) == ("evidence.appraise-debug", "UpToDate")


def dated(**window):
    return {key: value.strftime(dcap.ISO) for key, value in window.items()}


def listed(issuer, name, start, end):
    return Case(parts={name: dcap.revoked(issuer, start=start, end=end).hex()})


LATE, GONE = NOW + DAY, NOW - DAY
STALE = {
    "tcb_info": lambda a, b: Case(info=dated(issueDate=a, nextUpdate=b)),
    "qe_identity": lambda a, b: Case(identity=dated(issueDate=a, nextUpdate=b)),
    "pck_crl": lambda a, b: listed(CA, "pck_crl", a, b),
    "root_ca_crl": lambda a, b: listed(ROOT, "root_ca_crl", a, b),
}


@pytest.mark.parametrize("name", STALE)
def test_windows(name):
    make, first, last = STALE[name], NOW - 9 * DAY, NOW + 5 * DAY
    assert code(make(LATE, last)) == ("valid", "validity-not-yet")
    assert code(make(first, GONE)) == ("valid", "validity-expired")
    case = make(first, last)
    assert code(case, now=first.timestamp() - 1)[1] == "validity-not-yet"
    assert code(case, now=last.timestamp())[1] == ""
    assert code(case, now=last.timestamp() + 1)[1] == "validity-expired"
    assert code(make(first, GONE), collateral_grace=1)[1] == ""
    assert code(make(first, GONE), now=dcap.AT + 1, collateral_grace=1)[1] == "validity-expired"
    # The others are ten days old.
    assert code(make(NOW - 12 * DAY, last), collateral_age=12)[1] == ""
    assert code(make(NOW - 12 * DAY, last), collateral_age=11)[1] == "collateral-age"


def test_ages_are_told():
    case = Case(info=dated(issueDate=NOW - 3 * DAY, nextUpdate=LATE))
    said = outcome(judge(case), "collateral-validity")
    assert said[0] == "passed"
    assert "TCB info 3, QE identity 10, " in said[1]


def test_issuers_outside_their_validity():
    gone = dcap.certificate(SIGNER, ROOT, after=GONE)
    for name in ("tcb_info", "qe_identity"):
        case = Case(parts={f"{name}_issuer_chain": chain(gone, dcap.root()).decode()})
        assert code(case) == ("valid", "validity-expired")
    gone = dcap.certificate(CA, ROOT, after=GONE)
    case = Case(parts={"pck_crl_issuer_chain": chain(gone, dcap.root()).decode()})
    assert code(case) == ("valid", "validity-expired")


def test_evaluations():
    mixed = Case(info={"tcbEvaluationDataNumber": 17})
    assert code(mixed) == ("valid", "collateral-mixed")
    assert code(mixed, same_evaluation=False) == ("valid", "")
    assert code(mixed, same_evaluation=Unchecked("a test"), tcb_evaluation=17) == ("valid", "")
    assert code(mixed, same_evaluation=False, tcb_evaluation=18)[1] == "collateral-evaluation"
    assert code(Case(), tcb_evaluation=18) == ("valid", "")
    assert code(Case(), tcb_evaluation=19) == ("valid", "collateral-evaluation")


def test_malformed_collateral_leaves_the_quote_valid():
    assert code(Case(), changed={"collateral.json": b"{"}) == ("valid", "parse-json")
    debug = Case(body=dcap.td(tdattributes=b"\1\0\0\x10" + bytes(4)))
    assert code(debug, changed={"collateral.json": b"{"})[1] == "appraise-debug"
    signed = Case(info={"tcbLevels": []})
    assert code(signed) == ("valid", "parse-document")


def test_both_roots_are_looked_at_by_key_not_by_certificate():
    again = dcap.certificate(ROOT, ROOT, after=NOW + 999 * DAY)
    assert x509.parse(again, "root").raw != x509.parse(dcap.root(), "root").raw
    assert code(Case(chain=chain(leaf(), dcap.authority(), again))) == ("valid", "")


def test_padding_is_told():
    for padding, said in ((bytes(9), "zeros"), (b"\1" * 9, "01" * 9), (b"\1" * 99, "SHA-256")):
        judged = judge(Case(padding=padding))
        assert judged.decision == "accept"
        assert said in outcome(judged, "parse")[1]


def test_a_nonce_in_the_report_data():
    case = Case(body=dcap.td(report_data=b"nonce"))
    for nonce, wanted in ((b"nonce", ""), (b"nonce".ljust(64, b"\0"), ""), (b"other", "mismatch")):
        judged = folder.judge(case.files(), now=dcap.AT, policies={"tdx": dcap.tdx()}, nonce=nonce)
        assert judged.code == (wanted and f"evidence.freshness-{wanted}")
