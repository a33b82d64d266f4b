"""Faithful fakes of what evidence is made from: configfs-tsm's folder, /dev/nsm, /dev/sev-guest,
NVIDIA's library, and a real software TPM where one is installed. Keys are test roots' of the
supports for each kind."""

from __future__ import annotations

import base64
import contextlib
import ctypes
import errno
import hashlib
import hmac
import json
import os
import shutil
import socket
import struct
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any

import cbor2
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from casemate.attest.azure.policy import DEFAULT as AZURE
from casemate.attest.trust import Trust
from casemate.seams import OsRng
from casemate.seams.files import load, store
from casemate.tee import Machine, Tee, collateral, release
from casemate.tee import nvidia as nvidia_maker
from casemate.tee import open as open_tee
from casemate.tee.configfs_tsm import OsTsm
from casemate.tee.fetch import Ask, Fetch, Reply
from support import dcap, nitro, snp
from support.disk import SimDisk
from support.evidence import NOW, FixedClock

# configfs-tsm.

Made = tuple[bytes, bytes | None, bytes | None]  # outblob, auxblob, manifestblob


@dataclass
class Entry:
    """The kernel's state behind one folder (drivers/virt/coco)."""

    written: int = 0
    read: int = 0
    inblob: bytes = b""
    level: int = 0
    made: Made | None = None


class FakeTsm(OsTsm):
    """A real folder; after each operation on its files it does what the kernel does.

    ``faults``: errno names by (operation, attribute), each raised once, in order. ``before`` is
    called before each operation with its name, the entry and the attribute: another process.
    """

    def __init__(
        self,
        root: Path,
        make: Callable[[bytes, int], Made],
        *,
        provider: str = "sev_guest",
        floor: int | None = 0,
        start: int = 0,
    ) -> None:
        super().__init__(root)
        self._make_report, self._provider, self.floor, self._start = make, provider, floor, start
        self.entries: dict[str, Entry] = {}
        self.trace: list[tuple[str, str]] = []
        self.names: list[str] = []
        self.faults: dict[tuple[str, str], list[str]] = {}
        self.before: Callable[[str, str, str], None] = lambda *_: None
        self.reports = 0

    def _step(self, what: str, entry: str, attribute: str = "") -> None:
        self.trace.append((what, attribute))
        self.before(what, entry, attribute)
        waiting = self.faults.get((what, attribute))
        if waiting:
            number = getattr(errno, waiting.pop(0))
            raise OSError(number, os.strerror(number))

    def _show(self, entry: str, attribute: str, data: bytes) -> None:
        (self.root / entry / attribute).write_bytes(data)

    def make(self, entry: str) -> None:
        self._step("make", entry)
        super().make(entry)
        state = Entry(written=self._start, read=self._start)
        self.entries[entry] = state
        self.names.append(entry)
        self._show(entry, "generation", b"%d\n" % state.written)
        self._show(entry, "provider", self._provider.encode() + b"\n")
        self._show(entry, "inblob", b"")
        self._show(entry, "outblob", b"")
        if self.floor is not None:
            self._show(entry, "privlevel", b"")
            self._show(entry, "privlevel_floor", b"%d\n" % self.floor)
            self._show(entry, "auxblob", b"")

    def write(self, entry: str, attribute: str, data: bytes) -> None:
        self._step("write", entry, attribute)
        self.kernel_write(entry, attribute, data)

    def kernel_write(self, entry: str, attribute: str, data: bytes) -> None:
        """As another process may do too."""
        state = self.entries[entry]
        if not (self.root / entry / attribute).exists():
            raise FileNotFoundError(errno.ENOENT, "No such file or directory")
        if attribute == "inblob":
            if not 0 < len(data) <= 64:
                raise OSError(errno.EFBIG, "File too large")
        elif attribute == "privlevel":
            if not (self.floor or 0) <= int(data) <= 3:
                raise OSError(errno.EINVAL, "Invalid argument")
        else:
            raise PermissionError(errno.EACCES, "Permission denied")
        if state.written == (state.read - 1) % 2**64:
            raise OSError(errno.EBUSY, "Device or resource busy")
        state.written = (state.written + 1) % 2**64
        if attribute == "inblob":
            state.inblob = data
        else:
            state.level = int(data)
        super().write(entry, attribute, data)
        self._show(entry, "generation", b"%d\n" % state.written)

    def read(self, entry: str, attribute: str, limit: int) -> bytes:
        self._step("read", entry, attribute)
        if attribute in ("inblob", "privlevel"):
            raise PermissionError(errno.EACCES, "Permission denied")
        if attribute.endswith("blob") and (self.root / entry / attribute).exists():
            self._generate(entry)
        return super().read(entry, attribute, limit)

    def _generate(self, entry: str) -> None:
        state = self.entries[entry]
        if not state.inblob:
            raise OSError(errno.EINVAL, "Invalid argument")
        if state.made is None or state.read != state.written:
            self.reports += 1
            state.made = self._make_report(state.inblob.ljust(64, b"\0"), state.level)
            state.read = state.written
        for name, data in zip(("outblob", "auxblob", "manifestblob"), state.made, strict=True):
            if data is not None:
                self._show(entry, name, data)

    def remove(self, entry: str) -> None:
        self._step("remove", entry)
        for file in (self.root / entry).iterdir():
            file.unlink()
        super().remove(entry)
        del self.entries[entry]


