"""TCB levels, how statuses meet, and advisories, as Intel's documents define them (made up)."""

import itertools
from dataclasses import replace

import pytest

from casemate.attest import folder
from casemate.attest.dcap import tcb
from casemate.attest.dcap.documents import ENCLAVE_STATUSES, PLATFORM_STATUSES
from casemate.attest.dcap.policy import ADMISSIBLE
from support import dcap
from support.dcap import Case, identity, level, module, svn_level

SVNS = dcap.SVNS


def judge(case):
    policies = {
        "sgx": dcap.sgx(tcb_statuses=ADMISSIBLE),
        "tdx": dcap.tdx(tcb_statuses=ADMISSIBLE),
    }
    return folder.judge(case.files(), now=dcap.AT, policies=policies)


def status(case):
    judged = judge(case)
    return judged.tcb_status, judged.code.removeprefix("evidence.")


def with_byte(data, at, value):
    return data[:at] + bytes([value]) + data[at + 1 :]


LEVELS = [level(), level("OutOfDate", bytes(16), bytes(16), 0)]


@pytest.mark.parametrize("at", range(16))
@pytest.mark.parametrize("version", [0, 1])
@pytest.mark.parametrize("part", ["sgx", "tdx"])
def test_each_component_counts_by_itself(part, version, at):
    """One component above the platform's misses the level, however high the others are; the first
    two of a TD's speak of its module, which has levels of its own from version 1 on."""
    svn = bytes([6, version, 3] + [0] * 13)
    own = SVNS if part == "sgx" else svn
    lower = bytes(max(x - 1, 0) for x in own)
    for by, wanted in ((0, "UpToDate"), (1, "OutOfDate")):
        components = with_byte(lower, at, own[at] + by)
        case = Case(
            body=dcap.td(tee_tcb_svn=svn),
            info={"tcbLevels": [level(**{part: components}), LEVELS[1]]},
        )
        if part == "tdx" and version == 1 and at < 2:
            wanted = "UpToDate"
        if part == "sgx" and version == 0:
            case = replace(case, info={"tcbLevels": [level(sgx=components, tdx=svn), LEVELS[1]]})
        assert status(case) == (wanted, "")


@pytest.mark.parametrize("at", range(16))
def test_an_enclaves_components_too(at):
    for by, wanted in ((0, "UpToDate"), (1, "OutOfDate")):
        levels = [level(sgx=with_byte(bytes(16), at, SVNS[at] + by), tdx=None)]
        levels.append(level("OutOfDate", bytes(16), None, 0))
        assert status(Case(version=3, info={"tcbLevels": levels})) == (wanted, "")


def test_pcesvn_counts():
    for pcesvn, wanted in ((dcap.PCESVN, "UpToDate"), (dcap.PCESVN + 1, "OutOfDate")):
        levels = [level(pcesvn=pcesvn), LEVELS[1]]
        assert status(Case(info={"tcbLevels": levels})) == (wanted, "")


def test_the_highest_level_that_is_reached_speaks():
    levels = [
        level("ConfigurationNeeded", SVNS), level("SWHardeningNeeded", with_byte(SVNS, 0, 4)),
        level("OutOfDate", bytes(16)),
    ]  # fmt: skip
    for order in itertools.permutations(levels):
        assert status(Case(info={"tcbLevels": list(order)})) == ("ConfigurationNeeded", "")
    lower = dcap.extension(svns=with_byte(SVNS, 0, 4))
    case = Case(info={"tcbLevels": levels}, platform=lower)
    assert status(case) == ("SWHardeningNeeded", "")


def test_no_level():
    above = [level(pcesvn=99)]
    assert status(Case(info={"tcbLevels": above})) == ("none matches", "tcb-none")
    low = Case(body=dcap.td(tee_tcb_svn=bytes([6, 1, 1] + [0] * 13)))
    assert status(low) == ("none matches", "tcb-none")
    module_above = {"tdxModuleIdentities": [module(1, svn_level(7))]}
    assert status(Case(info=module_above)) == ("none matches", "tcb-none")
    assert status(Case(qe={"isvsvn": 1})) == ("none matches", "tcb-none")


