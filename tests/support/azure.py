"""Confidential VMs made up under test roots: a paravisor's report around a made-up SEV-SNP report
or TDREPORT, with a made-up vTPM's quote. No hardware made them."""

from __future__ import annotations

import base64
import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from cryptography.hazmat.primitives.asymmetric import rsa

from casemate.attest import folder
from casemate.attest.azure import abi
from casemate.attest.azure.policy import DEFAULT, AzurePolicy
from casemate.attest.folder import Judgement
from support import dcap, snp, tpm

NOW = tpm.NOW
HASHES = {"sha256": 1, "sha384": 2, "sha512": 3}
KINDS = {"snp": 2, "tdx": 4}
VM = "390CBCF5-6C67-4D9B-98EF-C3F1699CC8FC"
USER = bytes(range(64))


def number(value: int) -> str:
    raw = value.to_bytes((value.bit_length() + 7) // 8, "big")
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def jwk(of: tpm.Key, kid: str = abi.AK, use: str = "sign") -> dict[str, Any]:
    found = of.public_key()
    assert isinstance(found, rsa.RSAPublicKey)
    numbers = found.public_numbers()
    return {
        "kid": kid, "key_ops": [use], "kty": "RSA", "e": number(numbers.e), "n": number(numbers.n),
    }  # fmt: skip


def claims(ak: tpm.Key, **changed: Any) -> bytes:
    """Runtime claims. ``changed``: keys, configuration, user, or further members."""
    configuration = {
        "console-enabled": True, "secure-boot": True, "tpm-enabled": True, "vmUniqueId": VM,
    } | changed.pop("configuration", {})  # fmt: skip
    keys = changed.pop("keys", [jwk(ak), jwk(tpm.key("ek"), abi.EK, "encrypt")])
    whole = {
        "keys": keys, "vm-configuration": configuration,
        "user-data": changed.pop("user", USER.hex().upper()), **changed,
    }  # fmt: skip
    return json.dumps(whole, separators=(",", ":")).encode()


def report(hardware: str, payload: bytes, text: bytes, **changed: Any) -> bytes:
    """The paravisor's report. ``changed``: fields of its header and of the runtime data."""
    get = changed.get
    size = get("claims", len(text))
    total = 32 + 1184 + 20 + len(text)
    head = struct.pack(
        "<4sIIII12s", get("signature", b"HCLA"), get("version", 2), get("size", total),
        get("request", 2), get("status", 0), get("reserved", bytes(12)),
    )  # fmt: skip
    data = struct.pack(
        "<IIIII", get("data", 20 + len(text)), get("edition", 1), get("kind", KINDS[hardware]),
        get("hash", 1), size,
    )  # fmt: skip
    return head + payload.ljust(1184, b"\0") + data + text + get("padding", bytes(100))


def tdreport(**fields: bytes) -> bytes:
    """A TDREPORT whose two halves have their digests. ``fields`` as ``abi.td_report`` names."""
    values = {"reporttype": b"\x81\0\0\0", "mac": b"m" * 32} | fields
    names = [name for name, _ in abi._TD_FIELDS]
    unknown = set(values) - set(names)
    assert not unknown, unknown
    raw = abi._TD_REPORT.pack(*(values.get(name, b"") for name in names))
    digests = {
        "tee_tcb_info_hash": hashlib.sha384(raw[0x100:0x1EF]).digest(),
        "tee_info_hash": hashlib.sha384(raw[0x200:0x400]).digest(),
    } | fields
    return abi._TD_REPORT.pack(*((values | digests).get(name, b"") for name in names))


def evidence(
    hardware: str = "snp", files: Mapping[str, bytes | None] | None = None, *, hash: str = "sha256",
    ak: tpm.Key | None = None, by: tpm.Key | None = None, text: bytes | None = None,
    bound: bytes | None = None, header: Mapping[str, Any] | None = None,
    quote: Mapping[str, Any] | None = None, td: Mapping[str, bytes] | None = None,
    log: bytes | None = None, fifteen: bool = False, **fields: Any,
) -> dict[str, bytes]:  # fmt: skip
    """A folder. text: the claims; bound: the hardware's report data, else their hash; header: see
    :func:`report`; quote: fields of the TPMS_ATTEST; td: fields of the TDREPORT that differ from
    the quote's; fields: of the hardware's report."""
    own = ak or tpm.key("ak")
    words = claims(own) if text is None else text
    data = hashlib.new(hash, words).digest().ljust(64, b"\0") if bound is None else bound
    shape = {"hash": HASHES[hash]} | dict(header or {})
    whole: dict[str, bytes | None]
    if hardware == "snp":
        chain = snp.evidence("Genoa")
        inner = snp.report("Genoa", **({"report_data": data} | fields))
        whole = {n: chain[n] for n in ("vcek.der", "ask.pem", "ark.pem")}
        whole |= {"hcl_report.bin": report("snp", inner, words, **shape)}
    else:
        body = {
            "tee_tcb_svn": dcap.TEE_TCB_SVN, "tdattributes": bytes.fromhex("0000001000000000"),
            "mrtd": b"m" * 48, "report_data": data,
        } | fields  # fmt: skip
        if fifteen:
            body["tee_tcb_svn2"] = dcap.TEE_TCB_SVN
        version = 5 if fifteen else 4
        case = dcap.Case(
            version=version, body=dcap.td(fifteen, **body), body_type=3 if fifteen else 2
        )
        inner = tdreport(**(body | dict(td or {})))
        made = case.files()
        whole = {
            "td_quote.bin": made["quote.bin"], "collateral.json": made["collateral.json"],
            "hcl_report.bin": report("tdx", inner, words, **shape),
        }  # fmt: skip
    values = tpm.replayed(log, "sha256") if log else tpm.banks("sha256")
    message = tpm.attest(values, **(quote or {}))
    whole |= {
        "tpm_quote.msg": message,
        "tpm_quote.sig": tpm.bare(by or own, message),
        "pcrs.json": tpm.shown(values),
        "event_log.bin": log,
        **(files or {}),
    }
    return {name: data for name, data in whole.items() if data is not None}


def policy(**changed: Any) -> AzurePolicy:
    """The default, under the test roots; ``snp``, ``tdx`` and ``tpm`` as changes of theirs."""
    parts = {"snp": snp.policy, "tdx": dcap.tdx, "tpm": tpm.policy}
    inner = {
        name: make(**changed.pop(name, {}))
        for name, make in parts.items()
        if isinstance(changed.get(name, {}), dict)
    }
    return replace(DEFAULT, **(inner | changed))


def judge(files: Mapping[str, bytes], *, now: float = NOW, nonce: Any = None, **changed: Any
          ) -> Judgement:  # fmt: skip
    more = {} if nonce is None else {"nonce": nonce}
    return folder.judge(files, now=now, policies={"azure-cvm": policy(**changed)}, **more)
