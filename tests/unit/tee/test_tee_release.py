"""The owner's release of a sealing secret, from both sides."""

from dataclasses import replace

import pytest

from casemate.attest.trust import Trust
from casemate.seams import OsRng
from casemate.seams.files import load, store
from casemate.spec import codec
from casemate.spec.errors import AuthError, EvidenceError, FormatError, UsageError
from casemate.tee import release
from support import nitro, tees
from support.disk import SimDisk
from support.evidence import NOW, tee

SECRET = b"s" * 32


@pytest.fixture(scope="module")
def trust():
    return Trust.simulated(tee().root)


@pytest.fixture
def owner(trust):
    return tees.Owner(SimDisk(), trust)


def asked(owner):
    return release.request(tee().attest, owner.public, OsRng())


def grant(owner, request, *, secret=SECRET, trust=None, public=None):
    return release.grant(
        request, secret, trust or owner.trust, public or owner.public, owner.key.sign, now=NOW
    )


def test_from_request_to_secret(owner):
    request, key = asked(owner)
    assert release.accept(request, grant(owner, request), key, owner.public) == SECRET


def test_two_starts_ask_with_two_keys(owner):
    first, key = asked(owner)
    second, _ = asked(owner)
    assert first != second
    with pytest.raises(AuthError) as e:
        release.accept(first, grant(owner, second), key, owner.public)
    assert e.value.code == "auth.release-owner"


def test_an_old_request_is_of_no_use_to_a_new_start(owner):
    """A host that replays one gets a grant that nobody can open any more."""
    old, _ = asked(owner)
    _, new_key = asked(owner)
    with pytest.raises(FormatError) as e:
        release.accept(old, grant(owner, old), new_key, owner.public)
    assert e.value.code == "format.sealed"


def test_the_owner_refuses_what_the_trust_policy_refuses(owner):
    request, _ = asked(owner)
    hardware = Trust.sev_snp(measurements=["ab" * 48])
    for policy in (hardware, Trust.simulated("00" * 32), Trust.of("nitro")):
        with pytest.raises(EvidenceError):
            grant(owner, request, trust=policy)


def test_evidence_over_another_key_is_refused(owner):
    """What a host in the middle would do: its own HPKE key beside genuine evidence."""
    request, _ = asked(owner)
    _, mine = asked(owner)
    forged = replace(codec.decode(release.ReleaseRequest, request), hpke_key=mine.public)
    with pytest.raises(EvidenceError) as e:
        grant(owner, codec.encode(forged))
    assert e.value.code == "evidence.binding-mismatch"


def test_evidence_of_a_clients_attestation_is_no_request(owner):
    """Genuine evidence over a connection's binding does not open a release: other tag."""
    from support.evidence import attestation

    request, _ = asked(owner)
    value = codec.decode(release.ReleaseRequest, request)
    forged = replace(value, evidence=attestation().evidence)
    with pytest.raises(EvidenceError) as e:
        grant(owner, codec.encode(forged))
    assert e.value.code == "evidence.binding-mismatch"


def test_another_owner(owner, trust):
    other = tees.Owner(SimDisk(), trust, b"other")
    request, key = asked(owner)
    with pytest.raises(AuthError):
        grant(other, request)  # it was not asked
    forged = replace(codec.decode(release.ReleaseRequest, request), owner=other.public)
    with pytest.raises(EvidenceError):
        grant(other, codec.encode(forged))
    answer = codec.decode(release.ReleaseGrant, grant(owner, request))
    resigned = replace(answer, signature=other.key.sign(release._signed(request, answer.sealed)))
    with pytest.raises(AuthError):
        release.accept(request, codec.encode(resigned), key, owner.public)


def test_every_changed_byte_of_a_grant_is_refused(owner):
    request, key = asked(owner)
    answer = codec.decode(release.ReleaseGrant, grant(owner, request))
    for field in ("sealed", "signature"):
        data = getattr(answer, field)
        for at in range(0, len(data), 97):
            bad = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
            with pytest.raises(AuthError):
                release.accept(
                    request, codec.encode(replace(answer, **{field: bad})), key, owner.public
                )


@pytest.mark.parametrize("length", [0, 16, 31, 33])
def test_a_secret_of_another_length(owner, length):
    request, key = asked(owner)
    with pytest.raises(ValueError, match="32"):
        grant(owner, request, secret=bytes(length))
    from casemate.seal import hpke

    sealed = hpke.seal(key.public, bytes(length), info=release._info(request))
    signature = owner.key.sign(release._signed(request, sealed))
    answer = codec.encode(release.ReleaseGrant(sealed=sealed, signature=signature))
    with pytest.raises(FormatError) as e:
        release.accept(request, answer, key, owner.public)
    assert e.value.code == "format.release"


@pytest.mark.parametrize("data", [b"", b"{}", b"\xff", b'{"type":"release-grant/v1"}'])
def test_other_bytes(owner, data):
    request, key = asked(owner)
    with pytest.raises(FormatError):
        release.accept(request, data, key, owner.public)
    with pytest.raises(FormatError):
        grant(owner, data)


class Steps:
    """A clock that goes with the pauses."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now

    def wall(self):
        return NOW

    async def sleep(self, seconds):
        raise AssertionError


def obtain(owner, disk, pause):
    clock = Steps()

    def paused(seconds):
        clock.now += seconds
        pause(clock.now)

    seal = release.owner_release(owner.public, disk, OsRng(), clock, pause=paused)
    return seal.secret(tee().attest)


def test_a_server_waits_for_its_owner(owner):
    disk = owner.disk
    found = obtain(owner, disk, lambda now: owner(now) if now >= 30 else None)
    assert found == owner.secret
    assert not disk.exists(release.REQUEST_FILE)
    assert not disk.exists(release.GRANT_FILE)


def test_a_server_waits_for_ten_minutes_at_most(owner):
    waited = []
    with pytest.raises(UsageError) as e:
        obtain(owner, owner.disk, waited.append)
    assert e.value.code == "usage.tee-release"
    assert waited[-1] == release.WAIT_SECONDS


def test_an_answer_that_lay_there_before_is_not_taken(owner):
    store(owner.disk, release.GRANT_FILE, b"planted")
    assert obtain(owner, owner.disk, owner) == owner.secret


def test_a_planted_answer_ends_the_start(owner):
    with pytest.raises(FormatError):
        obtain(owner, owner.disk, lambda _: store(owner.disk, release.GRANT_FILE, b"planted"))
    assert load(owner.disk, release.REQUEST_FILE) is not None


def test_the_bytes_that_evidence_is_over():
    from hashlib import sha512

    made = release.report_data(b"o" * 32, b"h" * 1216)
    tag = b"\0\0\0\x13casemate/release/v1"
    assert made == sha512(tag + b"\0\0\0\x20" + b"o" * 32 + b"\0\0\x04\xc0" + b"h" * 1216).digest()


def test_over_another_kind_of_evidence(trust):
    policy = Trust.of("nitro", roots=nitro.policy().roots)
    owner = tees.Owner(SimDisk(), policy)

    def attest(report_data):
        from casemate.spec.evidence import Evidence

        files = {"document.cose": nitro.document(user_data=report_data)}
        return Evidence(tee="nitro", simulated=False, files=files)

    request, key = release.request(attest, owner.public, OsRng())
    assert release.accept(request, grant(owner, request), key, owner.public) == SECRET
