"""What people write: short constructors of the shared values, with plain positional arguments.

Each returns a value of :mod:`casemate.spec`; a bad argument raises ``UsageError``
(``usage.value``) with the sentence of the value's own check.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar

from casemate.seal import note
from casemate.spec import data, job, serving
from casemate.spec.contest import Contest as Contest_
from casemate.spec.errors import UsageError

T = TypeVar("T")


def make(made: type[T], /, **fields: Any) -> T:
    """``made(**fields)``, with the value's own refusal as ``UsageError`` (``usage.value``)."""
    try:
        return made(**fields)
    except (ValueError, TypeError) as e:
        name = made.__name__
        raise UsageError(
            "usage.value", f"{name}: {e}.", mend=f"See the documentation of {name}.", where=name
        ) from None


def Budget(epsilon: float, delta: float) -> data.Budget:  # noqa: N802
    """A dataset's total budget for the life of its ledger: epsilon in (0, 1000], delta ≤ 0.01."""
    return make(data.Budget, epsilon=float(epsilon), delta=float(delta))


def ServePolicy(  # noqa: N802
    callers: Iterable[str] | str,
    *,
    calls: int | None = None,
    records: int = 64,
    at_once: int = 8,
    slots: int = 1,
    epoch: int = 0,
) -> serving.ServePolicy:
    """A deployed model's policy (:class:`casemate.spec.serving.ServePolicy`).

    ``callers``: identity ids, or ``"*"`` for anyone enrolled. ``calls``: of each caller in one
    epoch. ``records``: the most in one call. ``at_once``: the most calls of one caller that wait or
    run. ``slots``: let several callers' records share forward passes of so many records. Raises
    ``UsageError``.
    """
    named = (callers,) if isinstance(callers, str) else tuple(callers)
    return make(
        serving.ServePolicy, callers=named, calls=calls, records=records, at_once=at_once,
        slots=slots, epoch=epoch,
    )  # fmt: skip


def Policy(  # noqa: N802
    scientists: Iterable[str] | str,
    *,
    approval: bool | Literal["none", "each-quote"] = "none",
    max_epsilon: float | None = None,
    nonprivate: str | None = None,
    last_epoch: int | None = None,
    evaluation: bool = False,
    scientist_budget: data.Budget | None = None,
    witnesses: Iterable[str] = (),
    cosignatures: int | None = None,
    resumes: int = data.MAX_RESUMES,
    evaluations: int = 0,
    contest: Contest_ | None = None,
) -> data.Policy:
    """Who may train: identity ids, or ``"*"`` for any enrolled identity.

    ``approval=True`` asks for the owner's approval of each quote; ``max_epsilon`` caps one job;
    ``nonprivate`` permits training without privacy, in the owner's own words; ``last_epoch`` ends
    the service when the dataset's signed epoch passes it; ``evaluation`` registers the
    rows for evaluation, for ever: nobody trains on them, and ``evaluations`` of all that are made
    may be exact; ``contest`` says what they score, and nothing else happens to them;
    ``scientist_budget`` caps what the jobs of one scientist take together. ``witnesses`` (verifier
    keys, as `casemate witness show` prints them) must have cosigned the log before a job may use
    the rows and before anything leaves: ``cosignatures`` of them, by default more than half.
    ``resumes``: how often a job that the end of the server cut short may be gone on with, 0 to 3.
    """
    keys = tuple(witnesses)
    note.witnesses(keys)
    names = (scientists,) if isinstance(scientists, str) else tuple(scientists)
    kind = ("each-quote" if approval else "none") if isinstance(approval, bool) else approval
    if kind not in ("none", "each-quote"):
        raise UsageError(
            "usage.value",
            f"Policy: approval is {approval!r}.",
            mend="Give True, False, 'none' or 'each-quote'.",
            where="Policy",
        )
    return make(
        data.Policy,
        scientists=names,
        approval=kind,
        max_epsilon=None if max_epsilon is None else float(max_epsilon),
        nonprivate=nonprivate,
        last_epoch=last_epoch,
        evaluation=evaluation,
        scientist_budget=scientist_budget,
        witnesses=keys,
        resumes=resumes,
        evaluations=evaluations,
        contest=contest,
        cosignatures=len(keys) // 2 + 1 if cosignatures is None and keys else cosignatures or 0,
    )


