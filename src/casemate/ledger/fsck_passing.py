"""What ``fsck`` replays of states that pass on: consents, recoveries, key rotation, hand-over."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from casemate.ledger import fsck_budget as budgets
from casemate.ledger import fsck_notes as notes
from casemate.spec import canonical, codec
from casemate.spec.consent import (
    CONSENT_TYPE,
    Consented,
    HandedOver,
    Recovered,
    RecoveryConsent,
    Rotated,
    SoftwareConsent,
)
from casemate.spec.errors import CasemateError
from casemate.spec.identity import PublicIdentity
from casemate.spec.log import Reserved, Started
from casemate.spec.receipt import LogEntry

if TYPE_CHECKING:
    from casemate.ledger.fsck_replay import Replay, Rows

_RECOVERY: Final = "recovery"
# What a recovery writes in one transaction, after the entry that it begins with.
_RECOVERING: Final = ("abandon", "consent")
# What may stand between a hand-over and the successor's first start: its operator's commands.
_BEFORE_START: Final = (*_RECOVERING, "recover", "rotate", "handover", "start")
_FORMATS: Final = {"consent-software/v1": SoftwareConsent, "consent-recovery/v1": RecoveryConsent}


@dataclass
class Passing:
    """``origins``: of each generation of the log's key, with where it ended. ``frozen``: (dataset,
    what was accepted). ``consents``: to which measurement each dataset may pass. ``unsaid``: no
    owner has consented yet to the last recovery."""

    origins: list[tuple[str, int | None]] = field(default_factory=list)
    running: str | None = None
    generation: int = 0
    frozen: set[tuple[str, str]] = field(default_factory=set)
    consents: dict[str, str] = field(default_factory=dict)
    recovered: Recovered | None = None
    began: int = 0
    unsaid: bool = False
    handed: HandedOver | None = None
    handed_at: int | None = None
    without: set[str] = field(default_factory=set)

    def origin(self, sequence: int) -> str:
        """The log's name when it got this entry."""
        names = [o for o, ended in self.origins if ended is None or sequence < ended]
        return names[0] if names else ""


def read_keys(replay: Replay, rows: Rows) -> None:
    """The names that the log had."""
    for generation, origin, key, ended in rows("SELECT * FROM log_keys ORDER BY generation"):
        public = replay.keys[origin] = notes.public(key)
        replay.expect(
            generation == len(replay.passing.origins) + 1
            and origin.endswith(hashlib.sha256(public).hexdigest()[:32]),
            f"the log's key {generation} is not the one of its name",
        )
        replay.passing.origins.append((origin, ended))


def _live(replay: Replay) -> set[str]:
    return {name for name, dataset in replay.datasets.items() if not dataset.revoked}


def before(replay: Replay, entry: LogEntry, body: Any) -> Iterator[str]:
    """What no entry of any kind may do after another one."""
    passing = replay.passing
    if passing.handed is not None and entry.kind not in _BEFORE_START:
        yield "it was written after the state had been handed over"
    if passing.unsaid and entry.kind not in _RECOVERING:
        yield "no owner consented to the recovery before it"
    if entry.kind in ("reserve", "commit"):
        frozen = {name for name, _ in passing.frozen}
        yield from (f"{name} is frozen" for name in sorted(_uses(replay, entry, body) & frozen))
    if entry.kind in ("takeover", "commit"):
        job = replay.jobs.get(entry.subject)
        if job is not None and job.sequence < passing.began:
            yield "its job was reserved before the recovery"


def _uses(replay: Replay, entry: LogEntry, body: Any) -> set[str]:
    if isinstance(body, Reserved):
        return {d.dataset for d in body.debits}
    job = replay.jobs.get(entry.subject)
    return set() if job is None else {d.dataset for d in job.reserved.debits}


def start(replay: Replay, body: Started) -> Iterator[str]:
    """Datasets whose owners did not accept another measurement are frozen."""
    passing = replay.passing
    if passing.handed is not None and passing.handed.measurement != body.measurement:
        yield "this is not the software that the state was handed to"
    passing.handed = None
    old, new = passing.running, body.measurement
    if old == new:
        return
    if old is not None:
        waiting = {name for name, accepted in passing.frozen if accepted != _RECOVERY}
        passing.frozen |= {(name, old) for name in _live(replay) - waiting}
    agreed = {name for name, measurement in passing.consents.items() if measurement == new}
    passing.frozen = {
        (name, accepted)
        for name, accepted in passing.frozen
        if accepted == _RECOVERY or (accepted != new and name not in agreed)
    }
    passing.consents = {n: m for n, m in passing.consents.items() if m != new}
    passing.running = new


def consent(replay: Replay, entry: LogEntry, body: Consented) -> Iterator[str]:
    """An owner's signature, for the present log or for the recovery that it went through."""
    owner = PublicIdentity(name="-", sign_key=body.sign_key, seal_key=body.seal_key).id
    try:
        payload = notes.envelope(body.envelope, CONSENT_TYPE, body.sign_key) or b""
        named: Any = canonical.decode(payload)
        signed: Any = codec.decode(_FORMATS[named["type"]], payload)
    except (CasemateError, KeyError, TypeError):
        yield "its signature or its form does not hold"
        return
    dataset = replay.datasets.get(signed.dataset)
    if dataset is None or dataset.owner != owner or dataset.revoked:
        yield "it is not the word of the owner of a dataset"
    elif isinstance(signed, SoftwareConsent):
        yield from _to_software(replay, entry, signed)
    else:
        yield from _to_recovery(replay, signed)