GUIDS = {
    "vcek": "63da758d-e664-4564-adc5-f4b93be8accd",
    "vlek": "a8074bc2-a25a-483e-aae6-39c045a0b8a1",
    "ask": "4ab7b379-bbac-4fe4-a02f-05aef327c782",
    "ark": "c0b406a4-a803-4952-9743-3fb6014cd0ae",
    "crl": "92f81bc3-5811-4d3d-97ff-d19f88dc67ea",
    "other": "00112233-4455-6677-8899-aabbccddeeff",
}


def table(**entries: bytes) -> bytes:
    """A host's certificate table, written by the format's own words."""
    head, body = b"", b""
    start = (len(entries) + 1) * 24
    for name, data in entries.items():
        head += uuid.UUID(GUIDS[name]).bytes
        head += (start + len(body)).to_bytes(4, "little") + len(data).to_bytes(4, "little")
        body += data
    return head + bytes(24) + body


def snp_table(product: str = "Genoa") -> bytes:
    ark, ask = snp.authorities(product)
    return table(vcek=snp.leaf(product, "VCEK"), ask=snp.der(ask), ark=snp.der(ark))


def snp_report(inblob: bytes, level: int) -> Made:
    return snp.report(report_data=inblob, vmpl=level), snp_table(), None


def td_quote(inblob: bytes, _: int) -> Made:
    return dcap.Case(body=dcap.td(report_data=inblob)).quote(), None, None


# /dev/nsm.


class FakeNsm:
    """Answers as drivers/misc/nsm.c and the module do. ``answer``: in place of a document."""

    def __init__(self, answer: Any = None, error: int = 0) -> None:
        self.answer, self.error = answer, error
        self.requests: list[Any] = []
        self.open = 0

    def __call__(self, path: Path) -> FakeNsm:
        self.open += 1
        return self

    def close(self) -> None:
        self.open -= 1

    def ioctl(self, request: int, argument: Any) -> None:
        if request != 0xC0200A00:
            raise OSError(errno.EINVAL, "Invalid argument")
        if argument.request.len > 0x1000:
            raise OSError(errno.EMSGSIZE, "Message too long")
        if self.error:
            raise OSError(self.error, os.strerror(self.error))
        asked = cbor2.loads(ctypes.string_at(argument.request.addr, argument.request.len))
        self.requests.append(asked)
        answer = self._answer(asked) if self.answer is None else self.answer
        data = (answer if isinstance(answer, bytes) else cbor2.dumps(answer))[:0x3000]
        argument.response.len = min(argument.response.len, len(data))
        ctypes.memmove(argument.response.addr, data, argument.response.len)

    def _answer(self, asked: Any) -> Any:
        fields = asked.get("Attestation") if isinstance(asked, dict) else None
        if not isinstance(fields, dict) or set(fields) != {"user_data", "nonce", "public_key"}:
            return {"Error": "InvalidOperation"}
        for name, most in (("user_data", 512), ("nonce", 512), ("public_key", 1024)):
            if fields[name] is not None and len(fields[name]) > most:
                return {"Error": "InputTooLarge"}
        return {"Attestation": {"document": nitro.document(**fields)}}


