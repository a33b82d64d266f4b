"""The trust policy on documents made up under a test root."""

from datetime import timedelta

import pytest

from casemate.attest import fields, folder, kinds
from casemate.attest.nitro.appraise import SKEW
from casemate.attest.nitro.policy import DEFAULT, NitroPolicy
from casemate.attest.verdict import Unchecked
from casemate.spec.errors import UsageError
from support import nitro

GOOD = nitro.document()
ZERO = bytes(48)


def judge(data=GOOD, now=nitro.NOW, nonce=None, **changed):
    more = {} if nonce is None else {"nonce": nonce}
    policies = {"nitro": nitro.policy(**changed)}
    return folder.judge({"document.cose": data}, now=now.timestamp(), policies=policies, **more)


def code(*args, **more):
    judged = judge(*args, **more)
    assert judged.crypto == "valid"
    assert (judged.decision == "accept") == (not judged.code)
    return judged.code.removeprefix("evidence.")


def registers(**changed):
    found = nitro.fields()["pcrs"] | {int(n[3:]): value for n, value in changed.items()}
    return nitro.document(pcrs={n: value for n, value in found.items() if value is not None})


@pytest.mark.parametrize("n", [0, 1, 2])
@pytest.mark.parametrize("value", [ZERO, None])
def test_debug_is_a_measured_register_that_is_zero_or_missing(n, value):
    data = registers(**{f"pcr{n}": value})
    assert code(data, debug=False) == "appraise-debug"
    assert code(data, debug=True) == ""
    assert code(data, debug=Unchecked("a test")) == ""
    assert judge(data, debug=True).claims.other["debug"] is True


def test_other_registers_may_be_zero():
    assert code(registers(pcr4=ZERO)) == ""
    assert judge().claims.other["debug"] is False


def test_pinned_registers():
    values = {n: value.hex() for n, value in nitro.fields()["pcrs"].items()}
    for n in (0, 4, 5):
        assert code(pcrs={n: ("ab" * 48, values[n])}) == ""
        assert code(pcrs={n: ("ab" * 48,)}) == f"appraise-pcr-{n}"
    assert code(pcrs={n: (value,) for n, value in values.items()}) == ""
    assert code(pcrs={0: (values[0],), 1: (values[0],)}) == "appraise-pcr-1"
    # A register that is pinned and not in the document is none of the admitted.
    assert code(pcrs={16: ("00" * 48,)}) == "appraise-pcr-16"
    assert code(registers(pcr4=None), pcrs={4: ("00" * 48,)}) == "appraise-pcr-4"


def test_pinned_enclaves_and_instances():
    assert code(module_ids=("i-1", nitro.MODULE)) == ""
    assert code(module_ids=(nitro.INSTANCE,)) == "appraise-module-id"
    assert code(instances=(nitro.INSTANCE,)) == ""
    for other in (nitro.INSTANCE[:-1], nitro.INSTANCE + "0", nitro.MODULE):
        assert code(instances=(other,)) == "appraise-instance"
    nameless = nitro.document(module_id="nobody")
    assert code(nameless) == ""
    assert code(nameless, instances=("nobody",)) == "appraise-instance"
    # What stands before the last -enc.
    tricky = nitro.document(module_id=f"{nitro.INSTANCE}-enc-encx")
    assert code(tricky, instances=(nitro.INSTANCE,)) == "appraise-instance"


def test_age():
    def at(seconds, **more):
        return code(now=nitro.NOW + timedelta(seconds=seconds), max_age=60, **more)

    assert at(0) == at(60) == at(-SKEW) == ""
    assert at(61) == "appraise-age"
    ahead = nitro.document(timestamp=int((nitro.NOW.timestamp() + SKEW + 1) * 1000))
    assert code(ahead, max_age=60) == "appraise-age"
    assert code(ahead) == ""
    assert code(nitro.document(timestamp=1), max_age=60) == "appraise-age"
    assert code(nitro.document(timestamp=2**64 - 1), max_age=60) == "appraise-age"


def test_all_is_looked_at_before_the_first_failure():
    judged = judge(
        registers(pcr0=ZERO), module_ids=("x",), instances=("x",), pcrs={1: ("ab" * 48,)}
    )
    failed = [c.name for c in judged.checks if c.outcome == "failed"]
    assert failed == ["debug", "pcr-1", "module-id", "instance"]
    assert judged.code == "evidence.appraise-debug"


