"""Collateral by a fetch function that is passed in: vendors' services as far as they are used."""

import base64
import json
from dataclasses import replace
from urllib.parse import parse_qs, quote, urlsplit

import pytest
from cryptography.hazmat.primitives import serialization

from casemate.attest import folder
from casemate.seams import OsRng
from casemate.seams.files import load, store
from casemate.spec.errors import NetError
from casemate.tee import collateral, nvidia
from casemate.tee.fetch import Reply, answered, failed
from support import dcap, snp, tees
from support import nvidia as gpu
from support.disk import SimDisk
from support.evidence import NOW, FixedClock


def pem(*certificates):
    return b"".join(c.public_bytes(serialization.Encoding.PEM) for c in certificates)


class Services:
    """AMD's KDS, Intel's PCS, NVIDIA's RIM service, a TPM maker's PKI. ``down``: a part of the URLs
    that do not answer, with the status; ``asked``: all URLs."""

    def __init__(self, down=None, **bodies):
        self.down, self.bodies, self.asked = down or {}, bodies, []

    def __call__(self, ask):
        self.asked.append(ask.url)
        assert ask.body is None
        for part, status in self.down.items():
            if part in ask.url:
                if status is None:
                    raise failed(ask.url, "ConnectError")
                return Reply(status, {}, b"x")
        where = urlsplit(ask.url)
        for name, answer in {
            "kdsintf.amd.com": self.amd, "api.trustedservices.intel.com": self.intel,
            "certificates.trustedservices.intel.com": self.intel_root,
            "rim.attestation.nvidia.com": self.nvidia, "pki.example": self.pki,
        }.items():  # fmt: skip
            if where.netloc == name:
                return answer(where, {k: v[0] for k, v in parse_qs(where.query).items()})
        raise AssertionError(ask.url)

    def amd(self, where, query):
        service, version, product, what = where.path.strip("/").split("/")
        assert (version, product) == ("v1", "Genoa")
        kind = service.upper()
        ark, between = snp.authorities("Genoa", kind)
        if what == "cert_chain":
            return Reply(200, {}, pem(between, ark))
        if what == "crl":
            return Reply(200, {}, snp.crl())
        assert kind == "VCEK"
        assert bytes.fromhex(what) == snp.hwid("Genoa")
        tcb = snp.TCB["Genoa"]
        assert query == {
            "blSPL": f"{tcb[0]:02d}", "teeSPL": f"{tcb[1]:02d}",
            "snpSPL": f"{tcb[6]:02d}", "ucodeSPL": f"{tcb[7]:02d}",
        }  # fmt: skip
        return Reply(200, {}, snp.leaf("Genoa", "VCEK"))

    def intel(self, where, query):
        case = dcap.Case().collateral()
        chain = quote(case["tcb_info_issuer_chain"])

        def document(member, name):
            text = f'{{"{member}":{case[name]},"signature":"{case[name + "_signature"]}"}}'
            return text.encode()

        if where.path.endswith("/tdx/certification/v4/tcb"):
            return Reply(200, {"tcb-info-issuer-chain": chain}, document("tcbInfo", "tcb_info"))
        if where.path.endswith("/tdx/certification/v4/qe/identity"):
            header = {"sgx-enclave-identity-issuer-chain": chain}
            return Reply(200, header, document("enclaveIdentity", "qe_identity"))
        assert where.path == "/sgx/certification/v4/pckcrl"
        assert query["encoding"] == "der"
        header = {"sgx-pck-crl-issuer-chain": quote(case["pck_crl_issuer_chain"])}
        return Reply(200, header, bytes.fromhex(case["pck_crl"]))

    def intel_root(self, where, _):
        assert where.path == "/IntelSGXRootCA.der"
        return Reply(200, {}, bytes.fromhex(dcap.Case().collateral()["root_ca_crl"]))

    def nvidia(self, where, _):
        name = where.path.removeprefix("/v1/rim/")
        body = gpu.driver_rim() if "DRIVER" in name else gpu.vbios_rim()
        answer = {"id": name, "rim": base64.b64encode(body).decode(), "sha256": "?"}
        return Reply(200, {}, json.dumps(answer).encode())

    def pki(self, where, _):
        assert where.path == "/root.crt"
        return Reply(200, {}, tees.authority().public_bytes(serialization.Encoding.DER))


