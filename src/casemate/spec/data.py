"""What an owner declares: columns, units, policy and budget.

The wire form of a dataset is a :class:`DatasetSchema` and one safetensors file with a tensor per
column, first axis the row. All that a model may know of the rows stands in the schema; nothing in
it is computed from the rows but the public counts.
"""

from __future__ import annotations

import math
from typing import Final, Literal, TypeAlias

from casemate.spec.codec import value
from casemate.spec.contest import Contest

Dtype: TypeAlias = Literal["bool", "u8", "i32", "i64", "f32"]
ITEM_BYTES: Final[dict[str, int]] = {"bool": 1, "u8": 1, "i32": 4, "i64": 8, "f32": 4}

ANYONE: Final = "*"
MAX_DELTA: Final = 0.01
MAX_WITNESSES: Final = 16
MAX_RESUMES: Final = 3
MAX_EVALUATIONS: Final = 1_000_000


@value("column/v1")
class Column:
    """One column: per-row ``shape`` (``()`` for a scalar), inclusive declared bounds, its role.

    ``low`` and ``high`` bound the owner's raw values. With ``scale`` the owner's client maps them
    linearly to [0, 1] (``unit``) or [-1, 1] (``symmetric``) as float32 before sealing, so that the
    wire holds scaled values; bounds are declared, never pooled statistics (rule P2).
    A ``unit`` column names the privacy unit of each row by an index in [0, units).
    """

    name: str
    dtype: Dtype
    shape: tuple[int, ...] = ()
    low: int | float | None = None
    high: int | float | None = None
    scale: Literal["none", "unit", "symmetric"] = "none"
    role: Literal["feature", "label", "unit"] = "feature"

    def __post_init__(self) -> None:
        if not (1 <= len(self.name) <= 120 and self.name.isascii() and self.name.isprintable()):
            raise ValueError("a column's name must have 1 to 120 printable ASCII characters")
        if len(self.shape) > 6 or any(not 1 <= d <= 2**24 for d in self.shape):
            raise ValueError(f"column {self.name!r} has an impossible shape")
        if self.dtype != "bool" and (self.low is None or self.high is None):
            raise ValueError(f"column {self.name!r} needs declared bounds low and high")
        if self.low is not None and self.high is not None and not self.low <= self.high:
            raise ValueError(f"column {self.name!r} has low above high")
        if self.scale != "none" and (self.dtype != "f32" or self.low == self.high):
            raise ValueError(f"column {self.name!r} can be scaled only as f32 with low below high")
        if self.role == "unit" and (self.dtype != "i64" or self.shape or self.low != 0):
            raise ValueError("the unit column must be i64 scalars from 0")

    @property
    def wire_bounds(self) -> tuple[float, float] | None:
        """Inclusive bounds of what stands in the wire form; ``None`` for bool."""
        if self.scale == "unit":
            return 0.0, 1.0
        if self.scale == "symmetric":
            return -1.0, 1.0
        return None if self.low is None or self.high is None else (self.low, self.high)

    @property
    def row_bytes(self) -> int:
        return ITEM_BYTES[self.dtype] * math.prod(self.shape)


@value("schema/v1")
class DatasetSchema:
    """Columns and public counts.

    ``units`` is the public number of privacy units (an owner may pad it); ``rows`` the rows in the
    wire form. Without a unit column each row is a unit of its own. ``rows_per_unit`` is k of P1.
    """

    name: str
    columns: tuple[Column, ...]
    rows: int
    units: int
    rows_per_unit: int = 1

    def __post_init__(self) -> None:
        names = [c.name for c in self.columns]
        if not 1 <= len(names) <= 4096 or len(set(names)) != len(names):
            raise ValueError("a schema needs 1 to 4096 columns with different names")
        if not (1 <= len(self.name) <= 120 and self.name.isprintable()):
            raise ValueError("a dataset's name must have 1 to 120 printable characters")
        if not (1 <= self.rows <= 2**40 and 1 <= self.units <= 2**40):
            raise ValueError("rows and units must be from 1 to 2^40")
        if not 1 <= self.rows_per_unit <= 4096:
            raise ValueError("rows_per_unit must be from 1 to 4096")
        unit = [c for c in self.columns if c.role == "unit"]
        if len(unit) > 1:
            raise ValueError("only one column can be the unit")
        if not unit and (self.units < self.rows or self.rows_per_unit != 1):
            raise ValueError("without a unit column every row is a unit: units >= rows, k = 1")
        if unit and unit[0].high != self.units - 1:
            raise ValueError("the unit column's high must be units - 1")
        if self.rows > self.units * self.rows_per_unit:
            raise ValueError("there are more rows than units * rows_per_unit")

    @property
    def unit_column(self) -> Column | None:
        return next((c for c in self.columns if c.role == "unit"), None)

    def column(self, name: str) -> Column | None:
        return next((c for c in self.columns if c.name == name), None)


@value("budget/v1")
class Budget:
    """A total privacy budget (epsilon, delta) for the whole life of a dataset's ledger."""

    epsilon: float
    delta: float

    def __post_init__(self) -> None:
        if not 0 < self.epsilon <= 1000:
            raise ValueError("epsilon must be above 0 and at most 1000")
        if not 0 < self.delta <= MAX_DELTA:
            raise ValueError(f"delta must be above 0 and at most {MAX_DELTA}")


