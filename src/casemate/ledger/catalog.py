"""Identities, uploads and datasets: who takes part, what they brought, under which policy."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Final, Literal

from casemate.accounting.filters import RdpFilter
from casemate.ledger.store import Store
from casemate.seal import note
from casemate.spec import canonical, codec
from casemate.spec.data import Budget, BudgetState, DatasetInfo, DatasetKey, Policy, Registration
from casemate.spec.errors import AuthError, BudgetError, DataError, LimitError, PolicyError
from casemate.spec.identity import PublicIdentity
from casemate.spec.job import Charge
from casemate.spec.log import (
    Enrolled,
    EpochAdvanced,
    PolicyChanged,
    Registered,
    Revoked,
    commitment,
    dataset_salt,
)

State = Literal["checking", "ready", "frozen", "refused", "revoked"]


@dataclass(frozen=True, slots=True)
class Dataset:
    """A dataset as it stands. ``policy`` may be newer than ``registration.policy``; ``salt`` is of
    its commitments in the log."""

    id: str
    owner: str
    lineage: str
    registration: Registration
    policy: Policy
    policy_digest: str
    salt: bytes
    epoch: int
    state: State
    error: str | None


@dataclass(frozen=True, slots=True)
class Upload:
    """``used_by``: the dataset or quote that the uploaded bytes became part of."""

    id: str
    owner: str
    size: int
    used_by: str | None


def enrol(store: Store, identity: PublicIdentity) -> None:
    """Make ``identity`` known; again is the same."""
    with store.transaction():
        if store.one("SELECT 1 FROM identities WHERE id = ?", identity.id) is None:
            store.run("INSERT INTO identities VALUES (?, ?)", identity.id, codec.encode(identity))
            store.append("identity", identity.id, Enrolled(identity=identity.id))


def identity(store: Store, id: str) -> PublicIdentity:
    """``AuthError`` ``auth.unknown-identity`` for one that never enrolled."""
    row = store.one("SELECT identity FROM identities WHERE id = ?", id)
    if row is None:
        raise AuthError(
            "auth.unknown-identity",
            f"The identity {id[:60]!r} is not enrolled here.",
            mend="Connect once with this identity to enrol it.",
        )
    found: PublicIdentity = codec.known(PublicIdentity, row[0])
    return found


def add_upload(store: Store, owner: str, size: int, *, most: int = 64) -> str:
    """A new upload of ``size`` bytes: its id. At most ``most`` unused ones an owner."""
    upload = "up_" + store.rng.bytes(16).hex()
    with store.transaction():
        unused = "SELECT count(*) FROM uploads WHERE owner = ? AND used_by IS NULL"
        if store.one(unused, owner)[0] >= most:
            raise LimitError(
                "limit.uploads",
                f"{most} uploads of yours wait to be used.",
                mend="Register or drop some first.",
            )
        store.run("INSERT INTO uploads VALUES (?, ?, ?, NULL)", upload, owner, size)
    return upload


def unknown_upload(id: str) -> DataError:
    """Also for one that exists but is another's."""
    return DataError(
        "data.unknown-upload",
        f"There is no upload {id[:60]!r} of yours.",
        mend="Start the upload anew.",
        status=404,
    )


def upload(store: Store, id: str, owner: str) -> Upload:
    """The upload if it is ``owner``'s; else ``DataError`` ``data.unknown-upload`` (404)."""
    row = store.one("SELECT * FROM uploads WHERE id = ? AND owner = ?", id, owner)
    if row is None:
        raise unknown_upload(id)
    return Upload(*row)


def drop_upload(store: Store, id: str) -> None:
    """Forget an upload; the caller removes its bytes afterwards."""
    with store.transaction():
        store.run("DELETE FROM uploads WHERE id = ?", id)


def uploads(store: Store) -> list[Upload]:
    """All of them, so that bytes without an owner can be removed at start."""
    return [Upload(*row) for row in store.all("SELECT * FROM uploads ORDER BY id")]


def use_upload(store: Store, id: str, owner: str, user: str) -> None:
    """Inside a transaction: bind the upload to the one thing ``user`` that is made of it. Two
    quotes of one model need one each: its bytes go when the job of either ends."""
    found = upload(store, id, owner)
    if found.used_by is not None:
        raise DataError(
            "data.upload-used",
            f"The upload {id!r} is already part of something else.",
            mend="Upload again.",
            status=409,
        )
    store.run("UPDATE uploads SET used_by = ? WHERE id = ?", user, id)


_COLUMNS = "id, owner, lineage, registration, policy, policy_digest, salt, epoch, state, error"
# What waits for its owner's consent (``ledger.consent``) is frozen, for all that looks at it.
_STATE = (
    "CASE WHEN state = 'ready' AND id IN (SELECT dataset FROM frozen) THEN 'frozen' ELSE state END"
)
_SELECT = f"SELECT {_COLUMNS.replace('state', _STATE)} FROM datasets"


