"""Evidence on demand: the nonces that wait share one report.

Hardware gives about one report a second, so one asks for a report at a time, for the Merkle root of
all nonces that came since the last one.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence

from casemate.attest import binding as bound
from casemate.seams import Clock
from casemate.server.keys import BootKeys
from casemate.server.metrics import Metrics
from casemate.server.throttle import Busy
from casemate.spec import codec
from casemate.spec.evidence import Attestation, ServerPolicy
from casemate.tee import Tee


def attest_now(
    tee: Tee, keys: BootKeys, policy: ServerPolicy, nonces: Sequence[bytes]
) -> list[Attestation]:
    """One report for 1 to 2^20 nonces of 32 bytes; an attestation for each, in order. Blocks."""
    binding = keys.binding(codec.digest(policy), bound.nonce_root(nonces))
    evidence = tee.attest(bound.report_data(binding))
    return [
        Attestation(
            binding=binding,
            policy=policy,
            index=index,
            count=len(nonces),
            path=bound.nonce_path(nonces, index),
            evidence=evidence,
        )
        for index in range(len(nonces))
    ]


def boot_nonce(boot: bytes) -> bytes:
    """The nonce of the attestation that goes with a boot's receipts."""
    return hashlib.sha256(boot).digest()


class Attester:
    """Answers nonces in batches; one report is made at a time, off the event loop."""

    def __init__(
        self,
        tee: Tee,
        keys: BootKeys,
        policy: ServerPolicy,
        clock: Clock,
        metrics: Metrics,
        *,
        window: float,
        limit: int,
    ) -> None:
        self._tee, self._keys, self._policy = tee, keys, policy
        self._clock, self._metrics = clock, metrics
        self._window, self._limit = window, limit
        self._waiting: list[tuple[bytes, asyncio.Future[Attestation]]] = []
        self._task: asyncio.Task[None] | None = None

    async def attest(self, nonce: bytes) -> Attestation:
        """The attestation for ``nonce`` (32 bytes); ``limit.attestations`` when too many wait."""
        if len(self._waiting) >= self._limit:
            raise Busy(
                "limit.attestations",
                "Too many clients wait for evidence.",
                mend="Try again in a few seconds.",
                retry_after=2.0,
            )
        future: asyncio.Future[Attestation] = asyncio.get_running_loop().create_future()
        self._waiting.append((nonce, future))
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._serve())
        return await future

    async def _serve(self) -> None:
        while self._waiting:
            await self._clock.sleep(self._window)
            batch, self._waiting = self._waiting, []
            nonces = [nonce for nonce, _ in batch]
            try:
                made = await asyncio.to_thread(
                    attest_now, self._tee, self._keys, self._policy, nonces
                )
            except Exception as e:
                for _, future in batch:
                    if not future.done():
                        future.set_exception(e)
                continue
            self._metrics.reports.inc()
            self._metrics.nonces.inc(len(nonces))
            for (_, future), attestation in zip(batch, made, strict=True):
                if not future.done():
                    future.set_result(attestation)