def Contest(  # noqa: N802
    target: str,
    metrics: str | Iterable[str] | Mapping[str, float] = "accuracy",
    *,
    entries: int,
    epsilon: float | None = None,
    delta: float | None = None,
) -> Contest_:
    """What a dataset for evaluation scores: entries' outputs against the label column ``target``.

    ``metrics``: of accuracy, cross_entropy, binary_cross_entropy_with_logits, mse, l1, by name with
    the limit at which a row's value is cut (accuracy needs none); the first ranks. ``entries``: of
    each participant, in all. ``epsilon`` and ``delta``: of each entry's scores, which the dataset's
    budget pays; without them scores are exact, ``Policy``'s ``evaluations`` of them.
    Raises ``UsageError``.
    """
    names = [metrics] if isinstance(metrics, str) else metrics
    limits = names if isinstance(names, Mapping) else dict.fromkeys(names, 1.0)
    if missing := sorted(set(limits) - {"accuracy"} if limits is not names else ()):
        raise UsageError(
            "usage.metrics",
            f"There is no limit for {missing[0]!r}.",
            mend="Give the limit at which a row's value is cut: metrics={'mse': 25.0}.",
        )
    made = tuple(make(job.Metric, name=n, limit=float(x)) for n, x in limits.items())
    return make(
        Contest_, target=target, metrics=made, entries=entries, epsilon=epsilon, delta=delta
    )


def DP(  # noqa: N802
    epsilon: float,
    delta: float,
    clip: float = 1.0,
    *,
    clipping: job.Clipping = "flat",
    gamma: float = 0.01,
) -> job.Dp:
    """The privacy of one job: no dataset's filter is charged more than epsilon at delta.

    ``clip`` is C, the bound on the L2 norm of one privacy unit's gradient; ``clipping`` how a
    gradient is brought to it (:class:`casemate.spec.job.Dp`): ``"flat"``, ``"per-layer"`` (each
    tensor to C over the root of their number) or ``"automatic"`` (times C / (norm + ``gamma``)).
    All cost the same.
    """
    return make(
        job.Dp,
        epsilon=float(epsilon),
        delta=float(delta),
        clip=float(clip),
        clipping=clipping,
        gamma=float(gamma),
    )


def NonPrivate(words: str) -> job.NonPrivate:  # noqa: N802
    """No privacy at all, where every owner's policy permits it: ``words`` repeats the policy's."""
    return make(job.NonPrivate, words=words)


def SGD(  # noqa: N802
    lr: float, momentum: float = 0.0, nesterov: bool = False, weight_decay: float = 0.0
) -> job.Sgd:
    """SGD as ``torch.optim.SGD`` defines it (dampening 0)."""
    return make(
        job.Sgd,
        lr=float(lr),
        momentum=float(momentum),
        nesterov=nesterov,
        weight_decay=float(weight_decay),
    )


def Adam(  # noqa: N802
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> job.Adam:
    """Adam as ``torch.optim.Adam`` defines it."""
    return _adam(lr, betas, eps, weight_decay, decoupled=False)


def AdamW(  # noqa: N802
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
) -> job.Adam:
    """AdamW as ``torch.optim.AdamW`` defines it."""
    return _adam(lr, betas, eps, weight_decay, decoupled=True)


def _adam(
    lr: float, betas: tuple[float, float], eps: float, decay: float, *, decoupled: bool
) -> job.Adam:
    return make(
        job.Adam,
        lr=float(lr),
        beta1=float(betas[0]),
        beta2=float(betas[1]),
        eps=float(eps),
        weight_decay=float(decay),
        decoupled=decoupled,
    )


def Views(  # noqa: N802
    count: int = 1,
    *,
    flip: bool = False,
    crop: int = 0,
    pad: Literal["reflect", "zeros"] = "reflect",
    input: str = "",
) -> job.Views:
    """Augmentation multiplicity: a row's gradient is the mean over ``count`` random views of it,
    before the clip; one unit moves no more than without (De et al. 2022, arXiv:2204.13650).

    ``flip``: left to right, half of the time. ``crop``: pad by so many pixels, then cut at random.
    ``input``: the model's input of images (C, H, W), where it has several.
    """
    crops = (make(job.Crop, pixels=crop, pad=pad),) if crop else ()
    flips = (job.Flip(),) if flip else ()
    return make(job.Views, count=count, input=input, transforms=(*flips, *crops))


def Schedule(  # noqa: N802
    kind: Literal["constant", "linear", "cosine", "step"] = "constant",
    warmup: int = 0,
    final: float = 0.0,
    gamma: float = 1.0,
    every: int = 1,
) -> job.Schedule:
    """Factor on the learning rate; see :class:`casemate.spec.job.Schedule`."""
    if kind not in ("constant", "linear", "cosine", "step"):
        raise UsageError(
            "usage.value",
            f"Schedule: kind is {str(kind)[:40]!r}.",
            mend="Give 'constant', 'linear', 'cosine' or 'step'.",
            where="Schedule",
        )
    return make(
        job.Schedule, kind=kind, warmup=warmup, final=float(final), gamma=float(gamma), every=every
    )