@pytest.mark.parametrize(
    ("case", "code"),
    [
        (Case(parts={k: v for k, v in Case(version=3).collateral().items() if "tcb" in k}),
         "collateral-tee"),
        (Case(version=3, info=dcap.tcb_info("TDX")), "collateral-tee"),
        (Case(identity={"id": "QE"}), "collateral-tee"),
        (Case(version=3, identity={"id": "TD_QE"}), "collateral-tee"),
        (Case(info={"fmspc": "00" * 6}), "collateral-fmspc"),
        (Case(info={"pceId": "0001"}), "collateral-pceid"),
        (Case(qe={"mrsigner": b"s" * 32}), "tcb-qe"),
        (Case(qe={"isvprodid": 1}), "tcb-qe"),
        (Case(qe={"miscselect": 1}), "tcb-qe"),
        (Case(qe={"attributes": b"\x15" + bytes(15)}), ""),  # 64 bit mode is outside the mask
        (Case(qe={"attributes": b"\x01" + bytes(15)}), "tcb-qe"),
        (Case(qe={"attributes": b"\x13" + bytes(15)}), "tcb-qe"),
        (Case(qe={"attributes": b"\x11" + bytes(7) + b"\xff" * 8}), ""),
        (Case(qe={"miscselect": 1}, identity={"miscselectMask": "FEFFFFFF"}), ""),
        (Case(identity={"attributesMask": "00" * 16}, qe={"attributes": b"\2" + bytes(15)}),
         "tcb-qe"),
        (Case(body=dcap.td(tee_tcb_svn=bytes([6, 2, 3] + [0] * 13))), "tcb-module"),
        (Case(body=dcap.td(mrsignerseam=b"s" * 48)), "tcb-module"),
        (Case(body=dcap.td(seamattributes=b"\1" + bytes(7))), "tcb-module"),
        (Case(info={"tdxModule": {"mrsigner": "11" * 48, "attributes": "00" * 8,
                                  "attributesMask": "00" * 8}}), ""),  # version 1 speaks for itself
    ],
)  # fmt: skip
def test_parts_of_others(case, code):
    assert status(case)[1] == code


def test_the_first_tdx_modules_have_no_levels():
    body = dcap.td(tee_tcb_svn=bytes([5, 0, 3] + [0] * 13))
    assert status(Case(body=body)) == ("UpToDate", "")
    who = {"mrsigner": "11" * 48, "attributes": "00" * 8, "attributesMask": "FF" * 8}
    assert status(Case(body=body, info={"tdxModule": who}))[1] == "tcb-module"


# What Intel's library answers: rows platform, columns the other's status.
CONVERGED = {
    ("UpToDate", "OutOfDate"): "OutOfDate",
    ("SWHardeningNeeded", "OutOfDate"): "OutOfDate",
    ("ConfigurationNeeded", "OutOfDate"): "OutOfDateConfigurationNeeded",
    ("ConfigurationAndSWHardeningNeeded", "OutOfDate"): "OutOfDateConfigurationNeeded",
    ("OutOfDate", "OutOfDate"): "OutOfDate",
    ("OutOfDateConfigurationNeeded", "OutOfDate"): "OutOfDateConfigurationNeeded",
    ("Revoked", "OutOfDate"): "Revoked",
    **{(x, "Revoked"): "Revoked" for x in PLATFORM_STATUSES},
    **{(x, "UpToDate"): x for x in PLATFORM_STATUSES},
}


def test_the_table_is_whole():
    assert set(CONVERGED) == set(itertools.product(PLATFORM_STATUSES, ENCLAVE_STATUSES))


@pytest.mark.parametrize(("platform", "other"), CONVERGED)
def test_statuses_converge(platform, other):
    wanted = CONVERGED[platform, other]
    assert tcb.converge(platform, other) == wanted
    code = "tcb-status" if wanted == "Revoked" else ""
    levels = {"tcbLevels": [level(platform)]}
    by_qe = Case(info=levels, identity={"tcbLevels": [svn_level(4, other)]})
    assert status(by_qe) == (wanted, code)
    enclave = Case(
        version=3, info={"tcbLevels": [level(platform, tdx=None)]},
        identity={"tcbLevels": [svn_level(4, other)]},
    )  # fmt: skip
    assert status(enclave) == (wanted, code)
    by_module = {"tdxModuleIdentities": [module(1, svn_level(6, other))]}
    assert status(Case(info=levels | by_module)) == (wanted, code)


