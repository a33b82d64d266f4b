"""Receipts as an enclave signs them, and their bundles in a log in memory."""

from __future__ import annotations

import hashlib

from casemate.accounting import pld
from casemate.accounting.filters import RdpFilter
from casemate.seal import dsse
from casemate.server.attestation import attest_now, boot_nonce
from casemate.spec import canonical
from casemate.spec.job import DpEvent, Plan
from casemate.spec.log import Committed, commitment
from casemate.spec.receipt import (
    PAYLOAD_TYPE,
    Guarantee,
    Receipt,
    ReceiptBundle,
    ReceiptDataset,
)
from casemate.spec.receipt import statement as said_by
from support.evidence import PROMISES
from support.publog import origin

POLICY = "sha256:" + "0" * 64
WEIGHTS = b"weights"
DELTA = 1e-5
MODEL, REQUEST = "sha256:" + "1" * 64, "sha256:" + "2" * 64


def plan(**changes) -> Plan:
    event = DpEvent(rate=0.25, noise_multiplier=4.0, steps=40)
    fields = {
        "request_digest": REQUEST, "model_digest": MODEL, "private": True, "units": 300,
        "rate": 0.25, "steps": 40, "clip": 1.0, "normaliser": 75.0, "sensitivity": 1.01,
        "noise_multiplier": 4.0, "sigma": 4.04, "grid": 1e-6, "microbatch": 32,
        "microbatches": 4, "events": (event,), "delta_truncation": 1e-7, "delta_sampler": 1e-7,
    }  # fmt: skip
    return Plan(**(fields | changes))


def receipt(keys, *, plan=plan(), delta=DELTA, **changes) -> Receipt:  # noqa: B008 - a frozen value
    """What is true of a run of this plan on two datasets."""
    extra = plan.delta_truncation + plan.delta_sampler
    charge = RdpFilter.charge(plan.events, extra, delta_shown=delta)
    epsilon = pld.epsilon(plan.events, delta - extra) if plan.events else 0.0
    words = "differentially private" if plan.private else "no privacy guarantee"
    parts = [
        ReceiptDataset(dataset="ds_" + c * 40, owner="id_x", policy_digest=POLICY, units=u,
                       charge=charge)
        for c, u in (("a", plan.units // 3), ("b", plan.units - plan.units // 3))
    ]  # fmt: skip
    fields = {
        "job": "job_" + "0" * 32, "scientist": "id_s", "boot": keys.boot,
        "model_digest": plan.model_digest,
        "result_digest": "sha256:" + hashlib.sha256(WEIGHTS).hexdigest(),
        "request_digest": plan.request_digest, "quote_digest": POLICY, "plan": plan,
        "guarantee": Guarantee(private=plan.private, epsilon=epsilon,
                               delta=delta if plan.private else 0.0, unit="unit",
                               statement=words),
        "datasets": tuple(parts), "simulated": ("tee",), "software": "casemate test",
        "log": origin(keys.log.public), "reserved": 1,
    }  # fmt: skip
    return Receipt(**(fields | changes))


def statement(found: Receipt, **changes) -> dict:
    return said_by(found) | changes


SALT = bytes(range(32))


def maker(keys, tee, public):
    """Bundles of a receipt, or of any statement, signed by the boot's own key and logged."""
    attestation = attest_now(tee, keys, PROMISES, [boot_nonce(keys.boot)])[0]

    def make(found, *, sign=keys.receipt.sign, kind=PAYLOAD_TYPE, said=None, boot=keys.boot,
             what="commit", witnesses=()) -> ReceiptBundle:  # fmt: skip
        body = statement(found) if isinstance(found, Receipt) else found
        text = dsse.sign(kind, canonical.encode(body), sign, keys.receipt.public.hex())
        claim = body["predicate"]
        claim = claim.get("receipt", claim)
        committed = {
            "job": claim.get("job", "job"),
            "result": commitment(SALT, claim.get("result_digest", POLICY)),
            "receipt": commitment(SALT, "sha256:" + hashlib.sha256(text.encode()).hexdigest()),
        } | (said or {})
        public.pad(2)
        place = public.append(what, committed["job"], Committed(**committed), boot)
        public.pad(3)
        return ReceiptBundle(
            envelope=text,
            attestation=attestation,
            entry=public.leaves[place],
            salt=SALT,
            proof=str(public.prove(place, public.sign(witnesses=witnesses))),
        )

    return make