def _to_software(replay: Replay, entry: LogEntry, signed: SoftwareConsent) -> Iterator[str]:
    passing = replay.passing
    if signed.origin != passing.origin(entry.sequence):
        yield "it is for another log"
    passing.consents.pop(signed.dataset, None)
    if signed.measurement and signed.measurement == passing.running:
        passing.frozen = {
            (name, accepted)
            for name, accepted in passing.frozen
            if name != signed.dataset or accepted == _RECOVERY
        }
    if signed.measurement:
        passing.consents[signed.dataset] = signed.measurement


def _to_recovery(replay: Replay, signed: RecoveryConsent) -> Iterator[str]:
    passing, row = replay.passing, (signed.dataset, _RECOVERY)
    last = passing.recovered
    if last is None or (last.head, last.origin) != (signed.head, signed.next):
        yield "it is for another recovery"
    if row not in passing.frozen:
        yield "its dataset does not wait for it"
    passing.frozen.discard(row)
    passing.unsaid = False
    lineage = replay.lineages[replay.datasets[signed.dataset].lineage]
    account, charge = lineage.accounts[""], signed.charge
    if signed.rest:
        charge = budgets.rest(lineage.budget, account.rdp_nano, account.delta_femto)
        account.slack += budgets.CAPACITY_SLACK
    if charge is not None and not budgets.possible(charge):
        yield "its charge is none of the filter's"
    elif charge is not None:
        account.add(charge)


def recover(replay: Replay, entry: LogEntry, body: Recovered) -> Iterator[str]:
    """The log goes on under a new name; everything waits for the owners."""
    passing = replay.passing
    head = body.head
    if (head.origin, head.size) != (passing.origin(entry.sequence - 1), entry.sequence):
        yield "it does not stand where the log before it ended"
    if head.root != notes.tree(replay.leaves):
        yield "the head that it names is not the one over the entries before it"
    if body.origin != passing.origin(entry.sequence) or body.origin == head.origin:
        yield "it names another log than the one that goes on"
    if not body.origin.endswith(hashlib.sha256(body.key).hexdigest()[:32]):
        yield "the log's new name is not that of its key"
    if body.newest is not None and not signed_by(replay, head.origin, body.newest):
        yield "the later checkpoint that it names is none of the log before it"
    passing.recovered, passing.began = body, entry.sequence
    passing.unsaid = bool(_live(replay))
    passing.frozen |= {(name, _RECOVERY) for name in _live(replay)}
    passing.consents = {}
    replay.verdicts = {}


def signed_by(replay: Replay, origin: str, signed: str) -> bool:
    """Whether a signed note is a checkpoint by this log under its name ``origin``."""
    text = signed.rpartition("\n\n")[0] + "\n"
    by = notes.Signer(origin, notes.LOG, replay.keys.get(origin, b""))
    return text.startswith(f"{origin}\n") and notes.note(text, signed, by)


def rotate(replay: Replay, entry: LogEntry, body: Rotated) -> Iterator[str]:
    """The store's key goes forward."""
    if body.generation <= replay.passing.generation:
        yield "the key did not go forward"
    replay.passing.generation = body.generation


def forget(replay: Replay, dataset: str) -> None:
    """Its key is gone: nothing waits any more."""
    replay.passing.consents.pop(dataset, None)
    replay.passing.frozen = {row for row in replay.passing.frozen if row[0] != dataset}


def handover(replay: Replay, entry: LogEntry, body: HandedOver) -> Iterator[str]:
    """Only what its owners signed for passes on."""
    passing = replay.passing
    agreed = {name for name, m in passing.consents.items() if m == body.measurement}
    dropped = set(body.dropped)  # also of owners who agreed under a trust policy that did not hold
    if not dropped <= _live(replay):
        yield "it dropped what was not there"
    passing.without = _live(replay) - dropped - agreed
    for name in dropped & replay.datasets.keys():
        replay.datasets[name].revoked = True
        forget(replay, name)
    if body.measurement == passing.running:
        passing.consents = {n: m for n, m in passing.consents.items() if m != passing.running}
    replay.void(dropped)
    passing.generation = 0  # under the successor's own keys
    passing.handed, passing.handed_at = body, entry.sequence


def compare(replay: Replay, rows: Rows) -> None:
    """The tables of states that pass on."""
    passing = replay.passing
    frozen = set(rows("SELECT dataset, accepted FROM frozen"))
    replay.expect(frozen == passing.frozen, "what is frozen is not what the log says")
    consents: dict[str, str] = dict(rows("SELECT dataset, measurement FROM consents"))
    replay.expect(consents == passing.consents, "consents are not those of the log")
    replay.expect(not passing.unsaid, "no owner consented to the last recovery")
    ends = [ended for _, ended in passing.origins]
    began = [] if passing.recovered is None else [passing.began]
    replay.expect(
        ends[-1:] in ([], [None]) and ends[-2:-1] == began and None not in ends[:-1],
        "the log's keys are not those of its recoveries",
    )
    handed = [entry for (entry,) in rows("SELECT entry FROM handed_over")]
    last = [passing.handed_at] if passing.handed_at == replay.entries - 1 else []
    replay.expect(handed in ([], last), "the mark of a hand-over is not where the log ends")
    states: dict[str, str] = dict(rows("SELECT id, state FROM datasets"))
    for name in sorted(passing.without & _live(replay)):
        replay.expect(
            states.get(name) == "refused", f"dataset {name} was handed over without consent"
        )
