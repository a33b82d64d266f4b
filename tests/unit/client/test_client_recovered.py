"""A client's memory over a recovery: the log under a new name is taken when it goes on from what
was seen, and only then."""

import warnings

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from casemate.client.memory import Memory
from casemate.ledger import consent, log, recovery
from casemate.spec import merkle
from casemate.spec.consent import Head, Recovered
from casemate.spec.errors import ReceiptError
from casemate.spec.log import EpochAdvanced
from support.disk import SimDisk
from support.ledgers import push
from support.passing import owner, started, to_recovery
from support.publog import PublicLog

NAME = "https://enclave.example:8443"
BOOT = b"b" * 16


def grown(size: int) -> PublicLog:
    log = PublicLog()
    for i in range(size):
        log.append("epoch", "ds", EpochAdvanced(dataset="ds", epoch=i + 1), BOOT)
    return log


def recovered(old: PublicLog, size: int, *, head=None, key=None) -> PublicLog:
    """The old log's first entries under a new key, and the entry that says so."""
    new = PublicLog(old.leaves[:size])
    root = merkle.root(size, merkle.tree(old.leaves[:size]))
    body = Recovered(
        head=head or Head(origin=old.origin, size=size, root=root),
        origin=new.origin,
        key=key or new.public,
    )
    new.append("recover", new.origin, body, BOOT)
    new.append("epoch", "ds", EpochAdvanced(dataset="ds", epoch=99), BOOT)
    return new


def meet(memory: Memory, log: PublicLog):
    return memory.meet(NAME, log.public, log.file)


@pytest.mark.parametrize(("seen", "kept"), [(5, 5), (5, 3), (5, 0), (3, 5), (300, 257), (1, 1)])
def test_a_recovery_is_followed_and_said(tmp_path, seen, kept):
    memory, old = Memory(tmp_path), grown(max(seen, kept))
    meet(memory, PublicLog(old.leaves[:seen], old.key))
    new = recovered(old, kept)
    with pytest.warns(UserWarning, match=f"{max(0, seen - kept)} entries that this client saw"):
        assert meet(memory, new).head.size == kept + 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert meet(memory, new).key == new.verifier


def test_two_recoveries_in_a_row(tmp_path):
    memory, old = Memory(tmp_path), grown(6)
    meet(memory, old)
    with pytest.warns(UserWarning, match="2 entries"):
        meet(memory, recovered(recovered(old, 4), 5))


def test_what_does_not_go_on_from_what_was_seen_is_refused(tmp_path):
    old, other = grown(6), grown(6)
    other.leaves[2] = other.leaves[2][:-1] + b" "
    wrong = Head(origin=old.origin, size=4, root=bytes(32))
    alien = Head(origin=other.origin, size=4, root=merkle.root(4, merkle.tree(old.leaves[:4])))
    mine = merkle.root(5, merkle.tree(old.leaves[:5]))
    cases = [
        grown(9),
        recovered(other, 4),
        recovered(old, 4, head=wrong),
        recovered(old, 4, head=alien),
        recovered(old, 4, head=Head(origin=old.origin, size=5, root=mine)),
        recovered(old, 4, key=bytes(32)),
        PublicLog(old.leaves),
    ]
    for place, bad in enumerate(cases):
        memory = Memory(tmp_path / str(place))
        meet(memory, old)
        with pytest.raises(ReceiptError) as e:
            meet(memory, bad)
        assert e.value.code == "receipt.log-replaced", place


def of(store, origin=None) -> PublicLog:
    """A store's log, under its present key or that of an earlier name."""
    sql = "SELECT key FROM log_keys WHERE origin = ?"
    (raw,) = store.one(sql, origin or log.key(store).origin)
    return PublicLog(store.entries(), Ed25519PrivateKey.from_private_bytes(raw))


def test_whose_consents_they_are_is_said_and_without_any_nothing_is_followed(tmp_path):
    store = started(SimDisk(), 1)
    a, b = push(store, "a", owner().public), push(store, "b", owner("second").public)
    old = of(store)
    newest = str(old.sign())
    asked = recovery.request(store, newest)
    recovery.recover(store, asked, [to_recovery(asked, a)])
    new = of(store)
    memory = Memory(tmp_path / "one")
    meet(memory, old)
    with pytest.warns(UserWarning, match=f"are of {owner().id}. 1 datasets wait"):
        meet(memory, new)
    consent.give(store, to_recovery(asked, b, owner("second")), owner("second").id)
    memory = Memory(tmp_path / "both")
    meet(memory, old)
    both = " ".join(sorted((owner().id, owner("second").id)))
    with pytest.warns(UserWarning, match=f"are of {both}. 0 datasets wait"):
        meet(memory, of(store))
    silent = PublicLog(new.leaves[:-1], new.key)
    lied = recovered_with(old, str(PublicLog(old.leaves).sign()))
    for place, bad in enumerate((silent, lied)):
        memory = Memory(tmp_path / str(place))
        meet(memory, old)
        with pytest.raises(ReceiptError) as e:
            meet(memory, bad)
        assert e.value.code == "receipt.log-replaced", place


def recovered_with(old: PublicLog, newest: str) -> PublicLog:
    """A recovery whose later checkpoint another log signed."""
    old = PublicLog(grown(3).leaves, old.key)
    new = PublicLog(old.leaves)
    head = Head(origin=old.origin, size=3, root=merkle.root(3, merkle.tree(old.leaves)))
    body = Recovered(head=head, origin=new.origin, key=new.public, newest=newest)
    new.append("recover", new.origin, body, BOOT)
    return new
