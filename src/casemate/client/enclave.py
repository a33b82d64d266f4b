"""``cm.connect``: an attested enclave and what one can ask of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from casemate.client import contests, log, models, values, views
from casemate.client.connection import Connection
from casemate.client.datasets import Datasets, DatasetView
from casemate.client.jobs import Jobs, QuoteView, Run, refuse_above
from casemate.client.memory import Memory
from casemate.client.served import Models, ModelView
from casemate.client.uploads import new_key, sealed_file, upload
from casemate.seal import hpke
from casemate.seal.checkpoint import Checkpoint
from casemate.seal.identity import Identity
from casemate.seams import OsRng
from casemate.spec import codec
from casemate.spec.data import DatasetInfo, DatasetSchema
from casemate.spec.errors import NetError, PolicyError, UsageError
from casemate.spec.job import (
    DatasetUse,
    Dp,
    JobRequest,
    Metric,
    NonPrivate,
    Quote,
    Runtime,
    Submission,
    TrainSpec,
    Views,
    longest,
)

if TYPE_CHECKING:
    from casemate.attest.trust import Trust
    from casemate.attest.verify import Verdict
    from casemate.spec.evidence import Attestation
    from casemate.spec.serving import ServePolicy


def connect(
    url: str,
    *,
    trust: Trust,
    identity: Identity,
    enrol: bool = True,
    memory: Memory | str | Path | None = "",
) -> Enclave:
    """Attest the enclave at ``url`` under ``trust``, check that its log extends what was seen of it
    before; with ``enrol``, make one's public identity known to it.

    ``memory``: the folder of what was seen of logs (``""``: that of the command line,
    :func:`casemate.client.memory.default_folder`); ``None`` remembers nothing and notices no
    rollback. Raises ``EvidenceError`` when the evidence is refused (a simulated TEE is, unless
    ``trust`` asks for simulation by name), ``ReceiptError`` when the log was rolled back, forked or
    replaced, ``NetError`` when the server cannot be reached.
    """
    if memory is not None and not isinstance(memory, Memory):
        memory = Memory(memory or None)
    connection = Connection(url, trust=trust, identity=identity, memory=memory)
    connection.line()
    if enrol:
        connection.request("PUT", f"/v1/identities/{identity.id}", identity.public)
    return Enclave(connection, trust, identity)


class Enclave:
    """An attested enclave: ``datasets`` for owners, ``quote`` and ``train`` for scientists,
    ``jobs`` for both; ``deploy``, ``predict`` and ``models`` for deployed models."""

    def __init__(self, connection: Connection, trust: Trust, identity: Identity) -> None:
        self._connection = connection
        self._trust = trust
        self.identity = identity
        self.datasets = Datasets(connection)
        self.jobs = Jobs(connection)
        self.models = Models(connection, trust)

    @property
    def url(self) -> str:
        return self._connection.url

    @property
    def attestation(self) -> Attestation:
        """The evidence of the live connection."""
        return self._connection.line().attestation

    @property
    def verdict(self) -> Verdict:
        """What the check of that evidence found."""
        return self._connection.line().verdict

    @property
    def checkpoint(self) -> Checkpoint | None:
        """The newest head of its log that this client has seen; ``None`` without a memory."""
        seen = self._connection.line().seen
        return None if seen is None else seen.head

    def sync(self) -> Checkpoint | None:
        """See the log's newest head now. Raises ``ReceiptError`` for a fork or a rollback."""
        seen = self._connection.sync()
        return None if seen is None else seen.head

    def _repr_html_(self) -> str:
        verdict = self.verdict
        loud = "SIMULATED, protects nothing: " if verdict.simulated else ""
        rows = [(c.name, c.outcome, c.detail) for c in verdict.checks]
        title = f"{loud}{verdict.tee} at {self.url}"
        return views.as_html(title, ("check", "outcome", "found"), rows)

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> Enclave:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Enclave {self.url} as {self.identity.name} ({self.identity.id[:11]}…)>"

    def quote(
        self,
        model: Any,
        datasets: Sequence[str | DatasetInfo | DatasetView],
        *,
        dp: Dp | NonPrivate,
        batch_size: int,
        epochs: float | None = None,
        steps: int | None = None,
        optimizer: Any = "adam",
        lr: float | None = None,
        loss: Any = None,
        schedule: Any = None,
        ema: float = 0.0,
        views: int | Views | None = None,
        dropout: bool = True,
        inputs: Mapping[str, str | Sequence[str]] | None = None,
        runtime: Runtime = "torch",
    ) -> QuoteView:
        """What training ``model`` over ``datasets`` would cost; no data is touched.

        ``model``: a ``torch.nn.Module`` with its ``loss`` (a name such as ``"cross_entropy"``, or a
        module or function of (output, label)), or a packed model (``.cmm`` path, ``Packed``).
        ``optimizer``: ``"sgd"``, ``"adam"`` or ``"adamw"`` with ``lr``, a ``torch.optim`` object,
        or ``cm.SGD(...)`` and the like. ``schedule``: ``"cosine"`` and the like, ``cm.Schedule``,
        or a ``torch.optim.lr_scheduler`` object stepped after every step. ``batch_size`` is the
        expected number of units in a step; give ``epochs`` (over all units of all datasets) or
        ``steps``. ``ema``: decay of the average of the weights that is released in place of the
        last ones, 0 for none. ``views``: a row's gradient is the mean over so many views of it, or
        over ``cm.Views(16, flip=True, crop=4)``. ``dropout``: layers in training mode drop out;
        ``False`` leaves it out. ``inputs`` names the columns of each input where names do not say.
        ``runtime``: ``"native"`` trains by a program made for this quote alone, without Python and
        torch in memory (docs/native.md); the quote and the receipt name its digest.
        Raises ``ModelError``, ``PlanError`` or ``PolicyError`` before anything is spent.
        """
        infos = self._infos(datasets)
        schemas = [i.schema for i in infos]
        exported = models.export(model, schemas, loss=loss, inputs=inputs, dropout=dropout)
        count = _steps(epochs, steps, batch_size, sum(i.schema.units for i in infos))
        train = values.make(
            TrainSpec,
            batch_size=batch_size,
            steps=count,
            privacy=dp,
            optimizer=models.optimizer(optimizer, lr),
            schedule=models.schedule(schedule, count),
            ema=float(ema),
            views=models.views(views),
            runtime=runtime,
        )
        return self._ask(infos, exported, train)

    def quote_metrics(
        self,
        model: Any,
        datasets: Sequence[str | DatasetInfo | DatasetView],
        *,
        metrics: str | Sequence[str] | Mapping[str, Any] = "accuracy",
        limits: Mapping[str, float] | None = None,
        epsilon: float | None = None,
        delta: float | None = None,
        inputs: Mapping[str, str | Sequence[str]] | None = None,
    ) -> QuoteView:
        """What the means of ``metrics`` of ``model`` over the rows would cost; no data is touched.

        ``model``: a ``torch.nn.Module`` with its weights; it is evaluated as after ``.eval()``.
        ``metrics``: ``"accuracy"``, a loss by its name (``"mse"``, ``"cross_entropy"``), or by name
        functions of (output, label) that give one value for each row. A value is cut to
        [0, ``limits[name]``]; of accuracy the limit is 1. With ``epsilon`` and ``delta`` the means
        are private, on any dataset, and its budget pays; without they are exact, on datasets
        registered for evaluation alone, as often as their policies say.
        Raises ``UsageError``, ``ModelError``, ``PlanError`` or ``PolicyError``.
        """
        infos = self._infos(datasets)
        schemas = [i.schema for i in infos]
        asked = models.metrics(metrics, limits)
        wanted = tuple(values.make(Metric, name=n, limit=x) for n, (_, x) in asked.items())
        privacy: Dp | NonPrivate = NonPrivate(words="")
        if epsilon is not None and delta is not None:
            clip = longest(len(wanted), max(s.rows_per_unit for s in schemas))
            privacy = values.DP(epsilon, delta, clip)
        elif epsilon is not None or delta is not None:
            raise UsageError(
                "usage.privacy",
                "One of epsilon and delta is given.",
                mend="Give both for private metrics, neither for exact ones.",
            )
        exported = models.export_metrics(model, schemas, asked, inputs=inputs)
        return self._ask(infos, exported, _one_step(schemas, privacy), wanted)

    def quote_entry(
        self,
        model: Any,
        dataset: str | DatasetInfo | DatasetView,
        *,
        inputs: Mapping[str, str | Sequence[str]] | None = None,
    ) -> QuoteView:
        """What it would cost to enter ``model`` in the contest that ``dataset`` holds.

        ``model``: a ``torch.nn.Module``, which is exported here in evaluation mode, an ``.onnx``
        file or a model packed for prediction; its one output is scored by the contest's metrics,
        which the enclave computes. It sees features alone: ``inputs`` names the columns that feed
        it where names do not tell. Raises ``UsageError``, ``ModelError``, ``PolicyError``.
        """
        info = self._info(dataset)
        contest = info.policy.contest
        if contest is None:
            raise PolicyError(
                "policy.no-contest",
                f"The dataset {info.dataset} holds no contest.",
                mend="Name a dataset that was pushed with a contest.",
                where=info.dataset,
            )
        privacy: Dp | NonPrivate = NonPrivate(words="")
        if contest.epsilon is not None and contest.delta is not None:
            clip = longest(len(contest.metrics), info.schema.rows_per_unit)
            privacy = values.DP(contest.epsilon, contest.delta, clip)
        exported = models.export_entry(model, info.schema, inputs=inputs)
        train = _one_step([info.schema], privacy)
        return self._ask([info], exported, train, contest.metrics, contest.target)

    def _ask(
        self,
        infos: Sequence[DatasetInfo],
        exported: models.Exported,
        train: TrainSpec,
        metrics: tuple[Metric, ...] = (),
        target: str = "",
    ) -> QuoteView:
        request = values.make(
            JobRequest,
            job="job_" + OsRng().bytes(16).hex(),
            scientist=self.identity.id,
            datasets=tuple(
                DatasetUse(dataset=i.dataset, policy_digest=i.policy_digest, epoch=i.epoch)
                for i in infos
            ),
            model_digest=exported.packed.digest,
            inputs=exported.inputs,
            train=train,
            metrics=metrics,
            target=target,
        )
        return self._quote(request, exported.packed.data)

    def _infos(self, datasets: Sequence[str | DatasetInfo | DatasetView]) -> list[DatasetInfo]:
        infos = [self._info(d) for d in datasets]
        if not infos:
            raise UsageError(
                "usage.datasets", "No dataset was named.", mend="Give one or several dataset ids."
            )
        return infos

    def _quote(self, request: JobRequest, packed: bytes) -> QuoteView:
        key = new_key()
        with sealed_file(key, [packed]) as (file, size):
            place = upload(self._connection, file, size)
        info = Submission.info(codec.digest(request))
        sealed = hpke.seal(self.attestation.binding.hpke_key, key, info=info)
        submission = Submission(request=request, upload=place, sealed_key=sealed)
        quote = self._connection.request("POST", "/v1/quotes", submission).value(Quote)
        if quote.request != request or quote.plan.request_digest != codec.digest(request):
            raise NetError(
                "net.protocol",
                "The quote is for another job than the one asked for.",
                mend="Check that client and server have matching versions.",
            )
        return QuoteView(quote)

    def _info(self, dataset: str | DatasetInfo | DatasetView) -> DatasetInfo:
        if isinstance(dataset, DatasetView):
            return dataset.info
        return dataset if isinstance(dataset, DatasetInfo) else self.datasets.show(dataset).info

    def submit(self, quote: QuoteView) -> Run:
        """Start a quoted job. Raises the refusal of a dataset, or ``PolicyError``
        (``policy.approval-needed``) while an owner's approval is missing."""
        return self.jobs.submit(quote, trust=self._trust)

    def job(self, job: str) -> Run:
        """A run by its id, for example after a restart of the notebook."""
        return self.jobs.get(job, trust=self._trust)

    def log(self) -> log.Log:
        """The enclave's whole log, checked (:func:`casemate.client.log.verify`)."""
        return log.fetch(self._connection)

    def train(
        self,
        model: Any,
        datasets: Sequence[str | DatasetInfo | DatasetView],
        *,
        max_epsilon: float | None = None,
        **job: Any,
    ) -> Run:
        """Quote, then submit; arguments as :meth:`quote`.

        ``max_epsilon``: refuse (``budget.cap``) when the quote would charge any dataset more.
        Raises the first dataset's refusal, or ``policy.approval-needed`` naming the quote's digest.
        """
        return self._run(self.quote(model, datasets, **job), max_epsilon)

    def evaluate(
        self,
        model: Any,
        datasets: Sequence[str | DatasetInfo | DatasetView],
        *,
        max_epsilon: float | None = None,
        **job: Any,
    ) -> Run:
        """:meth:`quote_metrics`, then submit: ``enclave.evaluate(...).watch().metrics()``.

        ``max_epsilon`` and errors as in :meth:`train`.
        """
        return self._run(self.quote_metrics(model, datasets, **job), max_epsilon)

    def enter(
        self,
        model: Any,
        dataset: str | DatasetInfo | DatasetView,
        *,
        inputs: Mapping[str, str | Sequence[str]] | None = None,
    ) -> Run:
        """Enter ``model``, sealed, in the contest that ``dataset`` holds (:meth:`quote_entry`): the
        receipt has its scores. The entry counts, whatever comes of it. Raises ``policy.entries``
        when there is none left."""
        return self._run(self.quote_entry(model, dataset, inputs=inputs), None)

    def leaderboard(
        self, dataset: str | DatasetInfo | DatasetView, *, recovered: bool = False
    ) -> contests.Board:
        """The contest's standings, each receipt verified; ``.save(path)`` for others to verify.
        ``recovered``: entries may stand in several logs (:func:`contests.verify`)."""
        name = dataset if isinstance(dataset, str) else self._info(dataset).dataset
        return contests.fetch(self._connection, name, self._trust, recovered=recovered)

    def deploy(
        self,
        model: Any,
        policy: ServePolicy,
        *,
        example: Any = None,
        bounds: Mapping[str, tuple[int, int]] | None = None,
        name: str = "model",
    ) -> ModelView:
        """Deploy ``model``, sealed: whom ``policy`` admits may call it, nobody sees its weights.

        ``model``: a ``torch.nn.Module``, which is exported here in evaluation mode and as it is
        now, an ``.onnx`` file, or a packed model (``.cmm`` path, ``Packed``) made for prediction.
        ``example``: of a module, tensors or arrays with the batch as axis 0: one, a tuple, or a
        dict by the names of ``forward``'s parameters; only dtypes and shapes are used. ``bounds``:
        inclusive bounds of integer inputs, which indices made of them need, as
        ``{"tokens": (0, 30_521)}``. ``name`` is shown to callers.
        Raises ``ModelError`` naming the node where records would mix, ``UsageError``.
        """
        return self.models.deploy(model, policy, example=example, bounds=bounds, name=name)

    def predict(self, model: str | ModelView, inputs: Any) -> Any:
        """What a deployed model gives for ``inputs``: arrays or tensors with records along axis 0,
        one, a tuple in the model's order, or a dict by input.

        They are sealed to the attested key, and so is the answer to a key of this call: numpy
        arrays, or tensors where tensors were given; a dict of several outputs by name. Raises
        ``UsageError`` for inputs of another form, ``DataError`` ``data.inputs``, ``PolicyError``
        ``policy.calls`` when no calls are left, ``LimitError``.
        """
        return self.models.predict(model, inputs)

    def _run(self, quote: QuoteView, max_epsilon: float | None) -> Run:
        quote.raise_if_refused()
        refuse_above(quote, max_epsilon)
        if quote.approval_needed:
            raise PolicyError(
                "policy.approval-needed",
                f"Quote {quote.digest} needs the approval of {', '.join(quote.approval_needed)}.",
                mend="Send them the digest; when all have approved, enclave.submit(quote).",
                where=quote.digest,
            )
        return self.submit(quote)


def _one_step(schemas: Sequence[DatasetSchema], privacy: Dp | NonPrivate) -> TrainSpec:
    """The one form that evaluations have."""
    return values.make(
        TrainSpec,
        batch_size=sum(s.units for s in schemas),
        steps=1,
        privacy=privacy,
        optimizer=values.SGD(1.0),
    )


def _steps(epochs: float | None, steps: int | None, batch_size: int, units: int) -> int:
    if (epochs is None) == (steps is None):
        raise UsageError(
            "usage.steps", "Neither or both of epochs and steps are given.", mend="Give one."
        )
    if steps is not None:
        return steps
    assert epochs is not None
    if not (epochs > 0 and batch_size >= 1):
        raise UsageError(
            "usage.steps", f"{epochs} epochs cannot be trained.", mend="Give epochs above 0."
        )
    return max(1, math.ceil(epochs * units / batch_size))