def test_what_is_left_open_says_why():
    reasons = {
        c.name: c.detail for c in judge(debug=Unchecked("so")).checks if c.outcome == "unchecked"
    }
    assert reasons == {
        "revocation": f"no revocation list came with the document: {DEFAULT.crl.reason}",
        "debug": "so", "pcrs": DEFAULT.pcrs.reason, "module-id": DEFAULT.module_ids.reason,
        "instance": DEFAULT.instances.reason, "age": DEFAULT.max_age.reason,
        "freshness": "evidence folder",
    }  # fmt: skip


def test_freshness():
    data = nitro.document(nonce=b"asked", user_data=b"mine\0\0")
    for nonce in (b"asked", b"mine\0\0", b"mine"):
        assert code(data, nonce=nonce) == ""
    for nonce in (b"aske", b"asked\0", b"mine\0", b"\0"):
        assert code(data, nonce=nonce) == "freshness-mismatch"
    assert code(data, nonce=b"") == "freshness-nonce"
    none = nitro.document(nonce=b"", user_data=None)
    assert judge(none).claims.fresh == ()


def test_what_is_claimed():
    claims = judge(nitro.document(public_key=b"key", user_data=b"u" * 64)).claims
    assert claims.bound == b"u" * 64
    assert claims.measurement == nitro.pcr("pcr0").hex()
    assert (claims.product, claims.chip_id, claims.tcb) == ("AWS Nitro Enclaves", "", {})
    assert claims.other["instance"] == nitro.INSTANCE
    assert claims.other["public_key"] == b"key".hex()
    assert judge(nitro.document(user_data=None)).claims.bound == b""


def test_the_fields_can_be_shown():
    kind = kinds.KINDS["nitro"]
    data = nitro.sign(b"x")
    assert kind.recognises({"document.cose": data})
    assert not kind.recognises({"report.bin": bytes(1184)})
    shown = kind.fields({"document.cose": GOOD})
    wanted = nitro.fields()
    assert shown["module_id"] == wanted["module_id"]
    assert shown["pcrs"] == {str(n): value.hex() for n, value in wanted["pcrs"].items()}
    assert (shown["public_key"], shown["nonce"]) == (None, wanted["nonce"].hex())
    assert shown["signature"] == GOOD[-96:].hex()
    assert kind.of(bytes(range(64))) == bytes(range(64))


@pytest.mark.parametrize(
    "changed",
    [
        {"roots": ()}, {"roots": ("AB" * 32,)}, {"roots": Unchecked("no")}, {"roots": "ab" * 32},
        {"crl": "yes"}, {"crl": 1}, {"debug": 0}, {"debug": None}, {"pcrs": {}},
        {"pcrs": {32: ("ab" * 48,)}}, {"pcrs": {"x": ("ab" * 48,)}}, {"pcrs": {0: ()}},
        {"pcrs": {0: "ab" * 48}}, {"pcrs": {0: ("ab" * 32,)}}, {"pcrs": {0: Unchecked("no")}},
        {"pcrs": ("ab" * 48,)}, {"pcrs": None}, {"pcrs": {0: 1}}, {"module_ids": ()},
        {"module_ids": "i-0"}, {"module_ids": (1,)}, {"instances": ("",)}, {"max_age": 0},
        {"max_age": -1}, {"max_age": True}, {"max_age": 1.5}, {"max_age": None},
    ],
)  # fmt: skip
def test_a_malformed_policy_is_refused(changed):
    with pytest.raises(UsageError) as e:
        nitro.policy(**changed)
    assert e.value.code == "usage.trust"
    assert e.value.where == next(iter(changed))


def test_a_policy_from_toml():
    section = {
        "roots": ["ab" * 32], "crl": {"unchecked": "none is carried"}, "debug": False,
        "pcrs": {"0": ["ab" * 48, "cd" * 48], "8": ["00" * 48]}, "module_ids": ["i-1-enc2"],
        "instances": {"unchecked": "any"}, "max_age": 300,
    }  # fmt: skip
    found = fields.load(NitroPolicy, section, "nitro")
    assert found.pcrs == {0: ("ab" * 48, "cd" * 48), 8: ("00" * 48,)}
    assert found.instances == Unchecked("any")
    for name in section:
        with pytest.raises(UsageError):
            fields.load(NitroPolicy, {k: v for k, v in section.items() if k != name}, "nitro")
