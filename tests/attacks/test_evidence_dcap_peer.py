"""Agreement with another verifier of DCAP quotes, dcap-qvl 0.7.0, on every captured quote with full
collateral, on mutations of each, and on platforms made up at random: the same status, the same
advisories; what it refuses is refused, and where casemate is stricter, ``STRICTER`` says why.

dcap-qvl takes every status but Revoked, and so does the policy here. One second is not compared: at
the very nextUpdate of a revocation list, which RFC 5280 (section 5.1.2.5) and Intel's library still
admit and dcap-qvl does not.
"""

from __future__ import annotations

import json
import os
import random
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest

from casemate.attest import folder, x509
from casemate.attest.dcap import abi, policy
from casemate.attest.dcap.documents import PLATFORM_STATUSES
from casemate.attest.verdict import Unchecked
from support import dcap
from support.mutation import flipped, mutated

dcap_qvl = pytest.importorskip("dcap_qvl", reason="dcap-qvl is not installed")

EVIDENCE = Path(__file__).resolve().parents[3] / "shared" / "evidence"
FULL = [p.parent for p in sorted(EVIDENCE.glob("*/*/collateral.json"))]
captured = pytest.mark.skipif(not FULL, reason="no captured evidence beside the project")
NAMES = [f"{p.parent.name}/{p.name}" for p in FULL]
FEW = int(os.environ.get("CASEMATE_MUTATIONS", "20"))

# Refused here and taken there, by the code's first words, and why.
STRICTER = {
    "parse-json": "a key twice, numbers that are none, bytes after the end",
    "parse-collateral": "hex of mixed case, members that are no strings",
    "parse-certificate": "PEM of one form: lines of 64 characters, nothing between; names and"
    " extensions that are not known",
    "parse-document": "dates of other forms, levels that stand twice, unknown types of TCB",
    "parse-reserved": "reserved bytes of header and reports that are not zero",
    "parse-quote-length": "bytes left over inside what the quote's length covers",
    "parse-qe-vendor": "quoting enclaves of others than Intel",
    "parse-crl": "lists with critical extensions or entries that stand twice",
    "chain-name": "whose certificate it is: a PCK's key must not sign TCB info; chains of other"
    " lengths",
    "chain-pck": "a chain beside the quote of another PCK than the quote's own",
    "chain-issuer": "a chain that does not lead from each to the next, whatever is found in it",
    "chain-signature": "certificates that are carried and that its own path does not need",
    "parse-key": "the same",
    "chain-authority": "the same",
    "root-unknown": "a carried root that is not the pinned one",
    "validity": "the window of each list and of every certificate that is carried, used or not",
    "revocation": "the carried root too",
    "needs": "an issuer chain or a part that it does not ask for",
    "collateral-mixed": "TCB info and QE identity of different evaluations",
    "collateral-pceid": "TCB info of another PCEID",
    "tcb-module": "a TDX module that TCB info does not know, SEAMATTRIBUTES that are not zero",
    "binding-event-log": "an event log beside the quote that does not lead to its RTMRs",
    "appraise-attributes-init": "an enclave that was never initialised",
}


def there(quote, collateral, now, root=None):
    """Status and advisories, or None."""
    try:
        parts = dcap_qvl.QuoteCollateralV3.from_json(collateral.decode("utf-8"))
        if root is None:
            found = dcap_qvl.verify(quote, parts, int(now))
        else:
            found = dcap_qvl.verify_with_root_ca(quote, parts, root, int(now))
    except ValueError:
        return None
    return found.status, tuple(found.advisory_ids)


def here(quote, collateral, now, roots=policy.SGX.roots, logs=None):
    """The same, and the code of a refusal."""
    wide = {"tcb_statuses": policy.ADMISSIBLE, "roots": roots}
    policies = {"sgx": replace(policy.SGX, **wide), "tdx": replace(policy.TDX, **wide)}
    files = {"quote.bin": quote, "collateral.json": collateral} | (logs or {})
    judged = folder.judge(files, now=now, policies=policies)
    if judged.decision in ("accept", "accept-with-status"):
        return (judged.tcb_status, judged.advisories), ""
    return None, judged.code.removeprefix("evidence.")


def compare(quote, collateral, now, **kwargs):
    """Both answers; fails unless they agree or the difference is one that is listed."""
    root = kwargs.pop("root", None)
    theirs = there(quote, collateral, now, root)
    ours, code = here(quote, collateral, now, **kwargs)
    if theirs is None:
        assert ours is None
    elif ours is None:
        assert any(code.startswith(stricter) for stricter in STRICTER), code
    else:
        assert ours == theirs
    return theirs, ours


def about(folder_):
    return json.loads((folder_ / "about.json").read_text())


def at(text):
    return datetime.fromisoformat(text).timestamp()


