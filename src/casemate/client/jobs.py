"""Quotes, approvals and runs."""

from __future__ import annotations

import hashlib
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from casemate.client import receipts, views, weights
from casemate.client.connection import Connection
from casemate.seal import stream
from casemate.spec import codec, contest
from casemate.spec.errors import (
    FAMILIES,
    BudgetError,
    CasemateError,
    JobError,
    NetError,
    PolicyError,
    ReceiptError,
)
from casemate.spec.job import JobStatus, NonPrivate, Plan, Quote
from casemate.spec.receipt import Receipt, ReceiptBundle, no_privacy

if TYPE_CHECKING:
    from casemate.attest.trust import Trust

POLL_SECONDS: Final = 0.25
MAX_RESULT: Final = 64 << 30
RESULT_KEY_INFO: Final = "casemate/result-key/v1|{job}|{digest}"
FINAL: Final = frozenset({"done", "failed", "cancelled"})


def _noise(plan: Plan) -> str:
    """A plan's noise and clip in words."""
    if not plan.private:
        return "none"
    form = "" if plan.clipping == "flat" else f" {plan.clipping}"
    gamma = f", gamma {plan.gamma:g}" if plan.gamma else ""
    return f"multiplier {plan.noise_multiplier:.3f}, clip {plan.clip:g}{form}{gamma}"


@dataclass(frozen=True, slots=True)
class QuoteView:
    """What a job would cost; ``quote`` holds the values, ``digest`` is what owners approve."""

    quote: Quote

    @property
    def digest(self) -> str:
        return codec.digest(self.quote)

    @property
    def job(self) -> str:
        return self.quote.request.job

    @property
    def epsilon(self) -> float:
        """Tight (PLD) epsilon of this job alone, at :attr:`delta`; infinite without privacy."""
        return self.quote.epsilon if self.private else float("inf")

    @property
    def delta(self) -> float:
        return self.quote.delta

    @property
    def private(self) -> bool:
        return self.quote.plan.private

    @property
    def charge(self) -> float:
        """The most that any dataset's filter takes, as epsilon at the job's delta."""
        return max(d.charge.epsilon for d in self.quote.datasets)

    @property
    def allowed(self) -> bool:
        """Whether every dataset would let the job run now, approvals aside."""
        return all(d.refusal is None for d in self.quote.datasets)

    @property
    def approval_needed(self) -> tuple[str, ...]:
        """Owners whose approval is still needed."""
        return tuple(sorted({d.owner for d in self.quote.datasets if d.approval_needed}))

    def raise_if_refused(self) -> None:
        """Raise the first dataset's refusal as the error that it names."""
        for part in self.quote.datasets:
            if part.refusal is not None:
                kind = FAMILIES.get(part.refusal.split(".")[0], PolicyError)
                raise kind(
                    part.refusal,
                    part.message or f"Dataset {part.dataset} refuses this job.",
                    mend="Ask for a smaller job, or its owner for another policy or budget.",
                    where=part.dataset,
                )

    def summary(self) -> list[tuple[str, object]]:
        quote, plan = self.quote, self.quote.plan
        privacy: object = no_privacy(quote.request.metrics)
        if self.private:
            privacy = f"epsilon {quote.epsilon:.3f} at delta {quote.delta:g} (this job alone)"
        rows: list[tuple[str, object]] = [
            ("quote", self.digest),
            ("job", self.job),
            ("privacy", privacy),
            ("metrics", ", ".join(m.name for m in quote.request.metrics))
            if quote.request.metrics
            else ("steps", f"{plan.steps}, each on {plan.rate:.2%} of {plan.units} units"),
            ("noise", _noise(plan)),
            ("parameters", quote.parameters),
            *([("native step", artifact)] if (artifact := quote.execution.artifact) else ()),
            ("time", f"about {quote.seconds:.0f} s"),
            ("memory", f"about {quote.bytes / 2**20:.0f} MiB"),
        ]
        for part in quote.datasets:
            answer = part.message or part.refusal or "allowed"
            if part.refusal is None and part.approval_needed:
                answer = f"needs the approval of {part.owner}"
            rows.append(
                (
                    part.dataset,
                    f"takes {part.charge.epsilon:.3f}, leaves {part.left_after:.3f}: {answer}",
                )
            )
        return rows

    def __str__(self) -> str:
        return views.as_text("", (), self.summary())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return views.as_html("Quote", (), self.summary())


@dataclass(frozen=True, slots=True)
class Measured:
    """A metric's mean over the rows, and the standard deviation of the noise in it: 0 for exact
    ones."""

    value: float
    noise: float

    def __str__(self) -> str:
        return f"{self.value:.5g}" + (f" ± {self.noise:.2g}" if self.noise else "")


