"""The log holds under its signed head, or the entry that does not fit is named."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from casemate.accounting.filters import RdpFilter
from casemate.client import log
from casemate.client.connection import Connection
from casemate.spec.errors import CasemateError, ReceiptError
from casemate.spec.job import DpEvent
from casemate.spec.log import Debit, Reserved, Started
from support.publog import PublicLog

D = "sha256:" + "0" * 64
EVENTS = (DpEvent(rate=0.25, noise_multiplier=4.0, steps=40),)


def reserve(less: int = 0) -> Reserved:
    charge = RdpFilter.charge(EVENTS, 2e-7, delta_shown=1e-5)
    charge = dataclasses.replace(charge, rdp_nano=(charge.rdp_nano[0] - less, *charge.rdp_nano[1:]))
    debit = Debit(dataset="ds_1", lineage="ds_1", policy=D, epoch=0)
    return Reserved(
        job="job_1", scientist="id_1", request=D, quote=D, plan=D, events=EVENTS,
        delta_truncation=1e-7, delta_sampler=1e-7, delta_shown=1e-5, charge=charge,
        debits=(debit,),
    )  # fmt: skip


def made(*bodies) -> PublicLog:
    public = PublicLog()
    for body in bodies:
        kind = "reserve" if isinstance(body, Reserved) else "start"
        public.append(kind, "s", body, bytes(16))
    return public


STARTS = [Started(software=f"casemate {i}", measurement="", attestation=D) for i in range(6)]


def verify(public: PublicLog, leaves: list[bytes] | None = None) -> log.Log:
    return log.verify(public.sign(), public.verifier, public.leaves if leaves is None else leaves)


@given(st.integers(0, 5), st.binary(min_size=1, max_size=4), st.data())
def test_no_entry_can_change_go_or_come(at, junk, data):
    public = made(*STARTS)
    assert verify(public).head == public.head()
    leaves = public.leaves
    forged = data.draw(
        st.sampled_from(
            [
                [*leaves[:at], leaves[at] + junk, *leaves[at + 1 :]],
                leaves[:at] + leaves[at + 1 :],
                [*leaves[:at], leaves[at], *leaves[at:]],
                leaves[:at],
                [*leaves, junk],
            ]
        )
    )
    with pytest.raises(ReceiptError) as caught:
        verify(public, forged)
    assert caught.value.code == "receipt.log-root"


def test_an_entry_in_anothers_place_is_found_though_it_is_signed():
    public = made(*STARTS)
    public.leaves[2], public.leaves[3] = public.leaves[3], public.leaves[2]
    with pytest.raises(ReceiptError) as caught:
        verify(public)
    assert (caught.value.code, caught.value.where) == ("receipt.log-gap", "entry 2")


def test_another_logs_signature_is_refused():
    public, other = made(*STARTS), made(*STARTS)
    with pytest.raises(CasemateError):
        log.verify(other.sign(), public.verifier, public.leaves)


def test_charges_are_recomputed_from_their_events():
    assert verify(made(STARTS[0], reserve())).debits == 1
    with pytest.raises(ReceiptError) as caught:
        verify(made(STARTS[0], reserve(less=1)))
    assert caught.value.code == "receipt.log-charge"


def test_the_log_comes_tile_by_tile(fakes, keys, trust, someone, public):
    for i in range(300):
        start = Started(software=f"casemate {i}", measurement="", attestation=D)
        public.append("start", "s", start, bytes(16))
    fake = fakes(keys, log=public)
    found = log.fetch(Connection(fake.url, trust=trust, identity=someone))
    assert list(found.leaves) == public.leaves
    assert [s.target for s in fake.requests] == [
        "/log/checkpoint", "/log/tile/entries/000", "/log/tile/entries/001.p/44",
    ]  # fmt: skip


def test_a_head_by_another_key_than_the_evidence_binds_is_refused(fakes, keys, trust, someone):
    other = made(*STARTS)
    fake = fakes(keys, log=other)
    with pytest.raises(ReceiptError) as caught:
        log.fetch(Connection(fake.url, trust=trust, identity=someone))
    assert caught.value.code.startswith("receipt.note-")
