"""Enveloped XML signatures, of the one form that reference integrity manifests have.

Sources: W3C XML Signature 1.1 (sections 3.2, 4.3 to 4.5, 6.4, 6.6.4), Canonical XML 1.0 and 1.1,
Exclusive XML Canonicalization 1.0, RFC 9231 (ecdsa-sha384, sha384).

What is admitted is narrow, so that what is read is what was signed:

 1. The text has no document type, comment, CDATA section or processing instruction: ``<!`` and
    ``<?`` occur nowhere but in an XML declaration of a fixed form. Nothing is fetched, no entity
    is resolved, sizes and depth are limited.
 2. One ``Signature`` in all, a child of the root, made of SignedInfo, SignatureValue and KeyInfo
    with certificates, and of nothing else; no attributes where none are needed.
 3. SignedInfo has one Reference, to the whole document (URI ``""``), with the enveloped-signature
    transform and one canonicalization; algorithms are of fixed lists.
 4. No attribute of the ``xml`` namespace: so Canonical XML 1.0 and 1.1 give the same octets.
 5. :attr:`Signed.content`, the octets whose digest was signed, is what callers parse, never the
    document that came.

White space and order inside tags, which canonical XML drops, and the white space of KeyInfo's
base64 are not signed and carry nothing.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, utils

from casemate.attest.nvidia.abi import COMPONENT_BYTES, P384_ORDER, SIGNATURE_BYTES
from casemate.attest.verdict import Refused, refusal

if TYPE_CHECKING:
    from lxml.etree import _Element

MAX_BYTES: Final = 1 << 20
MAX_ELEMENTS: Final = 4096
MAX_DEPTH: Final = 16
MAX_CERTIFICATES: Final = 8
_DS: Final = "{http://www.w3.org/2000/09/xmldsig#}"
_XML: Final = "{http://www.w3.org/XML/1998/namespace}"
ENVELOPED: Final = "http://www.w3.org/2000/09/xmldsig#enveloped-signature"
ECDSA_SHA384: Final = "http://www.w3.org/2001/04/xmldsig-more#ecdsa-sha384"
SHA384: Final = "http://www.w3.org/2001/04/xmldsig-more#sha384"
# Canonicalization, none with comments, to whether it is exclusive.
CANONICAL: Final = {
    "http://www.w3.org/TR/2001/REC-xml-c14n-20010315": False,
    "http://www.w3.org/2006/12/xml-c14n11": False,
    "http://www.w3.org/2001/10/xml-exc-c14n#": True,
}
_DECLARATION: Final = re.compile(
    rb"""<\?xml version=(["'])1\.0\1 encoding=(["'])(?:UTF-8|utf-8|US-ASCII|us-ascii)\2"""
    rb"""(?: standalone=(["'])(?:yes|no)\3)?\?>"""
)


@dataclass(frozen=True, kw_only=True)
class Signed:
    """content: the canonical document without its signature. signed_info: canonical SignedInfo,
    which ``signature`` (r and s, 48 bytes each) is over. digest: what SignedInfo says of
    ``content``. certificates: DER, the signer's first."""

    content: bytes
    signed_info: bytes
    digest: bytes
    signature: bytes
    certificates: tuple[bytes, ...]


def refuse(message: str, where: str) -> Refused:
    return refusal("parse-rim", f"{where} is no signed manifest: {message}.", where)


def document(data: bytes, where: str) -> _Element:
    """The root element of ``data``, read without anything that could reach outside of it."""
    from lxml import etree

    if len(data) > MAX_BYTES:
        raise refuse(f"it has {len(data)} bytes", where)
    body = data.strip(b" \t\r\n")
    declared = _DECLARATION.match(body)
    body = body[declared.end() :].lstrip(b" \t\r\n") if declared else body
    if not body.startswith(b"<") or b"<!" in body or b"<?" in body:
        raise refuse("it has a document type, a comment or an instruction", where)
    parser = etree.XMLParser(
        encoding="utf-8",
        resolve_entities=False,
        load_dtd=False,
        dtd_validation=False,
        no_network=True,
        huge_tree=False,
        recover=False,
        collect_ids=False,
    )
    try:
        root = etree.fromstring(body, parser)
    except (etree.LxmlError, ValueError):
        raise refuse("it is not well-formed XML", where) from None
    _limits(root, where)
    return root


def _limits(root: _Element, where: str) -> None:
    """Iterative, so that depth costs nothing."""
    level, count, depth = [root], 0, 0
    while level:
        count, depth = count + len(level), depth + 1
        if count > MAX_ELEMENTS or depth > MAX_DEPTH:
            raise refuse("it has too many elements", where)
        for element in level:
            if not isinstance(element.tag, str):
                raise refuse("it has more than elements", where)
            if any(str(name).startswith(_XML) for name in element.attrib):
                raise refuse("it has attributes of the xml namespace", where)
        level = [child for element in level for child in element]


def canonical(element: _Element, method: str, where: str) -> bytes:
    """The element and what is below it, by a method of :data:`CANONICAL`."""
    from lxml import etree

    try:
        out: bytes = etree.tostring(
            element, method="c14n", exclusive=CANONICAL[method], with_comments=False
        )
    except etree.LxmlError:  # a namespace that is a relative reference has no canonical form
        raise refuse("it has no canonical form", where) from None
    return out


def _children(parent: _Element, where: str, *names: str) -> list[_Element]:
    """The children of ``parent``, which has no text beside them: exactly those named."""
    found = list(parent)
    texts = [parent.text or "", *(child.tail or "" for child in found)]
    if [child.tag for child in found] != [_DS + name for name in names] or any(
        text.strip(" \t\r\n") for text in texts
    ):
        raise refuse(f"{_local(parent)} is not made of {', '.join(names)}", where)
    return found


def _local(element: _Element) -> str:
    return str(element.tag).rpartition("}")[2][:40]


def _attributes(element: _Element, where: str, *names: str) -> list[str]:
    """The values of the attributes, which are exactly those named."""
    if sorted(map(str, element.attrib)) != sorted(names):
        raise refuse(f"{_local(element)} has other attributes", where)
    return [str(element.attrib[name]) for name in names]


def _algorithm(element: _Element, where: str, admitted: tuple[str, ...]) -> str:
    [found] = _attributes(element, where, "Algorithm")
    _children(element, where)
    if found not in admitted:
        raise refuse(f"{_local(element)} is not of the admitted ones", where)
    return found


def _base64(element: _Element, where: str) -> bytes:
    if len(element) or element.attrib:
        raise refuse(f"{_local(element)} is more than base64", where)
    text = re.sub(r"[ \t\r\n]", "", element.text or "")
    try:
        raw = base64.b64decode(text.encode("ascii"), validate=True)
    except (UnicodeEncodeError, binascii.Error, ValueError):
        raise refuse(f"{_local(element)} is not base64", where) from None
    if not raw or base64.b64encode(raw).decode() != text:
        raise refuse(f"{_local(element)} is not canonical base64", where)
    return raw


def _signed_info(info: _Element, where: str) -> tuple[str, str, bytes]:
    """The canonicalizations of SignedInfo and of the document, and its digest."""
    how, method, reference = _children(
        info, where, "CanonicalizationMethod", "SignatureMethod", "Reference"
    )
    own = _algorithm(how, where, tuple(CANONICAL))
    _algorithm(method, where, (ECDSA_SHA384,))
    if _attributes(reference, where, "URI") != [""]:
        raise refuse("its signature refers to a part of it", where)
    transforms, digest_method, value = _children(
        reference, where, "Transforms", "DigestMethod", "DigestValue"
    )
    enveloped, transform = _children(transforms, where, "Transform", "Transform")
    _attributes(transforms, where)
    _algorithm(enveloped, where, (ENVELOPED,))
    whole = _algorithm(transform, where, tuple(CANONICAL))
    _algorithm(digest_method, where, (SHA384,))
    return own, whole, _base64(value, where)


def _detach(signature: _Element) -> None:
    """Take the signature out of its document and leave the text after it."""
    parent, before, tail = signature.getparent(), signature.getprevious(), signature.tail or ""
    assert parent is not None
    if before is not None:
        before.tail = (before.tail or "") + tail
    else:
        parent.text = (parent.text or "") + tail
    parent.remove(signature)


def parse(data: bytes, where: str) -> Signed:
    """A signed document, by the procedure above; nothing is verified yet. Raises
    ``evidence.parse-rim``; ``where`` names the file."""
    root = document(data, where)
    found = list(root.iter(_DS + "Signature"))
    if len(found) != 1 or found[0].getparent() is not root:
        raise refuse("it has not one signature under its root", where)
    [signature] = found
    info, value, key_info = _children(signature, where, "SignedInfo", "SignatureValue", "KeyInfo")
    for element in (signature, info, key_info):
        _attributes(element, where)
    own, whole, digest = _signed_info(info, where)
    [x509_data] = _children(key_info, where, "X509Data")
    count = len(x509_data)
    if not 1 <= count <= MAX_CERTIFICATES:
        raise refuse(f"it carries {count} certificates", where)
    certificates = _children(x509_data, where, *["X509Certificate"] * count)
    _attributes(x509_data, where)
    signed_info = canonical(info, own, where)
    signed = _base64(value, where)
    ders = tuple(_base64(certificate, where) for certificate in certificates)
    _detach(signature)
    return Signed(
        content=canonical(root, whole, where),
        signed_info=signed_info,
        digest=digest,
        signature=signed,
        certificates=ders,
    )


def verify(signed: Signed, key: ec.EllipticCurvePublicKey, where: str) -> None:
    """``evidence.signature-rim*`` unless ``key`` (on P-384) signed SignedInfo, and SignedInfo says
    the digest of the content. The twin (r, n-s) of a signature gets the same answer."""
    if hashlib.sha384(signed.content).digest() != signed.digest:
        raise refusal(
            "signature-rim-digest", f"{where} is not what its signature was made over.", where
        )
    raw = signed.signature
    r, s = (int.from_bytes(x, "big") for x in (raw[:COMPONENT_BYTES], raw[COMPONENT_BYTES:]))
    if len(raw) != SIGNATURE_BYTES or not (0 < r < P384_ORDER and 0 < s < P384_ORDER):
        raise refusal("signature-rim", f"The signature of {where} is none on P-384.", where)
    try:
        key.verify(utils.encode_dss_signature(r, s), signed.signed_info, ec.ECDSA(hashes.SHA384()))
    except InvalidSignature:
        raise refusal(
            "signature-rim", f"The signature of {where} is not its signer's.", where
        ) from None
