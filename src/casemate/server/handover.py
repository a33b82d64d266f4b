"""A software upgrade: the state passes to another enclave, by files (docs/adr/0011).

 1. The successor, new software on its own machine or on the same disk, shows evidence over

        SHA-512( item("casemate/handover/v1") item(HPKE key) item(server policy) item(anchor) )

    as a ``HandoverRequest`` (:func:`request`). item(x): its length in 4 bytes, big endian, x. The
    HPKE key follows from its sealing key, so that only this software on this machine can open what
    is sealed to it, at any later start too, and a crash loses nothing.
 2. The predecessor verifies the evidence, for each dataset, under the trust policy that its owner
    signed for that measurement (:func:`give`); destroys the keys of the datasets whose owners did
    not; writes the store under a fresh key, sealed to the HPKE key; and never starts again.
 3. The successor opens the key and takes the store over under its own (:func:`take`).

Uploads, results and training states stay where they lie: they are sealed under keys that only the
store has. A host that copies the files of 1 and 2 learns nothing. What it can do is to keep an
older copy of the predecessor: that is a rollback as any other, and found as any other.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Final

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from casemate.attest.binding import carried, item
from casemate.attest.trust import Trust
from casemate.attest.verdict import Checks, refusal
from casemate.attest.verify import verify_claims, verify_parts, verify_policy
from casemate.ledger import catalog, consent, handover, rekey
from casemate.ledger.store import Store
from casemate.seal import hpke
from casemate.seams.files import load, remove, store
from casemate.server import keeping, keys, machine
from casemate.server.config import server_policy
from casemate.server.consents import parse_trust
from casemate.server.state import Place
from casemate.spec import codec
from casemate.spec.codec import value
from casemate.spec.consent import HandedOver, HandoverRequest, SoftwareConsent
from casemate.spec.errors import CasemateError, FormatError, LedgerError
from casemate.spec.evidence import ServerPolicy
from casemate.spec.receipt import LogEntry
from casemate.tee import Tee

TAG: Final = b"casemate/handover/v1"
LABEL: Final = "casemate/handover/v1"
REQUEST_FILE: Final = f"{handover.FOLDER}/request.json"
GRANT_FILE: Final = f"{handover.FOLDER}/grant.json"
KEY_BYTES: Final = 32


@value("handover-grant/v1")
class HandoverGrant:
    """``request``: the digest of what was asked. ``sealed``: the key of the handed store under
    HPKE."""

    request: str
    sealed: bytes


@dataclass(frozen=True, slots=True)
class Handed:
    """``body``: the log's last entry here. ``refused``: why the evidence does not satisfy the owner
    of a dataset that was left behind."""

    body: HandedOver
    refused: dict[str, str]


def report_data(hpke_key: bytes, policy: ServerPolicy, anchor: str) -> bytes:
    """The 64 bytes that a request's evidence is over."""
    items = (TAG, hpke_key, codec.digest(policy).encode(), anchor.encode())
    return hashlib.sha512(b"".join(map(item, items))).digest()


def _digest(raw: bytes) -> str:
    return "sha256:" + hashlib.sha256(raw).hexdigest()


def _info(raw: bytes) -> bytes:
    return TAG + b"|" + hashlib.sha256(raw).digest()


def _seal_key(tee: Tee) -> hpke.SealKey:
    expand = HKDFExpand(hashes.SHA256(), hpke.SECRET_BYTES, TAG + b"/hpke")
    return hpke.from_secret(expand.derive(tee.sealing_key(LABEL)))


def _anchor(place: Place) -> str:
    found = machine.anchor(place.config, place.tee, bytes(32))
    return "" if found is None else found.name


# 1. The successor asks.


