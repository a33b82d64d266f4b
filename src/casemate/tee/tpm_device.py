"""A TPM 2.0 through the TSS: keys, quotes, NV indices, sealed secrets.

Source: TCG, "Trusted Platform Module Library" 2.0, part 3: TPM2_CreatePrimary (24.1), TPM2_Quote
(18.4), TPM2_PCR_Read (22.4), TPM2_NV_Read (31.13), TPM2_PolicyPCR (23.7), TPM2_Unseal (12.7),
TPM2_NV_DefineSpace (31.3), TPM2_NV_Extend (31.9); part 1, section 19.6 (salted sessions with
encrypted parameters).

Everything foreign is kept here: no other module sees the TSS's types or exceptions. Needs the extra
``[tpm]`` and the TSS's C libraries.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from casemate.spec.errors import UsageError
from casemate.tee import errors

T = TypeVar("T")

TCTI: Final = "device:/dev/tpmrm0"
BANK: Final = "sha256"
PCRS: Final = tuple(range(24))
ATTEMPTS: Final = 5
_NV_CHUNK: Final = 512
_NV_MAX: Final = 1 << 16
_AUTH_READ: Final = 1 << 18  # TPMA_NV_AUTHREAD
_HANDLE: Final = 0x18B  # TPM_RC_HANDLE for the first handle: no such index or object
_POLICY: Final = (0x99D, 0x128)  # TPM_RC_POLICY_FAIL for session 1, TPM_RC_PCR_CHANGED

# TPM_RC_BAD_AUTH for session 1; TPM_RC_NV_AUTHORIZATION, TPM_RC_NV_UNINITIALIZED, TPM_RC_NV_RATE.
_BAD_AUTH: Final = (0x9A2, 0x149)
_UNWRITTEN: Final = 0x14A
_RATE: Final = 0x920
_RATE_SECONDS: Final = 0.5
CHAIN_BYTES: Final = 32

# The endorsement key: template L-2 of TCG's EK Credential Profile 2.x, B.3.4, whose policy is
# PolicySecret of the endorsement hierarchy.
_EK: Final = "ecc256:null:aes128cfb"
_EK_POLICY: Final = bytes.fromhex(
    "837197674484b3f81a90cc8d46a5d724fd52d76e06520b64f2a1da1b331469aa"
)

# Storage key of the owner's hierarchy, made again at every use from the TPM's own seed.
_STORAGE: Final = "ecc256:null:aes128cfb"
_SIGNING: Final = "ecc256:ecdsa-sha256:null"


@dataclass(frozen=True)
class Quote:
    """message: TPMS_ATTEST. signature: TPMT_SIGNATURE. pcrs: index to value, SHA-256 bank."""

    message: bytes
    signature: bytes
    pcrs: dict[int, bytes]


@dataclass(frozen=True)
class Ak:
    """An attestation key, good for any connection until the TPM restarts. handle: a persistent one,
    or 0; then ``context`` is the saved key. public: TPMT_PUBLIC. certificate: DER, or empty where
    the TPM has none. source: where it comes from, for people."""

    handle: int
    context: Any
    public: bytes
    certificate: bytes
    source: str


@dataclass(frozen=True)
class AkSource:
    """A cloud's place for its AK: a persistent handle, or a template (TPMT_PUBLIC) in an NV index
    from which the endorsement hierarchy makes it again; the certificate stands in an NV index."""

    name: str
    handle: int
    template: int
    certificate: int


AK_SOURCES: Final = (
    AkSource("Azure vTPM", 0x81000003, 0, 0x01C101D0),
    AkSource("Google Cloud vTPM, RSA", 0, 0x01C10001, 0x01C10000),
    AkSource("Google Cloud vTPM, ECC", 0, 0x01C10003, 0x01C10002),
)


def tss() -> Any:
    """The TSS's Python module. Raises ``usage.extra`` where it is not installed."""
    os.environ.setdefault("TSS2_LOG", "all+none")  # it would write its own lines to stderr
    try:
        import tpm2_pytss
    except (ImportError, OSError) as e:
        raise UsageError(
            "usage.extra",
            f"A TPM needs packages that are not installed ({str(e)[:80]}).",
            mend="On Debian run apt-get install libtss2-dev, then pip install 'casemate[tpm]'.",
            where="tpm",
        ) from None
    return tpm2_pytss


