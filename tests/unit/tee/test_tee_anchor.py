"""Anchors in a software TPM (libtpms), with who sits on its bus."""

import hashlib
import socket
import struct
import threading
from contextlib import contextmanager, suppress

import pytest

from casemate.ledger import anchor as rule
from casemate.seams import OsRng
from casemate.spec.errors import LedgerError, UsageError
from casemate.tee import anchor, choose, open_anchor, tpm_device
from casemate.tee.anchor import INDEX, TpmAnchor
from support import tees
from support.anchors import Names, link
from support.firmware import _agree, _message

SECRET, OTHER = b"s" * 32, b"o" * 32
STEPS = [bytes([i]) * 32 for i in range(1, 9)]


def test_only_the_owners_range_and_whole_secrets():
    for index in (0x017FFFFF, 0x01C00000, 0x01C0000A, 0):
        with pytest.raises(UsageError) as e:
            TpmAnchor(SECRET, "none", index)
        assert e.value.code == "usage.tee-absent"
    with pytest.raises(ValueError, match="31 bytes"):
        TpmAnchor(bytes(31), "none")


def test_authorisations_differ_and_end_in_no_zero():
    """A TPM drops zeros at the end, and then its HMAC would be another."""
    made = {anchor._auth(bytes([i]) * 32, INDEX + j) for i in range(200) for j in range(2)}
    assert len(made) == 400
    assert {(len(a), a[-1]) for a in made} == {(32, 1)}


def test_which_machines_have_one(tmp_path):
    with tees.simulated_place(tmp_path, 0) as place:
        assert open_anchor(place.open(), SECRET, machine=place.machine) is None
    with tees.snp_place(tmp_path, 0) as place:
        assert open_anchor(place.open(), SECRET, machine=place.machine) is None
    assert anchor.look(tmp_path / "tpmrm0") == (False, f"no {tmp_path / 'tpmrm0'}")


def test_a_simulated_tee_beside_a_tpm_has_none(tmp_path):
    here = tees.machine(tmp_path, tpm_path=tmp_path)
    with tees.simulated_place(tmp_path, 0) as place:
        assert open_anchor(place.open(), SECRET, machine=here) is None


def test_no_tpm_at_the_other_end(tmp_path):
    pytest.importorskip("tpm2_pytss", reason="the extra tpm is not installed")
    dead = "swtpm:host=127.0.0.1,port=1"
    with pytest.raises(UsageError) as e:
        TpmAnchor(SECRET, dead).read()
    assert e.value.code == "usage.tee-device"
    fit, seen = anchor.look(tmp_path, dead)
    assert not fit
    assert "fails at opening" in seen


@pytest.fixture(scope="module")
def tcti(tmp_path_factory):
    with tees.swtpm(tmp_path_factory.mktemp("tpm")) as tcti:
        yield tcti


@pytest.fixture
def esys(tcti):
    """The operator at the TPM; each test gets it with no index. Only one may speak to it at a
    time."""

    def operate(work):
        import tpm2_pytss as tss

        with tss.ESAPI(tcti) as esys:
            return work(tss, esys)

    yield operate
    operate(forget)
    operate(remove)


def remove(tss, esys):
    for index in (INDEX, INDEX + 1):
        try:
            handle = esys.tr_from_tpmpublic(index)
        except tss.TSS2_Exception:
            continue
        esys.nv_undefine_space(handle)


def forget(tss, esys):
    """Sessions that an enclave could not end which was lied to; the kernel's resource manager does
    it when the connection ends."""
    _, found = esys.get_capability(tss.TPM2_CAP.HANDLES, tss.TPM2_HR.HMAC_SESSION, 64)
    for handle in found.data.handles:
        esys.flush_context(esys.tr_from_tpmpublic(handle))


def index(tss, kind, index=INDEX, size=32, more=0):
    attributes = tss.TPMA_NV.AUTHREAD | tss.TPMA_NV.AUTHWRITE | tss.TPMA_NV.NO_DA | more
    public = tss.TPMS_NV_PUBLIC(
        nvIndex=index, nameAlg=tss.TPM2_ALG.SHA256, dataSize=size,
        attributes=attributes | kind << tss.TPMA_NV.TPM2_NT_SHIFT,
    )  # fmt: skip
    return tss.TPM2B_NV_PUBLIC(nvPublic=public)