def request(place: Place) -> bytes:
    """A request's bytes, also kept as :data:`REQUEST_FILE`; the same HPKE key each time. Raises
    ``usage.tee-*``."""
    key, anchor = _seal_key(place.tee), _anchor(place)
    policy = server_policy(machine.sandboxed(place.config))
    evidence = place.tee.attest(report_data(key.public, policy, anchor))
    asked = HandoverRequest(hpke_key=key.public, policy=policy, anchor=anchor, evidence=evidence)
    raw = codec.encode(asked)
    store(place.disk, REQUEST_FILE, raw)
    return raw


# 2. The predecessor hands over.


def verify(asked: HandoverRequest, trust: Trust, *, now: float) -> str:
    """The measurement that a request's evidence shows, under an owner's policy.

    Raises EvidenceError as verification does.
    """
    checks = Checks()
    claims = verify_claims(asked.evidence, trust, now=now, checks=checks)
    verify_parts(asked.evidence, claims, trust, now=now, checks=checks)
    bound = report_data(asked.hpke_key, asked.policy, asked.anchor)
    if claims.bound != carried(asked.evidence.tee, bound):
        raise refusal(
            "binding-mismatch",
            "The evidence binds other keys than the request shows.",
            "handover",
            "Hand nothing over: something stands between you and the enclave.",
        )
    verify_policy(asked.policy, trust, checks=checks)
    return claims.measurement


def agreed(
    found: Store, asked: HandoverRequest, *, simulated: bool, now: float
) -> tuple[str, set[str], dict[str, str]]:
    """The successor's measurement, the datasets that may pass to it, and why others may not."""
    measurements: dict[str, str] = {}
    refused: dict[str, str] = {}
    for name, envelope in found.all("SELECT dataset, envelope FROM consents ORDER BY dataset"):
        owner = catalog.identity(found, catalog.dataset(found, name).owner)
        signed = consent.read(envelope, owner)
        assert isinstance(signed, SoftwareConsent)  # the table holds no other
        try:
            if asked.evidence.simulated and not simulated:
                raise refusal(
                    "simulated-not-asked", "The successor's TEE is simulated.", "label",
                    "A state on hardware passes to hardware only.",
                )  # fmt: skip
            shown = verify(asked, parse_trust(signed.trust), now=now)
        except CasemateError as e:
            refused[name] = str(e)
            continue
        if shown == signed.measurement:
            measurements[name] = shown
        else:
            refused[name] = f"its owner signed for {signed.measurement}, not for {shown}."
    if not measurements:
        raise _nobody(refused) if handover.left_out(found, ()) else _nothing()
    return next(iter(measurements.values())), set(measurements), refused


def _nobody(refused: dict[str, str]) -> LedgerError:
    name, why = next(iter(refused.items()), ("", "no consent was given."))
    return LedgerError(
        "ledger.handover-refused",
        f"No dataset's owner lets its state pass to this successor: {why}",
        mend="Let the owners sign for its measurement (casemate dataset consent), or take the"
        " request of the enclave that they signed for.",
        where=name,
    )


def _nothing() -> LedgerError:
    """Nobody judged the successor; it would get the log's key and the models of quotes."""
    return LedgerError(
        "ledger.handover-refused",
        "The state holds no dataset, hence no owner's word under which to judge the successor.",
        mend="Start the new software in an empty folder: there is nothing that needs to pass.",
    )