@contextmanager
def _said(what: str) -> Iterator[None]:
    """TSS exceptions as ``usage.tee-device``."""
    api = tss()
    try:
        yield
    except api.TSS2_Exception as e:
        raise errors.device(
            "tpm",
            f"The TPM fails at {what}: {str(e)[:120]}.",
            "See that no other process holds the TPM, and that its hierarchies have no passwords.",
        ) from None


def whole(data: bytes) -> bytes:
    """The DER element that ``data`` begins with: NV indices are often longer than what they
    hold."""
    if len(data) < 2 or data[0] != 0x30:
        return b""
    length, start = data[1], 2
    if length > 0x80:
        start = 2 + (length & 0x7F)
        length = int.from_bytes(data[2:start], "big")
    return data[: start + length] if len(data) >= start + length else b""


def digest(pcrs: dict[int, bytes]) -> bytes:
    """What a quote over these signs: SHA-256 of the values in the order of their indices."""
    return hashlib.sha256(b"".join(pcrs[i] for i in sorted(pcrs))).digest()


def selection(pcrs: Sequence[int]) -> str:
    return f"{BANK}:{','.join(map(str, pcrs))}"


class NotOurs(Exception):
    """An NV index that another has defined, or that asks for another authorisation."""


class Tpm:
    """An open connection, for one piece of work. Not for several threads at once."""

    def __init__(self, tcti: str = TCTI) -> None:
        """``tcti``: as ``TPM2TOOLS_TCTI``. Raises ``usage.extra`` and ``usage.tee-device``."""
        self._api = tss()
        with _said("opening"):
            self._esys = self._api.ESAPI(tcti)

    def __enter__(self) -> Tpm:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._esys.close()

    def nv(self, index: int) -> bytes | None:
        """What stands in an NV index, or None where it is not defined."""
        api, esys = self._api, self._esys
        try:
            handle = esys.tr_from_tpmpublic(index)
        except api.TSS2_Exception:
            return None
        with _said(f"reading NV index {index:#x}"):
            public = esys.nv_read_public(handle)[0].nvPublic
            size = int(public.dataSize)
            reader = handle if int(public.attributes) & _AUTH_READ else api.ESYS_TR.OWNER
            parts = [
                bytes(esys.nv_read(handle, min(_NV_CHUNK, size - at), at, auth_handle=reader))
                for at in range(0, min(size, _NV_MAX), _NV_CHUNK)
            ]
        return b"".join(parts)

    def _templated(self, source: AkSource) -> Any:
        """What makes a cloud's AK again, or None where this TPM has no template."""
        template = self.nv(source.template)
        if not template:
            return None
        with _said("reading the AK's template"):
            area, _ = self._api.TPMT_PUBLIC.unmarshal(template)
            return self._api.TPM2B_PUBLIC(publicArea=area)

    def _persistent(self, handle: int) -> Any:
        with suppress(self._api.TSS2_Exception):
            return self._esys.tr_from_tpmpublic(handle)
        return None

    def _transient(self, public: Any, certificate: bytes, source: str) -> Ak:
        """A key of the endorsement hierarchy, made, saved and let go of: a TPM without a resource
        manager has three places."""
        with _said("making an AK"):
            handle = self._esys.create_primary(None, public, self._api.ESYS_TR.ENDORSEMENT)[0]

            def saved(key: Any) -> Ak:
                area = self._esys.read_public(key)[0].publicArea.marshal()
                return Ak(0, self._esys.context_save(key), area, certificate, source)

            return self._flushed(handle, saved)

    def _placed(self, source: AkSource) -> Ak | None:
        """A cloud's AK, or None where this TPM has none."""
        if source.handle:
            handle = self._persistent(source.handle)
            if handle is None:
                return None
            with _said("reading the AK"):
                area = self._esys.read_public(handle)[0].publicArea.marshal()
            certificate = whole(self.nv(source.certificate) or b"")
            return Ak(source.handle, None, area, certificate, source.name)
        public = self._templated(source)
        if public is None:
            return None
        return self._transient(public, whole(self.nv(source.certificate) or b""), source.name)

    def ak(self, sources: Sequence[AkSource] = AK_SOURCES) -> Ak:
        """The cloud's AK where the TPM has one, else one made here, for which nobody vouches.

        What is made is a restricted signing key (ECC P-256, ECDSA with SHA-256) of the endorsement
        hierarchy, the same at every start.
        """
        for source in sources:
            found = self._placed(source)
            if found is not None:
                return found
        kind = self._api.TPMA_OBJECT
        attributes = (
            kind.SIGN_ENCRYPT | kind.RESTRICTED | kind.FIXEDTPM | kind.FIXEDPARENT
            | kind.SENSITIVEDATAORIGIN | kind.USERWITHAUTH
        )  # fmt: skip
        public = self._api.TPM2B_PUBLIC.parse(_SIGNING, objectAttributes=attributes)
        return self._transient(public, b"", "made here, without a certificate")

    @contextmanager
    def _loaded(self, ak: Ak) -> Iterator[Any]:
        if ak.handle:
            yield self._esys.tr_from_tpmpublic(ak.handle)
            return
        handle = self._esys.context_load(ak.context)
        try:
            yield handle
        finally:
            with suppress(self._api.TSS2_Exception):
                self._esys.flush_context(handle)

    def pcrs(self, wanted: Sequence[int] = PCRS) -> dict[int, bytes]:
        """Values of the SHA-256 bank; the TPM gives at most eight at a time."""
        out: dict[int, bytes] = {}
        left = sorted(wanted)
        with _said("reading PCRs"):
            while left:
                _, selected, values = self._esys.pcr_read(selection(left))
                bits = bytes(selected[0].pcrSelect) if len(selected) else b""
                got = [i for i in left if i // 8 < len(bits) and bits[i // 8] >> i % 8 & 1]
                if not got or len(got) != len(values):
                    raise errors.device(
                        "tpm", f"The TPM has no {BANK.upper()} bank of PCRs.",
                        "Have the firmware switch its SHA-256 bank on.",
                    )  # fmt: skip
                out.update(zip(got, map(bytes, values), strict=True))
                left = [i for i in left if i not in out]
        return out

    def quote(self, ak: Ak, qualifying: bytes) -> Quote:
        """A quote over all PCRs, and values that it is of: read again if they changed between.

        qualifying: up to 64 bytes, the quote's extraData.
        """
        for _ in range(ATTEMPTS):
            with _said("quoting"), self._loaded(ak) as key:
                message, signature = self._esys.quote(key, selection(PCRS), qualifying)
            values = self.pcrs()
            if bytes(message).endswith(digest(values)):
                return Quote(bytes(message), signature.marshal(), values)
        raise errors.device("tpm", "PCRs change faster than they can be read.")

    def _storage(self) -> Any:
        api = self._api
        kind = api.TPMA_OBJECT
        attributes = (
            kind.RESTRICTED | kind.DECRYPT | kind.FIXEDTPM | kind.FIXEDPARENT
            | kind.SENSITIVEDATAORIGIN | kind.USERWITHAUTH
        )  # fmt: skip
        return self._esys.create_primary(
            None, api.TPM2B_PUBLIC.parse(_STORAGE, objectAttributes=attributes), api.ESYS_TR.OWNER
        )[0]

    @contextmanager
    def _session(self, kind: str, key: Any, encrypted: str = "CONTINUESESSION") -> Iterator[Any]:
        """A session salted to ``key`` that hides its first parameter from the bus, of the command
        (DECRYPT) or of the response (ENCRYPT)."""
        api, esys = self._api, self._esys
        handle = esys.start_auth_session(
            key,
            api.ESYS_TR.NONE,
            getattr(api.TPM2_SE, kind),
            api.TPMT_SYM_DEF.parse("aes128cfb"),
            api.TPM2_ALG.SHA256,
        )
        try:
            flags = getattr(api.TPMA_SESSION, encrypted) | api.TPMA_SESSION.CONTINUESESSION
            esys.trsess_set_attributes(handle, flags)
            yield handle
        finally:
            with suppress(api.TSS2_Exception):
                esys.flush_context(handle)

    def _endorsement(self) -> tuple[Any, Any]:
        """The endorsement key's handle and its TPMT_PUBLIC, as sessions will be salted to."""
        api = self._api
        kind = api.TPMA_OBJECT
        attributes = (
            kind.FIXEDTPM | kind.FIXEDPARENT | kind.SENSITIVEDATAORIGIN | kind.ADMINWITHPOLICY
            | kind.RESTRICTED | kind.DECRYPT
        )  # fmt: skip
        public = api.TPM2B_PUBLIC.parse(_EK, objectAttributes=attributes, authPolicy=_EK_POLICY)
        public.publicArea.unique.ecc.x = public.publicArea.unique.ecc.y = bytes(32)
        made = self._esys.create_primary(None, public, api.ESYS_TR.ENDORSEMENT)
        return made[0], made[1].publicArea

    def ek(self) -> bytes:
        """The endorsement key (ECC P-256): SubjectPublicKeyInfo, DER. A TPM has it for life."""
        with _said("making the EK"):
            handle, area = self._endorsement()
            return self._flushed(handle, lambda _: bytes(area.to_der()))

    # A chain: an NV index of type EXTEND. Each extension makes SHA-256(value || data) of it.

    def _chain_public(self, index: int) -> Any:
        """Only its own authorisation reads and extends it; a wrong one locks nothing (NO_DA); it is
        never held back in RAM (no ORDERLY) and outlives restarts (no CLEAR_STCLEAR)."""
        api = self._api
        kind = api.TPMA_NV
        attributes = kind.AUTHREAD | kind.AUTHWRITE | kind.NO_DA
        return api.TPMS_NV_PUBLIC(
            nvIndex=index,
            nameAlg=api.TPM2_ALG.SHA256,
            attributes=attributes | api.TPM2_NT.EXTEND << kind.TPM2_NT_SHIFT,
            dataSize=CHAIN_BYTES,
        )

    def _index(self, index: int) -> Any:
        """Its handle, or None where it is not defined."""
        try:
            return self._esys.tr_from_tpmpublic(index)
        except self._api.TSS2_Exception as e:
            if e.rc == _HANDLE:
                return None
            raise

    def chain_state(self, index: int) -> str:
        """What a chain's index is, as anyone may see: absent, empty, written, or other (it is
        something else)."""
        with _said(f"looking at NV index {index:#x}"):
            handle = self._index(index)
            if handle is None:
                return "absent"
            public = self._esys.nv_read_public(handle)[0].nvPublic
        written = public.attributes & self._api.TPMA_NV.WRITTEN
        public.attributes &= ~self._api.TPMA_NV.WRITTEN
        if public.marshal() != self._chain_public(index).marshal():
            return "other"
        return "written" if written else "empty"

    def chain_define(self, index: int, auth: bytes) -> None:
        """Define a chain of this authorisation, which travels to the TPM encrypted to the EK. Its
        value is 32 zero bytes, and no value before the first extension."""
        api, esys = self._api, self._esys
        public = api.TPM2B_NV_PUBLIC(nvPublic=self._chain_public(index))

        def define(key: Any) -> None:
            with self._session("HMAC", key, "DECRYPT") as session:
                esys.nv_define_space(auth, public, session1=session)

        with _said(f"defining NV index {index:#x}"):
            self._flushed(self._endorsement()[0], define)

    def _chained(self, index: int, auth: bytes, work: Callable[[Any, Any], T]) -> T | None:
        """``work(handle, session)`` on a chain, or None where it is not defined. The session's HMAC
        is keyed by ``auth``. Raises :class:`NotOurs`."""
        state = self.chain_state(index)
        if state == "absent":
            return None
        if state == "other":
            raise NotOurs
        api = self._api
        with _said(f"using NV index {index:#x}"):
            handle = self._esys.tr_from_tpmpublic(index)
            self._esys.tr_set_auth(handle, auth)
            with self._session("HMAC", api.ESYS_TR.NONE) as session:
                try:
                    return work(handle, session)
                except api.TSS2_Exception as e:
                    if e.rc in _BAD_AUTH:
                        raise NotOurs from None
                    raise

    def chain_read(self, index: int, auth: bytes) -> bytes | None:
        """The value, 32 bytes, or None where there is none. Raises :class:`NotOurs`."""

        def read(handle: Any, session: Any) -> bytes | None:
            try:
                return bytes(self._esys.nv_read(handle, CHAIN_BYTES, session1=session))
            except self._api.TSS2_Exception as e:
                if e.rc == _UNWRITTEN:
                    return None
                raise

        return self._chained(index, auth, read)

    def chain_extend(self, index: int, auth: bytes, data: bytes) -> bool:
        """False where the index is not defined. A TPM that asks for a pause gets one. Raises
        :class:`NotOurs`."""

        def extend(handle: Any, session: Any) -> bool:
            for left in reversed(range(ATTEMPTS)):
                try:
                    self._esys.nv_extend(handle, data, session1=session)
                    break
                except self._api.TSS2_Exception as e:
                    if e.rc != _RATE or not left:
                        raise
                time.sleep(_RATE_SECONDS)
            return True

        return bool(self._chained(index, auth, extend))

    def _flushed(self, handle: Any, work: Callable[[Any], T]) -> T:
        try:
            return work(handle)
        finally:
            with suppress(self._api.TSS2_Exception):
                self._esys.flush_context(handle)

    def policy(self, pcrs: Sequence[int]) -> bytes:
        """The policy digest of TPM2_PolicyPCR over the present values."""
        api, esys = self._api, self._esys
        with _said("computing a policy"):
            handle = esys.start_auth_session(
                api.ESYS_TR.NONE, api.ESYS_TR.NONE, api.TPM2_SE.TRIAL, None, api.TPM2_ALG.SHA256
            )
            return self._flushed(handle, lambda session: self._policy(session, pcrs))

    def _policy(self, session: Any, pcrs: Sequence[int]) -> bytes:
        self._esys.policy_pcr(session, None, selection(pcrs))
        return bytes(self._esys.policy_get_digest(session))

    def seal(self, secret: bytes, pcrs: Sequence[int]) -> bytes:
        """``secret`` (up to 128 bytes) for this TPM while these PCRs are as now: both halves of the
        sealed object, each behind its own length."""
        policy = self.policy(pcrs)
        api = self._api
        kind = api.TPMA_OBJECT
        public = api.TPM2B_PUBLIC.parse(
            "keyedhash", objectAttributes=kind.FIXEDTPM | kind.FIXEDPARENT, authPolicy=policy
        )
        sensitive = api.TPM2B_SENSITIVE_CREATE(
            sensitive=api.TPMS_SENSITIVE_CREATE(data=api.TPM2B_SENSITIVE_DATA(secret))
        )

        def make(parent: Any) -> bytes:
            with self._session("HMAC", parent, "DECRYPT") as session:
                made = self._esys.create(parent, sensitive, public, session1=session)
            return bytes(made[0].marshal() + made[1].marshal())

        with _said("sealing"):
            return self._flushed(self._storage(), make)

    def unseal(self, sealed: bytes, pcrs: Sequence[int]) -> bytes | None:
        """What :meth:`seal` took, or None when the PCRs are others or the TPM is another."""
        api, esys = self._api, self._esys

        def load(parent: Any) -> Any:
            private, used = api.TPM2B_PRIVATE.unmarshal(sealed)
            public, _ = api.TPM2B_PUBLIC.unmarshal(sealed[used:])
            return esys.load(parent, private, public)

        def take(item: Any, parent: Any) -> bytes:
            with self._session("POLICY", parent, "ENCRYPT") as session:
                esys.policy_pcr(session, None, selection(pcrs))
                return bytes(esys.unseal(item, session1=session))

        def within(parent: Any) -> bytes | None:
            try:
                item = load(parent)
            except api.TSS2_Exception:
                return None  # another TPM's, or damaged: which, nobody can tell
            return self._flushed(item, lambda handle: _unless_policy(api, take, handle, parent))

        with _said("unsealing"):
            return self._flushed(self._storage(), within)


def _unless_policy(
    api: Any, take: Callable[[Any, Any], bytes], item: Any, parent: Any
) -> bytes | None:
    try:
        return take(item, parent)
    except api.TSS2_Exception as e:
        if e.rc in _POLICY:
            return None
        raise
