"""Receipts: what a client accepts claims no less than its run cost."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from audit import lab, rest
from audit.law import holds
from casemate.accounting import pld
from casemate.accounting.filters import RdpFilter
from casemate.attest.trust import Trust, Unchecked
from casemate.client.receipts import verify_receipt
from casemate.seal import dsse
from casemate.seams import OsRng, SystemClock
from casemate.server.attestation import attest_now, boot_nonce
from casemate.server.keys import BootKeys
from casemate.spec import canonical, codec
from casemate.spec.errors import CasemateError
from casemate.spec.evidence import Attestation
from casemate.spec.job import Plan
from casemate.spec.log import Committed, commitment
from casemate.spec.receipt import (
    PAYLOAD_TYPE,
    PREDICATE_TYPE,
    STATEMENT_TYPE,
    Guarantee,
    Receipt,
    ReceiptBundle,
    ReceiptDataset,
)
from casemate.tee.simulated import SimulatedTee
from support.disk import SimDisk
from support.evidence import PROMISES
from support.publog import PublicLog, keys_of, origin

SALT: Final = bytes(range(32))
WEIGHTS: Final = b"weights"
Change = Callable[[Receipt], Receipt]


@dataclasses.dataclass(frozen=True)
class Enclave:
    """A boot with its log, whose evidence is simulated."""

    log: PublicLog
    keys: BootKeys
    attestation: Attestation
    trust: Trust

    def bundle(self, receipt: Receipt, sign: Any = None, other: bool = False) -> ReceiptBundle:
        """A receipt as it leaves: signed, and its commit logged. other: the log has another."""
        statement: dict[str, Any] = {
            "_type": STATEMENT_TYPE,
            "subject": [{"name": "w", "digest": {"sha256": receipt.result_digest[7:]}}],
            "predicateType": PREDICATE_TYPE,
            "predicate": codec.to_json(receipt),
        }
        by, public = sign or self.keys.receipt.sign, self.keys.receipt.public.hex()
        text = dsse.sign(PAYLOAD_TYPE, canonical.encode(statement), by, public)
        logged = hashlib.sha256(text.encode() + b"!" * other).hexdigest()
        body = Committed(
            job=receipt.job,
            result=commitment(SALT, receipt.result_digest),
            receipt=commitment(SALT, "sha256:" + logged),
        )
        self.log.pad(2)
        place = self.log.append("commit", receipt.job, body, self.keys.boot)
        return ReceiptBundle(
            envelope=text, attestation=self.attestation, entry=self.log.leaves[place], salt=SALT,
            proof=str(self.log.prove(place, self.log.sign())),
        )  # fmt: skip


@functools.cache
def enclave() -> Enclave:
    tee = SimulatedTee(SimDisk(), OsRng(), SystemClock())
    log = PublicLog()
    keys = keys_of(log)
    attestation = attest_now(tee, keys, PROMISES, [boot_nonce(keys.boot)])[0]
    return Enclave(log, keys, attestation, Trust.simulated(tee.root))


def honest(at: Enclave, plan: Plan, delta: float) -> Receipt:
    """What is true of a run of this plan on two datasets."""
    extra = plan.delta_truncation + plan.delta_sampler
    charge = RdpFilter.charge(plan.events, extra, delta_shown=delta)
    first = plan.units // 3
    parts = [
        ReceiptDataset(
            dataset="ds_" + c * 40, owner="id_x", policy_digest=plan.request_digest, units=units,
            charge=charge,
        )
        for c, units in (("a", first), ("b", plan.units - first))
    ]  # fmt: skip
    return Receipt(
        job="job_" + "0" * 32, scientist="id_s", boot=at.keys.boot,
        model_digest=plan.model_digest,
        result_digest="sha256:" + hashlib.sha256(WEIGHTS).hexdigest(),
        request_digest=plan.request_digest, quote_digest=plan.request_digest, plan=plan,
        guarantee=Guarantee(
            private=True, epsilon=pld.epsilon(plan.events, delta - extra), delta=delta,
            unit="unit", statement="differentially private",
        ),
        datasets=tuple(parts), simulated=("tee",), software="casemate test",
        log=origin(at.keys.log.public), reserved=1,
    )  # fmt: skip


def _lies(at: Enclave, plan: Plan, delta: float) -> dict[str, Change]:
    """What a receipt may not say, each by a hundredth where it is a size; whose plan is another,
    with all that follows from it."""
    (event,) = plan.events
    less = dataclasses.replace

    def claims(**said: Any) -> Change:
        return lambda r: less(r, guarantee=less(r.guarantee, **said))

    def planned(**said: Any) -> Change:
        return lambda r: honest(at, less(plan, **said), delta)

    def of_events(**said: Any) -> Change:
        return planned(events=(less(event, **said),))

    def charged(place: int, change: Callable[[Any], Any]) -> Change:
        def changed(r: Receipt) -> Receipt:
            parts = list(r.datasets)
            parts[place] = less(parts[place], charge=change(parts[place].charge))
            return less(r, datasets=tuple(parts))

        return changed

    return {
        "epsilon": lambda r: claims(epsilon=0.99 * r.guarantee.epsilon)(r),
        "delta": claims(delta=delta / 2),
        "a delta below what the plan takes": claims(delta=plan.delta_truncation),
        "no privacy of a private plan": claims(private=False),
        "a charge of the first dataset": charged(
            0, lambda c: less(c, rdp_nano=tuple(max(0, n - 1) for n in c.rdp_nano))
        ),
        "a charge of the last dataset": charged(
            -1, lambda c: less(c, rdp_nano=tuple(n * 99 // 100 for n in c.rdp_nano))
        ),
        "a charge at the first order": charged(
            0, lambda c: less(c, rdp_nano=(c.rdp_nano[0] - 1, *c.rdp_nano[1:]))
        ),
        "a charge at fewer orders": charged(0, lambda c: less(c, rdp_nano=c.rdp_nano[:-1])),
        "a charge of delta": charged(-1, lambda c: less(c, delta_femto=c.delta_femto - 1)),
        "events of a lower rate": of_events(rate=event.rate * 0.99),
        "events of more noise": of_events(noise_multiplier=event.noise_multiplier * 1.01),
        "events of fewer steps": of_events(steps=event.steps - 1),
        "a plan without events": lambda r: less(r, plan=less(plan, events=())),
        "noise below the multiplier": planned(sigma=plan.sigma * 0.99),
        "a sensitivity below the clip": planned(
            sensitivity=plan.clip * 0.99, sigma=plan.sigma * 0.99 * plan.clip / plan.sensitivity
        ),
        "other units": lambda r: less(r, plan=less(plan, units=plan.units + 1)),
        "another result": lambda r: less(r, result_digest=plan.model_digest),
        "another boot": lambda r: less(r, boot=bytes(16)),
        "another model": lambda r: less(r, model_digest=plan.request_digest),
        "another request": lambda r: less(r, request_digest=plan.model_digest),
        "nothing simulated": lambda r: less(r, simulated=()),
        "one dataset twice": lambda r: less(
            r, datasets=tuple(less(d, dataset=r.datasets[0].dataset) for d in r.datasets)
        ),
        "no privacy in other words": lambda r: less(
            claims(private=False, epsilon=0.0, statement="fine")(r),
            plan=less(plan, private=False, events=(), noise_multiplier=0.0, sigma=0.0),
        ),
    }


def receipts(seed: int) -> None:
    """Rule P9: a client takes the receipt of a real plan, and none that claims less than the plan's
    events cost, whose plan is not what was charged, for other weights, or not signed and logged."""
    del seed
    at, job = enclave(), lab.kept(rest._plain)
    units = job.schema.units
    digest = "sha256:" + "1" * 64
    plan = dataclasses.replace(job.plan, units=units, model_digest=digest)
    delta = job.spec.privacy.delta
    true = honest(at, plan, delta)

    def taken(bundle: ReceiptBundle, weights: bytes = WEIGHTS, trust: Trust = at.trust) -> bool:
        with suppress(CasemateError):
            verify_receipt(bundle, trust=trust, weights=weights)
            return True
        return False

    holds(taken(at.bundle(true)), "receipts: a true one is taken")
    for what, lie in _lies(at, plan, delta).items():
        holds(not taken(at.bundle(lie(true))), f"receipts: one is taken that tells less: {what}")
    hardware = Trust.sev_snp(measurements=Unchecked("any, in this test"))
    right = not taken(at.bundle(true), trust=hardware)
    holds(right, "receipts: a simulated enclave's is taken unasked")
    other = Ed25519PrivateKey.generate().sign
    holds(not taken(at.bundle(true, sign=other)), "receipts: anyone may sign one")
    holds(not taken(at.bundle(true, other=True)), "receipts: the log has another")
    holds(not taken(at.bundle(true), b"others"), "receipts: one is taken for other weights")
