"""An owner's rules: whether a dataset's policy lets a job run. One table, for quotes and for the
ledger, which ask it of what each knows."""

from __future__ import annotations

from dataclasses import dataclass

from casemate.spec.data import Policy
from casemate.spec.job import DatasetUse, Dp, JobRequest, NonPrivate

_QUOTE = "Ask for a new quote."
_OWNER = "Ask its owner."


@dataclass(frozen=True, slots=True)
class Standing:
    """A dataset as it stands. ``evaluated``: exact evaluations so far. ``entered``: entries of this
    scientist in its contest so far. ``beyond``: the job would
    charge more than the policy's ``max_epsilon``, at the smaller of the job's delta and the
    budget's: epsilon falls as delta grows, so that a job may not pass by a delta of its choice."""

    state: str
    policy: Policy
    policy_digest: str
    epoch: int
    evaluated: int
    beyond: bool
    entered: int = 0


def broken(request: JobRequest, use: DatasetUse, now: Standing) -> tuple[str, str, str] | None:
    """The first rule that forbids the job: (code, what is said of the dataset, mend)."""
    policy, privacy = now.policy, request.train.privacy
    private = isinstance(privacy, Dp)
    words = privacy.words if isinstance(privacy, NonPrivate) else None
    contest = policy.contest
    rules = (
        (now.state != "ready", f"policy.{now.state}", f"is {now.state}, not ready", _OWNER),
        (
            not policy.admits(request.scientist),
            "policy.not-admitted",
            "does not admit this scientist",
            _OWNER,
        ),
        (
            use.policy_digest != now.policy_digest,
            "policy.changed",
            "has another policy now; list it again",
            _QUOTE,
        ),
        (
            use.epoch != now.epoch,
            "policy.stale-epoch",
            f"is in epoch {now.epoch}, not {use.epoch}; list it again",
            _QUOTE,
        ),
        (
            policy.last_epoch is not None and now.epoch > policy.last_epoch,
            "policy.expired",
            f"has expired with epoch {policy.last_epoch}",
            _OWNER,
        ),
        (
            policy.evaluation and not request.metrics,
            "policy.evaluation-only",
            "is for evaluation only",
            "Ask for metrics, or train on another dataset.",
        ),
        (
            contest is None and request.target != "",
            "policy.no-contest",
            "holds no contest",
            "Ask for metrics: enclave.quote_metrics, casemate job quote-metrics.",
        ),
        (
            contest is not None and not contest.takes(request),
            "policy.contest",
            "scores entries of its contest, and nothing else",
            "Enter a model: enclave.enter, casemate contest enter.",
        ),
        (
            contest is not None and now.entered >= contest.entries,
            "policy.entries",
            f"takes {contest.entries if contest else 0} entries of each participant, and took or"
            f" holds {now.entered} of this one",
            "Ask its owner.",
        ),
        (
            request.exact and not policy.evaluation,
            "policy.not-evaluation",
            "is not registered for evaluation, so that metrics on it must be private",
            "Ask for metrics with epsilon and delta.",
        ),
        (
            request.exact and now.evaluated >= policy.evaluations,
            "policy.evaluations",
            f"gives {policy.evaluations} exact evaluations, and gave or holds {now.evaluated}",
            "Ask for metrics with epsilon and delta, or its owner for more.",
        ),
        (
            not (private or request.exact) and (words is None or words != policy.nonprivate),
            "policy.private-only",
            "does not permit training without privacy in these words",
            "Repeat the policy's words, or train with privacy.",
        ),
        (
            private and now.beyond,
            "policy.max-epsilon",
            f"allows at most epsilon {policy.max_epsilon} for one job",
            f"Ask for at most {policy.max_epsilon}.",
        ),
    )
    for forbids, code, sentence, mend in rules:
        if forbids:
            return code, sentence, mend
    return None
