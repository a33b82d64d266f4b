"""PCK certificates: Intel's extension and the chains. Certificates are made up."""

from importlib import resources

import pytest

from casemate.attest import roots, x509
from casemate.attest.dcap import pck
from casemate.attest.verdict import Refused
from support import dcap
from support.mutation import COUNT, fuzz

NAMES = (pck.PCK, pck.PCK_CA, pck.ROOT)


def leaf(value):
    return x509.parse(dcap.certificate(dcap.PCK, dcap.CA, value=value), "leaf")


def refused(call, *args):
    with pytest.raises(Refused) as e:
        call(*args)
    return e.value.code.removeprefix("evidence.")


def test_both_editions_of_intels_root_have_the_pinned_key():
    files = [x for x in resources.files(roots).iterdir() if x.name.startswith("intel-sgx-root-ca")]
    found = [x509.parse(file.read_bytes(), file.name) for file in files]
    assert {certificate.fingerprint for certificate in found} == set(pck.ROOTS)
    assert len({certificate.raw for certificate in found}) == 2
    for certificate in found:
        x509.check_chain([(certificate, "root")])


def test_what_a_pck_says():
    found = pck.platform(leaf(dcap.extension()), "leaf")
    assert found == pck.Platform(
        ppid=dcap.PPID, svns=dcap.SVNS, pcesvn=dcap.PCESVN, pceid=dcap.PCEID, fmspc=dcap.FMSPC,
        sgx_type="scalable", instance=b"i" * 16,
        flags={"dynamic_platform": True, "cached_keys": False, "smt_enabled": True},
    )  # fmt: skip


@pytest.mark.parametrize("drop", ["6", "7"])
def test_a_processors_pck_says_less(drop):
    found = pck.platform(leaf(dcap.extension(drop=drop)), "leaf")
    assert (found.instance == b"") == (drop == "6")
    assert (found.flags == {}) == (drop == "7")


@pytest.mark.parametrize(
    "value",
    [
        *(dcap.extension(drop=arc) for arc in "12345"),
        dcap.extension(svns=dcap.SVNS[:15]),
        dcap.extension(svns=dcap.SVNS + b"\1"),
        dcap.extension(cpusvn=bytes(16)),
        dcap.extension(cpusvn=dcap.SVNS[:15]),
        dcap.extension(pcesvn=1 << 16),
        dcap.extension(ppid=b"p" * 15),
        dcap.extension(flags=b"\1"),
        dcap.extension(flags=b"\0\0\0\0"),
        dcap.extension(extra=dcap._pair("6", 0x04, b"i" * 16)),
        dcap.extension(extra=dcap._pair("8", 0x04, b"i")),
        dcap.extension(extra=b"\0"),
        dcap.extension() + b"\0",
        b"",
        None,
    ],
)
def test_extensions_that_are_none(value):
    assert refused(pck.platform, leaf(value), "leaf") == "parse-pck"


def test_a_chain_is_strict_pem():
    chain = dcap.Case().pck_chain
    assert [c.name() for c in pck.chain(chain + b"\0", "chain")] == [dcap.PCK, dcap.CA, dcap.ROOT]
    assert len(pck.chain(chain.replace(b"\n", b"\r\n"), "chain")) == 3
    assert len(pck.chain(chain + b"\n\n", "chain")) == 3
    for bad in (
        b"", chain + b"\0\0", b" " + chain, chain + b"x", chain + chain, chain[:-2],
        chain.replace(b"-----\n-", b"-----\x0b-"), chain.replace(b"\nMII", b"\n MII"),
        chain[:100] + b"\n" + chain[100:], chain.replace(b"BEGIN", b"begin"),
    ):  # fmt: skip
        assert refused(pck.chain, bad, "chain") == "parse-certificate"


def parsed(*pems):
    return tuple(x509.parse(pem, "certificate") for pem in pems)


def test_a_path_is_of_its_names_and_ends_in_a_root():
    pck_pem = dcap.certificate(dcap.PCK, dcap.CA, value=dcap.extension())
    whole = parsed(pck_pem, dcap.authority(), dcap.root())
    assert pck.path(whole, NAMES, "chain") == whole
    assert refused(pck.path, whole[:1], NAMES, "chain") == "chain-name"
    assert refused(pck.path, (whole[1], whole[0], whole[2]), NAMES, "chain") == "chain-name"
    assert refused(pck.path, (*whole, whole[2]), NAMES, "chain") == "chain-name"
    other = parsed(pck_pem, dcap.certificate(dcap.CA, dcap.ROOT, by="x"), dcap.root())
    assert refused(pck.path, other, NAMES, "chain") == "chain-signature"
    other = parsed(pck_pem, dcap.certificate(dcap.CA, dcap.ROOT, keyed="x"), dcap.root())
    assert refused(pck.path, other, NAMES, "chain") == "chain-signature"
    other = parsed(pck_pem, dcap.authority(), dcap.certificate(dcap.ROOT, dcap.ROOT, by="x"))
    assert refused(pck.path, other, NAMES, "chain") == "chain-signature"


def test_a_root_that_is_left_out_is_intels():
    pck_pem = dcap.certificate(dcap.PCK, dcap.CA, value=dcap.extension())
    short = parsed(pck_pem, dcap.authority())
    # Ours is not under Intel's, whose name is the same.
    assert refused(pck.path, short, NAMES, "chain") in ("chain-issuer", "chain-signature")
    assert pck.root().fingerprint in pck.ROOTS


def test_fuzz():
    seeds = [dcap.extension(), dcap.extension(drop="7")]
    certificate = leaf(seeds[0])

    def parse(data):
        certificate.extensions[pck.OID] = x509.Extension(False, data)
        return pck.platform(certificate, "leaf")

    assert 0 < fuzz(parse, seeds) < COUNT
    chain = dcap.Case().pck_chain
    fuzz(lambda data: pck.chain(data, "chain"), [chain, chain + b"\0"], COUNT)
