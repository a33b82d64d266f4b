"""What leaves once a worker has read rows: the closed list, and where each entry is held to it.

- the weights, or an evaluation's metrics, in a form with room for nothing else
  (:func:`check_result`), sealed;
- the receipt, of public constants and the weights' digest (:func:`receipt`); of an entry of a
  contest with its scores, which are in the result;
- that the run ended, and whether well, at a public moment (``server.run.Ticks``); of a failure no
  more than :func:`end` shows;
- on the Disk alone, training states of constant size at public steps (``server.states``).

Nothing else that a worker says is stored, answered, logged or counted (P6).

The result is sealed to the scientist's own key (ARCHITECTURE.md, the result's route); the receipt
is an in-toto Statement v1 in a DSSE envelope, signed by the boot's receipt key.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from typing import Final

from casemate.ledger import ledger, log
from casemate.ledger.quotes import StoredQuote
from casemate.ledger.store import Store
from casemate.plan.quote import recompute
from casemate.seal import dsse, hpke, stream
from casemate.seams import Disk, Rng
from casemate.server.config import software
from casemate.server.keys import BootKeys
from casemate.spec import canonical, tensors
from casemate.spec.errors import CasemateError, FormatError, InternalError, JobError
from casemate.spec.identity import PublicIdentity
from casemate.spec.job import Quote
from casemate.spec.messages import Prepared
from casemate.spec.receipt import (
    PAYLOAD_TYPE,
    Guarantee,
    Receipt,
    ReceiptDataset,
    no_privacy,
    statement,
)

FOLDER: Final = "results"
# Of errors after the first row was read, those that no row can cause.
SHOWN: Final = frozenset({"policy.revoked", "job.state"})
FAILED: Final = "The run failed. For the sake of the rows, nothing more is said."
UNIT: Final = "one privacy unit of one dataset (zero-out)"


def end(error: CasemateError, *, read: bool) -> tuple[str, str]:
    """Code and message that are shown of a run that failed. read: whether rows were read."""
    if read and error.code not in SHOWN:
        return "job.failed", FAILED
    return error.code, error.message


def blob_path(job: str) -> str:
    """Where a job's sealed result lies on the Disk."""
    return f"{FOLDER}/{job}"


def sweep(disk: Disk, store: Store) -> None:
    """Remove sealed results that no commit names: of runs that ended between the two."""
    for name in disk.list(FOLDER):
        try:
            kept = ledger.job(store, name).blob == blob_path(name)
        except JobError:
            kept = False
        if not kept:
            disk.remove(blob_path(name))
    disk.sync_folder(FOLDER)


def check_result(weights: bytes | memoryview, quote: Quote, prepared: Prepared) -> None:
    """The worker's result must be canonical safetensors with the very names and shapes, and of the
    size, that it told before it could read a row, and of no more scalars than the quoted model has,
    of an evaluation than it releases: a closed form with no place for anything beside the weights.
    Raises ``FormatError``."""
    infos = tensors.read_header(weights, len(weights)).values()
    scalars = sum(math.prod(info.shape) for info in infos)
    most = quote.request.released or quote.parameters
    head = weights[: 8 + int.from_bytes(weights[:8], "little")]
    told = "sha256:" + hashlib.sha256(head).hexdigest(), len(weights)
    same = told == (prepared.result, prepared.result_bytes)
    if not same or scalars > most or any(info.dtype != "f32" for info in infos):
        raise FormatError(
            "format.result",
            "The result is not the quoted model's weights.",
            mend="Report it: the worker broke its form.",
        )


def check_guarantee(quote: Quote) -> None:
    """Recompute epsilon and charge from the plan's events after the run (P9); the receipt must not
    claim less. Raises ``InternalError`` ``internal.guarantee``. Blocks: seconds for a long plan."""
    charge, epsilon = recompute(quote.plan, quote.delta)
    if epsilon > quote.epsilon * (1 + 1e-9) or any(d.charge != charge for d in quote.datasets):
        raise InternalError(
            "internal.guarantee",
            "The quote claims less than its events cost.",
            mend="Report it.",
        )


