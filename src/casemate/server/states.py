"""Training states of runs, sealed on the Disk: from the newest a job is gone on with after a crash.

Each is encrypted under a key of its own that only the store has, and named there before the one
before it is removed. What they hold and why going on is private: docs/privacy.md, "Resuming".
"""

from __future__ import annotations

import contextlib
import math
from typing import Final

from casemate.ledger import ledger
from casemate.ledger.ledger import TrainingState
from casemate.ledger.store import Store
from casemate.plan import state as form
from casemate.seal import stream
from casemate.seams import Disk
from casemate.server.config import Limits
from casemate.server.release import write_sealed
from casemate.server.service import Service
from casemate.spec.job import Quote

FOLDER: Final = "states"
# Of the steps: a crash can lose two of these parts, one being kept and one being worked on.
PARTS: Final = 40


def every(quote: Quote, limits: Limits) -> int:
    """Steps between two states, by public constants alone; 0: none is kept, where the job is
    predicted to be short, a state could be larger than a result may be, or a native step trains."""
    largest = form.size(quote.request.train, quote.parameters)
    short = quote.seconds < limits.state_seconds
    if short or largest > limits.result_bytes or quote.execution.artifact:
        return 0
    return math.ceil(quote.plan.steps / PARTS)


def keep(service: Service, job: str, step: int, data: memoryview) -> None:
    """Keep the state after ``step`` steps, durably, in place of the one before. Blocks.

    Raises ``FormatError``, ``PlanError`` for bytes that are no state of this job at that step.
    """
    store, disk = service.store, service.disk
    quote = ledger.quote(store, job)
    head = form.check(data[: form.HEAD_BYTES], len(data), quote.plan, quote.request.train)
    if head.step != step or head.dimension > quote.parameters:
        raise form.refuse("The training state is of another step or model.")
    before = ledger.training_state(store, job)
    key, path = service.rng.bytes(stream.KEY_BYTES), f"{FOLDER}/{job}.{step}"
    write_sealed(disk, FOLDER, path, key, data)
    ledger.keep_state(store, job, TrainingState(step, path, key))
    if before is not None and before.path != path:
        with contextlib.suppress(FileNotFoundError):
            disk.remove(before.path)


def newest(service: Service, job: str) -> TrainingState | None:
    """The state to go on from. Without its file the job begins again."""
    found = ledger.training_state(service.store, job)
    return found if found is not None and service.disk.exists(found.path) else None


def descriptor(service: Service, state: TrainingState) -> int:
    """A read-only descriptor of its bytes, for a worker; the caller closes it."""
    file = service.disk.open(state.path)
    try:
        return file.descriptor()
    finally:
        file.close()


def sweep(disk: Disk, store: Store) -> None:
    """Remove states that the store does not name."""
    kept = ledger.training_states(store)
    for name in disk.list(FOLDER):
        if f"{FOLDER}/{name}" not in kept:
            disk.remove(f"{FOLDER}/{name}")
    disk.sync_folder(FOLDER)
