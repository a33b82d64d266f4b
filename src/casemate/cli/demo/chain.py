"""An Ethereum chain in this process (py-evm): for the anchor's examples and tests.

Signed transactions, a block for each, the rules of Cancun; no peers, no stake, nothing on disk.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any, Final

from casemate.spec.errors import UsageError

GAS_LIMIT: Final = 30_000_000  # of a block, as on Ethereum when Cancun began
GAS_PRICE: Final = 10**10
_GENESIS: Final = {"difficulty": 0, "gas_limit": GAS_LIMIT, "timestamp": 1,
                   "mix_hash": bytes(32), "nonce": bytes(8)}  # fmt: skip
_ERROR: Final = bytes.fromhex("08c379a0")


class Reverted(Exception):
    """A call was refused; the text is the contract's reason, "" where it gave none."""


def _needed(module: str) -> Any:
    """A module of py-evm or what comes with it. It raises the limit of recursion for contracts that
    call each other deeply, which would be no limit for parsers: what was is put back."""
    limit = sys.getrecursionlimit()
    try:
        return import_module(module)
    except ImportError as e:
        raise UsageError(
            "usage.extra",
            f"A chain in this process needs packages that are not installed ({e.name}).",
            mend="Run pip install py-evm==0.12.1b1.",
        ) from None
    finally:
        sys.setrecursionlimit(limit)


class Account:
    """Who signs transactions: ``address`` (20 bytes) of a secret of 32 bytes."""

    def __init__(self, secret: bytes) -> None:
        self.key = _needed("eth_keys").keys.PrivateKey(secret)
        self.address: bytes = self.key.public_key.to_canonical_address()


class Chain:
    """Begins with these accounts, each with funds. ``events``: what contracts told, as (address,
    topics, data)."""

    def __init__(self, *accounts: Account) -> None:
        cancun = _needed("eth.vm.forks.cancun").CancunVM
        vm = cancun.configure(consensus_class=_needed("eth.consensus.noproof").NoProofConsensus)
        kind = _needed("eth.chains.base").MiningChain.configure(
            "Local", vm_configuration=((0, vm),), chain_id=1337
        )
        fund = {"balance": 10**20, "nonce": 0, "code": b"", "storage": {}}
        self._chain = kind.from_genesis(
            _needed("eth.db.atomic").AtomicDB(), _GENESIS, {a.address: dict(fund) for a in accounts}
        )
        self.events: list[tuple[bytes, tuple[int, ...], bytes]] = []

    def deploy(self, by: Account, code: bytes) -> tuple[bytes, int]:
        """Make a contract; its address, and the gas it took. Raises :class:`Reverted`."""
        done, gas = self._apply(by, b"", code)
        return done.msg.storage_address, gas

    def send(self, by: Account, to: bytes, data: bytes) -> int:
        """Call a contract in a block of its own; the gas it took. Raises :class:`Reverted`."""
        return self._apply(by, to, data)[1]

    def _apply(self, by: Account, to: bytes, data: bytes) -> tuple[Any, int]:
        vm = self._chain.get_vm()
        unsigned = vm.create_unsigned_transaction(
            nonce=vm.state.get_nonce(by.address), gas_price=GAS_PRICE, gas=GAS_LIMIT // 2, to=to,
            value=0, data=data,
        )  # fmt: skip
        signed = unsigned.as_signed_transaction(by.key, chain_id=self._chain.chain_id)
        _, _, done = self._chain.apply_transaction(signed)
        gas = self._chain.mine_block().header.gas_used
        self.events += _done(done).get_log_entries()
        return done, gas

    def call(self, to: bytes, data: bytes) -> bytes:
        """What a view answers, by this node alone. Raises :class:`Reverted`."""
        return self.ask(to, data)[0]

    def ask(self, to: bytes, data: bytes) -> tuple[bytes, int]:
        """As :meth:`call`, with the gas that the code took."""
        vm = self._chain.get_vm()
        done = _done(
            vm.execute_bytecode(
                origin=to, gas_price=GAS_PRICE, gas=GAS_LIMIT, to=to, sender=to, value=0,
                data=data, code=vm.state.get_code(to),
            )
        )  # fmt: skip
        return done.output, done.get_gas_used()


def _done(computation: Any) -> Any:
    if computation.is_success:
        return computation
    said = computation.output
    # Error(string): a selector, two words (where the text is, how long), the text
    known = said[:4] == _ERROR and len(said) >= 68
    raise Reverted(said[68:][: int.from_bytes(said[36:68], "big")].decode() if known else "")
