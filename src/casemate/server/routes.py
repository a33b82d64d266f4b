"""The one table of routes. What is not here does not exist; OpenAPI, docs/server.md and the test
that walks all routes as every kind of caller are made from it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final, Literal

from casemate.server import (
    consents,
    contests,
    datasets,
    jobs,
    log,
    models,
    openapi,
    public,
    quotes,
    sales,
)
from casemate.server.config import Limits, software
from casemate.server.service import Call
from casemate.spec.data import DatasetInfo, Policy, Registration
from casemate.spec.evidence import Attestation
from casemate.spec.identity import PublicIdentity
from casemate.spec.job import JobStatus, Quote, Submission
from casemate.spec.receipt import Leaderboard, ReceiptBundle
from casemate.spec.sale import SaleInfo
from casemate.spec.serving import Deployment, ModelInfo, ServePolicy

_OFFSET: Final = ("header", datasets.OFFSET, True, "Where the piece begins, in bytes.")
_AFTER: Final = ("query", "after", False, "The id behind which to go on; a Link header gives it.")


@dataclass(frozen=True, slots=True)
class Route:
    """One route. ``permission``: a key of ``permissions.RULES``, or public, self, enrolled.

    ``body``: ``None``, ``bytes``, a shared format, or the fields of a plain object. ``answer``:
    ``None``, ``bytes``, ``str``, ``object`` (any JSON object), a shared format, or a plain
    object's fields; a tuple of forms is a list of either. ``rate``: whose token bucket is asked.
    ``parameters``: (place, name, required, meaning) beside those in the path.
    """

    method: Literal["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"]
    path: str
    permission: str
    handler: Callable[[Call], Awaitable[Any]]
    summary: str
    body: Any = None
    answer: Any = None
    status: int = 200
    rate: Literal["identity", "quote"] = "identity"
    parameters: tuple[tuple[str, str, bool, str], ...] = ()

    @property
    def name(self) -> str:
        """The operation's name, unique."""
        return f"{self.handler.__module__.rsplit('.', 1)[-1]}.{self.handler.__name__}"

    def limit(self, limits: Limits) -> int:
        """The largest body, in bytes."""
        if self.body is None:
            return 0
        return limits.chunk_bytes if self.body is bytes else limits.json_bytes


async def openapi_document(call: Call) -> dict[str, Any]:
    return openapi.document(ROUTES, software())


