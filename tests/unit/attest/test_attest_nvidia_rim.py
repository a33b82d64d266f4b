"""Reference integrity manifests: only records of the known form, and all of what they say. Made-up
manifests, signed by a test root: what is refused here is refused though its signature is good."""

import pytest

from casemate.attest.nvidia import rim
from casemate.attest.verdict import Refused
from support import nvidia
from support.mutation import fuzz
from support.nvidia import DRIVER, VALUES, VBIOS, golden, manifest, resource, sign_xml

ONE = [VALUES[8]]


def refused(xml: str) -> str:
    with pytest.raises(Refused) as e:
        rim.parse(sign_xml(xml), "driver_rim.xml")
    assert e.value.where.startswith("driver_rim.xml")
    return e.value.code.removeprefix("evidence.")


def test_a_manifest_says_what_was_put_in():
    more = resource(9, [b"\1" * 48], active=False)
    found = rim.parse(sign_xml(manifest(DRIVER, {7: ONE, 8: ONE * 3}, records=more)), "x.xml")
    assert (found.role, found.version, found.product) == ("driver", DRIVER, "GH100")
    assert found.golden == {7: tuple(ONE), 8: tuple(ONE * 3)}
    assert (found.records, found.manufacturer, found.tag_id) == (3, "5703", "ab" * 48)
    assert [c.name() for c in found.chain] == ["rim-signer", "rim-ca", "rim-root"]


@pytest.mark.parametrize(
    ("version", "role"),
    [(DRIVER, "driver"), ("570.124.03", "driver"), (VBIOS, "vbios"), ("96.00.74.00.11", "vbios"),
     ("96.00.5e.00.01", "vbios")],
)  # fmt: skip
def test_the_role_follows_from_the_version(version, role):
    assert rim.parse(sign_xml(manifest(version, golden(7))), "x.xml").role == role


def _changed(old: str, new: str) -> str:
    xml = manifest(DRIVER, {7: ONE})
    assert old in xml
    return xml.replace(old, new)


META = (
    f'<ns0:Meta xmlns:ns1="{nvidia.TCG}" colloquialVersion="{DRIVER}" product="GH100"'
    ' ns1:FirmwareManufacturerId="5703"/>'
)


@pytest.mark.parametrize(
    "xml",
    [
        _changed('patch="false"', 'patch="true"'),
        _changed('supplemental="false"', 'supplemental="true"'),
        _changed('patch="false" ', ""),
        _changed('tagId="', 'tagid="'),
        _changed(f'"{DRIVER}"', '"latest"'),
        _changed(f'"{DRIVER}"', '""'),
        _changed(f'"{DRIVER}"', '"96.00.5G.00.01"'),
        _changed('product="GH100"', ""),
        _changed("FirmwareManufacturerId", "FirmwareManufacturer"),
        _changed('type="Measurement"', 'type="OpaqueData"'),
        _changed('index="7"', 'index="64"'),
        _changed('index="7"', 'index="-7"'),
        _changed('index="7"', 'index="07"'),
        _changed('index="7"', 'index="7 "'),
        _changed('index="7"', 'index="٧"'),
        _changed('active="True"', 'active="true"'),
        _changed('active="True"', 'active="False"'),
        _changed('alternatives="1"', 'alternatives="2"'),
        _changed('alternatives="1"', 'alternatives="0"'),
        _changed('size="48"', 'size="32"'),
        _changed('ns2:Hash0="', 'ns2:Hash1="'),
        _changed('ns2:Hash0="', 'Hash0="'),
        _changed(VALUES[8].hex(), VALUES[8].hex()[2:]),
        _changed(VALUES[8].hex(), "zz" * 48),
        _changed(VALUES[8].hex(), ""),
        manifest(DRIVER, {}),
        manifest(DRIVER, {7: ONE}, records=resource(7, ONE)),
        manifest(DRIVER, {7: ONE}, records=resource(8, ONE, more=' extra="1"')),
        manifest(DRIVER, {7: ONE}, records='<ns0:Resource type="Measurement"/>'),
        manifest(DRIVER, {7: ONE}, records="<ns0:File/>"),
        manifest(DRIVER, {7: ONE}, meta=META + META),
        manifest(DRIVER, {7: ONE}, meta="<ns0:Link/>" + META),
        manifest(DRIVER, {7: ONE}, meta="<ns0:Entity/>"),
    ],
)
def test_other_manifests_are_refused_though_they_are_signed(xml):
    assert refused(xml) == "parse-rim"


def test_a_certificate_that_is_none():
    signed = sign_xml(manifest(DRIVER, {7: ONE}))
    at = signed.index(b"<ds:X509Certificate>") + 20
    with pytest.raises(Refused) as e:
        rim.parse(signed[:at] + b"QUJD" + signed[signed.index(b"\n</ds:X509", at) :], "x.xml")
    assert e.value.code == "evidence.parse-certificate"


def test_fuzzed_manifests():
    seeds = [sign_xml(manifest(DRIVER, {7: ONE, 8: ONE * 2})), sign_xml(manifest(VBIOS, {1: ONE}))]
    fuzz(lambda data: rim.parse(data, "x.xml"), seeds)
