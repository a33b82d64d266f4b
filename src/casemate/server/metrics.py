"""Prometheus metrics: counts of requests and states, never data, names, or a job's true time.

Nothing here is finer than what rule P6 admits: a job is counted when its public tick is reached,
and neither its worker's time nor that worker's life is shown. Calls of deployed models are timed.
"""

from __future__ import annotations

import contextlib

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)

disable_created_metrics()  # type: ignore[no-untyped-call]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """One registry a server: none of the library's process-wide collectors, whose CPU seconds
    would follow the workers' load."""

    def __init__(self) -> None:
        registry = CollectorRegistry(auto_describe=False)
        self.registry = registry
        self.requests = Counter(
            "casemate_requests", "Answered requests", ["method", "route", "status"],
            registry=registry,
        )  # fmt: skip
        self.refusals = Counter(
            "casemate_refusals", "Refused requests by error family", ["family"], registry=registry
        )
        self.seconds = Histogram(
            "casemate_request_seconds", "Time to answer", ["route"], registry=registry,
            buckets=(0.01, 0.1, 1.0, 10.0, 60.0),
        )  # fmt: skip
        self.jobs = Counter("casemate_jobs", "Jobs by visible state", ["state"], registry=registry)
        self.queued = Gauge("casemate_jobs_queued", "Jobs that wait", registry=registry)
        self.reports = Counter(
            "casemate_attestation_reports", "Reports asked of the TEE", registry=registry
        )
        self.nonces = Counter("casemate_attestation_nonces", "Nonces answered", registry=registry)
        self.log = Gauge("casemate_log_entries", "Entries of the log", registry=registry)
        self.witnesses = Counter(
            "casemate_witness_answers", "Answers of witnesses", ["status"], registry=registry
        )
        self.calls = Counter("casemate_model_calls", "Answered calls", ["model"], registry=registry)
        self.called = Counter(
            "casemate_model_records", "Records of answered calls", ["model"], registry=registry
        )
        self.call_seconds = Histogram(
            "casemate_model_call_seconds", "Time from a call's body to its answer", ["model"],
            buckets=(0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0, 30.0),
            registry=registry,
        )  # fmt: skip
        self.uploaded = Counter("casemate_uploaded_bytes", "Sealed bytes taken", registry=registry)

    def predicted(self, model: str, records: int, seconds: float) -> None:
        """A call of so many records was answered."""
        self.calls.labels(model).inc()
        self.called.labels(model).inc(records)
        self.call_seconds.labels(model).observe(seconds)

    def undeployed(self, model: str) -> None:
        """Nothing more is shown of a model that is gone."""
        for metric in (self.calls, self.called, self.call_seconds):
            with contextlib.suppress(KeyError):
                metric.remove(model)

    def text(self) -> bytes:
        """The exposition text."""
        return generate_latest(self.registry)