ROUTES: Final[tuple[Route, ...]] = (
    Route(
        "GET", "/v1/health", "public", public.health, "Whether the server answers",
        answer={"status": str},
    ),
    Route(
        "GET", "/v1/attestation", "public", public.attestation, "Evidence for a nonce",
        answer=Attestation, parameters=(("query", "nonce", True, "32 bytes, hex, fresh."),),
    ),
    Route(
        "GET", "/openapi.json", "public", openapi_document, "This document", answer=object,
    ),
    Route("GET", "/metrics", "public", public.exposition, "Prometheus metrics", answer=str),
    Route(
        "PUT", "/v1/identities/{id}", "self", datasets.enrol, "Enrol a public identity",
        body=PublicIdentity, answer=PublicIdentity,
    ),
    Route(
        "POST", "/v1/uploads", "enrolled", datasets.begin_upload, "Begin an upload",
        body={"size": int}, answer={"upload": str}, status=201,
    ),
    Route(
        "HEAD", "/v1/uploads/{id}", "upload-owner", datasets.show_upload,
        "The upload's offset, in the header Upload-Offset",
    ),
    Route(
        "PATCH", "/v1/uploads/{id}", "upload-owner", datasets.append_upload,
        "Append sealed bytes at Upload-Offset", body=bytes, status=204, parameters=(_OFFSET,),
    ),
    Route(
        "POST", "/v1/datasets", "enrolled", datasets.register,
        "Register an uploaded dataset; it is checked in the background",
        body=Registration, answer=DatasetInfo, status=201,
    ),
    Route(
        "GET", "/v1/datasets", "enrolled", datasets.list_datasets,
        "Datasets that one owns or is admitted to, by id, a page at a time",
        answer=tuple[DatasetInfo, ...], parameters=(_AFTER,),
    ),
    Route(
        "GET", "/v1/datasets/{id}", "dataset-party", datasets.show_dataset, "One dataset",
        answer=DatasetInfo,
    ),
    Route(
        "GET", "/v1/datasets/{id}/leaderboard", "dataset-party", contests.leaderboard,
        "A contest's standings: the receipt of each participant's best entry", answer=Leaderboard,
    ),
    Route(
        "PUT", "/v1/datasets/{id}/policy", "dataset-owner", datasets.set_policy,
        "Replace the policy; quotes and approvals under the old one are void",
        body=Policy, answer=DatasetInfo,
    ),
    Route(
        "POST", "/v1/datasets/{id}/epoch", "dataset-owner", datasets.set_epoch,
        "Move the epoch forward", body={"epoch": int}, answer=DatasetInfo,
    ),
    Route(
        "POST", "/v1/datasets/{id}/consents", "dataset-owner", consents.give,
        "Consent to other software, or to a recovery (a DSSE envelope, spec.consent)",
        body={"envelope": str}, answer=DatasetInfo,
    ),
    Route(
        "DELETE", "/v1/datasets/{id}", "dataset-owner", datasets.revoke,
        "Revoke: the dataset's key is destroyed", status=204,
    ),
    Route(
        "POST", "/v1/quotes", "enrolled", quotes.make, "What a job would cost; touches no data",
        body=Submission, answer=Quote, rate="quote",
    ),
    Route(
        "GET", "/v1/quotes", "enrolled", quotes.list_quotes,
        "One's own quotes, and those that wait for one's approval", answer=tuple[Quote, ...],
    ),
    Route("GET", "/v1/quotes/{digest}", "quote-party", quotes.show, "One quote", answer=Quote),
    Route(
        "POST", "/v1/quotes/{digest}/approval", "quote-owner", quotes.approve,
        "Approve exactly this quote", status=204,
    ),
    Route(
        "DELETE", "/v1/quotes/{digest}/approval", "quote-owner", quotes.reject,
        "Reject this quote", status=204,
    ),
    Route(
        "POST", "/v1/jobs", "enrolled", jobs.submit, "Queue a quote's job (its scientist)",
        body={"quote": str}, answer=JobStatus,
    ),
    Route(
        "GET", "/v1/jobs", "enrolled", jobs.list_jobs,
        "One's own jobs, and those on one's datasets",
        answer=tuple[JobStatus, ...],
    ),
    Route(
        "GET", "/v1/jobs/{id}", "job-party", jobs.show_job, "A job's state and public tick",
        answer=JobStatus,
    ),
    Route(
        "DELETE", "/v1/jobs/{id}", "job-scientist", jobs.cancel,
        "Cancel a job; its charge stays", answer=JobStatus,
    ),
    Route(
        "GET", "/v1/jobs/{id}/result", "job-scientist", jobs.result,
        "The weights, sealed to the scientist", answer=bytes,
    ),
    Route(
        "GET", "/v1/jobs/{id}/receipt", "job-party", jobs.receipt, "The receipt and its evidence",
        answer=ReceiptBundle,
    ),
    Route(
        "POST", "/v1/models", "enrolled", models.deploy, "Deploy an uploaded model",
        body=Deployment, answer=ModelInfo, status=201, rate="quote",
    ),
    Route(
        "GET", "/v1/models", "enrolled", models.list_models,
        "Deployed models that one owns or may call, by id, a page at a time",
        answer=tuple[ModelInfo, ...], parameters=(_AFTER,),
    ),
    Route(
        "GET", "/v1/models/{id}", "model-party", models.show_model, "One deployed model",
        answer=ModelInfo,
    ),
    Route(
        "PUT", "/v1/models/{id}/policy", "model-owner", models.set_policy,
        "Replace the policy: who may call, how often", body=ServePolicy, answer=ModelInfo,
        rate="quote",
    ),
    Route(
        "DELETE", "/v1/models/{id}", "model-owner", models.undeploy,
        "Undeploy: the model's key is destroyed", status=204,
    ),
    Route(
        "POST", "/v1/models/{id}/predictions", "model-caller", models.predict,
        "Call a model; inputs and outputs are sealed", body=bytes, answer=bytes,
    ),
    Route(
        "POST", "/v1/models/{id}/sales", "model-owner", sales.grant,
        "Sell a model: its key, sealed to the buyer (a DSSE envelope, spec.sale)",
        body={"envelope": str}, answer=SaleInfo, status=201,
    ),
    Route(
        "GET", "/v1/sales", "enrolled", sales.list_sales, "What one sold and bought",
        answer=tuple[SaleInfo, ...],
    ),
    Route(
        "GET", "/v1/sales/{id}/model", "sale-buyer", sales.model,
        "The sold model, sealed to its buyer", answer=bytes,
    ),
    Route(
        "GET", "/v1/sales/{id}/receipt", "sale-party", sales.receipt,
        "The sale's receipt and its evidence", answer=ReceiptBundle,
    ),
    Route(
        "GET", "/log/checkpoint", "public", log.checkpoint,
        "The log's newest signed checkpoint (C2SP tlog-checkpoint)", answer=str,
    ),
    Route(
        "GET", "/log/tile/{path}", "public", log.tile,
        "A tile of the log's hashes or entries (C2SP tlog-tiles)", answer=bytes,
    ),
    Route(
        "GET", "/log/attestation/{hex}", "public", log.attestation,
        "The attestation that a start in the log names", answer=Attestation,
    ),
)  # fmt: skip