def _dataset(row: tuple[Any, ...]) -> Dataset:
    id_, owner, lineage, registration, policy, digest, salt, epoch, state, error = row
    return Dataset(
        id_,
        owner,
        lineage,
        codec.decode(Registration, registration),
        codec.decode(Policy, policy),
        digest,
        salt,
        epoch,
        state,
        error,
    )


def dataset(store: Store, id: str) -> Dataset:
    """``DataError`` ``data.unknown-dataset`` (404) if there is none."""
    row = store.one(f"{_SELECT} WHERE id = ?", id)
    if row is None:
        raise unknown_dataset(id)
    return _dataset(row)


def unknown_dataset(id: str) -> DataError:
    """Also for one that exists but that the caller may not know of."""
    return DataError(
        "data.unknown-dataset",
        f"There is no dataset {id[:60]!r} here that you may see.",
        mend="List the datasets that you own or are admitted to.",
        status=404,
    )


def datasets(store: Store) -> list[Dataset]:
    """All, by id."""
    return [_dataset(row) for row in store.all(f"{_SELECT} ORDER BY id")]


def names(field: str) -> str:
    """SQL: ``field`` of a row's policy names the identity ``?1``, or anyone."""
    return (
        f"EXISTS (SELECT 1 FROM json_each(CAST(policy AS TEXT), '$.{field}')"
        " WHERE value IN ('*', ?1))"
    )


def visible(store: Store, identity: str, after: str, count: int) -> list[Dataset]:
    """What ``identity`` may see: owners theirs, others what is ready and admits them. By id, the
    next ``count`` behind the id ``after``; "" is before all."""
    sql = (
        f"{_SELECT} WHERE id > ?2 AND (owner = ?1 OR {_STATE} = 'ready' AND {names('scientists')})"
        " ORDER BY id LIMIT ?3"
    )
    return [_dataset(row) for row in store.all(sql, identity, after, count)]


def register(store: Store, registration: Registration, key: DatasetKey) -> Dataset:
    """A new dataset, state ``checking``; the same registration again changes nothing.

    A new version shares the ledger of ``previous``, so its owner, budget and filter must be the
    same (P1, P9). Raises ``PolicyError`` ``policy.dataset-taken`` (same id, other body),
    ``policy.not-owner``; ``BudgetError`` ``budget.lineage``; ``DataError``; ``FormatError`` for a
    witness's key.
    """
    note.witnesses(registration.policy.witnesses)
    with store.transaction():
        row = store.one(f"{_SELECT} WHERE id = ?", registration.dataset)
        if row is not None:
            found = _dataset(row)
            if found.registration != registration:
                raise PolicyError(
                    "policy.dataset-taken",
                    f"The dataset {registration.dataset} is registered with another body.",
                    mend="Push again: a new salt makes a new id.",
                    status=409,
                )
            return found
        identity(store, registration.owner)
        use_upload(store, registration.upload, registration.owner, registration.dataset)
        lineage = registration.dataset
        if registration.previous is None:
            _new_lineage(store, registration)
        else:
            lineage = _old_lineage(store, registration)
        digest, salt = codec.digest(registration.policy), dataset_salt(key.salt)
        store.run(
            f"INSERT INTO datasets ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, 0, 'checking', NULL)",
            registration.dataset,
            registration.owner,
            lineage,
            codec.encode(registration),
            codec.encode(registration.policy),
            digest,
            salt,
        )
        store.run("INSERT INTO dataset_keys VALUES (?, ?)", registration.dataset, codec.encode(key))
        entry = Registered(
            dataset=registration.dataset,
            owner=registration.owner,
            lineage=lineage,
            units=registration.schema.units,
            schema=commitment(salt, codec.digest(registration.schema)),
            policy=commitment(salt, digest),
            budget=registration.budget,
            filter=registration.filter,
        )
        store.append("register", registration.dataset, entry)
        return dataset(store, registration.dataset)


def _new_lineage(store: Store, registration: Registration) -> None:
    store.run(
        "INSERT INTO lineages VALUES (?, ?, ?, ?)",
        registration.dataset,
        registration.owner,
        registration.filter,
        codec.encode(registration.budget),
    )


def _old_lineage(store: Store, registration: Registration) -> str:
    previous = dataset(store, registration.previous or "")
    if previous.owner != registration.owner:
        raise unknown_dataset(previous.id)
    before = previous.registration
    if (before.budget, before.filter) != (registration.budget, registration.filter):
        raise BudgetError(
            "budget.lineage",
            "A new version keeps the budget and the filter of the first.",
            mend=f"Register it with epsilon {before.budget.epsilon}, delta {before.budget.delta}.",
        )
    _keep_purpose(previous, registration.policy)
    return previous.lineage