def test_advisories_of_all_three_are_put_together():
    info = {
        "tcbLevels": [level("SWHardeningNeeded", advisories=("INTEL-SA-1", "INTEL-SA-2"))],
        "tdxModuleIdentities": [module(1, svn_level(6, "UpToDate", "INTEL-SA-2", "INTEL-SA-3"))],
    }
    case = Case(info=info, identity={"tcbLevels": [svn_level(4, "UpToDate", "INTEL-SA-4")]})
    assert judge(case).advisories == ("INTEL-SA-1", "INTEL-SA-2", "INTEL-SA-3", "INTEL-SA-4")


RELAUNCH, CONFIGURATION = "TDRelaunchAdvised", "TDRelaunchAdvisedConfigurationNeeded"


def fifteen(second, first=(4, 1, 3), **changes):
    body = dcap.td(
        True,
        tee_tcb_svn=bytes([*first] + [0] * 13),
        tee_tcb_svn2=bytes([*second] + [0] * 13),
    )
    info = {
        "tcbLevels": [level(tdx=bytes([3, 0, 3] + [0] * 13)), LEVELS[1]],
        "tdxModuleIdentities": [module(1, svn_level(6), svn_level(4, "OutOfDate")),
                                module(3, svn_level(2), svn_level(1, "OutOfDate"))],
    }  # fmt: skip
    return Case(version=5, body_type=3, body=body, info=info | changes)


@pytest.mark.parametrize(
    ("case", "wanted"),
    [
        (fifteen((6, 1, 3)), RELAUNCH),
        (fifteen((7, 1, 4)), RELAUNCH),
        (fifteen((2, 3, 3)), RELAUNCH),  # another module's version altogether
        (fifteen((3, 0, 3)), RELAUNCH),  # the first modules: by the platform's level
        (fifteen((2, 0, 3)), "OutOfDate"),
        (fifteen((5, 1, 3)), "OutOfDate"),
        (fifteen((6, 1, 2)), "OutOfDate"),
        (fifteen((1, 3, 3)), "OutOfDate"),
        (fifteen((6, 1, 3), (6, 1, 3)), "UpToDate"),
        (fifteen((6, 1, 3), tcbLevels=[level("ConfigurationNeeded", tdx=bytes(16))]),
         CONFIGURATION),
        (fifteen((6, 1, 0), tcbLevels=[level("OutOfDate", tdx=bytes(16))]), "OutOfDate"),
        (fifteen((6, 1, 0), tcbLevels=[level("Revoked", tdx=bytes(16))]), "Revoked"),
    ],
)  # fmt: skip
def test_relaunch_is_advised_where_only_the_module_was_old(case, wanted):
    found, code = status(case)
    assert (found, code) == (wanted, "tcb-status" if wanted == "Revoked" else "")


def test_relaunch_needs_a_current_quoting_enclave():
    case = fifteen((6, 1, 3))
    old = Case(**{f: getattr(case, f) for f in ("version", "body_type", "body", "info")}
               | {"identity": identity(tcbLevels=[svn_level(4, "OutOfDate")])})  # fmt: skip
    assert status(old)[0] == "OutOfDate"


@pytest.mark.parametrize("first", [(4, 1, 3), (6, 1, 3)])
def test_what_runs_now_must_not_be_revoked(first):
    modules = [
        module(1, svn_level(6), svn_level(4, "OutOfDate")),
        module(3, svn_level(1, "Revoked")),
    ]
    by_module = fifteen((1, 3, 3), first, tdxModuleIdentities=modules)
    assert status(by_module) == ("Revoked", "tcb-status")
    levels = [level(tdx=bytes([3, 0, 3] + [0] * 13)), level("Revoked", bytes(16), bytes(16), 0)]
    assert status(fifteen((6, 1, 2), first, tcbLevels=levels)) == ("Revoked", "tcb-status")


def test_what_runs_now_must_be_known():
    assert status(fifteen((6, 9, 3)))[1] == "tcb-module"
    assert status(fifteen((3, 1, 3))) == ("none matches", "tcb-none")
    assert status(fifteen((3, 1, 3), (6, 1, 3))) == ("none matches", "tcb-none")


def test_relaunch_is_refused_by_default():
    judged = folder.judge(
        fifteen((6, 1, 3)).files(), now=dcap.AT, policies={"tdx": dcap.tdx(), "sgx": dcap.sgx()}
    )
    assert (judged.decision, judged.tcb_status, judged.code) == (
        "reject", RELAUNCH, "evidence.tcb-status",
    )  # fmt: skip
