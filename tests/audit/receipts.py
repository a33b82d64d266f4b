"""Receipts: what a client accepts claims no less than its run cost."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from audit import lab, rest
from audit.law import holds
from casemate.attest.trust import Trust, Unchecked
from casemate.client.receipts import verify_receipt
from casemate.seams import OsRng, SystemClock
from casemate.server.keys import BootKeys
from casemate.spec.errors import CasemateError
from casemate.spec.job import Plan
from casemate.spec.log import commitment
from casemate.spec.receipt import Receipt, ReceiptBundle
from casemate.tee.simulated import SimulatedTee
from support.disk import SimDisk
from support.publog import PublicLog, keys_of
from support.receipts import SALT, WEIGHTS, maker, receipt

Change = Callable[[Receipt], Receipt]


@dataclasses.dataclass(frozen=True)
class Enclave:
    """A boot with its log, whose evidence is simulated. ``make``: of ``support.receipts.maker``."""

    keys: BootKeys
    make: Callable[..., ReceiptBundle]
    trust: Trust


@functools.cache
def enclave() -> Enclave:
    tee = SimulatedTee(SimDisk(), OsRng(), SystemClock())
    log = PublicLog()
    keys = keys_of(log)
    return Enclave(keys, maker(keys, tee, log), Trust.simulated(tee.root))


def _lies(at: Enclave, plan: Plan, delta: float) -> dict[str, Change]:
    """What a receipt may not say, each by a hundredth where it is a size; whose plan is another,
    with all that follows from it."""
    (event,) = plan.events
    less = dataclasses.replace

    def claims(**said: Any) -> Change:
        return lambda r: less(r, guarantee=less(r.guarantee, **said))

    def planned(**said: Any) -> Change:
        return lambda r: receipt(at.keys, plan=less(plan, **said), delta=delta)

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
    true = receipt(at.keys, plan=plan, delta=delta)

    def taken(bundle: ReceiptBundle, weights: bytes = WEIGHTS, trust: Trust = at.trust) -> bool:
        with suppress(CasemateError):
            verify_receipt(bundle, trust=trust, weights=weights)
            return True
        return False

    holds(taken(at.make(true)), "receipts: a true one is taken")
    for what, lie in _lies(at, plan, delta).items():
        holds(not taken(at.make(lie(true))), f"receipts: one is taken that tells less: {what}")
    hardware = Trust.sev_snp(measurements=Unchecked("any, in this test"))
    right = not taken(at.make(true), trust=hardware)
    holds(right, "receipts: a simulated enclave's is taken unasked")
    other = Ed25519PrivateKey.generate().sign
    holds(not taken(at.make(true, sign=other)), "receipts: anyone may sign one")
    holds(
        not taken(at.make(true, said={"receipt": commitment(SALT, plan.model_digest)})),
        "receipts: the log has another",
    )
    holds(not taken(at.make(true), b"others"), "receipts: one is taken for other weights")
