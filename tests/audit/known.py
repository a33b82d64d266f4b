"""Known answers: samples and noise made again from the key, by code that shares none with the
engine's, against what the real step releases. HKDF and AES-CTR are those of ``cryptography``;
Box and Muller's logarithm, root, cosine and sine are numpy's in extended precision.

Laws of chance (``chance.py``) look at some steps; these see any one draw that is not what the key
says, at steps, places and rates where a law would have to wait long.
"""

from __future__ import annotations

import dataclasses
import functools
from fractions import Fraction
from typing import Final
from unittest import mock

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from audit import chance, lab, sums
from audit.lab import Job
from audit.law import holds
from casemate.engine import noise as engine_noise
from casemate.engine import sampling, train, windows

# Small ones, neighbours of powers of two and of thousands: what repeats or leaves out shows.
AT: Final = (0, 1, 2, 999, 4_099, 16_387, (1 << 20) + 7, 9_999_998)
FEW: Final = (0, 4_099)
# Entries of models that are too large to be made here: counters of 16 to 32 bits are over, and the
# last draws that there are.
FAR: Final = (*((1 << k) + 2 for k in (16, 17, 20, 24, 31, 32, 33, 40)), (1 << 49) - 6)
_MOST: Final = 10_000_000  # of a job
_STEP: Final = 4_099
# float32 weights show a draw of some sigma to this.
_SEEN: Final = 2e-6


def subkey(key: bytes, purpose: str) -> bytes:
    info = f"casemate/engine/{purpose}/v1".encode()
    return HKDF(SHA256(), 32, salt=None, info=info).derive(key)


def words(key: bytes, purpose: str, step: int, count: int, first: int = 0) -> np.ndarray:
    """Words of a step's stream from its block ``first`` on, uint64."""
    counter = step.to_bytes(8, "big") + first.to_bytes(8, "big")
    stream = Cipher(algorithms.AES(subkey(key, purpose)), modes.CTR(counter)).encryptor()
    return np.frombuffer(stream.update(bytes(8 * (count + count % 2))), dtype="<u8")[:count]


def normals(key: bytes, step: int, count: int, first: int = 0) -> np.ndarray:
    """A step's draws from the even number ``first`` on, before their rounding, extended precision:
    a word for the radius and one for the angle of each pair, both in the middle of what 64 bits
    tell."""
    drawn = words(key, "noise", step, count + count % 2, first // 2).reshape(-1, 2)
    real, whole = np.longdouble, np.longdouble(2) ** 64
    low, high = (w.astype(real) / whole + real(0.5) / whole for w in (drawn[:, 0], ~drawn[:, 0]))
    radius = np.sqrt(-2 * np.where(low < 0.5, np.log(low), np.log1p(-high)))
    angle = (drawn[:, 1].astype(real) + real(0.5)) / whole * (8 * np.arctan(real(1)))
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1).reshape(-1)[:count]


def sample(key: bytes, step: int, units: int, rate: float) -> np.ndarray:
    """Who is in a step, by the definition: whose word is below rate times 2^64."""
    limit = int(Fraction(rate) * 2**64)
    drawn = words(key, "sampling", step, units)
    return np.arange(units) if limit == 2**64 else np.flatnonzero(drawn < np.uint64(limit))


class Windows(lab.Wide):
    """Two full windows and a part of a third."""

    SIZES = (1, 5, 301, 140_003, 3)


def _windows(path: str) -> Job:
    grid = 2.0**-10 if path == "record" else 0.0  # the plan's own, and one whose rounding shows
    return lab.job(
        Windows(), lab.schema_of(5, 4), batch=2, steps=_MOST, path=path, noise=0.8, grid=grid
    )


_wides: Final = {path: functools.partial(_windows, path) for path in ("auto", "record")}


