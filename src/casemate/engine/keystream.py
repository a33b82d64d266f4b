"""The engine's only randomness: AES-256-CTR keystreams under a fresh key (P4).

A job's 32-byte key never leaves the worker. Each purpose has its own AES key (HKDF-SHA256, RFC
5869); within a purpose the 16-byte counter block is the step (8 bytes, big endian) and the block
number within the step (8 bytes), so that no block is ever used twice (NIST SP 800-38A, appendix B).
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

KEY_BYTES: Final = 32
BLOCK: Final = 16


def subkey(key: bytes, purpose: str) -> bytes:
    """The AES key of one purpose."""
    if len(key) != KEY_BYTES:
        raise ValueError(f"the generator's key must have {KEY_BYTES} bytes")
    info = f"casemate/engine/{purpose}/v1".encode()
    return HKDF(SHA256(), KEY_BYTES, salt=None, info=info).derive(key)


def check_range(step: int, first: int, count: int) -> None:
    """Raises ``ValueError`` where a counter would leave its 8 bytes."""
    if not (0 <= step < 2**64 and first >= 0 and first + count <= 2**64):
        raise ValueError("step and block numbers must fit 64 bits")


def blocks(key: bytes, step: int, first: int, count: int) -> bytes:
    """``count`` 16-byte blocks of ``step``'s stream, from block number ``first``."""
    check_range(step, first, count)
    counter = step.to_bytes(8, "big") + first.to_bytes(8, "big")
    out = Cipher(algorithms.AES(key), modes.CTR(counter)).encryptor()
    return out.update(bytes(BLOCK * count)) + out.finalize()


def scattered(key: bytes, step: int, numbers: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint8]:
    """The blocks of these numbers (n,) of ``step``'s stream, (n, 16): those of :func:`blocks`,
    since a block of CTR is its counter enciphered."""
    check_range(step, 0, 0)
    counters = np.empty((len(numbers), 2), dtype=">u8")
    counters[:, 0], counters[:, 1] = step, numbers
    # Counters never repeat, so that no two plain blocks of this ECB are the same.
    out = Cipher(algorithms.AES(key), modes.ECB()).encryptor()
    made = out.update(counters.tobytes()) + out.finalize()
    return np.frombuffer(made, dtype=np.uint8).reshape(-1, BLOCK)


def words(key: bytes, step: int, first: int, count: int) -> npt.NDArray[np.uint64]:
    """``count`` blocks as 2 * ``count`` uniform 64-bit words (little endian)."""
    return np.frombuffer(blocks(key, step, first, count), dtype="<u8")