def measured(receipt: Receipt, result: bytes) -> dict[str, Measured]:
    """The metrics in an evaluation's result, which the receipt is about.

    The vector is (rows, each metric's sum over its limit) over the normaliser, with the same noise
    s on each; a mean is a quotient, whose noise is s sqrt(1 + quotient^2) / (rows' part), in first
    order. Raises ``FormatError`` for a result of another form, ``JobError`` ``job.noise`` where the
    noise left no rows.
    """
    rows, *sums = contest.sums(receipt.metrics, result)
    if not rows > 0:
        raise JobError(
            "job.noise",
            "The noise is larger than the number of rows.",
            mend="Ask for the metrics at a larger epsilon, or over more rows.",
            where=receipt.job,
        )
    noise = receipt.plan.sigma / receipt.plan.normaliser
    return {
        m.name: Measured(m.limit * part / rows, m.limit * noise * math.hypot(1, part / rows) / rows)
        for m, part in zip(receipt.metrics, sums, strict=True)
    }


class Jobs:
    """``enclave.jobs``: what owners approve and what runs."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def quotes(self) -> views.Listing[Quote]:
        """One's own quotes, and those that wait for one's approval."""
        found = self._connection.listing("/v1/quotes", Quote)
        rows = tuple(
            (
                codec.digest(q),
                q.request.scientist,
                f"{q.epsilon:.3f}" if q.plan.private else "none",
                ", ".join(d.dataset[:11] + "…" for d in q.datasets),
                "needed" if any(d.approval_needed for d in q.datasets) else "-",
            )
            for q in found
        )
        head = ("quote", "scientist", "epsilon", "datasets", "approval")
        return views.Listing(tuple(found), f"{len(found)} quote(s)", head, rows)

    def quote(self, digest: str) -> QuoteView:
        """A quote by its digest, compared with that digest."""
        found = self._connection.request("GET", f"/v1/quotes/{digest}").value(Quote)
        if codec.digest(found) != digest:
            raise NetError(
                "net.protocol",
                f"The server answered with another quote than {digest}.",
                mend="Check that client and server have matching versions.",
            )
        return QuoteView(found)

    def approve(self, digest: str) -> None:
        """Approve a quote, as an owner; it counts for exactly this quote."""
        self._connection.change("POST", f"/v1/quotes/{digest}/approval", retry=True)

    def reject(self, digest: str) -> None:
        """Reject a quote, as an owner."""
        self._connection.change("DELETE", f"/v1/quotes/{digest}/approval")

    def list(self) -> views.Listing[JobStatus]:
        """One's own jobs and those on one's datasets."""
        found = self._connection.listing("/v1/jobs", JobStatus)
        rows = tuple((s.job, s.state, f"{s.tick}/{s.ticks}", s.error or "") for s in found)
        head = ("job", "state", "ticks", "error")
        return views.Listing(tuple(found), f"{len(found)} job(s)", head, rows)

    def status(self, job: str) -> JobStatus:
        return self._connection.request("GET", f"/v1/jobs/{job}").value(JobStatus)

    def get(self, job: str, *, trust: Trust) -> Run:
        """A run that exists, by its id."""
        return Run(self._connection, self.status(job).job, trust)

    def submit(self, quote: QuoteView, *, trust: Trust) -> Run:
        """Start the quoted job. The same quote again is the same job (P8)."""
        body = {"quote": quote.digest}
        answer = self._connection.request("POST", "/v1/jobs", body, retry=True)
        return Run(self._connection, answer.value(JobStatus).job, trust)


def pull(connection: Connection, path: str, info: bytes, digest: str) -> bytes:
    """A stream behind its key, which is sealed to one's own with ``info``: downloaded, opened, held
    against the ``digest`` that a receipt names. Raises ``receipt.weights``, ``FormatError``."""
    identity = connection.identity
    assert identity is not None  # the download is signed
    with tempfile.TemporaryFile(prefix="casemate-") as sealed:
        size = connection.download(path, sealed.write, limit=MAX_RESULT)
        sealed.seek(0)
        length = int.from_bytes(sealed.read(4), "big")
        if not 0 < length <= size - 4:
            raise NetError(
                "net.protocol", "The sealed result is cut short.", mend="Ask for it again."
            )
        key = identity.open(sealed.read(length), info=info)
        parts = iter(partial(sealed.read, stream.CHUNK), b"")
        plain = b"".join(stream.decrypt(key, parts))
    if "sha256:" + hashlib.sha256(plain).hexdigest() != digest:
        raise ReceiptError(
            "receipt.weights",
            "The result is not the one that the receipt is about.",
            mend="Do not use it; ask the enclave again.",
        )
    return plain


class Run:
    """One job: watch it, cancel it, take its receipt and weights."""

    def __init__(
        self,
        connection: Connection,
        job: str,
        trust: Trust,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self._connection = connection
        self._trust = trust
        self._pause = pause
        self.job = job
        self._bundle: ReceiptBundle | None = None
        self._data: bytes | None = None

    @property
    def status(self) -> JobStatus:
        """The job's state and public tick, asked of the server now."""
        return Jobs(self._connection).status(self.job)

    def ticks(self) -> Iterator[JobStatus]:
        """The status at each change, until the last one."""
        seen: JobStatus | None = None
        while True:
            status = self.status
            if status != seen:
                yield status
                seen = status
            if status.state in FINAL:
                self._connection.remember()
                return
            self._pause(POLL_SECONDS)

    def watch(self, *, progress: bool = True) -> Run:
        """Wait for the end, with a progress bar of public ticks; raises ``JobError`` on failure."""
        from tqdm.auto import tqdm

        form = "{desc} {percentage:3.0f}% |{bar}| {elapsed} {postfix}"
        now = self.status
        total = now.ticks
        if now.state not in FINAL:
            receipts.warm()
        with tqdm(desc=self.job[:12], total=total, disable=not progress, bar_format=form) as bar:
            for status in self.ticks():
                bar.n = total if status.state == "done" else min(status.tick, total)
                waits = status.message if status.state not in FINAL else ""
                bar.set_postfix_str(views.plain(f"{status.state} {waits}".rstrip()))
        raise_if_failed(status)
        return self

    def cancel(self) -> None:
        """Stop the job. What it reserved of the budgets is not given back (P8)."""
        self._connection.change("DELETE", f"/v1/jobs/{self.job}")

    @property
    def bundle(self) -> ReceiptBundle:
        """The receipt as the server gives it, for a file or an auditor; not yet verified."""
        if self._bundle is None:
            path = f"/v1/jobs/{self.job}/receipt"
            self._bundle = self._connection.request("GET", path).value(ReceiptBundle)
            self._connection.sync()  # its head is newer than the one seen at the beginning
        return self._bundle

    @property
    def receipt(self) -> receipts.VerifiedReceipt:
        """The receipt, verified under this connection's trust, with the weights if pulled."""
        verified = receipts.verify_receipt(
            self.bundle, trust=self._trust, weights=self._data, memory=self._connection.memory
        )
        if verified.receipt.job != self.job:
            raise ReceiptError(
                "receipt.job",
                f"The receipt is about {verified.receipt.job}, not {self.job}.",
                mend="Do not rely on it; ask the enclave again.",
            )
        return verified

    def result(self) -> bytes:
        """The weights as one safetensors file, opened with one's own key, digest checked."""
        if self._data is None:
            self._data = self._pull(self.receipt.receipt.result_digest)
        return self._data

    def _pull(self, digest: str) -> bytes:
        info = RESULT_KEY_INFO.format(job=self.job, digest=digest).encode()
        return pull(self._connection, f"/v1/jobs/{self.job}/result", info, digest)

    def weights(self, into: Any = None) -> dict[str, Any]:
        """The trained weights as a dict of numpy arrays by tensor name.

        ``into``: a ``torch.nn.Module`` that gets them too. Needs numpy (extra ``torch``); without
        it :meth:`save` writes the file.
        """
        return weights.load(self.result(), into)

    def metrics(self) -> dict[str, Measured]:
        """The means over the rows that an evaluation measured, by the metric's name, with what the
        noise adds. Raises ``JobError`` ``job.no-metrics`` for a training."""
        data, receipt = self.result(), self.receipt.receipt
        if not receipt.metrics:
            raise JobError(
                "job.no-metrics",
                f"{self.job} is no evaluation.",
                mend="Take its weights: run.weights().",
                where=self.job,
            )
        return measured(receipt, data)

    def save(self, path: str | Path) -> Path:
        """Write the weights as a safetensors file."""
        path = Path(path)
        path.write_bytes(self.result())
        return path

    def __repr__(self) -> str:
        return f"<Run {self.job}>"


def raise_if_failed(status: JobStatus) -> None:
    """``JobError`` (or the error that the server names) unless the job is done or under way."""
    if status.state not in ("failed", "cancelled"):
        return
    code = status.error or f"job.{status.state}"
    kind: type[CasemateError] = FAMILIES.get(code.split(".")[0], JobError)
    raise kind(
        code,
        status.message or f"Job {status.job} {status.state}.",
        mend="Its charge stays spent; mend the cause and submit a new quote.",
        where=status.job,
    )


def refuse_above(quote: QuoteView, cap: float | None) -> None:
    """``BudgetError`` when the quote's charge is above the scientist's own cap."""
    if cap is None:
        return
    if isinstance(quote.quote.request.train.privacy, NonPrivate) or quote.charge > cap:
        found = f"{quote.charge:.4g}" if quote.private else "no privacy"
        raise BudgetError(
            "budget.cap",
            f"The quote would charge epsilon {found}, above your own cap of {cap:g}.",
            mend="Ask for fewer steps, more noise, or raise max_epsilon.",
            where=quote.digest,
        )