def _keep_purpose(before: Dataset, policy: Policy) -> None:
    """What is for evaluation stays so, and nothing else becomes it: exact metrics would undo what
    was promised of private jobs on the same rows, and those the other way round (P10)."""
    if policy.evaluation != before.policy.evaluation:
        raise PolicyError(
            "policy.purpose",
            f"The dataset {before.id} was registered for"
            f" {'evaluation' if before.policy.evaluation else 'training'}, and stays so.",
            mend="Register other rows for the other purpose.",
            where=before.id,
        )
    if policy.contest != before.policy.contest:
        raise PolicyError(
            "policy.purpose",
            f"The dataset {before.id} was registered"
            f" {'without' if before.policy.contest is None else 'for one'} contest, and stays so.",
            mend="Repeat its contest in the policy, or register other rows for another one.",
            where=before.id,
        )


def settle(store: Store, id: str, error: str | None) -> Dataset:
    """The check at push ended: ``ready``, or ``refused`` with what was wrong and the key gone."""
    with store.transaction():
        found = dataset(store, id)
        if found.state == "checking":
            state = "ready" if error is None else "refused"
            store.run("UPDATE datasets SET state = ?, error = ? WHERE id = ?", state, error, id)
            if error is not None:
                store.run("DELETE FROM dataset_keys WHERE dataset = ?", id)
        return dataset(store, id)


def checking_key(store: Store, id: str) -> DatasetKey:
    """The key of a dataset whose check at push is due. Runs get keys by ``ledger.begin`` alone."""
    sql = (
        "SELECT key FROM dataset_keys JOIN datasets ON id = dataset"
        " WHERE id = ? AND state = 'checking'"
    )
    row = store.one(sql, id)
    if row is None:
        raise unknown_dataset(id)
    require_thawed(store, id)
    return codec.decode(DatasetKey, row[0])


def require_thawed(store: Store, id: str) -> None:
    """``PolicyError`` ``policy.frozen`` where the state passed on without the owner's consent."""
    if store.one("SELECT 1 FROM frozen WHERE dataset = ?", id) is not None:
        raise PolicyError(
            "policy.frozen",
            f"The dataset {id} waits for its owner's consent: its state was restored from a backup,"
            " or other software runs.",
            mend="Ask its owner: casemate dataset consent.",
            where=id,
        )


def owned(store: Store, id: str, owner: str) -> Dataset:
    """``owner``'s dataset, unless it is revoked. Raises ``data.unknown-dataset``,
    ``policy.revoked``."""
    found = dataset(store, id)
    if found.owner != owner:
        raise unknown_dataset(id)
    if found.state == "revoked":
        raise PolicyError(
            "policy.revoked",
            f"The dataset {id} is revoked.",
            mend="Push it again as a new version, with previous naming it.",
        )
    return found


def set_policy(store: Store, id: str, owner: str, policy: Policy) -> Dataset:
    """Replace the policy; quotes, approvals and queued jobs made under the old one are void."""
    note.witnesses(policy.witnesses)
    digest = codec.digest(policy)
    with store.transaction():
        found = owned(store, id, owner)
        _keep_purpose(found, policy)
        if found.policy_digest != digest:
            store.run(
                "UPDATE datasets SET policy = ?, policy_digest = ? WHERE id = ?",
                codec.encode(policy),
                digest,
                id,
            )
            body = PolicyChanged(dataset=id, policy=commitment(found.salt, digest))
            store.append("policy", id, body)
            _void(store, id, "policy.changed")
        return dataset(store, id)


def advance_epoch(store: Store, id: str, owner: str, epoch: int) -> Dataset:
    """Move the dataset's epoch forward; ``PolicyError`` ``policy.epoch-back`` for going back."""
    with store.transaction():
        found = owned(store, id, owner)
        if not found.epoch <= epoch < 2**53:
            raise PolicyError(
                "policy.epoch-back",
                f"The epoch is {found.epoch} and only goes forward; {epoch} was asked for.",
                mend="Name a later epoch.",
                status=409,
            )
        if epoch > found.epoch:
            store.run("UPDATE datasets SET epoch = ? WHERE id = ?", epoch, id)
            store.append("epoch", id, EpochAdvanced(dataset=id, epoch=epoch))
            _void(store, id, "policy.stale-epoch")
        return dataset(store, id)


def revoke(store: Store, id: str, owner: str) -> Dataset:
    """Destroy the dataset's key: its row is overwritten, and the WAL that held it is emptied.

    Jobs that run on it can no longer commit. Idempotent. An operator who kept an older copy of the
    disk is found by who has seen this entry: the owner's client, which remembers it.
    """
    with store.transaction():
        found = dataset(store, id)
        if found.owner != owner:
            raise unknown_dataset(id)
        if found.state != "revoked":
            destroy(store, id)
            store.append("revoke", id, Revoked(dataset=id))
    store.empty_wal()
    return dataset(store, id)


