"""What a data owner does: push, watch, change the policy, revoke."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from casemate.client import consents, views
from casemate.client.connection import Connection
from casemate.client.memory import log_origin
from casemate.client.uploads import Progress, new_key, sealed_file, upload
from casemate.seal import hpke
from casemate.seams import OsRng
from casemate.spec import codec
from casemate.spec.data import Budget, DatasetInfo, DatasetKey, Policy, Registration
from casemate.spec.errors import DataError, JobError, NetError

SALT_BYTES: Final = 32
CHECK_SECONDS: Final = 600.0
COMMITMENT_TAG: Final = b"casemate/dataset/v1\0"


@dataclass(frozen=True, slots=True)
class DatasetView:
    """A dataset as the server shows it; ``info`` holds the values."""

    info: DatasetInfo

    @property
    def id(self) -> str:
        return self.info.dataset

    def __str__(self) -> str:
        title, rows = views.dataset(self.info)
        return views.as_text(title, (), rows)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        title, rows = views.dataset(self.info)
        return views.as_html(title, (), rows)


class Datasets:
    """``enclave.datasets``. Every method raises the ``CasemateError`` that the server names."""

    def __init__(self, connection: Connection, pause: Callable[[float], None] = time.sleep) -> None:
        self._connection = connection
        self._pause = pause

    def push(
        self,
        source: Any,
        *,
        name: str,
        policy: Policy,
        budget: Budget,
        previous: str | None = None,
        progress: Progress | None = None,
        **encoding: Any,
    ) -> DatasetView:
        """Encode, encrypt and upload a table, register it, and wait until it is checked.

        ``source``: a pandas or polars frame, an Arrow table, a path to Parquet or CSV, numpy
        arrays, a torch or Hugging Face dataset. ``encoding`` (``label``, ``bounds``, ``scale``,
        ``unit`` …) is that of :func:`casemate.client.data.encode`: bounds are declared, never
        computed. ``previous`` names the dataset of which this is a new version; it inherits that
        dataset's ledger. Rows leave this machine only under a fresh key that is sealed to the
        attested enclave. Raises ``DataError`` for a bad table.
        """
        from casemate.client import data

        encoded = data.encode(source, name=name, **encoding)
        key, salt = new_key(), OsRng().bytes(SALT_BYTES)
        commitment = hashlib.sha256(COMMITMENT_TAG + salt)

        def plaintext() -> Any:
            for part in encoded.chunks():
                commitment.update(part)
                yield part

        with sealed_file(key, plaintext()) as (file, size):
            dataset = "ds_" + commitment.hexdigest()[:40]
            place = upload(self._connection, file, size, progress)
        info = Registration.info(dataset, codec.digest(policy), codec.digest(encoded.schema))
        binding = self._connection.line().attestation.binding
        sealed = hpke.seal(
            binding.hpke_key, codec.encode(DatasetKey(key=key, salt=salt)), info=info
        )
        owner = self._connection.identity
        assert owner is not None  # upload was signed
        registration = Registration(
            dataset=dataset,
            owner=owner.id,
            schema=encoded.schema,
            policy=policy,
            budget=budget,
            previous=previous,
            upload=place,
            sealed_key=sealed,
        )
        answer = self._connection.change("POST", "/v1/datasets", registration)
        return self._checked(answer.value(DatasetInfo))

    def _checked(self, info: DatasetInfo) -> DatasetView:
        """Poll until the worker has compared the rows with the schema."""
        waited, step = 0.0, 0.05
        while info.state == "checking":
            if waited > CHECK_SECONDS:
                raise JobError(
                    "job.check-slow",
                    f"Dataset {info.dataset} is still being checked after {waited:.0f} s.",
                    mend="Look again later: casemate dataset show.",
                    where=info.dataset,
                )
            self._pause(step)
            waited, step = waited + step, min(1.0, step * 1.5)
            info = self._info(info.dataset)
        if info.state == "refused":
            code = info.error or ""
            raise DataError(
                code if code.startswith("data.") else "data.refused",
                f"The enclave refused dataset {info.dataset}: {info.error}.",
                mend="Compare the table with its schema, then push it again.",
                where=info.dataset,
            )
        return DatasetView(info)

    def _info(self, dataset: str) -> DatasetInfo:
        info = self._connection.request("GET", f"/v1/datasets/{dataset}").value(DatasetInfo)
        if info.dataset != dataset:
            raise NetError(
                "net.protocol",
                f"The server answered with {info.dataset} where {dataset} was asked for.",
                mend="Check that client and server have matching versions.",
            )
        return info

    def list(self) -> views.Listing[DatasetInfo]:
        """The datasets that one owns or may train on."""
        return views.datasets(self._connection.listing("/v1/datasets", DatasetInfo))

    def show(self, dataset: str) -> DatasetView:
        """One dataset: schema, policy, budget, state."""
        return DatasetView(self._info(dataset))

    def set_policy(self, dataset: str, policy: Policy) -> DatasetView:
        """Replace the policy; approvals and quotes under the old one are void."""
        path = f"/v1/datasets/{dataset}/policy"
        return DatasetView(self._connection.change("PUT", path, policy).value(DatasetInfo))

    def advance_epoch(self, dataset: str, epoch: int) -> DatasetView:
        """Move the dataset's epoch forward, never back."""
        path = f"/v1/datasets/{dataset}/epoch"
        body = {"epoch": epoch}
        return DatasetView(self._connection.change("POST", path, body).value(DatasetInfo))

    def consent(self, dataset: str, measurement: str, trust: str) -> DatasetView:
        """Let the dataset's state pass to software of ``measurement`` (hex), if its evidence holds
        under ``trust``: a policy in TOML, or ``simulated[:ROOT]``. Both ``""``: take an earlier
        consent back. Needed before an upgrade, or after one while the dataset is frozen."""
        line, owner = self._connection.line(), self._connection.identity
        assert owner is not None
        origin = log_origin(line.attestation.binding.log_key)
        return self.give(dataset, consents.to_software(origin, dataset, measurement, trust, owner))

    def give(self, dataset: str, envelope: str) -> DatasetView:
        """Send a consent that was signed before (:mod:`casemate.client.consents`)."""
        path = f"/v1/datasets/{dataset}/consents"
        answer = self._connection.change("POST", path, {"envelope": envelope})
        return DatasetView(answer.value(DatasetInfo))

    def revoke(self, dataset: str) -> None:
        """Destroy the dataset's key in the enclave: nobody can train on it again."""
        self._connection.change("DELETE", f"/v1/datasets/{dataset}")
