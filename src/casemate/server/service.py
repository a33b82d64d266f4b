"""What every handler works with: one object a running server, one small object a request."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

from casemate.ledger import log
from casemate.ledger.store import Store
from casemate.seal import note, stream
from casemate.seams import Clock, Disk, Rng
from casemate.server.attestation import Attester
from casemate.server.config import Config
from casemate.server.keys import BootKeys
from casemate.server.logs import Log
from casemate.server.metrics import Metrics
from casemate.server.pool import Pool
from casemate.server.publish import Publisher
from casemate.server.throttle import Nonces, Throttle
from casemate.server.uploads import Uploads
from casemate.spec import codec
from casemate.spec.errors import AuthError, FormatError, LedgerError, LimitError
from casemate.spec.evidence import Attestation
from casemate.tee import Tee

if TYPE_CHECKING:
    from casemate.server.inference import Inference
    from casemate.server.queue import Queue


JSON: Final = "application/json"
# Items in one answer of a listing that grows with what others bring.
PAGE: Final = 100
_FINAL: Final = frozenset({"ledger.stopped", "ledger.rolled-back"})
# Checkpoints that clients sent and that held, so that each is looked at once.
_REMEMBERED: Final = 4096


@dataclass(slots=True, kw_only=True)
class Service:
    """The parts of a running server."""

    config: Config
    clock: Clock
    rng: Rng
    disk: Disk
    tee: Tee
    keys: BootKeys
    store: Store
    log: Log
    metrics: Metrics
    attester: Attester
    boot_attestation: Attestation
    uploads: Uploads
    pool: Pool
    publisher: Publisher
    nonces: Nonces
    throttles: Mapping[str, Throttle]
    queue: Queue = field(init=False)
    inference: Inference = field(init=False)
    stop: Callable[[], None] = lambda: None
    broken: LedgerError | None = None
    held: set[str] = field(default_factory=set)

    def require_whole(self) -> None:
        """Nothing is answered from a state that was found stopped or rolled back. Raises what was
        found: the server ends a moment later."""
        if self.broken is not None:
            raise self.broken

    def remembers(self, text: str) -> None:
        """A client has seen this checkpoint (a signed note): the log must extend it. Raises
        ``ledger.rolled-back``, after which this server serves nobody."""
        self.require_whole()
        if text in self.held:
            return
        log.check(self.store, note.parse(text))
        if len(self.held) >= _REMEMBERED:
            self.held.clear()
        self.held.add(text)

    def require_worker_memory(self, size: int) -> None:
        """An upload of ``size`` bytes fits a worker, before one is started for it. Raises
        ``limit.memory``."""
        if size > self.config.worker_memory:
            raise LimitError(
                "limit.memory",
                f"The upload has {size} bytes where a worker may hold {self.config.worker_memory}.",
                mend="Make the model or the dataset smaller, or ask the operator.",
                where="upload",
            )

    def model_key(self, sealed: bytes, info: bytes) -> bytes:
        """The stream key of an uploaded model, as its owner sealed it with ``info``. Raises
        ``format.sealed``."""
        key = self.keys.hpke.open(sealed, info=info)
        if len(key) != stream.KEY_BYTES:
            raise FormatError(
                "format.sealed",
                "The sealed key is not a stream key of 32 bytes.",
                mend="Seal the model with casemate.",
                where="sealed_key",
            )
        return key

    def watch(self, error: BaseException) -> None:
        """Leave when the store has stopped (crash, start again, read what the disk holds), and when
        someone has seen more of the log than is here."""
        if isinstance(error, LedgerError) and error.code in _FINAL:
            self.broken = self.broken or error
            self.stop()


@dataclass(frozen=True, slots=True)
class Call:
    """A request that was let in. ``id``: the resource in its path, or ``""``; ``body``: decoded."""

    service: Service
    caller: str
    id: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: Any

    def require_named(self, what: str, role: str, named: str, act: str) -> None:
        """Who signs is whom the body names. Raises ``auth.forbidden``."""
        if named != self.caller:
            raise AuthError(
                "auth.forbidden",
                f"The {what} names another {role} than the one who signs.",
                mend=f"{act} with the {role}'s own identity.",
                where=role,
                status=403,
            )


def whole(text: str) -> int | None:
    """A whole number of at most 15 ASCII digits, as a header or a query may hold; else ``None``."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= 15 else None


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer that is not a value in JSON: octets, text, or headers alone."""

    content: bytes | AsyncIterator[bytes] = b""
    media: str = "application/octet-stream"
    headers: Mapping[str, str] = field(default_factory=dict)


class _Item(Protocol):
    @property
    def id(self) -> str: ...


T = TypeVar("T", bound=_Item)


def page(
    call: Call,
    look: Callable[[Store, str, str, int], Sequence[T]],
    show: Callable[[Service, T, str], Any],
) -> Reply:
    """The next items that ``look`` finds behind the id in ``after``, and a link to what follows
    (RFC 8288)."""
    service, caller = call.service, call.caller
    found = look(service.store, caller, call.query.get("after", ""), PAGE)
    more = {"link": f'<?after={found[-1].id}>; rel="next"'} if len(found) == PAGE else {}
    return Reply(codec.encode(tuple(show(service, x, caller) for x in found)), JSON, more)