def destroy(store: Store, id: str) -> None:
    """Inside a transaction: the dataset's key is deleted, and what was quoted on it is void."""
    store.run("DELETE FROM dataset_keys WHERE dataset = ?", id)
    store.run("DELETE FROM consents WHERE dataset = ?", id)
    store.run("DELETE FROM frozen WHERE dataset = ?", id)
    store.run("UPDATE datasets SET state = 'revoked', error = NULL WHERE id = ?", id)
    _void(store, id, "policy.revoked")


def _void(store: Store, id: str, code: str) -> None:
    quotes = "(SELECT quote FROM quote_datasets WHERE dataset = ?)"
    store.run(f"UPDATE quotes SET void = ? WHERE void IS NULL AND digest IN {quotes}", code, id)
    store.run(f"UPDATE quote_datasets SET verdict = NULL WHERE quote IN {quotes}", id)
    store.run(
        "UPDATE jobs SET state = 'failed', error = ?,"
        " message = 'An owner changed what the quote was made under.'"
        f" WHERE state = 'queued' AND quote IN {quotes}",
        code,
        id,
    )


EVERYONE: Final = ""


@dataclass(frozen=True, slots=True)
class Account:
    """What a filter has taken: nano-RDP at each order, delta in 1e-15, how many jobs."""

    rdp_nano: tuple[int, ...]
    delta_femto: int
    jobs: int

    def add(self, charge: Charge) -> Account:
        """With one more job."""
        # An order that overflows has long left the filter; it stays out.
        pairs = zip(self.rdp_nano, charge.rdp_nano, strict=True)
        total = tuple(min(a + b, canonical.MAX_INT) for a, b in pairs)
        return Account(total, self.delta_femto + charge.delta_femto, self.jobs + 1)

    def fits(self, rdp: RdpFilter, charge: Charge) -> bool:
        """Whether ``rdp`` admits one more job. Integers only."""
        return rdp.admits(self.rdp_nano, self.delta_femto, charge)


def budget(store: Store, lineage: str) -> Budget:
    """What a lineage was registered with."""
    (raw,) = store.one("SELECT budget FROM lineages WHERE id = ?", lineage)
    return codec.decode(Budget, raw)


def account(store: Store, lineage: str, scientist: str = EVERYONE) -> Account:
    """What all jobs on a lineage took, or those of one scientist."""
    row = store.one(
        "SELECT rdp_nano, delta_femto, jobs FROM accounts WHERE lineage = ? AND scientist = ?",
        lineage,
        scientist,
    )
    if row is None:
        return Account(RdpFilter.empty(), 0, 0)
    return Account(tuple(map(int, row[0].split())), *row[1:])


def set_account(store: Store, lineage: str, scientist: str, account: Account) -> None:
    """Inside a transaction."""
    store.run(
        "INSERT INTO accounts VALUES (?1, ?2, ?3, ?4, ?5) ON CONFLICT (lineage, scientist)"
        " DO UPDATE SET rdp_nano = ?3, delta_femto = ?4, jobs = ?5",
        lineage,
        scientist,
        " ".join(map(str, account.rdp_nano)),
        account.delta_femto,
        account.jobs,
    )


def budget_state(store: Store, lineage: str) -> BudgetState:
    """What is spent and left, in the filter's epsilon."""
    found = account(store, lineage)
    return _state(budget(store, lineage), found.rdp_nano, found.delta_femto, found.jobs)


@functools.lru_cache(maxsize=1024)
def _state(total: Budget, rdp_nano: tuple[int, ...], delta_femto: int, jobs: int) -> BudgetState:
    """Kept, since listings ask for the same of every dataset again and again."""
    return RdpFilter(total).state(rdp_nano, delta_femto, jobs)


def witnesses(store: Store) -> set[str]:
    """The verifier keys that the policy of some dataset names which still has its key."""
    sql = (
        "SELECT DISTINCT value FROM datasets,"
        " json_each(json_extract(CAST(policy AS TEXT), '$.witnesses'))"
        " WHERE state NOT IN ('refused', 'revoked')"
    )
    return {key for (key,) in store.all(sql)}


def info(store: Store, dataset: Dataset, *, budget: bool) -> DatasetInfo:
    """What a listing shows, with the budget's state where the reader may see it."""
    return DatasetInfo(
        dataset=dataset.id,
        owner=dataset.owner,
        schema=dataset.registration.schema,
        policy=dataset.policy,
        policy_digest=dataset.policy_digest,
        epoch=dataset.epoch,
        state=dataset.state,
        error=dataset.error,
        budget=budget_state(store, dataset.lineage) if budget else None,
    )
