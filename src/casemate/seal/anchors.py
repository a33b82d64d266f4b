"""An anchor as a plain file: checkpoints of one log, one behind the other, each with the proof that
it extends the one before.

The text is a head, the log's vkey, and for each checkpoint an empty line and what a witness is
asked (C2SP tlog-witness, add-checkpoint)::

    casemate.dev/anchor@v1
    casemate.dev/log/5f1c…+c7a9f0d2+AQ…

    old 0

    casemate.dev/log/5f1c…
    12
    G4…=

    — casemate.dev/log/5f1c… …=

    old 12
    zR…=
    …

A file has one spelling, so that it can be printed, hashed or kept in a repository of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from casemate.seal import checkpoint, note
from casemate.seal.checkpoint import Checkpoint, Request
from casemate.seal.note import Note, Verifier
from casemate.spec.errors import FormatError

HEAD: Final = "casemate.dev/anchor@v1"
MAX_BYTES: Final = 16 << 20
_BETWEEN: Final = "\n\nold "


@dataclass(frozen=True, slots=True)
class Anchor:
    """An anchor that holds: whose log it is, and what was posted, the oldest first."""

    log: Verifier
    posts: tuple[Request, ...] = ()

    @property
    def heads(self) -> tuple[Checkpoint, ...]:
        return tuple(checkpoint.read(p.signed.text) for p in self.posts)

    def __str__(self) -> str:
        """The file's text."""
        return "\n".join([f"{HEAD}\n{self.log}\n", *map(str, self.posts)])


def post(anchor: Anchor, signed: Note, proof: Sequence[bytes]) -> Anchor:
    """With one checkpoint more: signed by the log, of a greater size than the last, and extending
    it by ``proof`` (RFC 9162, 2.1.4; nothing for the first).

    Raises ``ReceiptError``: ``receipt.note-*`` for another's signature, ``receipt.fork``.
    ``FormatError`` ``format.anchor`` for one that is no newer.
    """
    last = anchor.heads[-1] if anchor.posts else None
    request = Request(last.size if last else 0, tuple(proof), signed)
    _check(anchor.log, last, request)
    return Anchor(anchor.log, (*anchor.posts, request))


def _check(log: Verifier, last: Checkpoint | None, post: Request) -> Checkpoint:
    """The head of a post that may follow ``last``."""
    head, size = checkpoint.verify(post.signed, log), last.size if last else 0
    if post.old != size or head.size <= size:
        said = f"from {post.old} entries to {head.size} follows one of {size}"
        raise _form(f"A checkpoint {said}.", str(head.size))
    if last is not None:
        checkpoint.check_extends(last, head, post.proof)
    elif post.proof:
        raise _form("The first checkpoint has nothing to extend.", str(head.size))
    return head


def read(data: bytes) -> Anchor:
    """The anchor in a file, all of it verified. Raises as :func:`post`; ``FormatError``
    ``format.anchor`` for another form."""
    if len(data) > MAX_BYTES:
        raise _form(f"An anchor's file has at most {MAX_BYTES} bytes.")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise _form("An anchor's file is UTF-8.") from None
    start, *parts = text.removesuffix("\n").split(_BETWEEN)
    name, _, vkey = start.partition("\n")
    if name != HEAD:
        raise _form(f"An anchor's file begins with {HEAD}.")
    log = note.verifier(vkey)
    if log.kind != note.SIGNATURE:
        raise _form("The key of an anchor is a log's, which signs its checkpoints.", vkey[:60])
    posts = [checkpoint.read_request(f"old {part}\n".encode()) for part in parts]
    last: Checkpoint | None = None
    for each in posts:
        last = _check(log, last, each)
    if str(found := Anchor(log, tuple(posts))) != text:
        raise _form("The file is cut short, or has another spelling than its own.")
    return found


def _form(message: str, where: str = "") -> FormatError:
    return FormatError(
        "format.anchor",
        message,
        mend="Get the file again from where it is published, unchanged.",
        where=where,
    )
