"""A participant's keys and the file that keeps them.

Ed25519 signs requests and approvals (RFC 8032); ML-KEM-768+X25519 receives results. The file is
canonical JSON, mode 0600, written whole or not at all and never over another. With a passphrase the
secrets stand under AES-256-GCM with a key by scrypt (RFC 7914), bound to the public half.
"""

from __future__ import annotations

import os
import stat
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from casemate.seal import hpke
from casemate.seams import OsRng, Rng
from casemate.spec import codec
from casemate.spec.codec import value
from casemate.spec.errors import AuthError, FormatError, UsageError
from casemate.spec.identity import PublicIdentity

SECRET_BYTES: Final = 32 + hpke.SECRET_BYTES
SCRYPT_LOG_N: Final = 17  # 128 MiB, about a third of a second
_MAX_FILE: Final = 1 << 16


@value("identity-file/v1")
class IdentityFile:
    """``secret``: the Ed25519 seed (32) and the seal key's secret (96); with ``salt``, a GCM nonce
    (12) and these encrypted under scrypt(passphrase, salt, N = 2^log_n, r = 8, p = 1)."""

    public: PublicIdentity
    salt: bytes | None
    log_n: int
    secret: bytes

    def __post_init__(self) -> None:
        if len(self.secret) != SECRET_BYTES + (28 if self.salt is not None else 0):
            raise ValueError("the secret has the wrong length")
        if self.salt is not None and (len(self.salt) != 16 or not 14 <= self.log_n <= 20):
            raise ValueError("the passphrase's parameters are out of range")


def _wrapping(passphrase: str, salt: bytes, log_n: int) -> AESGCM:
    return AESGCM(Scrypt(salt, 32, 2**log_n, 8, 1).derive(passphrase.encode("utf-8")))