def bare(inblob, level):
    """A host that hands out no certificates."""
    return snp.report(report_data=inblob, vmpl=level), b"", None


@pytest.fixture
def disk():
    return SimDisk()


def snp_machine(tmp_path, made=bare, **given):
    fake = tees._tsm(tmp_path, 0, made)
    policies = {"sev-snp": snp.policy()}
    return tees.machine(
        tmp_path, tsm_path=fake.root, tsm_folder=lambda _: fake, policies=policies, **given
    )


def opened(kind, machine, disk):
    from casemate import tee

    return tee.open(kind, disk=disk, rng=OsRng(), clock=FixedClock(), machine=machine)


def test_what_snp_needs_is_fetched_and_then_stands_beside_the_report(tmp_path, disk):
    machine = snp_machine(tmp_path)
    maker = opened("auto", machine, disk)
    assert maker.judged.code == "evidence.needs-vcek"
    services = Services()
    outcomes = collateral.refresh(maker, disk, services, NOW)
    assert [o.error for o in outcomes] == ["", "", ""]
    assert {f for o in outcomes for f in o.files} == {
        "vcek.der", "ask.pem", "ark.pem", "crl.der",
    }  # fmt: skip
    assert len({*services.asked}) == len(services.asked) == 3
    again = opened("auto", machine, disk.power_cycle())
    assert again.judged.decision == "accept", again.judged.message
    assert set(maker.attest(bytes(64)).files) == {
        "report.bin", "vcek.der", "ask.pem", "ark.pem", "crl.der",
    }  # fmt: skip


def test_a_hosts_vcek_of_an_older_tcb_gives_way_to_the_one_that_was_fetched(tmp_path, disk):
    """After a firmware update the host's table lags behind."""
    tcb = snp.TCB["Genoa"]
    ark, ask = snp.authorities("Genoa")
    stale = snp.leaf("Genoa", "VCEK", bytes([tcb[0] - 1]) + tcb[1:])
    blob = tees.table(vcek=stale, ask=snp.der(ask), ark=snp.der(ark))

    def made(inblob, level):
        return snp.report(report_data=inblob, vmpl=level), blob, None

    maker = opened("auto", snp_machine(tmp_path, made), disk)
    assert maker.judged.decision == "needs-collateral"
    collateral.refresh(maker, disk, Services(), NOW)
    again = opened("auto", snp_machine(tmp_path / "again", made), disk)
    assert again.judged.decision == "accept", again.judged.message
    assert again.attest(bytes(64)).files["vcek.der"] == snp.leaf("Genoa", "VCEK")


def test_a_vlek_is_the_hosts_and_its_chain_is_amds(tmp_path, disk):
    blob = tees.table(vlek=snp.leaf("Genoa", "VLEK"))

    def made(inblob, level):
        return snp.report(kind="VLEK", report_data=inblob, vmpl=level), blob, None

    maker = opened("auto", snp_machine(tmp_path, made), disk)
    outcomes = collateral.refresh(maker, disk, Services(), NOW)
    assert [o.what for o in outcomes] == ["certificates", "revocation list"]
    assert [o.error for o in outcomes] == ["", ""]
    assert all("/vlek/v1/" in o.url for o in outcomes)
    files = maker.attest(bytes(64)).files
    assert {"vlek.der", "asvk.pem", "ark.pem"} <= set(files)
    assert "vcek.der" not in files


def test_collateral_of_the_other_kind_of_key_does_not_go_along(tmp_path, disk):
    collateral.keep(disk, "cpu", {"vlek.der": b"0", "asvk.pem": b"0"}, "u", NOW)
    maker = opened("auto", snp_machine(tmp_path), disk)
    assert set(maker.attest(bytes(64)).files) == {"report.bin"}


def test_a_hidden_chip_id_is_told(tmp_path, disk):
    def made(inblob, level):
        return snp.report(report_data=inblob, chip_id=bytes(64)), b"", None

    maker = opened("auto", snp_machine(tmp_path, made), disk)
    (outcome,) = collateral.refresh(maker, disk, Services(), NOW)
    assert "hides" in outcome.error


