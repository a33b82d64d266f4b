"""Enveloped signatures: what is admitted, and the attacks on XML signatures that are known by name.
Made-up documents under a test root."""

import base64
import re

import pytest

from casemate.attest import x509
from casemate.attest.nvidia import xmldsig
from casemate.attest.verdict import Refused
from support import nvidia
from support.mutation import fuzz

DOCUMENT = nvidia.manifest(nvidia.DRIVER, nvidia.golden(7, 21))
SIGNED = nvidia.sign_xml(DOCUMENT)
METHODS = tuple(xmldsig.CANONICAL)


def judge(data: bytes) -> xmldsig.Signed:
    found = xmldsig.parse(data, "rim.xml")
    key = x509.p384(x509.parse(found.certificates[0], "a test"), "a test")
    xmldsig.verify(found, key, "rim.xml")
    return found


def refused(data: bytes) -> str:
    with pytest.raises(Refused) as e:
        judge(data)
    return e.value.code.removeprefix("evidence.")


@pytest.mark.parametrize("method", METHODS)
def test_signatures_over_each_canonical_form(method):
    found = judge(nvidia.sign_xml(DOCUMENT, method=method))
    assert b"Signature" not in found.content
    assert found.content == nvidia.canonical(DOCUMENT, "exc" in method)
    assert len(found.certificates) == 3


@pytest.mark.parametrize(
    "head",
    [
        b'<?xml version="1.0" encoding="UTF-8"?>\n',
        b"<?xml version='1.0' encoding='UTF-8' standalone='no'?>",
    ],
)
def test_an_xml_declaration_may_stand_before_it(head):
    assert judge(head + SIGNED + b"\n") == judge(SIGNED)


def test_space_after_the_signature_belongs_to_what_was_signed():
    spaced = DOCUMENT.replace("</SoftwareIdentity>", "\n \n</SoftwareIdentity>")
    signed = nvidia.sign_xml(spaced)
    judge(signed)
    moved = signed.replace(b"</ds:Signature>", b"</ds:Signature> ")
    assert refused(moved) == "signature-rim-digest"


def test_the_twin_signature_gets_the_same_answer():
    assert judge(nvidia.sign_xml(DOCUMENT, value=nvidia.twin)).content == judge(SIGNED).content


@pytest.mark.parametrize(
    "value",
    [
        lambda raw: raw[:-1],
        lambda raw: raw + b"\0",
        lambda raw: b"\0" * 96,
        lambda raw: raw[:48] + b"\0" * 48,
        lambda raw: raw[:48] + nvidia.P384_ORDER.to_bytes(48, "big"),
        lambda raw: raw[48:] + raw[:48],
        lambda raw: raw[:-1] + bytes([raw[-1] ^ 1]),
    ],
)
def test_wrong_signatures(value):
    assert refused(nvidia.sign_xml(DOCUMENT, value=value)) == "signature-rim"


def test_another_key():
    assert refused(nvidia.sign_xml(DOCUMENT, signer="stranger")) == "signature-rim"


def test_a_changed_document():
    assert refused(SIGNED.replace(b"590.12", b"590.13")) == "signature-rim-digest"
    other = nvidia.manifest("590.13", nvidia.golden(7, 21))
    assert refused(nvidia.sign_xml(other, over=DOCUMENT)) == "signature-rim-digest"