def _chunks(data: bytes | memoryview) -> Iterator[bytes]:
    view = memoryview(data)
    for at in range(0, len(data), stream.CHUNK):
        yield bytes(view[at : at + stream.CHUNK])


def seal_result(
    disk: Disk, rng: Rng, job: str, weights: bytes | memoryview
) -> tuple[str, str, bytes]:
    """Write the encrypted result durably: its path on the Disk, ``sha256:`` of the plaintext, and
    the stream key, which only the store may have until the job is released."""
    digest = "sha256:" + hashlib.sha256(weights).hexdigest()
    key, path = rng.bytes(stream.KEY_BYTES), blob_path(job)
    write_sealed(disk, FOLDER, path, key, weights)
    return path, digest, key


def write_sealed(disk: Disk, folder: str, path: str, key: bytes, data: bytes | memoryview) -> None:
    """Write ``data`` encrypted under ``key`` at ``path`` in ``folder``, durably."""
    file = disk.open(path, create=True)
    try:
        file.truncate(0)
        at = 0
        for part in stream.encrypt(key, _chunks(data)):
            file.write(at, part)
            at += len(part)
        file.sync()
    finally:
        file.close()
    disk.sync_folder(folder)


def seal_key(store: Store, job: str, scientist: PublicIdentity) -> bytes:
    """A committed result's key, sealed to the scientist."""
    digest = ledger.job(store, job).result_digest
    info = f"casemate/result-key/v1|{job}|{digest}".encode()
    return hpke.seal(scientist.seal_key, ledger.result_key(store, job), info=info)


def guarantee(quote: Quote) -> Guarantee:
    """The claim, in words that hold against who does not see access patterns (P6)."""
    if not quote.plan.private:
        return Guarantee(
            private=False, epsilon=0.0, delta=0.0, unit=UNIT,
            statement=no_privacy(quote.request.metrics),
        )  # fmt: skip
    what = "metrics" if quote.request.metrics else "weights"
    return Guarantee(
        private=True,
        epsilon=quote.epsilon,
        delta=quote.delta,
        unit=UNIT,
        statement=(
            f"The released {what} are ({quote.epsilon:.6g}, {quote.delta:g})-differentially "
            "private for zeroing out one privacy unit of one dataset. A person with units in m "
            "datasets has m-fold group privacy. No amplification by sampling is claimed against "
            "an observer of the machine's timing or memory accesses."
        ),
    )


def receipt(
    store: Store,
    keys: BootKeys,
    simulated: bool,
    stored: StoredQuote,
    *,
    units: Mapping[str, int],
    result_digest: str,
    scores: tuple[float, ...] = (),
) -> str:
    """The signed receipt of a running job, an envelope; ``units`` by dataset. scores: of an entry
    of a contest, post-processing of its result."""
    quote = stored.quote
    request = quote.request
    found = ledger.job(store, request.job)
    assert found.reserved is not None
    predicate = Receipt(
        job=request.job,
        scientist=request.scientist,
        boot=keys.boot,
        model_digest=request.model_digest,
        result_digest=result_digest,
        request_digest=found.request_digest,
        quote_digest=stored.digest,
        plan=quote.plan,
        guarantee=guarantee(quote),
        datasets=tuple(
            ReceiptDataset(
                dataset=d.dataset,
                owner=d.owner,
                policy_digest=d.policy_digest,
                units=units[d.dataset],
                charge=d.charge,
            )
            for d in quote.datasets
        ),
        simulated=("tee",) if simulated else (),
        software=software(),
        log=log.key(store).origin,
        reserved=found.reserved,
        metrics=request.metrics,
        target=request.target,
        scores=scores,
        artifact=quote.execution.artifact,
    )
    return dsse.sign(
        PAYLOAD_TYPE,
        canonical.encode(statement(predicate)),
        keys.receipt.sign,
        keys.receipt.public.hex(),
    )