def load(name):
    folder_ = EVIDENCE / name
    quotes = [folder_ / "quote.bin", folder_ / "td_quote.bin"]
    quote = next(path for path in quotes if path.exists())
    now = at(about(folder_)["verify_at"])
    return quote.read_bytes(), (folder_ / "collateral.json").read_bytes(), now


# --- mutations -----------------------------------------------------------------------------------


def lengthened(raw, chain):
    """The quote with another PCK chain in it, every length put right."""
    quote = abi.parse(raw)
    head = len(quote.signed) + 4
    inner = raw.index(quote.certification_data, head)
    more = len(chain) - len(quote.certification_data)
    out = bytearray(raw[:inner] + chain + raw[inner + len(quote.certification_data) :])
    places = [head - 4, inner - 4] + ([head + 130] if quote.header.version > 3 else [])
    for place in places:
        size = int.from_bytes(out[place : place + 4], "little") + more
        out[place : place + 4] = size.to_bytes(4, "little")
    return bytes(out)


def rearranged(chain, draw):
    """Another way to write a chain of certificates in PEM, or another chain."""
    blocks = [b + "-----END CERTIFICATE-----\n" for b in chain.split("-----END CERTIFICATE-----\n")]
    blocks = [block for block in blocks if "BEGIN" in block]
    match draw.randrange(7):
        case 0:
            return "".join(blocks[:-1])
        case 1:
            draw.shuffle(blocks)
            return "".join(blocks)
        case 2:
            return chain.replace("\n", "\r\n")
        case 3:
            return chain + draw.choice(blocks)
        case 4:
            return chain + draw.choice(["\n", " ", "\0", "x"])
        case 5:
            return chain.replace("-----\n-----", "-----\n\n-----")
    return "".join(blocks[:1] + blocks)


def other_quote(raw, draw, others):
    quote = abi.parse(raw)
    end = len(raw) - len(quote.padding)
    match draw.randrange(7):
        case 0:
            return raw[:end] + draw.randbytes(draw.randrange(80))
        case 1:
            return flipped(raw, draw.randrange(8 * len(raw)))
        case 2:
            text = quote.certification_data.rstrip(b"\0").decode()
            return lengthened(raw, rearranged(text, draw).encode() + draw.choice([b"", b"\0"]))
        case 3:
            where = draw.choice([len(quote.signed) + 4, raw.index(quote.qe_report.raw) + 384])
            s = abi.P256_ORDER - int.from_bytes(raw[where + 32 : where + 64], "big")
            return raw[: where + 32] + (s % 2**256).to_bytes(32, "big") + raw[where + 64 :]
        case 4:
            return draw.choice(others)
        case 5:
            return raw[: draw.randrange(len(raw))]
    return mutated(raw, draw)


def other_collateral(data, draw, others):
    members = json.loads(data)
    name = draw.choice(sorted(members))
    value = members[name]
    match draw.randrange(9):
        case 0:
            members[name] = json.loads(draw.choice(others)).get(name)
        case 1:
            members.pop(name)
        case 2:
            members[name] = value.swapcase() if draw.random() < 0.5 else value.upper()
        case 3:
            members[name] = rearranged(value, draw) if "BEGIN" in value else value + "00"
        case 4:
            members["more"] = draw.choice([5, None, "x", {"a": []}])
        case 5:
            where = draw.randrange(len(value))
            members[name] = (
                value[:where] + draw.choice("0123456789abcdefAF \n{}:,") + value[where + 1 :]
            )
        case 6:
            return json.dumps(members, indent=draw.choice([None, 1])).encode()
        case 7:
            return flipped(data, draw.randrange(8 * len(data)))
        case 8:
            return mutated(data, draw)
    return json.dumps(members).encode()


def moved(now, name, draw):
    """Sometimes another time, near the window's edges or far away, never the one second."""
    valid = about(EVIDENCE / name)["valid"]
    edge = at(draw.choice([valid["from"], valid["to"]]))
    return draw.choice([now] * 6 + [edge - 1, edge + 1, now + 86400 * draw.randint(-400, 400)])


def mutate(name, count):
    """Compare on ``count`` mutated quotes and as many mutated collaterals; how often both took
    them, and how often only the other did."""
    quote, collateral, now = load(name)
    loaded = [load(other) for other in NAMES]
    quotes, collaterals = [x[0] for x in loaded], [x[1] for x in loaded]
    draw = random.Random(f"{name} {count}")
    both = stricter = 0
    for n in range(2 * count):
        if n % 2:
            bad = other_quote(quote, draw, quotes), collateral
        else:
            bad = quote, other_collateral(collateral, draw, collaterals)
        theirs, ours = compare(*bad, moved(now, name, draw))
        both += ours is not None
        stricter += theirs is not None and ours is None
    return both, stricter


