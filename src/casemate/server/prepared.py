"""What a worker says before it may read rows, held to ranges: it parses a stranger's model, and may
by then be that stranger's.

Later words are held to these: a result has the head and the size that were told before any row was
read, a state the size that follows (``server.release``, ``server.run``).
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from typing import Final

from casemate.server.config import Config
from casemate.spec.errors import JobError, LimitError
from casemate.spec.job import Runtime
from casemate.spec.messages import Locked, Prepared

# How gradients are had: ``casemate.engine``'s paths, by ``TrainSpec.runtime``.
PATHS: Final = {"torch": frozenset({"record", "graph"}), "native": frozenset({"native"})}
_MOST: Final = 1 << 40
_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}\Z")
_LINE: Final = 1024
# A word for each trained tensor, of as many parts as it is read in (engine.forms).
_WAYS: Final = 1 << 14
_WAY: Final = re.compile(rf"[a-z0-9+-]{{1,{_LINE}}}\Z")


def _refuse(what: str) -> JobError:
    return JobError(
        "job.worker-failed", what, mend="Ask the operator to run `casemate doctor`.", status=503
    )


def check_prepared(
    found: Prepared, model_digest: str, config: Config, runtime: Runtime = "torch"
) -> None:
    """Raises ``JobError`` ``job.worker-failed`` for what no worker of ours says, and ``LimitError``
    ``limit.result`` for a result that is too large here."""
    counts = (
        (found.parameters, _MOST),
        (found.dimension, found.parameters),
        (found.microbatch, _MOST),
        (found.bytes, config.worker_memory),
        (found.result_bytes, 4 * _MOST),
    )
    seconds = found.seconds_per_microbatch, found.seconds_per_step, found.seconds_fixed
    native = runtime == "native"
    holds = (
        found.model_digest == model_digest
        and all(1 <= count <= most for count, most in counts)
        and all(0 <= s <= config.limits.run_seconds for s in seconds)
        and 0 <= found.certified_eta <= 1
        and found.rounding >= 0 and math.isfinite(found.rounding)
        and bool(_DIGEST.match(found.result))
        and found.path[:1] in {(path,) for path in PATHS[runtime]}
        and bool(_DIGEST.match(found.artifact)) == native and (native or not found.artifact)
        and len(found.ways) <= native * _WAYS
        and all(_WAY.match(way) for way in found.ways)
        and all(len(line) <= _LINE and line.isprintable() for line in found.path)
    )  # fmt: skip
    if not holds:
        raise _refuse("The worker that looks at the model says what cannot be.")
    if found.result_bytes > (most := config.limits.result_bytes):
        raise LimitError(
            "limit.result",
            f"The result would have {found.result_bytes} bytes where {most} are allowed.",
            mend="Train fewer parameters, or ask the operator for a larger limit.",
        )


def check_locked(locked: Locked, demanded: Collection[str]) -> None:
    """A worker that says itself that a promised layer does not hold gets no key. What one says that
    its model has taken over proves nothing (docs/sandbox.md). Raises ``JobError``."""
    if missing := sorted(set(demanded) - set(locked.layers)):
        names = ", ".join(missing)
        raise _refuse(f"The worker would run without {names}, which its server promises.")
