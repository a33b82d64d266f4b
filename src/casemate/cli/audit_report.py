"""What ``casemate audit verify`` shows of a log that holds."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from casemate.cli import output
from casemate.spec.errors import UsageError

if TYPE_CHECKING:
    from casemate.client.heads import Check
    from casemate.client.log import Log, Start
    from casemate.client.replay import Job


@dataclass(frozen=True)
class Report:
    """A log, the starts whose evidence was judged, and the further checks."""

    log: Log
    starts: tuple[Start, ...]
    checks: tuple[Check, ...]

    @cached_property
    def tight(self) -> dict[str, float]:
        """Each job's epsilon by the second accountant (PLD); empty where it is not installed."""
        from casemate.accounting import pld

        out: dict[str, float] = {}
        for name, job in self.log.ledger.jobs.items():
            said = job.reserved
            extra = said.delta_truncation + said.delta_sampler
            try:
                if said.events:
                    out[name] = pld.epsilon(said.events, said.delta_shown - extra)
            except UsageError as e:
                if e.code != "usage.extra":
                    raise
                return {}
        return out

    def _job(self, name: str, job: Job) -> dict[str, object]:
        said = job.reserved
        return {
            "job": name,
            "state": job.state,
            "scientist": said.scientist,
            "datasets": [d.dataset for d in said.debits],
            "private": bool(said.events),
            "epsilon": said.charge.epsilon,
            "epsilon_pld": self.tight.get(name),
            "delta": said.delta_shown,
            "takeovers": job.takeovers,
        }

    def json(self) -> dict[str, object]:
        """A stable shape for ``--format json``."""
        ledger, head = self.log.ledger, self.log.head
        return {
            "entries": head.size,
            "debits": self.log.debits,
            "origin": head.origin,
            "vkey": str(self.log.key),
            "checkpoint": str(self.log.signed),
            "kinds": dict(Counter(e.kind for e in self.log.entries)),
            "simulated": any(s.simulated for s in self.starts),
            "starts": [
                {"entry": s.place, "software": s.said.software, "tee": s.tee,
                 "measurement": s.said.measurement, "simulated": s.simulated}
                for s in self.starts
            ],
            "budgets": [
                {"lineage": name, "owner": x.owner, "epsilon": x.budget.epsilon,
                 "delta": x.budget.delta, "spent_epsilon": x.state.spent_epsilon,
                 "left_epsilon": x.state.left_epsilon, "jobs": x.jobs}
                for name, x in ledger.lineages.items()
            ],
            "datasets": [
                {"dataset": name, "lineage": x.lineage, "owner": x.owner, "units": x.units,
                 "state": x.state, "epoch": x.epoch}
                for name, x in ledger.datasets.items()
            ],
            "jobs": [self._job(name, job) for name, job in ledger.jobs.items()],
            "checks": [{"name": c.name, "state": c.state, "found": c.found} for c in self.checks],
        }  # fmt: skip

    def table(self) -> object:
        from rich.console import Group
        from rich.text import Text

        ledger, head = self.log.ledger, self.log.head
        kinds = Counter(e.kind for e in self.log.entries)
        rows: list[tuple[object, ...]] = [
            ("entries", f"{head.size}: " + ", ".join(f"{k} {n}" for k, n in sorted(kinds.items()))),
            ("origin", head.origin),
            ("root", head.root.hex()),
            ("starts", f"{len(self.starts)} of {len(ledger.starts)} with evidence that holds"),
            ("charges", f"{self.log.debits} recomputed"),
            *((c.name, f"{c.state}: {c.found}") for c in self.checks),
        ]
        parts: list[object] = [output.rows_table("The log holds", (), rows)]
        if any(s.simulated for s in self.starts):
            loud = "SIMULATED: these starts ran in no TEE; their operator can see everything."
            parts.insert(0, Text(loud, style="bold white on red"))
        if ledger.lineages:
            parts.append(
                output.rows_table(
                    "Budgets",
                    ("ledger", "epsilon", "delta", "spent", "left", "jobs"),
                    [
                        (name, x.budget.epsilon, x.budget.delta, x.state.spent_epsilon,
                         x.state.left_epsilon, x.jobs)
                        for name, x in ledger.lineages.items()
                    ],
                )
            )  # fmt: skip
        if ledger.jobs:
            parts.append(
                output.rows_table(
                    "Jobs",
                    ("job", "state", "epsilon", "PLD", "delta", "datasets"),
                    [
                        (name, job.state, job.reserved.charge.epsilon, self.tight.get(name, "-"),
                         job.reserved.delta_shown, len(job.reserved.debits))
                        for name, job in ledger.jobs.items()
                    ],
                )
            )  # fmt: skip
        return Group(*parts)  # type: ignore[arg-type]