@captured
@pytest.mark.parametrize("name", NAMES)
def test_both_say_the_same_of_each_quote(name):
    quote, collateral, now = load(name)
    theirs, ours = compare(quote, collateral, now)
    assert theirs == ours
    confirmed = about(EVIDENCE / name)["confirmed"]["dcap_qvl_0.7.0_at_verify_at"]
    assert (theirs is None) == confirmed.startswith("ERR")


@captured
@pytest.mark.parametrize("name", NAMES)
def test_both_say_the_same_of_mutations(name):
    mutate(name, FEW)


@pytest.mark.full
@captured
@pytest.mark.parametrize("name", NAMES)
def test_both_say_the_same_of_many_mutations(name):
    both, stricter = mutate(name, 1000)
    # Some mutations change nothing that counts; some put a genuine quote in a bad one's place.
    assert both > 0 or compare(*load(name))[1] is None
    assert stricter < 1000


# --- platforms made up at random -----------------------------------------------------------------


def svns(draw, near):
    """16 components, at most one off from ``near``."""
    out = bytearray(near)
    for _ in range(draw.choice((0, 0, 0, 1, 1, 2))):
        where = draw.randrange(16)
        out[where] = max(0, min(255, out[where] + draw.choice((-2, -1, 1))))
    return bytes(out)


def made_up(draw):
    """A case with security versions about its levels', and anything else now and then."""
    version = draw.choice((3, 4, 5, 5))
    fifteen = version == 5 and draw.random() < 0.5
    tdx = version != 3

    def status(whole=True):
        return draw.choice(PLATFORM_STATUSES if whole else ("UpToDate", "OutOfDate", "Revoked"))

    def advisories():
        return tuple(f"INTEL-SA-{draw.randrange(6)}" for _ in range(draw.choice((0, 1, 2))))

    def level(pcesvn):
        found = svns(draw, bytes([5, 1, 3] + [0] * 13)) if tdx else None
        components = svns(draw, dcap.SVNS)
        return dcap.level(status(), components, found, pcesvn, tuple(dict.fromkeys(advisories())))

    def one(isvsvn):
        return dcap.svn_level(
            isvsvn, draw.choice(("UpToDate", status(False))), *dict.fromkeys(advisories())
        )

    info = {"tcbLevels": [level(13 - n) for n in range(draw.randint(1, 4))]}
    info["tcbLevels"].append(dcap.level("OutOfDate", bytes(16), bytes(16) if tdx else None, 0))
    draw.shuffle(info["tcbLevels"])
    if tdx:
        info["tdxModuleIdentities"] = [
            dcap.module(n, *(one(svn) for svn in sorted(draw.sample(range(2, 8), 2), reverse=True)))
            for n in (1, 3)
        ]
    body = dcap.enclave(attributes=bytes([draw.choice((5, 5, 5, 7))]) + bytes(15))
    if tdx:
        values = {"tee_tcb_svn": svns(draw, dcap.TEE_TCB_SVN)}
        values["tdattributes"] = draw.choice(
            [1 << 28] * 8 + [0, 1 << 28 | 1, 1 << 28 | 1 << 30, 1 << 28 | 2]
        )
        values["tdattributes"] = values["tdattributes"].to_bytes(8, "little")
        if fifteen:
            module = [draw.randint(3, 8), draw.choice((0, 1, 1, 3)), 3]
            values["tee_tcb_svn2"] = svns(draw, bytes(module + [0] * 13))
        body = dcap.td(fifteen, **values)
    qe_levels = [one(svn) for svn in sorted(draw.sample(range(1, 8), 2), reverse=True)]
    return dcap.Case(
        version=version,
        body_type=3 if fifteen else 2,
        body=body,
        platform=dcap.extension(svns(draw, dcap.SVNS), draw.choice((12, 13, 13))),
        info=info,
        identity={"tcbLevels": qe_levels},
        qe={"isvsvn": draw.randint(2, 8), "isvprodid": draw.choice([2] * 15 + [1])},
    )


def sweep(count, seed):
    draw, root = random.Random(seed), x509.from_pem(dcap.root())
    both = refused = 0
    for _ in range(count):
        files = made_up(draw).files()
        theirs, ours = compare(*files.values(), dcap.AT, root=root, roots=dcap.pin())
        both += ours is not None
        refused += theirs is None
    return both, refused


def test_both_say_the_same_of_platforms_made_up():
    both, refused = sweep(120, 1)
    assert both > 20
    assert refused > 20


@pytest.mark.full
def test_both_say_the_same_of_many_platforms_made_up():
    both, refused = sweep(3000, 2)
    assert both > 500
    assert refused > 500


def test_a_difference_is_noticed():
    """The comparison itself bites: a verifier without the roots' pins accepts what the other does
    not."""
    files = dcap.Case().files()
    assert there(*files.values(), dcap.AT) is None
    with pytest.raises(AssertionError):
        compare(*files.values(), dcap.AT, roots=Unchecked("a test"))