# /dev/sev-guest.


@dataclass
class FakeGuest:
    """A chip with a secret and a guest of one measurement, policy and privilege level."""

    chip: bytes = b"chip"
    measurement: bytes = b"m" * 48
    policy: int = 1 << 17
    vmpl: int = 0
    status: int = 0
    error: int = 0
    exitinfo2: int = 0
    calls: list[tuple[int, int, int]] = field(default_factory=list)

    def __call__(self, path: Path) -> FakeGuest:
        return self

    def close(self) -> None: ...

    def ioctl(self, request: int, argument: Any) -> None:
        if request != 0xC0205301:
            raise OSError(errno.ENOTTY, "Inappropriate ioctl for device")
        if not argument.msg_version:
            raise OSError(errno.EINVAL, "Invalid argument")
        if self.error:
            argument.exitinfo2 = self.exitinfo2
            raise OSError(self.error, os.strerror(self.error))
        asked = ctypes.string_at(argument.req_data, 32)
        root, reserved = (int.from_bytes(asked[i : i + 4], "little") for i in (0, 4))
        fields = int.from_bytes(asked[8:16], "little")
        vmpl = int.from_bytes(asked[16:20], "little")
        self.calls.append((root, fields, vmpl))
        status = 0x16 if reserved or vmpl < self.vmpl or vmpl > 3 else self.status
        mixed = f"{root}|{vmpl}|{fields}|".encode()
        mixed += self.policy.to_bytes(8, "little") if fields & 1 else b""
        mixed += self.measurement if fields & 8 else b""
        key = hmac.digest(self.chip, mixed, hashlib.sha256)
        data = status.to_bytes(4, "little") + bytes(28) + (bytes(32) if status else key)
        ctypes.memmove(argument.resp_data, data, 64)


# A software TPM.


