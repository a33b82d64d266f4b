"""The log holds under its signed head, or the entry that does not fit is named."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from casemate.client import log
from casemate.client.connection import Connection
from casemate.spec.consent import Head, Recovered
from casemate.spec.errors import CasemateError, ReceiptError
from casemate.spec.log import Enrolled, Started
from support.publog import PublicLog

D = "sha256:" + "0" * 64


def boot(number: int) -> bytes:
    return bytes([number + 1]) * 16


def made(count: int = 6) -> PublicLog:
    """A log of starts alone."""
    public = PublicLog()
    for i in range(count):
        said = Started(software=f"casemate {i}", measurement="", attestation=D)
        public.append("start", boot(i % 256).hex(), said, boot(i % 256))
    return public


def verify(public: PublicLog, leaves: list[bytes] | None = None) -> log.Log:
    return log.verify(public.sign(), public.verifier, public.leaves if leaves is None else leaves)


@given(st.integers(0, 5), st.binary(min_size=1, max_size=4), st.data())
def test_no_entry_can_change_go_or_come(at, junk, data):
    public = made()
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
    public = made()
    public.leaves[2], public.leaves[3] = public.leaves[3], public.leaves[2]
    with pytest.raises(ReceiptError) as caught:
        verify(public)
    assert (caught.value.code, caught.value.where) == ("receipt.log-gap", "entry 2")


def test_another_logs_signature_is_refused():
    public, other = made(), made()
    with pytest.raises(CasemateError):
        log.verify(other.sign(), public.verifier, public.leaves)


def test_the_log_comes_tile_by_tile(fakes, keys, trust, someone, public):
    for i in range(300):
        name = i.to_bytes(16, "big")
        said = Started(software=f"casemate {i}", measurement="", attestation=D)
        public.append("start", name.hex(), said, name)
    fake = fakes(keys, log=public)
    found = log.fetch(Connection(fake.url, trust=trust, identity=someone))
    assert list(found.leaves) == public.leaves
    assert [s.target for s in fake.requests] == [
        "/log/checkpoint", "/log/tile/entries/000", "/log/tile/entries/001.p/44",
    ]  # fmt: skip


def test_a_head_by_another_key_than_the_evidence_binds_is_refused(fakes, keys, trust, someone):
    other = made()
    fake = fakes(keys, log=other)
    with pytest.raises(ReceiptError) as caught:
        log.fetch(Connection(fake.url, trust=trust, identity=someone))
    assert caught.value.code.startswith("receipt.note-")


def recovered(public: PublicLog, new: PublicLog) -> PublicLog:
    """``public`` goes on as ``new``, which gets all its entries."""
    head = public.head()
    new.leaves[:] = public.leaves
    body = Recovered(
        head=Head(origin=head.origin, size=head.size, root=head.root), origin=new.origin,
        key=new.public,
    )  # fmt: skip
    new.append("recover", new.origin, body, boot(9))
    return new


def test_a_recovered_log_stands_under_its_new_name_only():
    public, new = made(2), PublicLog()
    recovered(public, new)
    assert verify(new).ledger.recovered[0][1].origin == new.origin
    public.leaves[:] = new.leaves
    with pytest.raises(ReceiptError) as caught:
        verify(public)
    assert caught.value.code == "receipt.log-root"


def test_each_start_binds_the_key_that_the_log_had_then():
    public, new, other = made(2), PublicLog(), PublicLog()
    found = verify(recovered(public, new))
    for place, key, holds in (
        (0, public, True), (1, new, False), (1, other, False), (2, new, True), (3, new, True),
        (3, public, False), (3, other, False),
    ):  # fmt: skip
        assert log._binds(found, place, key.public) is holds


def test_a_folder_whose_log_never_started_is_refused(tmp_path, trust):
    public = PublicLog()
    public.append("identity", "id_a", Enrolled(identity="id_a"), boot(0))
    for path in ("checkpoint", "tile/entries/000.p/1"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(public.file(path))
    with pytest.raises(ReceiptError) as caught:
        log.read(tmp_path, trust)
    assert caught.value.code == "receipt.log-impossible"
