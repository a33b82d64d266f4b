import hashlib
import stat
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa

import casemate
from casemate.seams import OsDisk, OsRng
from casemate.spec.errors import LedgerError
from casemate.tee import simulated
from casemate.tee.simulated import CHAIN_FILE, SEALING_FILE, SimulatedTee
from support.disk import PowerLoss, SimDisk
from support.evidence import FixedClock, attestation, tee


@pytest.fixture(autouse=True)
def quick_chain(monkeypatch):
    """New chains take the ready-made RSA keys: what is tested is what becomes of them."""
    made, _ = tee()._chain, tee(1)  # both are made before the patch
    text = chain_text(made)
    monkeypatch.setattr(simulated, "_make_chain", lambda: (made, text))


def chain_text(chain) -> bytes:
    from cryptography.hazmat.primitives import serialization

    key = chain.ask_key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    return f"# {simulated.LABEL}\n".encode() + key + chain.ask + chain.ark


def start(disk) -> SimulatedTee:
    return SimulatedTee(disk, OsRng(), FixedClock())


def certificates():
    files = attestation().evidence.files
    return (
        x509.load_pem_x509_certificate(files["ark.pem"]),
        x509.load_pem_x509_certificate(files["ask.pem"]),
        x509.load_der_x509_certificate(files["vcek.der"]),
    )


def test_the_chain_has_amds_form_as_an_independent_parser_reads_it():
    ark, ask, vcek = certificates()
    for certificate in (ark, ask, vcek):
        parameters = certificate.signature_algorithm_parameters
        assert isinstance(parameters, padding.PSS)
        assert certificate.signature_hash_algorithm.name == "sha384"
        assert len(certificate.signature) == 512
    assert ark.public_key().key_size == ask.public_key().key_size == 4096
    assert isinstance(ark.public_key(), rsa.RSAPublicKey)
    assert isinstance(vcek.public_key().curve, ec.SECP384R1)
    ark.verify_directly_issued_by(ark)
    ask.verify_directly_issued_by(ark)
    vcek.verify_directly_issued_by(ask)
    oids = {e.oid.dotted_string for e in vcek.extensions}
    amd = "1.3.6.1.4.1.3704.1"
    assert oids == {f"{amd}.{x}" for x in ("1", "2", *(f"3.{i}" for i in range(1, 9)), "4")}


def test_every_certificate_says_that_it_is_simulated():
    for certificate in certificates():
        for name in (certificate.subject, certificate.issuer):
            found = name.get_attributes_for_oid(x509.NameOID.ORGANIZATION_NAME)[0].value
            assert "SIMULATED" in found
    assert attestation().evidence.simulated is True


def test_the_files_are_labelled_and_private(tmp_path):
    start(OsDisk(tmp_path / "state"))
    for file in (CHAIN_FILE, SEALING_FILE):
        path = tmp_path / "state" / file
        assert "SIMULATED" in path.name
        assert path.read_text().startswith("# SIMULATED TEE, FOR DEVELOPMENT ONLY.")
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_the_root_and_the_chip_stay_over_a_restart(tmp_path, monkeypatch):
    first = start(OsDisk(tmp_path))
    monkeypatch.setattr(simulated, "_make_chain", None)  # a second start makes no new chain
    second = start(OsDisk(tmp_path))
    assert second.root == first.root
    assert second._chip == first._chip
    assert second._report_id != first._report_id


@pytest.mark.parametrize("file", [CHAIN_FILE, SEALING_FILE])
@pytest.mark.parametrize("damage", ["cut", "empty", "label", "noise", "text"])
def test_a_damaged_file_is_named(tmp_path, file, damage):
    start(OsDisk(tmp_path))
    path = tmp_path / file
    good = path.read_bytes()
    bad = {
        "cut": good[: len(good) * 2 // 3],
        "empty": b"",
        "label": good.replace(b"SIMULATED", b"REAL"),
        "noise": b"\xff" * 100,
        "text": good[:-20] + b"not hex, no PEM",
    }
    path.write_bytes(bad[damage])
    with pytest.raises(LedgerError) as e:
        start(OsDisk(tmp_path))
    assert e.value.code == "ledger.tee-state"
    assert e.value.where == file


def test_a_chain_with_another_key_is_damaged(tmp_path):
    start(OsDisk(tmp_path))
    other = chain_text(tee(1)._chain)
    mine = (tmp_path / CHAIN_FILE).read_bytes()
    begin = b"-----BEGIN CERT"
    key, rest = other[: other.index(begin)], mine[mine.index(begin) :]
    (tmp_path / CHAIN_FILE).write_bytes(key + rest)
    with pytest.raises(LedgerError):
        start(OsDisk(tmp_path))


def quick_read(text: bytes):
    """As ``_read_chain`` for the one good text, without checking RSA keys, which takes long."""
    if text != chain_text(tee()._chain):
        raise AssertionError("a torn chain was kept")
    return tee()._chain


def test_a_crash_at_any_step_leaves_a_tee_that_starts(monkeypatch):
    monkeypatch.setattr(simulated, "_read_chain", quick_read)
    whole = SimDisk()
    start(whole)
    steps = len(whole.trace)
    assert steps > 8
    for step in range(1, steps + 1):
        for seed in range(20):
            disk = SimDisk(seed, fault=(step, "POWER"))
            with pytest.raises(PowerLoss):
                start(disk)
            after = disk.power_cycle()
            again = start(after)
            # What a start returned is durable.
            assert start(after.power_cycle()).sealing_key("x") == again.sealing_key("x")


def test_the_measurement_is_of_the_installed_files():
    root = Path(casemate.__file__).parent
    lines = []
    for path in root.rglob("*"):
        if path.is_file() and path.suffix != ".pyc":
            name = path.relative_to(root).as_posix()
            lines.append((name, f"{hashlib.sha384(path.read_bytes()).hexdigest()}  {name}\n"))
    text = "".join(line for _, line in sorted(lines)).encode()
    simulated.measurement.cache_clear()
    assert simulated.measurement() == hashlib.sha384(text).digest()


def test_the_measurement_changes_with_any_file(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.py").write_bytes(b"1")
    (tmp_path / "a" / "__pycache__").mkdir()
    monkeypatch.setattr(simulated.resources, "files", lambda _: tmp_path)

    def now() -> bytes:
        simulated.measurement.cache_clear()
        return simulated.measurement()

    try:
        first = now()
        (tmp_path / "a" / "__pycache__" / "x.pyc").write_bytes(b"1")
        assert now() == first
        (tmp_path / "a" / "x.py").write_bytes(b"2")
        second = now()
        (tmp_path / "a" / "x.py").rename(tmp_path / "a" / "y.py")
        assert len({first, second, now()}) == 3
    finally:
        simulated.measurement.cache_clear()
