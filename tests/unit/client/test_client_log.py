"""The chain holds, or the entry that does not fit is named."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from casemate.accounting.filters import RdpFilter
from casemate.client import log
from casemate.client.connection import Connection
from casemate.spec import codec
from casemate.spec.errors import FormatError, ReceiptError
from casemate.spec.job import DpEvent
from casemate.spec.log import Debit, Reserved, Started
from casemate.spec.receipt import LogEntry

D = "sha256:" + "0" * 64
EVENTS = (DpEvent(rate=0.25, noise_multiplier=4.0, steps=40),)


def reserve(less: int = 0) -> Reserved:
    charge = RdpFilter.charge(EVENTS, 2e-7, delta_shown=1e-5)
    charge = dataclasses.replace(charge, rdp_nano=(charge.rdp_nano[0] - less, *charge.rdp_nano[1:]))
    debit = Debit(dataset="ds_1", lineage="ds_1", policy_digest=D, epoch=0, charge=charge)
    return Reserved(
        job="job_1", scientist="id_1", request_digest=D, quote_digest=D, plan_digest=D,
        events=EVENTS, delta_truncation=1e-7, delta_sampler=1e-7, delta_shown=1e-5, debits=(debit,),
    )  # fmt: skip


def chain(*bodies) -> list[LogEntry]:
    previous, entries = log.FIRST_PREVIOUS, []
    for i, body in enumerate(bodies):
        kind = "reserve" if isinstance(body, Reserved) else "start"
        entry = LogEntry(
            sequence=i, previous=previous, boot=bytes(16), kind=kind, subject="s",
            body=codec.encode(body),
        )  # fmt: skip
        entries.append(entry)
        previous = codec.digest(entry)
    return entries


STARTS = [Started(software=f"casemate {i}") for i in range(6)]


def seen(entries, hidden=()):
    return [
        log.Seen(e.sequence, codec.digest(e), None if e.sequence in hidden else e) for e in entries
    ]


@given(st.sets(st.integers(0, 5)))
def test_hidden_entries_still_link(hidden):
    entries = chain(*STARTS)
    found = log.verify(seen(entries, hidden))
    assert found.head == codec.digest(entries[-1])
    assert found.links == 6 - len(hidden)


@given(st.integers(0, 5), st.sets(st.integers(0, 5)))
def test_a_changed_entry_is_found_where_its_successor_is_seen(at, hidden):
    entries = chain(*STARTS)
    changed = dataclasses.replace(entries[at], subject="another")
    forged = [*entries[:at], changed, *entries[at + 1 :]]
    if at == 5 or at + 1 in hidden:
        log.verify(seen(forged, hidden))  # nobody's word to compare with: the head tells
        if at == 5:
            assert log.verify(seen(forged)).head != log.verify(seen(entries)).head
        return
    with pytest.raises(ReceiptError) as caught:
        log.verify(seen(forged, hidden))
    assert caught.value.code == "receipt.log-chain"
    assert caught.value.where == f"entry {at + 1}"


def test_a_missing_entry_is_found():
    entries = seen(chain(*STARTS))
    with pytest.raises(ReceiptError) as caught:
        log.verify(entries[:2] + entries[3:])
    assert caught.value.code == "receipt.log-gap"


def test_charges_are_recomputed_from_their_events():
    assert log.verify(seen(chain(STARTS[0], reserve()))).debits == 1
    with pytest.raises(ReceiptError) as caught:
        log.verify(seen(chain(STARTS[0], reserve(less=1))))
    assert caught.value.code == "receipt.log-charge"


def test_a_receipts_entry_must_stand_in_the_log():
    entries = chain(*STARTS)
    found = log.verify(seen(entries))
    log.verify_receipt_entry(found, 3, codec.digest(entries[3]))
    for sequence in (2, -1, 6):
        with pytest.raises(ReceiptError):
            log.verify_receipt_entry(found, sequence, codec.digest(entries[3]))


def test_the_log_comes_page_by_page(fakes, keys, trust, someone):
    fake, entries = fakes(keys), chain(*STARTS)

    def page(request):
        start = int(request.target.partition("from=")[2])
        shown = [codec.to_json(e) for e in entries[start : start + 2]]
        if start == 2:
            shown[1] = {"digest": codec.digest(entries[3]), "sequence": 3}
        return 200, {}, shown

    fake.answers["GET", "/v1/log"] = page
    connection = Connection(fake.url, trust=trust, identity=someone)
    assert log.verify(log.fetch(connection)).links == 5
    for bad in ({}, [3], [{"digest": 1, "sequence": 0}], [{"digest": D, "sequence": 5}]):
        fake.answers["GET", "/v1/log"] = (200, {}, bad)
        with pytest.raises(FormatError):
            log.verify(log.fetch(connection))