def give(place: Place, raw: bytes, *, drop: bool) -> Handed:
    """Hand the state over to who made the request ``raw``; the store and its sealed key then lie in
    ``handover/``. Again with the same request gives them again.

    ``drop``: without the datasets whose owners did not sign, whose keys are destroyed. Raises
    ``ledger.handover-refused``, ``ledger.consent-missing``, ``ledger.handed-over``, and what a
    start does.
    """
    asked = codec.decode(HandoverRequest, raw)
    keeping.require_settled(place.disk)
    found = place.store()
    try:
        before = handover.handed(found)
        if before is not None:
            body = handover.hand_over(found, before.measurement, _digest(raw), (), drop=drop)
            refused: dict[str, str] = {}
        else:
            machine.hold(place.config, place.tee, found)
            simulated, now = place.tee.simulated, place.clock.wall()
            shown, names, refused = agreed(found, asked, simulated=simulated, now=now)
            body = handover.hand_over(found, shown, _digest(raw), names, drop=drop)
    finally:
        found.close()
    fresh = place.rng.bytes(KEY_BYTES)
    same = asked.anchor == _anchor(place)
    keeping.with_key(
        place.disk,
        place.tee,
        lambda key: handover.export(place.disk, key, fresh, same_anchor=same),
    )
    sealed = hpke.seal(asked.hpke_key, fresh, info=_info(raw))
    store(place.disk, GRANT_FILE, codec.encode(HandoverGrant(request=_digest(raw), sealed=sealed)))
    return Handed(body, refused)


# 3. The successor takes over.


def take(place: Place) -> HandedOver:
    """Take the store in ``handover/`` over under this enclave's own key; the entry that handed it.

    Raises ``ledger.handover`` where nothing was handed to this enclave, or it has a state already;
    ``ledger.inconsistent`` and the like for a store that does not hold.
    """
    asked, granted = load(place.disk, REQUEST_FILE), load(place.disk, GRANT_FILE)
    path = f"{handover.FOLDER}/{keeping.STORE_NAME}"
    if asked is None or granted is None or not place.disk.exists(path):
        raise _refuse("Nothing was handed over to this folder.", "Hand the state over first.")
    _require_none(place, _digest(asked))
    try:
        grant = codec.decode(HandoverGrant, granted)
        if grant.request != _digest(asked):
            raise _refuse(
                "What was handed over answers another request.",
                "Hand the state over with the request that lies in this folder.",
            )
        fresh = _seal_key(place.tee).open(grant.sealed, info=_info(asked))
    except FormatError as e:
        raise _refuse(
            f"What was handed over is not for this enclave: {e.message}",
            "Take it over on the machine, and with the software, that asked for it.",
        ) from None
    boot = place.rng.bytes(keys.BOOT_BYTES)
    found = Store.open(place.disk, fresh, boot, place.rng, folder=handover.FOLDER)
    try:
        body = _last(found)
        if body is None or body.request != grant.request or handover.handed(found) is not None:
            raise _refuse("The store's log does not end with this hand-over.", "Hand it over.")
        if body.measurement != place.tee.measurement:
            raise _refuse(
                f"The state was handed to software of {body.measurement[:64]}, which this is not.",
                "Start the software that the owners signed for.",
            )
        found.empty_wal()
    finally:
        found.close()
    own = place.tee.sealing_key(keeping.label(keeping.generation(place.disk)))
    rekey.copy(place.disk, fresh, own, rekey.NEXT, source=handover.FOLDER)
    rekey.install(place.disk, rekey.NEXT)
    for name in (GRANT_FILE, REQUEST_FILE):
        remove(place.disk, name)
    rekey.clear(place.disk, handover.FOLDER)
    return body


def _last(found: Store) -> HandedOver | None:
    raw = found.entries(found.size() - 1, 1)
    entry = codec.decode(LogEntry, raw[0]) if raw else None
    if entry is None or entry.kind != "handover":
        return None
    return codec.decode(HandedOver, entry.body)


def _require_none(place: Place, request: str) -> None:
    """What lies there is the predecessor's, or nothing."""
    if not place.disk.exists(keeping.STORE_FILE):
        return
    try:
        handed = place.using(handover.handed)
    except LedgerError as e:
        if e.code == "ledger.key":
            return
        raise
    if handed is not None and handed.request == request:
        return
    raise _refuse(
        "This enclave has a state of its own in this folder.",
        "Name another folder, or move what lies there away.",
    )


def _refuse(message: str, mend: str) -> LedgerError:
    return LedgerError("ledger.handover", message, mend=mend, where=handover.FOLDER)