REPLACED = {
    "canonicalization with comments": (f'CanonicalizationMethod Algorithm="{nvidia.C14N11}"',
        f'CanonicalizationMethod Algorithm="{nvidia.C14N11}#WithComments"'),
    "hmac": (nvidia.ECDSA, "http://www.w3.org/2001/04/xmldsig-more#hmac-sha384"),
    "ecdsa with sha1": (nvidia.ECDSA, "http://www.w3.org/2001/04/xmldsig-more#ecdsa-sha1"),
    "sha1": (nvidia.DIGEST, "http://www.w3.org/2000/09/xmldsig#sha1"),
    "no transform": (re.compile("<ds:Transforms>.*</ds:Transforms>"), "<ds:Transforms/>"),
    "xslt": (nvidia.ENVELOPED, "http://www.w3.org/TR/1999/REC-xslt-19991116"),
    "xpath": (nvidia.ENVELOPED, "http://www.w3.org/TR/1999/REC-xpath-19991116"),
    "a third transform": ("</ds:Transforms>",
        f'<ds:Transform Algorithm="{nvidia.C14N11}"/></ds:Transforms>'),
    "transforms in another order": (re.compile("(<ds:Transform [^>]*>)(<ds:Transform [^>]*>)"),
        r"\2\1"),
    "transform parameters": ('-signature"/>',
        '-signature"><ds:XPath>/</ds:XPath></ds:Transform>'),
    "a part by its id": ('URI=""', 'URI="#part"'),
    "another file": ('URI=""', 'URI="file:///etc/passwd"'),
    "no uri": (' URI=""', ""),
    "a typed reference": ('URI=""', 'URI="" Type="http://www.w3.org/2000/09/xmldsig#Object"'),
    "two references": (re.compile("(<ds:Reference .*</ds:Reference>)"), r"\1\1"),
    "no reference": (re.compile("<ds:Reference .*</ds:Reference>"), ""),
    "an id": ("<ds:SignedInfo", '<ds:SignedInfo Id="x"'),
    "text between": ("<ds:Reference", "x<ds:Reference"),
    "no digest": (re.compile("<ds:DigestValue>.*</ds:DigestValue>"), "<ds:DigestValue/>"),
}  # fmt: skip


@pytest.mark.parametrize("change", REPLACED)
def test_other_signed_info_than_the_admitted_is_refused_though_it_is_signed(change):
    old, new = REPLACED[change]

    def info(text: str) -> str:
        out = text.replace(old, new, 1) if isinstance(old, str) else old.sub(new, text, count=1)
        assert out != text
        return out

    assert refused(nvidia.sign_xml(DOCUMENT, info=info)) == "parse-rim"


SIGNATURE = re.search(rb"<ds:Signature.*</ds:Signature>", SIGNED, re.DOTALL)[0]
FORGED = nvidia.manifest(nvidia.DRIVER, {7: [b"\xee" * 48]}).encode()


def _in(document: bytes, *parts: bytes) -> bytes:
    return document.replace(b"</SoftwareIdentity>", b"".join(parts) + b"</SoftwareIdentity>")


WRAPPED = {
    "the signature on another document": (_in(FORGED, SIGNATURE), "signature-rim-digest"),
    "the signed document inside the forged one": (_in(FORGED, SIGNED), "parse-rim"),
    "the signed document inside the signature": (
        _in(FORGED, SIGNATURE.replace(b"</ds:Signature>",
            b"<ds:Object>" + SIGNED + b"</ds:Object></ds:Signature>")), "parse-rim"),
    "the signed document beside the signature": (_in(FORGED, SIGNATURE, DOCUMENT.encode()),
        "signature-rim-digest"),
    "two signatures": (_in(SIGNED, SIGNATURE), "parse-rim"),
    "a signature deeper down": (
        DOCUMENT.encode().replace(b"</ns0:Payload>", SIGNATURE + b"</ns0:Payload>"), "parse-rim"),
    "a signature as the root": (SIGNATURE, "parse-rim"),
    "a resource after the signature": (
        _in(SIGNED, b"<ns0:Payload/>"), "signature-rim-digest"),
    "a resource inside the signature": (
        SIGNED.replace(b"<ds:SignedInfo>", b"<ds:Object/><ds:SignedInfo>"), "parse-rim"),
    "more in KeyInfo": (
        SIGNED.replace(b"<ds:X509Data>", b"<ds:KeyName>x</ds:KeyName><ds:X509Data>"), "parse-rim"),
    "no certificate": (
        re.sub(rb"<ds:X509Data>.*</ds:X509Data>", b"<ds:X509Data/>", SIGNED, flags=re.DOTALL),
        "parse-rim"),
    "no signature": (DOCUMENT.encode(), "parse-rim"),
    "no key info": (
        re.sub(rb"<ds:KeyInfo>.*</ds:KeyInfo>", b"", SIGNED, flags=re.DOTALL), "parse-rim"),
}  # fmt: skip


