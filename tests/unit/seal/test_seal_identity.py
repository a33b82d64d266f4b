"""Identities and their files."""

import json
import os
import stat

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from casemate.seal import hpke, identity
from casemate.seal.identity import Identity
from casemate.spec.errors import AuthError, CasemateError, FormatError, UsageError


@pytest.fixture
def anna():
    return Identity.generate("Anna's hospital")


@pytest.fixture(autouse=True)
def quick_scrypt(monkeypatch):
    monkeypatch.setattr(identity, "SCRYPT_LOG_N", 14)


def code_of(call, *args):
    with pytest.raises(CasemateError) as e:
        call(*args)
    return e.value.code


def test_signs_and_receives(anna):
    Ed25519PublicKey.from_public_bytes(anna.public.sign_key).verify(anna.sign(b"x"), b"x")
    assert anna.open(hpke.seal(anna.public.seal_key, b"w", info=b"i"), info=b"i") == b"w"
    assert anna.id == anna.public.id and anna.id.startswith("id_")


def test_two_identities_differ(anna):
    assert Identity.generate(anna.name).id != anna.id


@pytest.mark.parametrize("name", ["", "a" * 81, "line\nbreak", "\ud800"])
def test_impossible_names_are_refused(name):
    assert code_of(Identity.generate, name) == "usage.identity-name"


@pytest.mark.parametrize("passphrase", [None, "correct horse", "Füchslein 🦊"])
def test_a_saved_identity_loads(anna, tmp_path, passphrase):
    path = tmp_path / "deep" / "id.json"
    anna.save(path, passphrase)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert sorted(p.name for p in path.parent.iterdir()) == ["id.json"]
    again = Identity.load(path, passphrase)
    assert again == anna and again.sign(b"x") == anna.sign(b"x")


def test_a_passphrase_hides_the_secret(anna, tmp_path):
    open_, closed = tmp_path / "open", tmp_path / "closed"
    anna.save(open_)
    anna.save(closed, "p")
    secret = json.loads(open_.read_text())["secret"]
    assert secret not in closed.read_text()
    assert secret[:40] not in repr(anna)


def test_a_passphrase_is_needed_and_must_be_right(anna, tmp_path):
    anna.save(tmp_path / "id", "right")
    assert code_of(Identity.load, tmp_path / "id") == "auth.passphrase"
    assert code_of(Identity.load, tmp_path / "id", "wrong") == "auth.passphrase"
    assert code_of(anna.save, tmp_path / "id2", "") == "usage.passphrase"


def test_an_identity_is_never_overwritten(anna, tmp_path):
    anna.save(tmp_path / "id")
    before = (tmp_path / "id").read_bytes()
    assert code_of(Identity.generate("other").save, tmp_path / "id") == "usage.identity-exists"
    assert (tmp_path / "id").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o610, 0o644])
def test_a_file_that_others_can_touch_is_refused(anna, tmp_path, mode):
    path = tmp_path / "id"
    anna.save(path)
    path.chmod(mode)
    assert code_of(Identity.load, path) == "auth.identity-exposed"


def test_what_is_no_identity_file_is_refused(anna, tmp_path):
    assert code_of(Identity.load, tmp_path / "none") == "usage.identity-file"
    assert code_of(Identity.load, tmp_path) in ("format.identity-file", "auth.identity-exposed")
    os.mkfifo(tmp_path / "pipe", 0o600)
    assert code_of(Identity.load, tmp_path / "pipe") == "format.identity-file"
    for content in (b"", b"{}", b"not json", b"\x00" * 100, b"[" * 60000, b"x" * 70000):
        path = tmp_path / "bad"
        path.write_bytes(content)
        path.chmod(0o600)
        assert code_of(Identity.load, path).startswith("format.")


def test_a_swapped_public_half_is_refused(anna, tmp_path):
    other = Identity.generate("other")
    for passphrase, code in ((None, "format.identity-file"), ("p", "auth.passphrase")):
        path = tmp_path / f"id{passphrase}"
        anna.save(path, passphrase)
        tree = json.loads(path.read_text())
        other.save(tmp_path / f"other{passphrase}")
        tree["public"] = json.loads((tmp_path / f"other{passphrase}").read_text())["public"]
        path.write_text(json.dumps(tree, sort_keys=True, separators=(",", ":")))
        assert code_of(Identity.load, path, passphrase) == code


@pytest.mark.parametrize("log_n", [0, 13, 21, 63])
def test_a_file_cannot_ask_for_absurd_work(anna, tmp_path, log_n):
    path = tmp_path / "id"
    anna.save(path, "p")
    tree = json.loads(path.read_text())
    tree["log_n"] = log_n
    path.write_text(json.dumps(tree, sort_keys=True, separators=(",", ":")))
    with pytest.raises(FormatError):
        Identity.load(path, "p")


def test_errors_name_the_file_and_the_mend(anna, tmp_path):
    path = tmp_path / "id"
    anna.save(path)
    path.chmod(0o644)
    with pytest.raises(AuthError, match=rf"chmod 600 {path}"):
        Identity.load(path)
    with pytest.raises(UsageError, match="identity new"):
        Identity.load(tmp_path / "none")


def test_derived_secrets_differ_by_label_and_by_identity(anna, tmp_path):
    assert len(anna.derive(b"a")) == 32
    assert len({anna.derive(b"a"), anna.derive(b"b"), Identity.generate("B").derive(b"a")}) == 3
    anna.save(tmp_path / "anna.json")
    assert Identity.load(tmp_path / "anna.json").derive(b"a") == anna.derive(b"a")