def _read_private(path: Path) -> bytes:
    """A file's bytes, only if nobody but its owner can read or write it."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as e:
        raise UsageError(
            "usage.identity-file",
            f"The identity file {path} cannot be read: {e.strerror}.",
            mend="Make one with 'casemate identity new', or name another.",
            where=str(path),
        ) from None
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode) or info.st_size > _MAX_FILE:
            raise FormatError(
                "format.identity-file",
                f"{path} is no identity file.",
                mend="Name the file that 'casemate identity new' made.",
                where=str(path),
            )
        if info.st_mode & 0o077 or info.st_uid not in (0, os.geteuid()):
            raise AuthError(
                "auth.identity-exposed",
                f"Others can read or change {path} (mode {info.st_mode & 0o777:04o}).",
                mend=f"Run 'chmod 600 {path}'; if others may have read it, make a new identity.",
                where=str(path),
            )
        return os.read(fd, _MAX_FILE)
    finally:
        os.close(fd)


@dataclass(frozen=True, slots=True)
class Identity:
    """Private keys with their public half; ``id`` names them."""

    public: PublicIdentity
    _secret: bytes = field(repr=False)
    _sign: Ed25519PrivateKey = field(repr=False, compare=False)
    _seal: hpke.SealKey = field(repr=False, compare=False)

    @staticmethod
    def generate(name: str, rng: Rng | None = None) -> Identity:
        """Fresh keys. Raises UsageError ``usage.identity-name`` for an impossible name."""
        return _from_secret(name, (rng or OsRng()).bytes(SECRET_BYTES))

    @property
    def id(self) -> str:
        return self.public.id

    @property
    def name(self) -> str:
        return self.public.name

    def sign(self, message: bytes) -> bytes:
        """Ed25519 signature, 64 bytes."""
        return self._sign.sign(message)

    def open(self, message: bytes, *, info: bytes) -> bytes:
        """See :meth:`casemate.seal.hpke.SealKey.open`."""
        return self._seal.open(message, info=info)

    def derive(self, label: bytes) -> bytes:
        """32 bytes that only this identity can make, the same for the same label: HKDF-SHA256 (RFC
        5869) of its secret, ``label`` as info."""
        return HKDF(hashes.SHA256(), 32, b"casemate/identity/derive/v1", label).derive(self._secret)

    def save(self, path: str | Path, passphrase: str | None = None) -> None:
        """Write a new file, mode 0600; UsageError ``usage.identity-exists`` if one is there."""
        path = Path(path)
        salt, log_n, secret = None, 0, self._secret
        if passphrase is not None:
            if not passphrase:
                raise UsageError(
                    "usage.passphrase",
                    "The passphrase is empty.",
                    mend="Give a passphrase, or none to keep the file unencrypted.",
                )
            salt, log_n, nonce = os.urandom(16), SCRYPT_LOG_N, os.urandom(12)
            wrapping = _wrapping(passphrase, salt, log_n)
            secret = nonce + wrapping.encrypt(nonce, secret, codec.encode(self.public))
        content = IdentityFile(public=self.public, salt=salt, log_n=log_n, secret=secret)
        _write_new(path, codec.encode(content) + b"\n")

    @staticmethod
    def load(path: str | Path, passphrase: str | None = None) -> Identity:
        """Read a file that :meth:`save` wrote.

        Raises AuthError ``auth.identity-exposed`` (others can read it), ``auth.passphrase`` (needed
        or wrong), FormatError for another form, UsageError ``usage.identity-file`` if unreadable.
        """
        path = Path(path)
        data = _read_private(path)
        content = codec.decode(IdentityFile, data.removesuffix(b"\n"), limit=_MAX_FILE)
        secret = content.secret
        if content.salt is not None:
            if passphrase is None:
                raise AuthError(
                    "auth.passphrase",
                    f"The identity file {path} needs a passphrase.",
                    mend="Give it, for example in CASEMATE_PASSPHRASE.",
                    where=str(path),
                )
            wrapping = _wrapping(passphrase, content.salt, content.log_n)
            try:
                secret = wrapping.decrypt(secret[:12], secret[12:], codec.encode(content.public))
            except InvalidTag:
                raise AuthError(
                    "auth.passphrase",
                    f"The passphrase does not open {path}.",
                    mend="Type it again; a lost one cannot be recovered.",
                    where=str(path),
                ) from None
        identity = _from_secret(content.public.name, secret)
        if identity.public != content.public:
            raise FormatError(
                "format.identity-file",
                f"The keys in {path} do not belong together.",
                mend="Restore the file from a backup, or make a new identity.",
                where=str(path),
            )
        return identity


def _from_secret(name: str, secret: bytes) -> Identity:
    sign = Ed25519PrivateKey.from_private_bytes(secret[:32])
    seal = hpke.from_secret(secret[32:])
    try:
        public = PublicIdentity(
            name=name, sign_key=sign.public_key().public_bytes_raw(), seal_key=seal.public
        )
        codec.encode(public)
    except (ValueError, FormatError) as e:
        raise UsageError(
            "usage.identity-name",
            f"{name[:80]!r} cannot name an identity: {e}.",
            mend="Use 1 to 80 printable characters.",
        ) from None
    return Identity(public, secret, sign, seal)


def _write_new(path: Path, data: bytes) -> None:
    """Write whole or not at all; never over another file."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd, temporary = tempfile.mkstemp(prefix=".identity-", dir=path.parent)  # mode 0600
        try:
            with os.fdopen(fd, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.link(temporary, path)  # unlike rename, fails if the name is taken
        finally:
            os.unlink(temporary)  # noqa: PTH108
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except FileExistsError:
        raise UsageError(
            "usage.identity-exists",
            f"{path} exists; an identity is never overwritten, its keys would be lost.",
            mend="Name another file, or move this one away.",
            where=str(path),
        ) from None
    except OSError as e:
        raise UsageError(
            "usage.identity-file",
            f"The identity file {path} cannot be written: {e.strerror}.",
            mend="Name a file in a folder that you may write to.",
            where=str(path),
        ) from None
