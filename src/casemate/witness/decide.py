"""What a witness answers to add-checkpoint (C2SP tlog-witness), from what it cosigned and which
logs it knows: no clock, no disk, no key."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from casemate.seal import checkpoint, note
from casemate.seal.checkpoint import Checkpoint, Request
from casemate.seal.note import Note, Verifier
from casemate.spec import merkle
from casemate.spec.errors import FormatError, ReceiptError

TEXT: Final = "text/plain; charset=utf-8"
SIZE: Final = "text/x.tlog.size"
Suspicion: TypeAlias = Literal["", "fork", "unproven"]


@dataclass(frozen=True, slots=True)
class Answer:
    """An HTTP answer: status, content type, body."""

    status: int
    kind: str
    body: bytes


@dataclass(frozen=True, slots=True)
class Accepted:
    """The head to keep, and the checkpoint with the log's own line, to cosign."""

    head: Checkpoint
    signed: Note


@dataclass(frozen=True, slots=True)
class Refused:
    """``suspicion``: what ``log`` signed here cannot stand beside what was cosigned before
    (``fork``: two roots of one size; ``unproven``: the proof given does not lead from one to the
    other, which may be its sender's fault)."""

    answer: Answer
    suspicion: Suspicion = ""
    log: Verifier | None = None


@dataclass(frozen=True, slots=True)
class Case:
    """A request of a known log, signed by it, beside the newest head that was cosigned."""

    request: Request
    head: Checkpoint
    held: Checkpoint | None

    @property
    def known(self) -> int:
        return self.held.size if self.held is not None else 0

    @property
    def forked(self) -> bool:
        """Two roots of one size, both signed by the log."""
        return self.held is not None and self.held.size == self.head.size and (
            self.held.root != self.head.root
        )  # fmt: skip

    @property
    def unproven(self) -> bool:
        root = self.held.root if self.held is not None else merkle.EMPTY
        try:
            merkle.check_consistency(
                self.request.old, root, self.head.size, self.head.root, self.request.proof
            )
        except ValueError:
            return True
        return False

    def suspicion(self, status: int) -> Suspicion:
        """What a refusal with this status says against the log."""
        if self.forked:
            return "fork"
        return "unproven" if status == 422 and self.held is not None else ""


Rule: TypeAlias = tuple[int, str, Callable[[Case], bool]]
#: In the specification's order: the status and words of a refusal, and when it is given.
RULES: Final[tuple[Rule, ...]] = (
    (400, "The old size is above the checkpoint's.", lambda c: c.request.old > c.head.size),
    (409, "The old size is not that of the newest cosigned.", lambda c: c.request.old != c.known),
    (409, "Another root of this size was cosigned.", lambda c: c.forked),
    (422, "The consistency proof does not verify.", lambda c: c.unproven),
)


def refuse(status: int, words: str) -> Answer:
    """A refusal in words."""
    return Answer(status, TEXT, f"{words}\n".encode())


def _no(status: int, words: str) -> Refused:
    return Refused(refuse(status, words))


def decide(
    heads: Mapping[str, Checkpoint], body: bytes, logs: Mapping[str, Verifier]
) -> Accepted | Refused:
    """The decision on a request's ``body``. ``heads``: the newest head cosigned, by origin;
    ``logs``: the keys of the logs that are watched, by origin."""
    try:
        request = checkpoint.read_request(body)
        head = checkpoint.head(request.signed.text)
    except FormatError as e:
        return _no(400, e.message)
    log = logs.get(head.origin)
    if log is None:
        return _no(404, "This witness does not know the log.")
    try:
        note.verify(request.signed, [log])
    except ReceiptError as e:
        return _no(403, e.message)
    case = Case(request, head, heads.get(head.origin))
    for status, words, broken in RULES:
        if broken(case):
            conflict = Answer(409, SIZE, b"%d\n" % case.known)
            return Refused(
                conflict if status == 409 else refuse(status, words), case.suspicion(status), log
            )
    own = next(x for x in request.signed.lines if (x.name, x.id) == (log.name, log.id))
    return Accepted(head, Note(request.signed.text, (own,)))