def begun(tcti, secret=SECRET, **more):
    made = TpmAnchor(secret, tcti, **more)
    stand = rule.resume(made, None, OsRng())
    return made, stand


@tees.needs_tpm
class TestTpm:
    def test_a_life(self, tcti, esys):
        made, stand = begun(tcti)
        value = stand.value
        assert made.read() == value
        for count, step in enumerate(STEPS, 1):
            mark = stand.mark(step)
            stand = rule.move(TpmAnchor(SECRET, tcti), mark)
            value = link(value, step)
            assert stand == rule.Stand(made.name, count, value)
        again = rule.resume(TpmAnchor(SECRET, tcti), mark, OsRng())
        assert again == stand
        with pytest.raises(LedgerError) as e:
            rule.resume(made, rule.Stand(made.name, 1, STEPS[0]).mark(STEPS[1]), OsRng())
        assert e.value.code == "ledger.rolled-back"

    def test_a_crash_between_recording_and_moving(self, tcti, esys):
        made, stand = begun(tcti)
        mark = stand.mark(STEPS[0])
        assert rule.resume(made, mark, OsRng()).value == mark.after == made.read()

    def test_a_dormant_copy_is_refused(self, tcti, esys):
        made, stand = begun(tcti)
        dormant, sibling = stand.mark(STEPS[0]), stand.mark(STEPS[1])
        rule.move(made, sibling)
        for call in (lambda: rule.resume(made, dormant, OsRng()), lambda: rule.move(made, dormant)):
            with pytest.raises(LedgerError) as e:
                call()
            assert e.value.code == "ledger.rolled-back"

    def test_it_outlives_a_power_cycle(self, tmp_path):
        folder = tmp_path / "tpm"
        with tees.swtpm(folder) as tcti:
            made, stand = begun(tcti)
            mark = stand.mark(STEPS[0])
            rule.move(made, mark)
            name = made.name
        with tees.swtpm(folder, new=False) as tcti:  # killed: no TPM2_Shutdown went before
            after = TpmAnchor(SECRET, tcti)
            assert after.name == name
            assert rule.resume(after, mark, OsRng()).value == mark.after

    def test_the_name_is_the_index_and_the_endorsement_key(self, tcti, esys):
        """The key is the one of TCG's template, as TCG's own software makes it."""

        def theirs(tss, esys):
            from tpm2_pytss.utils import NoSuchIndex, create_ek_template

            def none(index):
                raise NoSuchIndex(index)

            _, template = create_ek_template("EK-ECC256", none)
            handle, public, *_ = esys.create_primary(None, template, tss.ESYS_TR.ENDORSEMENT)
            esys.flush_context(handle)
            return public.publicArea.to_der()

        expected = hashlib.sha256(esys(theirs)).hexdigest()
        assert TpmAnchor(SECRET, tcti).name == f"tpm2:0180ca5e:{expected}"
        assert TpmAnchor(SECRET, tcti, INDEX + 1).name == f"tpm2:0180ca5f:{expected}"

    def test_two_servers_on_one_tpm(self, tcti, esys):
        one, _ = begun(tcti)
        two, stand = begun(tcti, OTHER, index=INDEX + 1)
        before = one.read()
        rule.move(two, stand.mark(STEPS[0]))
        assert one.read() == before

    def test_anothers_index_is_refused(self, tcti, esys):
        begun(tcti, OTHER)
        mine = TpmAnchor(SECRET, tcti)
        for call in (mine.read, lambda: mine.extend(STEPS[0]), lambda: mine.begin(STEPS[0])):
            with pytest.raises(LedgerError) as e:
                call()
            assert e.value.code == "ledger.anchor-foreign"
            assert e.value.where == mine.name

    def test_wrong_authorisations_lock_nothing(self, tcti, esys):
        made, _ = begun(tcti)
        for _ in range(40):
            with pytest.raises(LedgerError):
                TpmAnchor(OTHER, tcti).read()
        assert made.read()

    def test_the_operator_cannot_use_it(self, tcti, esys):
        made, stand = begun(tcti)

        def attempts(tss, esys):
            handle = esys.tr_from_tpmpublic(INDEX)
            tried = [
                lambda who=who, what=what: what(handle, who)
                for who in (tss.ESYS_TR.OWNER, tss.ESYS_TR.PLATFORM, handle)
                for what in (
                    lambda h, who: esys.nv_read(h, 32, auth_handle=who),
                    lambda h, who: esys.nv_extend(h, b"x" * 32, auth_handle=who),
                    lambda h, who: esys.nv_write(h, bytes(32), auth_handle=who),
                    lambda h, who: esys.nv_increment(h, auth_handle=who),
                )
            ]
            for attempt in tried:
                with pytest.raises(tss.TSS2_Exception):
                    attempt()
            return len(tried)

        assert esys(attempts) == 12
        assert made.read() == stand.value

    def test_removed_and_defined_anew(self, tcti, esys):
        made, stand = begun(tcti)
        mark = stand.mark(STEPS[0])
        rule.move(made, mark)
        esys(remove)
        assert made.read() is None
        with pytest.raises(LedgerError) as e:
            rule.resume(made, mark, OsRng())
        assert e.value.code == "ledger.anchor-missing"
        with pytest.raises(LedgerError) as e:
            made.extend(STEPS[1])
        assert e.value.code == "ledger.anchor-missing"
        # By the enclave, from a state that had no mark yet.
        _, anew = begun(tcti)
        assert anew.value not in (mark.before, mark.after)
        with pytest.raises(LedgerError) as e:
            rule.resume(made, mark, OsRng())
        assert e.value.code == "ledger.rolled-back"

    @pytest.mark.parametrize("form", ["other auth", "counter", "ordinary", "readable", "short"])
    def test_defined_anew_by_the_operator(self, tcti, esys, form):
        made, stand = begun(tcti)
        mark = stand.mark(STEPS[0])
        esys(remove)

        def define(tss, esys):
            kinds = {"counter": (tss.TPM2_NT.COUNTER, 8), "ordinary": (tss.TPM2_NT.ORDINARY, 32)}
            kind, size = kinds.get(form, (tss.TPM2_NT.EXTEND, 32))
            more = tss.TPMA_NV.OWNERWRITE if form == "readable" else 0
            if form == "short":
                kind, size = tss.TPM2_NT.ORDINARY, 16
            handle = esys.nv_define_space(b"guess", index(tss, kind, size=size, more=more))
            if form == "counter":
                esys.nv_increment(handle)
            elif kind == tss.TPM2_NT.EXTEND:
                esys.nv_extend(handle, STEPS[0])
            else:
                esys.nv_write(handle, bytes(size))

        esys(define)
        with pytest.raises(LedgerError) as e:
            rule.resume(made, mark, OsRng())
        assert e.value.code == "ledger.anchor-foreign"

    def test_another_tpm(self, tcti, esys, tmp_path):
        made, stand = begun(tcti)
        mark = stand.mark(STEPS[0])
        with tees.swtpm(tmp_path / "other") as other:
            there, _ = begun(other)
            assert there.name != made.name
            with pytest.raises(LedgerError) as e:
                rule.resume(there, mark, OsRng())
        assert e.value.code == "ledger.anchor-foreign"

    def test_a_counter_never_goes_back_either(self, tcti, esys):
        """TCG's rule that the module's docstring cites: it was the obvious choice, and fails for
        another reason (tests/attacks/test_anchor.py)."""

        def lives(tss, esys):
            values = []
            for increments in (5, 1, 1):
                handle = esys.nv_define_space(b"", index(tss, tss.TPM2_NT.COUNTER, INDEX + 1, 8))
                for _ in range(increments):
                    esys.nv_increment(handle)
                values.append(int.from_bytes(bytes(esys.nv_read(handle, 8)), "big"))
                esys.nv_undefine_space(handle)
            return values

        first, *later = esys(lives)
        assert later == [first + 1, first + 2]

    def test_a_crash_between_defining_and_beginning(self, tcti, esys):
        made = TpmAnchor(SECRET, tcti)
        with tpm_device.Tpm(tcti) as tpm:
            tpm.chain_define(INDEX, made._auth)
        assert made.read() is None
        _, stand = begun(tcti)
        assert stand.value == made.read()

    def test_many_uses_leave_nothing_in_the_tpm(self, tcti, esys):
        """It has three places for keys and as many for sessions: a leak shows at the fourth."""
        made, stand = begun(tcti)
        for step in STEPS:
            stand = rule.move(made, stand.mark(step))
            assert TpmAnchor(SECRET, tcti).name == made.name
        for _ in range(8):
            esys(remove)
            made, _ = begun(tcti)

    def test_a_tpm_that_asks_for_pauses(self, tcti, esys, monkeypatch):
        import tpm2_pytss as tss

        made, stand = begun(tcti)
        real, waits, pauses = tss.ESAPI.nv_extend, [2], []

        def limited(self, *arguments, **options):
            if waits[0]:
                waits[0] -= 1
                raise tss.TSS2_Exception(0x920)
            return real(self, *arguments, **options)

        monkeypatch.setattr(tss.ESAPI, "nv_extend", limited)
        monkeypatch.setattr(tpm_device.time, "sleep", pauses.append)
        stand = rule.move(made, stand.mark(STEPS[0]))
        assert len(pauses) == 2
        waits[0] = 1000
        with pytest.raises(UsageError) as e:
            rule.move(made, stand.mark(STEPS[1]))
        assert e.value.code == "usage.tee-device"

    def test_what_doctor_sees(self, tcti, esys, tmp_path):
        from casemate.cli import doctor

        here = tees.machine(tmp_path, tpm_path=tmp_path, tcti=tcti)

        def seen():
            found = doctor._anchor(here)
            return found.state, found.found.partition(" is ")[2]

        assert seen() == ("ok", "free: the server can define it")
        made = TpmAnchor(SECRET, tcti)
        with tpm_device.Tpm(tcti) as tpm:
            tpm.chain_define(INDEX, made._auth)
        assert seen() == ("ok", "defined, with no value yet")
        begun(tcti)
        assert seen() == ("ok", "in use as an anchor")
        esys(remove)
        esys(lambda tss, esys: esys.nv_define_space(b"", index(tss, tss.TPM2_NT.ORDINARY)))
        assert seen() == ("missing", "taken by something else")

    def test_beside_hardware(self, tcti, esys, tmp_path):
        class Tee:
            simulated = False

        here = tees.machine(tmp_path, tpm_path=tmp_path, tcti=tcti)
        made = choose.open_anchor(Tee(), SECRET, machine=here, index=INDEX + 1)
        assert rule.resume(made, None, Names(1)).value == made.read()


