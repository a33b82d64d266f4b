"""Collateral as it lies beside a quote: both layouts, what is missing, what is malformed."""

import json

import pytest

from casemate.attest.dcap import collateral
from casemate.attest.verdict import Refused
from support import dcap
from support.mutation import COUNT, fuzz

GOOD = dcap.Case().collateral()
NEEDED = ("tcb_info", "qe_identity", "pck_crl", "pck_crl_issuer_chain", "root_ca_crl")


def one(members):
    return {"collateral.json": json.dumps(members).encode()}


def refused(files):
    with pytest.raises(Refused) as e:
        collateral.parse(files)
    return e.value.code.removeprefix("evidence.")


def single(members=GOOD):
    """The same as single files."""
    out = {
        "tcb_signing_chain.pem": members["tcb_info_issuer_chain"].encode(),
        "pck_crl_issuer_chain.pem": members["pck_crl_issuer_chain"].encode(),
        "pck_crl.der": bytes.fromhex(members["pck_crl"]),
        "root_ca_crl.crl": bytes.fromhex(members["root_ca_crl"]),
    }
    for name, outer in (("tcb_info", "tcbInfo"), ("qe_identity", "enclaveIdentity")):
        signature = members[f"{name}_signature"]
        out[f"{name}.json"] = f'{{"{outer}":{members[name]},"signature":"{signature}"}}'.encode()
    return out


def test_both_layouts_say_the_same():
    found = collateral.parse(one(GOOD))
    assert found == collateral.parse(single())
    assert found.missing == found.unread == ()
    assert found.tcb_info.text == GOOD["tcb_info"].encode()
    assert found.pck_certificate_chain is None


def test_collateral_json_goes_first():
    files = single() | one(GOOD | {"tcb_info": None})
    assert collateral.parse(files).missing == ("tcb_info",)


def test_no_collateral():
    assert collateral.parse({"quote.bin": b""}).missing == NEEDED


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize("value", [None, "", ...])
def test_what_is_missing(name, value):
    members = {key: text for key, text in GOOD.items() if key != name}
    found = collateral.parse(one(members if value is ... else members | {name: value}))
    part = name.removesuffix("_signature")
    assert found.missing == (part if part in NEEDED else part.removesuffix("_issuer_chain"),)


def test_members_of_other_names_are_told():
    assert collateral.parse(one(GOOD | {"x": "y", "version": 3})).unread == ("version", "x")


def test_lists_and_chains_in_other_forms():
    pem = dcap.made.load_der_x509_crl(bytes.fromhex(GOOD["pck_crl"])).public_bytes(
        dcap.serialization.Encoding.PEM
    )
    for form in (GOOD["pck_crl"].upper(), pem.decode()):
        assert collateral.parse(one(GOOD | {"pck_crl": form})) == collateral.parse(one(GOOD))
    with_chain = GOOD | {"pck_certificate_chain": dcap.Case().pck_chain.decode()}
    assert len(collateral.parse(one(with_chain)).pck_certificate_chain) == 3


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"tcb_info": {}}, "parse-collateral"),
        ({"tcb_info": 5}, "parse-collateral"),
        ({"tcb_info": "x" * (1 << 19)}, "parse-collateral"),
        ({"tcb_info_signature": GOOD["tcb_info_signature"][:-2]}, "parse-collateral"),
        ({"tcb_info_signature": "00" * 64}, "parse-collateral"),
        ({"tcb_info_signature": "ff" * 64}, "parse-collateral"),
        ({"tcb_info_signature": "zz" * 64}, "parse-collateral"),
        ({"tcb_info_signature": "aA" * 64}, "parse-collateral"),
        ({"pck_crl": GOOD["pck_crl"][:-1]}, "parse-collateral"),
        ({"pck_crl": GOOD["pck_crl"][:-2]}, "parse-crl"),
        ({"pck_crl": "30"}, "parse-crl"),
        ({"root_ca_crl": GOOD["root_ca_crl"] + "00"}, "parse-crl"),
        ({"tcb_info_issuer_chain": "x"}, "parse-certificate"),
        ({"pck_crl_issuer_chain": dcap.root().decode() * 4}, "parse-certificate"),
    ],
)
def test_malformed_members(changes, code):
    assert refused(one(GOOD | changes)) == code


@pytest.mark.parametrize("data", [b"", b"[]", b"{", b'{"a":1,"a":2}', b"{} {}", b"\xff"])
def test_malformed_json(data):
    assert refused({"collateral.json": data}) == "parse-json"


def test_malformed_single_files():
    good = single()
    for name in ("tcb_info.json", "qe_identity.json"):
        for bad in (b"{}", good[name] + b"x", b" " + good[name], good[name][:-2]):
            assert refused(good | {name: bad}) == "parse-collateral"
    assert refused(good | {"pck_crl.pem": b"x"}) == "parse-collateral"
    assert refused(good | {"root_ca_crl.crl": b"x"}) == "parse-collateral"


def test_fuzz():
    data = one(GOOD)["collateral.json"]
    taken = fuzz(lambda x: collateral.parse({"collateral.json": x}), [data], COUNT)
    assert taken < COUNT
