"""Quotes of a software TPM (swtpm) by tpm2-tools: what a real implementation of TPM 2.0 writes."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time

import pytest

from casemate.attest.tpm import abi, verify
from support import tpm

TOOLS = (
    "swtpm", "tpm2_createprimary", "tpm2_readpublic", "tpm2_quote", "tpm2_pcrread",
    "tpm2_pcrextend", "tpm2_flushcontext",
)  # fmt: skip
pytestmark = pytest.mark.skipif(
    any(shutil.which(tool) is None for tool in TOOLS), reason="swtpm or tpm2-tools not installed"
)
ATTRIBUTES = "fixedtpm|fixedparent|sensitivedataorigin|userwithauth|restricted|sign"
NONCE = bytes(range(32))


@pytest.fixture(scope="module")
def tools(tmp_path_factory):
    """Runs one of the tools in a directory of its own, on a TPM of its own."""
    home = tmp_path_factory.mktemp("swtpm")
    socket = home / "sock"
    server = subprocess.Popen(
        ["swtpm", "socket", "--tpm2", "--tpmstate", f"dir={home}",
         "--ctrl", f"type=unixio,path={socket}.ctrl", "--server", f"type=unixio,path={socket}",
         "--flags", "not-need-init,startup-clear"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip

    def run(*args):
        out = subprocess.run(
            [args[0], "-T", f"swtpm:path={socket}", *args[1:]], cwd=home, text=True,
            capture_output=True, timeout=60, check=True,
        )  # fmt: skip
        if args[0] in ("tpm2_createprimary", "tpm2_readpublic", "tpm2_quote"):
            run("tpm2_flushcontext", "-t")
        return out.stdout

    try:
        for _ in range(100):
            if socket.exists():
                break
            time.sleep(0.05)
        run("tpm2_pcrextend", "16:sha256=" + "11" * 32 + ",sha384=" + "22" * 48)
        yield run, home
    finally:
        server.terminate()
        server.wait(10)


def banks(text):
    """What tpm2_pcrread writes, as a file of PCR values."""
    out, bank = {}, ""
    for line in text.splitlines():
        if head := re.fullmatch(r"\s*(sha\d+)\s*:\s*", line):
            bank = head[1]
            out[bank] = {}
        elif value := re.fullmatch(r"\s*(\d+)\s*:\s*0x([0-9A-F]+)\s*", line):
            out[bank][value[1]] = value[2]
    return out


@pytest.mark.parametrize(
    ("algorithm", "scheme"),
    [
        ("rsa2048:rsassa-sha256:null", "rsassa"), ("rsa2048:rsapss-sha256:null", "rsapss"),
        ("ecc256:ecdsa-sha256:null", "ecdsa"), ("ecc384:ecdsa-sha384:null", "ecdsa"),
    ],
)  # fmt: skip
def test_a_quote_is_verified(tools, algorithm, scheme):
    run, home = tools
    run("tpm2_createprimary", "-C", "e", "-G", algorithm, "-a", ATTRIBUTES, "-c", "ak.ctx")
    run("tpm2_readpublic", "-c", "ak.ctx", "-o", "ak.pub")
    select = "sha256:0,7,16+sha384:16"
    digest = re.search(r"sha\d+", algorithm)[0]
    run("tpm2_quote", "-c", "ak.ctx", "-l", select, "-q", NONCE.hex(), "-m", "msg", "-s", "sig",
        "-g", digest, "--scheme", scheme)  # fmt: skip
    values = banks(run("tpm2_pcrread", "sha256:all+sha384:all"))
    files = {
        "quote.msg": (home / "msg").read_bytes(),
        "quote.tpmt_signature": (home / "sig").read_bytes(),
        "ak_public.tpmt": (home / "ak.pub").read_bytes(),
        "pcrs.json": json.dumps(values).encode(),
    }
    assert tpm.outcome(tpm.judge(files)) == ("valid", "reject", "root-ak-unvouched")
    ak = verify.fingerprint(abi.public(files["ak_public.tpmt"], "it").key)
    judged = tpm.judge(files, aks=(ak,), nonce=NONCE)
    assert tpm.outcome(judged) == ("valid", "accept", "")
    assert abi.signature(files["quote.tpmt_signature"], "it").scheme == scheme
    assert tpm.check(judged, "signer")[1] == "a primary key of the endorsement hierarchy"
    quoted = judged.claims.other["pcrs"]
    assert {bank: sorted(found) for bank, found in quoted.items()} == {
        "sha256": ["0", "16", "7"], "sha384": ["16"],
    }  # fmt: skip
    changed = json.loads(files["pcrs.json"])
    changed["sha256"]["16"] = "00" * 32
    forged = {**files, "pcrs.json": json.dumps(changed).encode()}
    assert tpm.judge(forged, aks=(ak,)).code == "evidence.signature-pcr-digest"


def test_a_key_that_is_not_restricted_is_refused(tools):
    run, home = tools
    loose = ATTRIBUTES.replace("|restricted", "")
    run("tpm2_createprimary", "-C", "e", "-G", "ecc256:ecdsa-sha256:null", "-a", loose,
        "-c", "ak.ctx")  # fmt: skip
    run("tpm2_readpublic", "-c", "ak.ctx", "-o", "ak.pub")
    run("tpm2_quote", "-c", "ak.ctx", "-l", "sha256:0", "-q", "aa", "-m", "msg", "-s", "sig")
    files = {
        "quote.msg": (home / "msg").read_bytes(),
        "quote.tpmt_signature": (home / "sig").read_bytes(),
        "ak_public.tpmt": (home / "ak.pub").read_bytes(),
        "pcrs.json": json.dumps(banks(run("tpm2_pcrread", "sha256:all"))).encode(),
    }
    assert tpm.judge(files).code == "evidence.endorsement-ak-attributes"