# Who sits on the bus.

NV_READ, NV_EXTEND, NV_DEFINE = 0x14E, 0x136, 0x12A


class Bus:
    """Hands commands on to a TPM; ``change(code, command, ask)`` may answer in its place, where
    ``ask`` puts a command to the TPM."""

    def __init__(self, tcti):
        self.port = int(tcti.rpartition("=")[2])
        self.change = lambda code, command, ask: ask(command)
        self.seen = []
        self.place = tees._free_ports()
        self._listeners = [socket.create_server(("127.0.0.1", self.place + i)) for i in (0, 1)]
        threading.Thread(target=self._commands, daemon=True).start()
        threading.Thread(target=_agree, args=(self._listeners[1],), daemon=True).start()
        self.tcti = f"swtpm:host=127.0.0.1,port={self.place}"

    def close(self):
        for one in self._listeners:
            one.close()

    def _commands(self):
        with suppress(OSError):
            while True:
                client, _ = self._listeners[0].accept()
                chip = socket.create_connection(("127.0.0.1", self.port))
                with client, chip, suppress(EOFError):
                    self._serve(client, chip)

    def _serve(self, client, chip):
        def ask(command):
            chip.sendall(command)
            return _message(chip)

        while True:
            command = _message(client)
            code = struct.unpack(">I", command[6:10])[0]
            answer = self.change(code, command, ask)
            self.seen.append((code, command, answer))
            client.sendall(answer)

    def all(self, code):
        return [(command, answer) for c, command, answer in self.seen if c == code]


