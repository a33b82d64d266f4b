"""TCB info and QE identity, read strictly."""

import json

import pytest

from casemate.attest.dcap import documents
from casemate.attest.verdict import Refused
from support import dcap
from support.mutation import COUNT, fuzz


def text(document):
    return json.dumps(document).encode()


def refused(read, document):
    with pytest.raises(Refused) as e:
        read(document if isinstance(document, bytes) else text(document))
    return e.value.code.removeprefix("evidence.")


def without(document, name):
    return {key: value for key, value in document.items() if key != name}


def test_tcb_info():
    found = documents.tcb_info(text(dcap.tcb_info()))
    assert (found.id, found.fmspc, found.pceid, found.evaluation) == (
        "TDX", dcap.FMSPC, dcap.PCEID, 18,
    )  # fmt: skip
    assert (found.issue_date, found.next_update) == (dcap.START.timestamp(), dcap.END.timestamp())
    assert [(x.status, x.pcesvn, x.tdx[:3]) for x in found.levels] == [
        ("UpToDate", 13, b"\x05\0\x03"), ("OutOfDate", 5, b"\x05\0\x02"),
    ]  # fmt: skip
    assert found.levels[1].advisories == ("INTEL-SA-00001", "INTEL-SA-00002")
    assert [(x.version, len(x.levels)) for x in found.modules] == [(0, 0), (1, 2)]
    sgx = documents.tcb_info(text(dcap.tcb_info("SGX")))
    assert (sgx.id, sgx.modules, sgx.levels[0].tdx) == ("SGX", (), b"")


def test_levels_stand_highest_first_whatever_their_order():
    levels = dcap.tcb_info()["tcbLevels"]
    found = documents.tcb_info(text(dcap.tcb_info(tcbLevels=levels[::-1])))
    assert found.levels == documents.tcb_info(text(dcap.tcb_info())).levels
    levels = dcap.identity()["tcbLevels"]
    found = documents.identity(text(dcap.identity(tcbLevels=levels[::-1])))
    assert [x.isvsvn for x in found.levels] == [4, 2]


def test_qe_identity():
    found = documents.identity(text(dcap.identity(miscselect="01000000")))
    assert (found.id, found.miscselect, found.miscselect_mask) == ("TD_QE", 1, 0xFFFFFFFF)
    assert (found.mrsigner, found.isvprodid) == (dcap.QE_MRSIGNER, 2)
    assert found.levels[1].advisories == ("INTEL-SA-00004",)


@pytest.mark.parametrize("name", [*dcap.tcb_info()])
def test_each_field_of_tcb_info_is_needed(name):
    if name == "tdxModuleIdentities":  # TCB info of the first TDX modules has none
        assert len(documents.tcb_info(text(without(dcap.tcb_info(), name))).modules) == 1
    else:
        assert refused(documents.tcb_info, without(dcap.tcb_info(), name)) == "parse-document"


@pytest.mark.parametrize("name", [*dcap.identity()])
def test_each_field_of_qe_identity_is_needed(name):
    assert refused(documents.identity, without(dcap.identity(), name)) == "parse-document"


@pytest.mark.parametrize(
    "changes",
    [
        {"version": 2}, {"version": 4}, {"version": "3"}, {"version": True}, {"id": "QE"},
        {"tcbType": 1}, {"fmspc": "00"}, {"fmspc": "zz" * 6}, {"fmspc": 5}, {"pceId": "000"},
        {"issueDate": "2026-06-01"}, {"issueDate": "2026-06-01T00:00:00+00:00"}, {"issueDate": 5},
        {"issueDate": "2026-13-01T00:00:00Z"}, {"nextUpdate": "9999999-06-01T00:00:00Z"},
        {"tcbEvaluationDataNumber": -1}, {"tcbEvaluationDataNumber": 1.5}, {"tcbLevels": []},
        {"tcbLevels": {}}, {"tcbLevels": [5]}, {"tcbLevels": [dcap.level()] * 2},
        {"tcbLevels": [dcap.level(pcesvn=n) for n in range(257)]},
        {"tcbLevels": [dcap.level("Fine")]}, {"tcbLevels": [dcap.level(sgx=bytes(15))]},
        {"tcbLevels": [dcap.level(tdx=None)]}, {"tcbLevels": [dcap.level(tdx=bytes(17))]},
        {"tcbLevels": [dcap.level() | {"advisoryIDs": "x"}]},
        {"tcbLevels": [dcap.level() | {"advisoryIDs": ["a b"]}]},
        {"tcbLevels": [dcap.level() | {"tcb": {"pcesvn": 1}}]},
        {"tcbLevels": [dcap.level(pcesvn=1 << 16)]},
        {"tdxModule": []}, {"tdxModuleIdentities": []},
        {"tdxModuleIdentities": [dcap.module(1, dcap.svn_level(n)) for n in (1, 2)]},
        {"tdxModuleIdentities": [dcap.module(0, dcap.svn_level(1))]},
        {"tdxModuleIdentities": [dcap.module(1)]},
        {"tdxModuleIdentities": [dcap.module(1, dcap.svn_level(1), dcap.svn_level(1))]},
        {"tdxModuleIdentities": [dcap.module(1, dcap.svn_level(1)) | {"id": "TDX_1"}]},
        {"tdxModuleIdentities": [dcap.module(1, dcap.svn_level(1, "SWHardeningNeeded"))]},
    ],
)  # fmt: skip
def test_malformed_tcb_info(changes):
    assert refused(documents.tcb_info, dcap.tcb_info(**changes)) == "parse-document"


@pytest.mark.parametrize(
    "changes",
    [
        {"version": 1}, {"id": "QVE"}, {"id": "TDX"}, {"miscselect": "0"}, {"mrsigner": ""},
        {"isvprodid": 1 << 16}, {"tcbLevels": []}, {"attributesMask": "FF" * 15},
        {"tcbLevels": [dcap.svn_level(1)] * 2}, {"tcbLevels": [dcap.svn_level(1 << 16)]},
        {"tcbLevels": [dcap.svn_level(1, "ConfigurationNeeded")]},
    ],
)  # fmt: skip
def test_malformed_qe_identity(changes):
    assert refused(documents.identity, dcap.identity(**changes)) == "parse-document"


@pytest.mark.parametrize(
    "data",
    [
        b"", b"null", b"[]", b"{", b'{"id":1,"id":2}', b'{"id":NaN}', b"{}x",
        b"[" * 5000 + b"]" * 5000, b"\xff", b"{}" + b" " * documents.MAX_BYTES,
    ],
)  # fmt: skip
def test_what_is_no_document(data):
    for read in (documents.tcb_info, documents.identity):
        assert refused(read, data) in ("parse-json", "parse-too-large")


def test_fuzz():
    infos = [text(dcap.tcb_info(tee)) for tee in ("SGX", "TDX")]
    assert fuzz(documents.tcb_info, infos, COUNT) < COUNT
    assert fuzz(documents.identity, [text(dcap.identity())], COUNT) < COUNT
