"""What comes with a Nitro document: its certificates, revocation lists, a TLS certificate.

Source: AWS, "Nitro Enclaves Attestation Process", sections 2.1 (the root), 3.2.3 (order of
cabundle); RFC 5280 sections 4.2.1.13 (distribution points) and 5 (revocation lists).

The certificates stand in the document itself: ``certificate`` signed it, ``cabundle`` leads from
the root to it. Other files, as in an evidence folder:

- ``*.crl``: revocation lists of the chain's authorities, in DER or PEM. AWS publishes them, the
  chain names their addresses, no Nitro system carries them.
- ``tls_cert.der`` or ``tls_cert.pem``: a TLS certificate that the document binds.

Anything else, such as ``root.pem``, is signed by nobody and used for nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Final

from casemate.attest import crl, roots, x509
from casemate.attest.kind import Files
from casemate.attest.nitro.abi import Document
from casemate.attest.verdict import Refused, refusal

# Admitted SHA-256 of the root key's SubjectPublicKeyInfo: AWS's root G1 of the commercial
# partition, 2019 to 2049. AWS publishes no other.
AWS: Final = ("f2caf5ecc6190b4a8399b78bc58a2bbcd0382375db8a1bfd78a82743874fd225",)

CRL_POINTS: Final = "2.5.29.31"
_TLS_FILES: Final = ("tls_cert.der", "tls_cert.pem")
_MAX_CRLS: Final = 8


@cache
def root() -> x509.Certificate:
    """The carried root certificate, as AWS publishes it at
    ``https://aws-nitro-enclaves.amazonaws.com/AWS_NitroEnclaves_Root-G1.zip``."""
    file = "aws-nitro.pem"
    return x509.parse((resources.files(roots) / file).read_bytes(), file)


@dataclass(frozen=True, kw_only=True)
class Chain:
    """path: leaf first, the self-signed root last, each with its name in errors. lists: file to
    revocation list. tls: the TLS certificate, if one came, with its file. unused: files that play
    no part."""

    path: tuple[tuple[x509.Certificate, str], ...]
    lists: Mapping[str, crl.RevocationList]
    tls: tuple[x509.Certificate, str] | None
    unused: tuple[str, ...]

    @property
    def leaf(self) -> x509.Certificate:
        return self.path[0][0]

    @property
    def root(self) -> x509.Certificate:
        return self.path[-1][0]


def _der(data: bytes, where: str) -> tuple[x509.Certificate, str]:
    if data.startswith(b"-----"):
        raise refusal("parse-certificate", f"{where} is not in DER.", where)
    return x509.parse(data, where), where


def _too_many(what: str) -> Refused:
    return refusal("parse-too-large", f"The evidence carries too many {what}.", what)


def parse(document: Document, files: Files, file: str) -> Chain:
    """The chain in ``document`` and what stands beside it in ``files``; ``file``: the document's
    own. Raises ``evidence.parse-certificate``, ``parse-crl`` and ``parse-too-large``."""
    bundle = [_der(one, f"cabundle[{n}]") for n, one in enumerate(document.cabundle)]
    listed = sorted(name for name in files if name.endswith(".crl"))
    if len(listed) > _MAX_CRLS:
        raise _too_many("revocation lists")
    tls = [name for name in _TLS_FILES if name in files]
    if len(tls) > 1:
        raise _too_many("TLS certificates")
    return Chain(
        path=(_der(document.certificate, "certificate"), *reversed(bundle)),
        lists={name: crl.parse(files[name], name) for name in listed},
        tls=(x509.parse(files[tls[0]], tls[0]), tls[0]) if tls else None,
        unused=tuple(sorted(set(files) - {file, *listed, *tls})),
    )
