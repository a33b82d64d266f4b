"""Who may use a route: one table, deny by default.

A resource gives its caller roles. Without a role the answer is the same as for a resource that does
not exist (404), so that a stranger learns nothing; with a role that the route does not admit, 403.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias

from casemate.ledger import catalog, ledger, models, quotes, sales
from casemate.spec.errors import AuthError

if TYPE_CHECKING:
    from casemate.server.service import Service

Roles: TypeAlias = frozenset[str]


def upload_roles(service: Service, caller: str, name: str) -> Roles:
    """owner. Raises ``data.unknown-upload`` for all others."""
    catalog.upload(service.store, name, caller)
    return frozenset({"owner"})


def dataset_roles(service: Service, caller: str, name: str) -> Roles:
    """owner; scientist: admitted by the policy to a dataset that serves, or that was revoked.

    Raises ``data.unknown-dataset`` for all others.
    """
    found = catalog.dataset(service.store, name)
    roles = set()
    if found.owner == caller:
        roles.add("owner")
    if found.state in ("ready", "frozen", "revoked") and found.policy.admits(caller):
        roles.add("scientist")
    if not roles:
        raise catalog.unknown_dataset(name)
    return frozenset(roles)


def quote_roles(service: Service, caller: str, digest: str) -> Roles:
    """scientist; owner of one of its datasets. Raises ``plan.unknown-quote`` for all others."""
    stored = quotes.get(service.store, digest)
    roles = set()
    if stored.quote.request.scientist == caller:
        roles.add("scientist")
    if caller in quotes.owners(service.store, digest):
        roles.add("owner")
    if not roles:
        raise quotes.unknown(digest)
    return frozenset(roles)


def job_roles(service: Service, caller: str, name: str) -> Roles:
    """As for its quote. Raises ``job.unknown`` for all others."""
    found = ledger.job(service.store, name)
    roles = set()
    if found.scientist == caller:
        roles.add("scientist")
    if caller in quotes.owners(service.store, found.quote):
        roles.add("owner")
    if not roles:
        raise ledger.unknown(name)
    return frozenset(roles)


def model_roles(service: Service, caller: str, name: str) -> Roles:
    """owner; caller: admitted by the policy. Raises ``model.unknown`` for all others."""
    found = models.model(service.store, name)
    roles = {"owner"} if found.owner == caller else set()
    if found.policy.admits(caller):
        roles.add("caller")
    if not roles:
        raise models.unknown(name)
    return frozenset(roles)


def sale_roles(service: Service, caller: str, name: str) -> Roles:
    """seller, buyer. Raises ``model.unknown-sale`` for all others."""
    sale = sales.sold(service.store, name).sale
    roles = {"seller"} if sale.seller == caller else set()
    if sale.buyer == caller:
        roles.add("buyer")
    if not roles:
        raise sales.unknown(name)
    return frozenset(roles)


@dataclass(frozen=True, slots=True)
class Rule:
    """``roles(service, caller, id)`` must meet ``admits``."""

    roles: Callable[[Service, str, str], Roles]
    admits: Roles


def _rule(roles: Callable[[Service, str, str], Roles], *admits: str) -> Rule:
    return Rule(roles, frozenset(admits))


# public: without a signature. self: signed by the identity that the body enrols. enrolled: signed.
WITHOUT_RESOURCE: Final = frozenset({"public", "self", "enrolled"})
RULES: Final[dict[str, Rule]] = {
    "upload-owner": _rule(upload_roles, "owner"),
    "dataset-owner": _rule(dataset_roles, "owner"),
    "dataset-party": _rule(dataset_roles, "owner", "scientist"),
    "quote-owner": _rule(quote_roles, "owner"),
    "quote-party": _rule(quote_roles, "owner", "scientist"),
    "job-scientist": _rule(job_roles, "scientist"),
    "job-party": _rule(job_roles, "owner", "scientist"),
    "model-owner": _rule(model_roles, "owner"),
    "model-caller": _rule(model_roles, "caller"),
    "model-party": _rule(model_roles, "owner", "caller"),
    "sale-buyer": _rule(sale_roles, "buyer"),
    "sale-party": _rule(sale_roles, "seller", "buyer"),
}


def check(service: Service, permission: str, caller: str, resource: str) -> None:
    """Raise the resource's ``unknown`` (404) or ``auth.forbidden`` (403) unless ``caller`` may."""
    if permission in WITHOUT_RESOURCE:
        return
    rule = RULES[permission]
    if not rule.roles(service, caller, resource) & rule.admits:
        raise AuthError(
            "auth.forbidden",
            f"Only the {' or the '.join(sorted(rule.admits))} may do this.",
            mend="Ask them, or sign with the identity that is.",
            status=403,
        )
