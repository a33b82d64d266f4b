"""Event logs beside TDX quotes: replayed to the RTMRs, or refused. Logs are made up."""

import hashlib
import json
import struct

import pytest

from casemate.attest import folder
from casemate.attest.dcap import replay
from casemate.attest.verdict import Refused
from support import dcap
from support.mutation import COUNT, fuzz

ZERO = bytes(48)


def extend(*digests):
    value = ZERO
    for digest in digests:
        value = hashlib.sha384(value + digest).digest()
    return value


def firmware(imr, payload=b"x", digest=None):
    found = hashlib.sha384(payload).digest() if digest is None else digest
    return {
        "imr": imr, "event_type": 4, "digest": found.hex(), "event": "",
        "event_payload": payload.hex(),
    }  # fmt: skip


def runtime(name="app-id", payload=b"\x12\x34"):
    told = replay.RUNTIME.to_bytes(4, "little") + b":" + name.encode() + b":" + payload
    return {
        "imr": 3, "event_type": replay.RUNTIME, "digest": hashlib.sha384(told).hexdigest(),
        "event": name, "event_payload": payload.hex(),
    }  # fmt: skip


EVENTS = [
    firmware(0), firmware(1, b"y", b"d" * 48), firmware(0, b"z"), firmware(2), runtime(),
    runtime("ready", b""),
]  # fmt: skip
RTMRS = {
    f"rtmr{n}": extend(*(bytes.fromhex(e["digest"]) for e in EVENTS if e["imr"] == n))
    for n in range(4)
}


def ccel(*events, padding=b"\xff" * 9):
    """A log in TCG's form; ``events``: register (RTMR's number and 1), data."""
    spec = b"Spec ID Event03\0" + struct.pack("<IBBBBI", 0, 0, 2, 0, 2, 1)
    spec += struct.pack("<HH", 0x0C, 48) + b"\0"
    out = struct.pack("<II20sI", 1, 3, bytes(20), len(spec)) + spec
    for register, data in events:
        digest = hashlib.sha384(data).digest()
        out += struct.pack("<IIIH", register, 0x80000007, 1, 0x0C) + digest
        out += struct.pack("<I", len(data)) + data
    return out + padding


LOG = ccel((1, b"a"), (2, b"b"), (1, b"c"), (3, b"d"))
MEASURED = {
    "rtmr0": extend(*(hashlib.sha384(x).digest() for x in (b"a", b"c"))),
    "rtmr1": extend(hashlib.sha384(b"b").digest()),
    "rtmr2": extend(hashlib.sha384(b"d").digest()),
    "rtmr3": b"\7" * 48,
}


def judge(body, files, **policy):
    case = dcap.Case(body=dcap.td(**body))
    policies = {"tdx": dcap.tdx(**policy)}
    return folder.judge(case.files() | files, now=dcap.AT, policies=policies)


def written(events):
    return {"event_log.json": json.dumps(events).encode()}


def outcome(judged):
    return next((c.outcome, c.detail) for c in judged.checks if c.name == "event-log")


def test_a_log_that_leads_to_the_registers():
    judged = judge(RTMRS, written(EVENTS), event_log=True)
    assert judged.decision == "accept"
    assert outcome(judged) == (
        "passed",
        "6 events lead to RTMR0, 1, 2, 3; what 1 of them say is covered by no digest",
    )


def test_no_log():
    assert outcome(judge(RTMRS, {})) == ("unchecked", "no event log is asked for")
    assert outcome(judge(RTMRS, {}, event_log=False)) == ("unchecked", "there is none")
    assert judge(RTMRS, {}, event_log=True).code == "evidence.binding-event-log-missing"


@pytest.mark.parametrize("n", range(len(EVENTS)))
def test_no_event_can_be_left_out_changed_or_moved(n):
    for other in (
        EVENTS[:n] + EVENTS[n + 1 :],
        [*EVENTS, EVENTS[n]],
        [e | {"digest": "ab" * 48} if i == n else e for i, e in enumerate(EVENTS)],
        [e | {"imr": (e["imr"] + 1) % 4} if i == n else e for i, e in enumerate(EVENTS)],
    ):
        judged = judge(RTMRS, written(other))
        assert (judged.crypto, judged.code) == ("valid", "evidence.binding-event-log")


def test_what_a_runtime_event_says_is_what_was_measured():
    for change in ({"event": "other"}, {"event_payload": "99"}):
        changed = [e | change if e == EVENTS[4] else e for e in EVENTS]
        assert judge(RTMRS, written(changed)).code == "evidence.binding-event-log"


def test_a_runtime_events_digest_may_be_left_out():
    events = [e | {"digest": "", "version": 1} if e["imr"] == 3 else e for e in EVENTS]
    assert judge(RTMRS, written(events)).decision == "accept"
    events[4] |= {"event_payload": "99"}
    assert judge(RTMRS, written(events)).code == "evidence.binding-event-log"


@pytest.mark.parametrize(
    "event",
    [
        5, [], {}, EVENTS[0] | {"digest": ""}, EVENTS[0] | {"imr": 4}, EVENTS[0] | {"imr": True},
        EVENTS[0] | {"event_type": -1}, EVENTS[0] | {"event_type": 1 << 32},
        EVENTS[0] | {"event": None}, EVENTS[0] | {"digest": "ab" * 32},
        EVENTS[0] | {"digest": "AB" * 48}, EVENTS[0] | {"digest": 5},
        EVENTS[0] | {"event_payload": "abc"}, EVENTS[0] | {"event_payload": "zz"},
    ],
)  # fmt: skip
def test_malformed_events(event):
    assert judge(RTMRS, written([event])).code == "evidence.parse-event-log"


def test_malformed_logs():
    for data, code in ((b"{}", "event-log"), (b"[", "json"), (b'[{"a":1,"a":1}]', "json")):
        assert judge(RTMRS, {"event_log.json": data}).code == f"evidence.parse-{code}"
    twice = written(EVENTS) | {"ccel_data.bin": LOG}
    assert judge(RTMRS, twice).code == "evidence.parse-event-log"


def test_a_ccel():
    judged = judge(MEASURED, {"ccel_data.bin": LOG}, event_log=True)
    assert judged.decision == "accept"
    assert outcome(judged)[1].startswith("4 events lead to RTMR0, 1, 2")
    for register in ("rtmr0", "rtmr1", "rtmr2"):
        judged = judge(MEASURED | {register: ZERO}, {"ccel.bin": LOG})
        assert judged.code == "evidence.binding-event-log"
    third = ccel((1, b"a"), (2, b"b"), (1, b"c"), (3, b"d"), (4, b"e"))
    assert judge(MEASURED, {"ccel_data.bin": third}).code == "evidence.binding-event-log"
    runtime = MEASURED | {"rtmr3": extend(hashlib.sha384(b"e").digest())}
    assert judge(runtime, {"ccel_data.bin": third}).decision == "accept"
    # Registers that a log does not mention are zero.
    short = ccel((1, b"a"), (1, b"c"), (3, b"d"))
    assert judge(MEASURED, {"ccel_data.bin": short}).code == "evidence.binding-event-log"
    assert judge(MEASURED, {"ccel_data.bin": LOG[:40]}).code == "evidence.parse-event-log"


def test_fuzz():
    files = [written(EVENTS), {"ccel_data.bin": LOG}]
    for log in files:
        ((name, data),) = log.items()

        def parse(changed, name=name):
            return replay.read({name: changed})

        assert fuzz(parse, [data], COUNT) < COUNT
    with pytest.raises(Refused):
        replay.read({"event_log.json": b""})