def lacks_tpm() -> str:
    """Why no TPM can be had here, or ""."""
    for tool in ("swtpm", "swtpm_setup"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed (apt-get install swtpm swtpm-tools)"
    try:
        import tpm2_pytss  # noqa: F401
    except Exception as e:
        return f"tpm2-pytss does not load ({type(e).__name__}: apt-get install libtss2-dev)"
    return ""


needs_tpm = pytest.mark.skipif(bool(lacks_tpm()), reason=lacks_tpm() or "-")


def _free_ports() -> int:
    """A port that is free with the one after it, on which swtpm listens for control."""
    for _ in range(100):
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port = first.getsockname()[1]
            try:
                second.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            return port
    raise RuntimeError("no two free ports")


@contextlib.contextmanager
def swtpm(folder: Path, *, new: bool = True) -> Iterator[str]:
    """A fresh software TPM (libtpms), or the one that this folder held; yields its TCTI."""
    folder.mkdir(parents=True, exist_ok=True)
    state = ["--tpm2", "--tpmstate"]
    if new:
        subprocess.run(
            ["swtpm_setup", *state, str(folder), "--pcr-banks", "sha256"],
            check=True, capture_output=True,
        )  # fmt: skip
    port = _free_ports()
    process = subprocess.Popen(
        [
            "swtpm", "socket", *state, f"dir={folder}", "--server", f"type=tcp,port={port}",
            "--ctrl", f"type=tcp,port={port + 1}", "--flags", "not-need-init,startup-clear",
        ],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        yield _listening(process, port)
    finally:
        process.kill()
        process.wait()


def _listening(process: subprocess.Popen[bytes], port: int) -> str:
    for _ in range(200):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return f"swtpm:host=127.0.0.1,port={port}"
        if process.poll() is not None:
            break
        time.sleep(0.02)
    raise RuntimeError("swtpm does not listen")


def extend(tcti: str, pcr: int, digest: bytes) -> None:
    """Extend a PCR of the SHA-256 bank, as a boot stage does."""
    import tpm2_pytss as tss

    with tss.ESAPI(tcti) as esys:
        value = tss.TPMT_HA(hashAlg=tss.TPM2_ALG.SHA256, digest=tss.TPMU_HA(sha256=digest))
        esys.pcr_extend(tss.ESYS_TR(pcr), tss.TPML_DIGEST_VALUES([value]))


def nv_store(tcti: str, index: int, data: bytes) -> None:
    """Define an NV index of the owner's, which anyone may read, and write it."""
    import tpm2_pytss as tss

    public = tss.TPMS_NV_PUBLIC(
        nvIndex=index,
        nameAlg=tss.TPM2_ALG.SHA256,
        attributes=tss.TPMA_NV.OWNERWRITE | tss.TPMA_NV.AUTHREAD | tss.TPMA_NV.OWNERREAD,
        dataSize=len(data),
    )
    with tss.ESAPI(tcti) as esys:
        handle = esys.nv_define_space(None, tss.TPM2B_NV_PUBLIC(nvPublic=public))
        for at in range(0, len(data), 512):
            esys.nv_write(handle, data[at : at + 512], at, auth_handle=tss.ESYS_TR.OWNER)


# Whole machines, one for each attester, and whom a client must trust for them.


def no_gpus() -> nvidia_maker.Found:
    return nvidia_maker.Found(None, 0, "no GPU here")


@dataclass
class Place:
    """A machine and its disk. ``open`` starts casemate on it once more."""

    kind: str
    machine: Machine
    disk: SimDisk
    trust: Callable[[Tee], Trust]

    def open(self, disk: SimDisk | None = None) -> Tee:
        return open_tee(
            self.kind, disk=disk or self.disk, rng=OsRng(), clock=FixedClock(),
            machine=self.machine,
        )  # fmt: skip


def machine(folder: Path, **given: Any) -> Machine:
    """Nothing is there but what is given."""
    absent = {
        name: folder / f"no-{name}"
        for name in ("tsm_path", "nsm_path", "guest_path", "tpm_path", "log_path", "ccel_path")
    }
    return Machine(**(absent | {"gpus": no_gpus, "pause": lambda _: None} | given))


class Owner:
    """Releases the sealing secret as soon as a server asks: the owner's side of ``tee.release``,
    in place of the pause between two looks."""

    def __init__(self, disk: SimDisk, trust: Trust, name: bytes = b"owner") -> None:
        self.disk, self.trust = disk, trust
        self.key = Ed25519PrivateKey.from_private_bytes(hashlib.sha256(b"key" + name).digest())
        self.secret = hashlib.sha256(name).digest()
        self.public = self.key.public_key().public_bytes_raw()

    def __call__(self, _: float) -> None:
        asked = load(self.disk, release.REQUEST_FILE)
        assert asked is not None
        answer = release.grant(asked, self.secret, self.trust, self.public, self.key.sign, now=NOW)
        store(self.disk, release.GRANT_FILE, answer)


def _tsm(folder: Path, seed: int, made: Callable[[bytes, int], Made], **fake: Any) -> FakeTsm:
    root = folder / f"tsm{seed}"
    root.mkdir(parents=True, exist_ok=True)
    return FakeTsm(root, made, **fake)


def _released(kind: str, seed: int, trust: Trust, **given: Any) -> Place:
    disk = SimDisk(seed)
    owner = Owner(disk, trust, b"owner%d" % seed)
    folder = given.pop("folder")
    here = machine(folder, owner=owner.public, pause=owner, policies=trust.policies, **given)
    return Place(kind, here, disk, lambda _: trust)


@contextlib.contextmanager
def snp_place(folder: Path, seed: int) -> Iterator[Place]:
    fake = _tsm(folder, seed, snp_report)
    trust = Trust.of("sev-snp", roots={"Genoa": (snp.root(),)})
    device = folder / "sev-guest"
    device.touch()
    here = machine(
        folder, tsm_path=fake.root, tsm_folder=lambda _: fake, guest_path=device,
        opener=FakeGuest(chip=b"chip%d" % seed), policies=trust.policies,
    )  # fmt: skip
    yield Place("configfs-tsm", here, SimDisk(seed), lambda _: trust)


@contextlib.contextmanager
def tdx_place(folder: Path, seed: int) -> Iterator[Place]:
    fake = _tsm(folder, seed, td_quote, provider="tdx_guest", floor=None)
    trust = Trust.of("tdx", roots=dcap.pin())
    place = _released(
        "configfs-tsm", seed, trust, folder=folder, tsm_path=fake.root, tsm_folder=lambda _: fake
    )
    good = dcap.Case().files()["collateral.json"]
    collateral.keep(place.disk, "cpu", {"collateral.json": good}, "test", NOW)
    yield place


@contextlib.contextmanager
def nsm_place(folder: Path, seed: int) -> Iterator[Place]:
    device = folder / "nsm"
    device.touch()
    trust = Trust.of("nitro", roots=nitro.policy().roots)
    yield _released("nsm", seed, trust, folder=folder, nsm_path=device, opener=FakeNsm())


@contextlib.contextmanager
def tpm_place(folder: Path, seed: int) -> Iterator[Place]:
    """A TPM whose AK a test authority has certified, as a cloud does it: template and certificate
    stand in NV indices."""
    with swtpm(folder / f"tpm{seed}") as tcti:
        provision(tcti)
        root = hashlib.sha256(spki(authority().public_key())).hexdigest()
        trust = Trust.of("tpm", roots=(root,))
        here = machine(folder, tpm_path=folder, tcti=tcti, policies=trust.policies)
        place = Place("tpm", here, SimDisk(seed), lambda _: trust)
        root_der = authority().public_bytes(serialization.Encoding.DER)
        collateral.keep(place.disk, "cpu", {"issuer1.der": root_der}, ISSUER_URL, NOW)
        yield place


@contextlib.contextmanager
def azure_place(folder: Path, seed: int) -> Iterator[Place]:
    with swtpm(folder / f"azure{seed}") as tcti:
        hcl = azure_provision(tcti)
        trust = Trust.of("azure-cvm", snp=replace(AZURE.snp, roots={"Genoa": (snp.root(),)}))
        here = machine(
            folder, tpm_path=folder, tcti=tcti, fetch=metadata(hcl), policies=trust.policies
        )
        yield Place("azure-vtpm", here, SimDisk(seed), lambda _: trust)


@contextlib.contextmanager
def simulated_place(folder: Path, seed: int) -> Iterator[Place]:
    yield Place("simulated", machine(folder), SimDisk(seed), lambda tee: Trust.simulated(tee.root))


# A test authority for TPM keys.


@cache
def authority_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def spki(key: Any) -> bytes:
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    encoded: bytes = key.public_bytes(serialization.Encoding.DER, form)
    return encoded


def _certificate(
    name: str, key: Any, *, ca: bool, extensions: tuple[Any, ...] = ()
) -> x509.Certificate:
    usage = x509.KeyUsage(
        digital_signature=not ca, content_commitment=False, key_encipherment=False,
        data_encipherment=False, key_agreement=False, key_cert_sign=ca, crl_sign=ca,
        encipher_only=False, decipher_only=False,
    )  # fmt: skip
    start = datetime.fromtimestamp(NOW, UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]))
        .issuer_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "Test TPM root")]))
        .public_key(key)
        .serial_number(7)
        .not_valid_before(start - timedelta(days=1))
        .not_valid_after(start + timedelta(days=100))
        .add_extension(x509.BasicConstraints(ca=ca, path_length=0 if ca else None), critical=True)
        .add_extension(usage, critical=True)
    )
    for extension in extensions:
        builder = builder.add_extension(extension, critical=False)
    return builder.sign(authority_key(), hashes.SHA256())