@value(
    "policy/v1",
    later=("scientist_budget", "witnesses", "cosignatures", "resumes", "evaluations", "contest"),
)
class Policy:
    """Who may do what with a dataset; every field is stated.

    ``scientists``: identity ids, or ``("*",)`` for any enrolled identity.
    ``approval``: whether each quote needs the owner's approval by digest.
    ``max_epsilon``: the most that one job may charge (in the filter's epsilon), or ``None``.
    ``nonprivate``: the owner's own words that permit training without privacy, or ``None`` (P10).
    ``last_epoch``: the dataset serves while its signed epoch is at most this, or ``None``.
    ``evaluation``: the dataset is registered for evaluation, for ever: nobody trains on it.
    ``evaluations``: how many evaluations of such a dataset's ledger may be exact, in all (P10).
    ``scientist_budget``: the most that the jobs of one scientist may charge together, by a filter
    of its own beside the dataset's, or ``None``.
    ``witnesses``: verifier keys (C2SP vkey, cosignature/v1) of which ``cosignatures`` must have
    cosigned the log over a job's reservation before its keys are used, and over its commit before
    anything leaves. More than half of them, so that two branches of a log cannot both have enough.
    ``resumes``: how often a job that the server's end cut short may be gone on with, 0 to 3
    (docs/privacy.md, "Resuming").
    ``contest``: of a dataset for evaluation, for ever: it scores entries of this contest and does
    nothing else (:class:`casemate.spec.contest.Contest`).
    """

    scientists: tuple[str, ...]
    approval: Literal["none", "each-quote"] = "none"
    max_epsilon: float | None = None
    nonprivate: str | None = None
    last_epoch: int | None = None
    evaluation: bool = False
    scientist_budget: Budget | None = None
    witnesses: tuple[str, ...] = ()
    cosignatures: int = 0
    resumes: int = MAX_RESUMES
    evaluations: int = 0
    contest: Contest | None = None

    def __post_init__(self) -> None:
        count = len(self.witnesses)
        if len({w.rpartition("+")[2] for w in self.witnesses}) != count or count > MAX_WITNESSES:
            raise ValueError(f"witnesses must be at most {MAX_WITNESSES} different keys")
        if not (count < 2 * self.cosignatures <= 2 * count or count == self.cosignatures == 0):
            raise ValueError("cosignatures must be more than half of the witnesses, and not more")
        if not 0 <= self.evaluations <= (MAX_EVALUATIONS if self.evaluation else 0):
            raise ValueError(
                f"evaluations must be from 0 to {MAX_EVALUATIONS}, and 0 but for evaluation"
            )
        if self.contest is not None and not self.evaluation:
            raise ValueError("a contest is of a dataset for evaluation")
        if not 0 <= self.resumes <= MAX_RESUMES:
            raise ValueError(f"resumes must be from 0 to {MAX_RESUMES}")
        if not self.scientists or len(set(self.scientists)) != len(self.scientists):
            raise ValueError("scientists must name one or several different identities")
        if any(s != ANYONE and not s.startswith("id_") for s in self.scientists):
            raise ValueError("scientists must hold identity ids or '*'")
        if self.max_epsilon is not None and not self.max_epsilon > 0:
            raise ValueError("max_epsilon must be above 0")
        if self.nonprivate is not None and len(self.nonprivate.split()) < 3:
            raise ValueError(
                "nonprivate must say in words that training without privacy is allowed"
            )
        if self.last_epoch is not None and self.last_epoch < 0:
            raise ValueError("last_epoch must be at least 0")

    def admits(self, identity: str) -> bool:
        return identity in self.scientists or ANYONE in self.scientists


@value("registration/v1")
class Registration:
    """An owner's request to register an uploaded, sealed dataset.

    ``dataset`` is ``ds_`` and 40 hex digits of the salted commitment
    SHA-256("casemate/dataset/v1\\0" || salt || wire bytes). ``sealed_key`` is the HPKE message that
    holds :class:`DatasetKey`, with :meth:`info` as its info. ``previous`` names the dataset whose
    new version this is: it inherits that ledger (P1). ``filter`` is fixed for ever (P9).
    """

    dataset: str
    owner: str
    schema: DatasetSchema
    policy: Policy
    budget: Budget
    filter: Literal["rdp/v1"] = "rdp/v1"
    previous: str | None = None
    upload: str
    sealed_key: bytes

    def __post_init__(self) -> None:
        if not (self.dataset.startswith("ds_") and len(self.dataset) == 43):
            raise ValueError("dataset must be ds_ and 40 hex digits")
        if (contest := self.policy.contest) is not None:
            column = self.schema.column(contest.target)
            if column is None or column.role != "label":
                raise ValueError("the contest's target must be a label column")
            if not any(contest.can_score(column, classes=kind) for kind in (True, False)):
                raise ValueError("no one output can have all of the contest's metrics")

    @staticmethod
    def info(dataset: str, policy_digest: str, schema_digest: str) -> bytes:
        return f"casemate/dataset-key/v1|{dataset}|{policy_digest}|{schema_digest}".encode()


@value("dataset-key/v1")
class DatasetKey:
    """What is sealed to the enclave: the stream's key and the commitment's salt, 32 bytes each."""

    key: bytes
    salt: bytes


@value("budget-state/v1")
class BudgetState:
    """A dataset's budget as its owner sees it. Epsilons are the filter's, at ``budget.delta``."""

    budget: Budget
    spent_epsilon: float
    left_epsilon: float
    jobs: int


@value("dataset-info/v1")
class DatasetInfo:
    """What a listing shows. ``budget`` is there for the owner and for admitted scientists.

    ``frozen``: ready, but its state passed on without its owner's consent, and waits for it."""

    dataset: str
    owner: str
    schema: DatasetSchema
    policy: Policy
    policy_digest: str
    epoch: int
    state: Literal["checking", "ready", "frozen", "refused", "revoked"]
    error: str | None = None
    budget: BudgetState | None = None