def td(tmp_path, disk):
    fake = tees._tsm(tmp_path, 0, tees.td_quote, provider="tdx_guest", floor=None)
    machine = tees.machine(
        tmp_path, tsm_path=fake.root, tsm_folder=lambda _: fake, policies={"tdx": dcap.tdx()}
    )
    return machine, opened("auto", machine, disk)


def test_what_tdx_needs(tmp_path, disk):
    machine, maker = td(tmp_path, disk)
    assert maker.judged.decision == "needs-collateral"
    services = Services()
    outcomes = collateral.refresh(maker, disk, services, NOW)
    assert [o.error for o in outcomes] == [""] * 4
    assert f"fmspc={dcap.FMSPC.hex()}" in services.asked[0]
    again = opened("auto", machine, disk)
    assert again.judged.decision == "accept", again.judged.message


def test_what_a_gpu_needs(tmp_path, disk):
    class Source:
        name = "test"

        def count(self):
            return 1

        def collect(self, index, nonce):
            return gpu.report(nonce=nonce), gpu.pem(*gpu.device_chain())

    found = nvidia.Found(Source(), 1, "one")
    machine = snp_machine(tmp_path, tees.snp_report, gpus=lambda: found)
    maker = opened("auto", machine, disk)
    outcomes = [o for o in collateral.refresh(maker, disk, Services(), NOW) if o.part == "gpu0"]
    assert [o.what for o in outcomes] == ["driver RIM", "vbios RIM"]
    assert [o.error for o in outcomes] == ["", ""]
    files = maker.attest(bytes(64)).files
    own = {n.removeprefix("gpu0/"): d for n, d in files.items() if n.startswith("gpu0/")}
    judged = folder.judge(own, now=NOW, policies={"nvidia": gpu.policy()})
    assert judged.decision == "accept", judged.message


def test_rim_ids_of_captured_reports():
    """As NVIDIA's catalogue spells them."""
    from casemate.attest.nvidia import abi
    from casemate.attest.nvidia import collateral as devices
    from support.evidence import CAPTURED

    cases = {
        "h100-535.86-driver-rim-mismatch": {
            "driver_rim.xml": "NV_GPU_DRIVER_GH100_535.86.09",
            "vbios_rim.xml": "NV_GPU_VBIOS_1010_0200_882_96005E0001",
        },
        "h100-driver-590-unit": {
            "driver_rim.xml": "NV_GPU_DRIVER_GH100_590.12",
            "vbios_rim.xml": "NV_GPU_VBIOS_G520_0200_885_9600A50001",
        },
        "nvswitch-ls10-rim-match": {
            "bios_rim.xml": "NV_SWITCH_BIOS_5612_0002_890_9610550001",
        },
    }
    root = CAPTURED.parent / "nvidia"
    if not root.is_dir():
        pytest.skip(f"no captured evidence at {root}")
    for case, ids in cases.items():
        files = {p.name: p.read_bytes() for p in (root / case).iterdir()}
        report = abi.parse(files["report.bin"])
        assert collateral.rim_ids(report, devices.device(files)) == ids, case


@tees.needs_tpm
def test_what_a_tpm_needs(tmp_path, disk):
    with tees.tpm_place(tmp_path, 0) as place:
        maker = opened("tpm", replace(place.machine), disk)
        assert maker.judged.code == "evidence.root-ak-unvouched"
        services = Services()
        outcomes = collateral.refresh(maker, disk, services, NOW)
        assert [(o.what, o.url, o.error) for o in outcomes] == [("issuer 1", tees.ISSUER_URL, "")]
        assert opened("tpm", place.machine, disk).judged.decision == "accept"


@tees.needs_tpm
def test_what_an_azure_vm_needs(tmp_path, disk):
    with tees.azure_place(tmp_path, 0) as place:
        offline = replace(place.machine, fetch=lambda ask: Reply(503, {}, b""))
        maker = opened("azure-vtpm", offline, disk)
        assert maker.judged.decision == "needs-collateral"
        outcomes = collateral.refresh(maker, disk, Services(), NOW)
        assert [o.error for o in outcomes] == ["", "", ""]
        assert opened("azure-vtpm", offline, disk).judged.decision == "accept"