@cache
def authority() -> x509.Certificate:
    return _certificate("Test TPM root", authority_key().public_key(), ca=True)


ISSUER_URL = "http://pki.example/root.crt"


def _ak_certificate(key: Any) -> bytes:
    aia = x509.AuthorityInformationAccess(
        [
            x509.AccessDescription(
                x509.AuthorityInformationAccessOID.CA_ISSUERS,
                x509.UniformResourceIdentifier(ISSUER_URL),
            )
        ]
    )
    made = _certificate("Test AK", key, ca=False, extensions=(aia,))
    return made.public_bytes(serialization.Encoding.DER)


_AK = "sign|restricted|fixedtpm|fixedparent|sensitivedataorigin|userwithauth"


def provision(tcti: str) -> None:
    """As Google's cloud does: a template and a certificate for the key that it makes."""
    import tpm2_pytss as tss

    public = tss.TPM2B_PUBLIC.parse("rsa2048:rsassa-sha256:null", objectAttributes=_AK)
    with tss.ESAPI(tcti) as esys:
        handle, made = esys.create_primary(None, public, tss.ESYS_TR.ENDORSEMENT)[:2]
        key = serialization.load_pem_public_key(made.to_pem())
        esys.flush_context(handle)
    nv_store(tcti, 0x01C10001, public.publicArea.marshal())
    nv_store(tcti, 0x01C10000, _ak_certificate(key).ljust(1400, b"\0"))