def noise(seed: int) -> None:
    """Where no unit adds anything, a step releases what its key and number say, in each entry of
    three windows, rounded to the grid, and in several microbatches as in one. Both paths; native
    and in numpy."""
    several = {n: make for n, make in sums.CASES.items() if "microbatches" in n}
    for what, make, helped, steps in (
        ("graph", _wides["auto"], True, AT), ("record", _wides["record"], True, AT),
        ("numpy", _wides["auto"], False, FEW),
        *((name, made, True, FEW) for name, made in several.items()),
    ):  # fmt: skip
        job = lab.kept(make)
        plan, count = job.plan, job.ready.program.dimension
        if what in several:
            sums.in_microbatches(job, what)
        else:
            holds(count > 2 * windows.WINDOW, f"known noise, {what}: there are three windows")
        table = lab.spoilt(lab.zeros(job.schema), slice(None))
        key = lab.key_of("known noise", seed, what)
        helper = engine_noise._helper if helped else lambda: None
        with mock.patch.object(engine_noise, "_helper", helper):
            for step in steps:
                run = job.start(table, key)
                run.done = step
                run(step)
                found = (job.initial.numpy().astype(np.float64) - job.flat()) / job.rate
                found *= plan.normaliser / plan.sigma
                drawn = np.rint(normals(key, step, count) * plan.sigma / plan.grid)
                want = (drawn * plan.grid / plan.sigma).astype(np.float64)
                off = np.abs(found - want)
                at = int(off.argmax())
                holds(
                    off[at] < _SEEN,
                    f"known noise, {what}: in step {step} entry {at} is {off[at]:.3g} sigma off"
                    " what its key says",
                )
    _far(seed)


def _far(seed: int) -> None:
    """What a run adds to entries that only much larger models have is their own as well; to windows
    of few entries, to the longest draws of a million, and where the grid is as fine as it may be,
    so that float64 cannot tell each rounding."""
    job, key = lab.kept(_wides["record"]), lab.key_of("far noise", seed)
    drawn = words(key, "noise", _STEP, 1 << 21)[::2]
    longest = np.argsort(drawn)[:4]
    places = [(first, 6) for first in FAR] + [(2 * int(pair), 2) for pair in longest]
    places += [(1 << 16, count) for count in (1, 2, 3, 511, 512, 513, 1 << 16)]
    fine = dataclasses.replace(job.plan, sigma=job.plan.grid * 2.0**31)
    for plan in (job.plan, fine):
        taken: list[train.Add] = []
        with mock.patch.object(train, "loop", lambda *args, to=taken: to.append(args[6])):
            job.start_of(job.rows(lab.zeros(job.schema)), key, plan)
        scale = plan.sigma / plan.grid
        for helper in (engine_noise._helper, lambda: None):
            with mock.patch.object(engine_noise, "_helper", helper):
                for first, count in places:
                    total = np.zeros(count, dtype=np.int64)
                    taken[0](_STEP, first, total)
                    want = np.rint(normals(key, _STEP, count, first) * scale).astype(np.float64)
                    same = bool((np.abs(total - want) <= 1).all())
                    what = f"known noise: {count} entries from {first} on"
                    holds(same, f"{what} are not what their key says at {scale:.3g}")


def samples(seed: int) -> None:
    """Whoever the key says is in a step, and nobody else: as a meter of 48 units shows it on both
    paths, and of the engine's function for more units than it draws at once."""
    for path, make in chance._meters.items():
        job = lab.kept(make)
        units, rate, key = chance.UNITS, job.plan.rate, lab.key_of("known samples", seed, path)
        table = lab.zeros(job.schema)
        table["x"][:] = torch.eye(units) * 2
        for step in AT:
            run = job.start(table, key)
            run.done = step
            run(step)
            seen = np.flatnonzero(-job.flat() * job.plan.normaliser > job.plan.clip / 2)
            same = np.array_equal(seen, sample(key, step, units, rate))
            holds(same, f"known samples, {path}: step {step} has others than its key says")
    rng = lab.rng_of("rates", seed)
    for units, rate, steps in (
        (48, 1 / 24, AT), (300_001, 1 / 37, AT), (300_001, 1.0, FEW), (131_074, 0.003, AT),
        (300_001, 2e-5, FEW), (300_001, 1e-9, FEW), (999, 0.999, AT), (5, 1 - 1e-9, AT),
        *((4_001, float(10 ** rng.uniform(-4, 0)), FEW) for _ in range(8)),
    ):  # fmt: skip
        for step in steps:
            key = lab.key_of("known samples", seed, units, step)
            found = sampling.sample(subkey(key, "sampling"), step, units, rate)
            same = np.array_equal(found, sample(key, step, units, rate))
            holds(same, f"known samples: of {units} at {rate:.4g}, step {step} has others")