@pytest.mark.parametrize("attack", WRAPPED)
def test_signature_wrapping(attack):
    data, code = WRAPPED[attack]
    assert refused(data) == code


BOMB = b"".join(
    b'<!ENTITY %c "%s">' % (97 + n, b"&%c;" % (96 + n) * 10 if n else b"lol") for n in range(9)
)
HOSTILE = {
    "external entity": b'<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]>' + SIGNED,
    "external dtd": b'<!DOCTYPE a SYSTEM "http://127.0.0.1:9/x.dtd">' + SIGNED,
    "entity expansion": b"<!DOCTYPE a [" + BOMB + b"]>" + SIGNED.replace(b"590.12", b"&i;"),
    "a comment": SIGNED.replace(b"<ns0:Meta", b"<!-- x --><ns0:Meta"),
    "a comment in a value": SIGNED.replace(b"</ds:DigestValue>", b"<!---->==</ds:DigestValue>"),
    "an instruction": SIGNED.replace(b"<ns0:Meta", b"<?x y?><ns0:Meta"),
    "cdata": SIGNED.replace(b"<ns0:Meta", b"<![CDATA[x]]><ns0:Meta"),
    "inclusion": SIGNED.replace(
        b"<ns0:Meta", b'<x:include xmlns:x="http://www.w3.org/2001/XInclude" href="x"/><ns0:Meta'
    ),
    "an unknown entity": SIGNED.replace(b"590.12", b"&x;"),
    "an xml base": SIGNED.replace(b"<ns0:Meta", b'<ns0:Meta xml:base="http://x/"'),
    "an xml id": SIGNED.replace(b"<ns0:Meta", b'<ns0:Meta xml:id="x"'),
    "a relative namespace": SIGNED.replace(b"<ns0:Meta", b'<ns0:Meta xmlns:r="../r"'),
    "a byte order mark": b"\xef\xbb\xbf" + SIGNED,
    "another encoding": SIGNED.decode().encode("utf-16"),
    "another xml": b'<?xml version="1.1" encoding="UTF-8"?>' + SIGNED,
    "an encoding by declaration": b'<?xml version="1.0" encoding="UTF-7"?>' + SIGNED,
    "two roots": SIGNED + SIGNED,
    "nothing": b"",
    "no xml": b"\0" * 64,
    "depth": b"<a>" * 5000 + b"</a>" * 5000,
    "breadth": b"<a>" + b"<b/>" * 5000 + b"</a>",
    "size": SIGNED + b" " * xmldsig.MAX_BYTES,
    "a zero": SIGNED.replace(b"590.12", b"590\x0012"),
}


@pytest.mark.parametrize("attack", HOSTILE)
def test_hostile_documents(attack):
    """An inclusion is not followed: the document is another than was signed."""
    wanted = "signature-rim-digest" if attack == "inclusion" else "parse-rim"
    assert refused(HOSTILE[attack]) == wanted


@pytest.mark.parametrize("change", [b"!", b"=", b"\xc3\xa9", b"<x/>"])
def test_values_that_are_not_base64(change):
    assert refused(SIGNED.replace(b"</ds:SignatureValue>", change + b"</ds:SignatureValue>")) == (
        "parse-rim"
    )


def test_base64_has_one_form():
    text = re.search(rb"<ds:X509Certificate>([^<]*)\n<", SIGNED)[1]
    raw = base64.b64decode(text) + b"\0" * (2 - len(base64.b64decode(text)) % 3 or 3)
    plain = base64.b64encode(raw)
    assert plain.endswith(b"=")
    cut = plain.rstrip(b"=")
    for other in (cut, cut[:-1] + bytes([cut[-1] + 1]) + b"=" * (len(plain) - len(cut))):
        assert refused(SIGNED.replace(text, other)) == "parse-rim"


def test_fuzzed_documents():
    fuzz(judge, [SIGNED, nvidia.sign_xml(DOCUMENT, method=METHODS[2])])
