"""A client's memory over a recovery: the log under a new name is taken when it goes on from what
was seen, and only then."""

import warnings

import pytest

from casemate.client.memory import Memory
from casemate.spec import merkle
from casemate.spec.consent import Head, Recovered
from casemate.spec.errors import ReceiptError
from casemate.spec.log import EpochAdvanced
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
    for place, log in enumerate(cases):
        memory = Memory(tmp_path / str(place))
        meet(memory, old)
        with pytest.raises(ReceiptError) as e:
            meet(memory, log)
        assert e.value.code == "receipt.log-replaced", place