def test_nitro_needs_nothing_and_simulation_neither(tmp_path, disk):
    from support.evidence import tee

    with tees.nsm_place(tmp_path, 0) as place:
        assert collateral.refresh(place.open(), disk, Services(), NOW) == ()
    assert collateral.refresh(tee(), disk, Services(), NOW) == ()
    assert collateral.stored(disk, NOW) == ()


@pytest.mark.parametrize("status", [None, 404, 429, 500, 302])
def test_one_service_that_fails_leaves_the_others_and_what_was_there(tmp_path, disk, status):
    maker = opened("auto", snp_machine(tmp_path), disk)
    collateral.refresh(maker, disk, Services(), NOW)
    before = collateral.files(disk)
    outcomes = collateral.refresh(maker, disk, Services(down={"/crl": status}), NOW + 100)
    assert [bool(o.error) for o in outcomes] == [False, False, True]
    assert collateral.files(disk) == before
    ages = {row.file: row.age for row in collateral.stored(disk, NOW + 150)}
    assert ages == {"vcek.der": 50, "ask.pem": 50, "ark.pem": 50, "crl.der": 150}


@pytest.mark.parametrize("body", [b"<html>", b"{}", b"[]", b"\xff\xff", b"null", b'"x"'])
def test_answers_of_another_form_are_not_kept(tmp_path, disk, body):
    class Wrong(Services):
        def __call__(self, ask):
            super().__call__(ask)
            return Reply(200, {}, body)

    for maker in (opened("auto", snp_machine(tmp_path), disk), td(tmp_path / "td", disk)[1]):
        outcomes = collateral.refresh(maker, disk, Wrong(), NOW)
        assert all(o.error for o in outcomes), outcomes
    assert collateral.files(disk) == {}


def test_a_missing_issuer_chain_is_an_error(tmp_path, disk):
    class Headless(Services):
        def __call__(self, ask):
            return replace(super().__call__(ask), headers={})

    outcomes = collateral.refresh(td(tmp_path, disk)[1], disk, Headless(), NOW)
    assert [bool(o.error) for o in outcomes] == [True, True, True, False]


def test_ages_the_oldest_first(disk):
    collateral.keep(disk, "cpu", {"b.der": b"22"}, "u2", NOW)
    collateral.keep(disk, "gpu0", {"a.xml": b"1"}, "u1", NOW - 50)
    rows = collateral.stored(disk, NOW + 10)
    assert [(r.part, r.file, r.url, r.age, r.size) for r in rows] == [
        ("gpu0", "a.xml", "u1", 60, 1), ("cpu", "b.der", "u2", 10, 2),
    ]  # fmt: skip
    assert collateral.files(disk) == {"b.der": b"22"}
    assert collateral.files(disk, "gpu0") == {"a.xml": b"1"}


@pytest.mark.parametrize(
    "index",
    [b"", b"{", b"[]", b'{"cpu/b.der":7}', b'{"cpu/../x":{"fetched":1,"url":"u"}}', b"\xff"],
)
def test_a_damaged_index_is_an_empty_one(disk, index):
    collateral.keep(disk, "cpu", {"b.der": b"2"}, "u", NOW)
    store(disk, collateral.INDEX, index)
    assert collateral.files(disk) == {}
    assert collateral.stored(disk, NOW) == ()
    collateral.keep(disk, "cpu", {"c.der": b"3"}, "u", NOW)
    assert collateral.files(disk) == {"c.der": b"3"}


@pytest.mark.parametrize("file", ["../x.der", "a/b.der", "", ".der", "x", "X.DER", "a.der\n"])
def test_names_of_files_are_plain(disk, file):
    with pytest.raises(ValueError, match="no name"):
        collateral.keep(disk, "cpu", {file: b""}, "u", NOW)
    assert load(disk, collateral.INDEX) is None


def test_an_empty_or_long_answer_is_none():
    from casemate.tee.fetch import MAX_BODY, Ask

    for body in (b"", bytes(MAX_BODY + 1)):
        with pytest.raises(NetError) as e:
            answered(lambda _, body=body: Reply(200, {}, body), Ask("https://x"))
        assert e.value.code == "net.collateral"