def azure_provision(tcti: str) -> bytes:
    """A persistent AK, and a paravisor's report whose runtime claims name it."""
    import tpm2_pytss as tss

    public = tss.TPM2B_PUBLIC.parse("rsa2048:rsassa-sha256:null", objectAttributes=_AK)
    with tss.ESAPI(tcti) as esys:
        handle, made = esys.create_primary(None, public, tss.ESYS_TR.ENDORSEMENT)[:2]
        esys.evict_control(tss.ESYS_TR.OWNER, handle, 0x81000003)
        esys.flush_context(handle)
        numbers = serialization.load_pem_public_key(made.to_pem()).public_numbers()

    def number(value: int) -> str:
        data = value.to_bytes((value.bit_length() + 7) // 8, "big")
        return base64.urlsafe_b64encode(data).rstrip(b"=").decode()

    key = {
        "kid": "HCLAkPub", "key_ops": ["sign"], "kty": "RSA",
        "e": number(numbers.e), "n": number(numbers.n),
    }  # fmt: skip
    claims = json.dumps({"keys": [key], "vm-configuration": {}, "user-data": "0" * 128}).encode()
    report = snp.report(report_data=hashlib.sha256(claims).digest())
    hcl = struct.pack("<4sIIII12s", b"HCLA", 1, 1236 + len(claims), 2, 0, b"") + report
    hcl += struct.pack("<IIIII", 20 + len(claims), 1, 2, 1, len(claims)) + claims
    hcl = hcl.ljust(2048, b"\0")  # Azure's vTPM has 2,600 bytes there; this one takes 2,048
    nv_store(tcti, 0x01400001, hcl)
    return hcl


def metadata(hcl: bytes, quote: bytes = b"") -> Fetch:
    """Azure's instance metadata service."""

    def answer(ask: Ask) -> Reply:
        if ask.headers.get("Metadata") != "true":
            return Reply(400, {}, b"")
        if ask.url.endswith("/metadata/THIM/amd/certification"):
            ark, between = snp.authorities("Genoa")
            pem = serialization.Encoding.PEM
            leaf = x509.load_der_x509_certificate(snp.leaf("Genoa", "VCEK"))
            chain = between.public_bytes(pem) + ark.public_bytes(pem)
            body = {
                "vcekCert": leaf.public_bytes(pem).decode(), "tcbm": "0",
                "certificateChain": chain.decode(), "cacheControl": "86400",
            }  # fmt: skip
            return Reply(200, {}, json.dumps(body).encode())
        if ask.url.endswith("/acc/tdquote") and ask.body is not None:
            asked = json.loads(ask.body)["report"]
            report = base64.urlsafe_b64decode(asked + "=" * (-len(asked) % 4))
            assert report == hcl[32 : 32 + 1024]
            text = base64.urlsafe_b64encode(quote).decode().rstrip("=")
            return Reply(200, {}, json.dumps({"quote": text}).encode())
        return Reply(404, {}, b"")

    return answer


PLACES = {
    "simulated": simulated_place,
    "configfs-tsm": snp_place,
    "configfs-tsm/tdx": tdx_place,
    "nsm": nsm_place,
    "tpm": tpm_place,
    "azure-vtpm": azure_place,
}
NEEDS_TPM = ("tpm", "azure-vtpm")
