import hashlib
from dataclasses import fields, replace

import pytest

from casemate.attest import binding
from casemate.attest.kinds import KINDS
from casemate.spec.errors import EvidenceError
from casemate.spec.evidence import Binding
from support.evidence import NONCE, NONCES, attestation, bound


def test_the_bytes_are_those_of_the_docstring():
    b = replace(bound(), server_policy="sha256:" + "5" * 64)
    spelled = b""
    for part in (
        b"casemate/report-data/v1", b.boot, b.tls_spki, b.hpke_key, b.receipt_key, b.log_key,
        b.server_policy.encode(), b.nonce_root,
    ):  # fmt: skip
        spelled += len(part).to_bytes(4, "big") + part
    assert binding.report_data(b) == hashlib.sha512(spelled).digest()
    # Frozen: hardware's field must be the same in every release of this version.
    assert binding.report_data(b).hex() == (
        "9cf23c3075b7d99163f79b843e6e2e9082a46bab5743a687283de6e82e70304d"
        "b6231e3640a6b4c9fea1ef940f837a60674b4af4a01efb9dc6aab7927f3ea301"
    )


@pytest.mark.parametrize("name", [f.name for f in fields(Binding)])
def test_every_field_is_bound(name):
    b = bound()
    value = getattr(b, name)
    other = "sha256:" + "6" * 64 if name == "server_policy" else bytes([value[0] ^ 1]) + value[1:]
    assert binding.report_data(replace(b, **{name: other})) != binding.report_data(b)


@pytest.mark.parametrize("name", [f.name for f in fields(Binding)])
def test_every_field_has_one_length(name):
    b = bound()
    for other in (getattr(b, name)[:-1], getattr(b, name)[:0]):
        with pytest.raises(EvidenceError) as e:
            binding.report_data(replace(b, **{name: other}))
        assert e.value.code == "evidence.binding-malformed"
        assert e.value.where == name


@pytest.mark.parametrize("tee", list(KINDS))
def test_each_kind_has_a_field_in_which_other_keys_are_other_bytes(tee):
    data = binding.report_data(bound())
    carried = binding.carried(tee, data)
    assert KINDS[tee].field
    assert carried == binding.carried(tee, data)
    for at in (0, 31, 32, 63):
        other = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
        assert binding.carried(tee, other) != carried
    assert len(carried) >= 32


def test_what_a_device_carries_follows_from_the_report_and_its_name():
    spelled = b""
    for part in (b"casemate/device/v1", b"sev-snp", b"r" * 64, b"gpu0"):
        spelled += len(part).to_bytes(4, "big") + part
    found = binding.device_data("sev-snp", b"r" * 64, "gpu0")
    assert found == hashlib.sha512(spelled).digest()
    for other in (("tdx", b"r" * 64, "gpu0"), ("sev-snp", b"R" * 64, "gpu0"),
                  ("sev-snp", b"r" * 64, "gpu1")):  # fmt: skip
        assert binding.device_data(*other) != found


def test_files_under_a_name_are_further_evidence():
    own, further = binding.split({"report.bin": b"1", "gpu0/report.bin": b"2", "gpu0/x": b"3"})
    assert own == {"report.bin": b"1"}
    assert further == {"gpu0": {"report.bin": b"2", "x": b"3"}}
    for path in ("/x", "gpu0/", "a/b/c", "../x", "GPU/x", "0gpu/x", "g" * 17 + "/x", "gpu 0/x"):
        with pytest.raises(EvidenceError) as e:
            binding.split({path: b""})
        assert e.value.code == "evidence.parse-name"


def test_nonces():
    a = attestation()
    binding.check_nonce(a, NONCE)
    for nonce in (b"", NONCE[:-1], NONCE + b"\0"):
        with pytest.raises(EvidenceError) as e:
            binding.check_nonce(a, nonce)
        assert e.value.code == "evidence.freshness-nonce"
    for forged, nonce in (
        (a, NONCES[2]),
        (replace(a, index=2), NONCE),
        (replace(a, count=9), NONCE),
        (replace(a, count=2**30), NONCE),
        (replace(a, path=a.path[1:]), NONCE),
        (replace(a, path=(*a.path, bytes(32))), NONCE),
        (replace(a, path=(a.path[0][:-1], *a.path[1:])), NONCE),
    ):
        with pytest.raises(EvidenceError) as e:
            binding.check_nonce(forged, nonce)
        assert e.value.code == "evidence.freshness-path"


def test_a_tree_takes_only_whole_nonces():
    for nonces in ([], [b"x"], [NONCE, b""]):
        with pytest.raises(ValueError, match="nonces"):
            binding.nonce_root(nonces)