@pytest.fixture
def bus(tcti, esys):
    made = Bus(tcti)
    yield made
    made.close()


def refused(call):
    with pytest.raises((UsageError, LedgerError)) as e:
        call()
    return e.value.code


@tees.needs_tpm
class TestBus:
    def test_the_authorisation_never_stands_on_it(self, bus):
        made, stand = begun(bus.tcti)
        rule.move(made, stand.mark(STEPS[0]))
        assert bus.all(NV_DEFINE)
        assert bus.all(NV_EXTEND)
        assert STEPS[0] in bus.all(NV_EXTEND)[-1][0]  # so the search would find it
        for _, command, answer in bus.seen:
            assert made._auth[:16] not in command + answer

    def test_an_older_answer(self, bus):
        """Replayed whole, and its value in a fresh answer's place."""
        made, stand = begun(bus.tcti)
        mark = stand.mark(STEPS[0])
        old = bus.all(NV_READ)[-1][1]
        rule.move(made, mark)
        at = old.index(stand.value)

        def replay(code, command, ask):
            answer = ask(command)
            return old if code == NV_READ else answer

        def graft(code, command, ask):
            answer = ask(command)
            if code == NV_READ:
                return answer[:at] + stand.value + answer[at + 32 :]
            return answer

        for bus.change in (replay, graft):
            assert refused(made.read) == "usage.tee-device"

    def test_passwords_in_place_of_hmacs_would_be_found(self, bus, monkeypatch):
        """Seeded: then the authorisation is seen, and an older value taken for the newest."""
        import tpm2_pytss as tss

        real = tpm_device.Tpm._session

        @contextmanager
        def plain(self, kind, key, *encrypted):
            if key == tss.ESYS_TR.NONE:
                yield tss.ESYS_TR.PASSWORD
            else:
                with real(self, kind, key, *encrypted) as session:
                    yield session

        monkeypatch.setattr(tpm_device.Tpm, "_session", plain)
        made, stand = begun(bus.tcti)
        mark = stand.mark(STEPS[0])
        old = bus.all(NV_READ)[-1][1]
        rule.move(made, mark)
        assert any(made._auth in command for _, command, _ in bus.seen)
        bus.change = lambda code, command, ask: old if code == NV_READ else ask(command)
        assert made.read() == stand.value

    def test_a_swallowed_extension(self, bus):
        """Said to be done: the answer's HMAC is wanting."""
        made, stand = begun(bus.tcti)
        done = bus.all(NV_EXTEND)[-1][1]
        bus.change = lambda code, command, ask: done if code == NV_EXTEND else ask(command)
        assert refused(lambda: rule.move(made, stand.mark(STEPS[0]))) == "usage.tee-device"
        bus.change = lambda code, command, ask: ask(command)
        assert made.read() == stand.value

    def test_another_extension(self, bus):
        made, stand = begun(bus.tcti)

        def other(code, command, ask):
            return ask(command.replace(STEPS[0], STEPS[1]))

        bus.change = other
        assert refused(lambda: rule.move(made, stand.mark(STEPS[0]))) == "ledger.anchor-foreign"
        bus.change = lambda code, command, ask: ask(command)
        assert made.read() == stand.value

    def test_an_extension_sent_again(self, bus, tcti):
        made, stand = begun(bus.tcti)

        def twice(code, command, ask):
            answer = ask(command)
            if code == NV_EXTEND:
                ask(command)
            return answer

        bus.change = twice
        mark = stand.mark(STEPS[0])
        with suppress(UsageError, LedgerError):  # it may spoil the session, but not the value
            rule.move(made, mark)
        bus.change = lambda code, command, ask: ask(command)
        assert made.read() == mark.after

    @pytest.mark.parametrize("error", [0x18B, 0x14A, 0x9A2, 0x101])
    def test_errors_are_not_authentic_and_open_nothing(self, bus, error):
        """Said of a state that is anchored: no such index, no value yet, a wrong authorisation."""
        made, stand = begun(bus.tcti)
        mark = stand.mark(STEPS[0])
        rule.move(made, mark)
        bus.change = lambda code, command, ask: (
            struct.pack(">HII", 0x8001, 10, error) if code in (NV_READ, 0x169) else ask(command)
        )
        assert refused(lambda: rule.resume(made, mark, OsRng())) in (
            "ledger.anchor-missing", "ledger.anchor-foreign", "usage.tee-device",
        )  # fmt: skip
