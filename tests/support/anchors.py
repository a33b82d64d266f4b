"""Anchors in memory, and enclaves that are anchored in one, run one operation at a time.

An enclave here is a function of what its operations answered so far. It is run again from its start
for each further one, so that a whole world (chip, disks, enclaves at any point) is a plain value
that can be kept, gone back to and gone through in every order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from casemate.ledger import anchor
from casemate.ledger.anchor import Mark
from casemate.spec.errors import LedgerError

NAME = "tpm2:0180ca5e:test"


class Off(Exception):
    """The machine stopped."""


def link(value: bytes | None, data: bytes) -> bytes:
    """TPM2_NV_Extend: what was never written is zero."""
    return hashlib.sha256((value or bytes(32)) + data).digest()


@dataclass
class FakeAnchor:
    """A TPM's chain. ``crash``: the number of the operation that the machine stops at (from 1), and
    whether that was done."""

    value: bytes | None = None
    name: str = NAME
    crash: tuple[int, bool] | None = None
    trace: list[str] = field(default_factory=list)

    def _do(self, what: str, change: Callable[[], None]) -> None:
        self.trace.append(what)
        due = self.crash is not None and len(self.trace) >= self.crash[0]
        if not due or (self.crash is not None and self.crash[1]):
            change()
        if due:
            raise Off(what)

    def _set(self, data: bytes) -> None:
        self.value = link(self.value, data)

    def read(self) -> bytes | None:
        self._do("read", lambda: None)
        return self.value

    def begin(self, base: bytes) -> None:
        self._do("begin", lambda: self._set(base))

    def extend(self, step: bytes) -> None:
        self._do("extend", lambda: self._set(step))

    def restarted(self) -> FakeAnchor:
        return FakeAnchor(self.value, self.name)


@dataclass(frozen=True)
class Names:
    """Draws that differ from boot to boot."""

    boot: int

    def bytes(self, count: int) -> bytes:
        return hashlib.sha256(b"draw %d" % self.boot).digest()[:count]


# Enclaves, one operation at a time.

History = tuple[str, ...]


@dataclass(frozen=True)
class Saved:
    """What a sealed state holds. ``mark``: a Mark, or whatever another rule keeps."""

    history: History = ()
    mark: Any = None


class Paused(BaseException):
    """The operation that an enclave wants done next."""


@dataclass
class Io:
    """Answers from the record; then stops at the first operation that is not there."""

    answers: tuple[Any, ...]
    name: str = NAME
    at: int = 0

    def _ask(self, *operation: Any) -> Any:
        if self.at == len(self.answers):
            raise Paused(operation)
        self.at += 1
        return self.answers[self.at - 1]

    def read(self) -> Any:
        return self._ask("read")

    def begin(self, base: bytes) -> None:
        self._ask("extend", base)

    def extend(self, step: Any) -> None:
        self._ask("extend", step)

    def store(self, saved: Saved) -> None:
        self._ask("store", saved)

    def act(self, history: History) -> None:
        """Something is seen outside."""
        self._ask("act", history)


Program = Callable[[Io, Saved, int], None]


def root(history: History) -> bytes:
    return hashlib.sha256(repr(history).encode()).digest()


def enclave(acts: int) -> Program:
    """Starts, and does so many things that are recorded, anchored and then seen; the first of them
    is the start itself."""

    def program(io: Io, saved: Saved, boot: int) -> None:
        stand = anchor.resume(io, saved.mark, Names(boot))
        assert stand is not None
        history = saved.history
        for number in range(acts):
            history = (*history, f"{boot}.{number}")
            mark = stand.mark(root(history))
            io.store(Saved(history, mark))
            stand = anchor.move(io, mark)
            io.act(history)

    return program


@dataclass(frozen=True)
class Running:
    boot: int
    saved: Saved
    answers: tuple[Any, ...] = ()


@dataclass(frozen=True)
class World:
    """``seen``: the longest history that anything outside follows from."""

    chip: Any
    disks: tuple[Saved, ...]
    running: tuple[Running, ...] = ()
    seen: History = ()
    boots: int = 0


class Violation(AssertionError):
    """Two things were seen that no one history explains."""


def started(world: World, saved: Saved) -> World:
    boot = world.boots + 1
    return replace(world, boots=boot, running=(*world.running, Running(boot, saved)))


def stopped(world: World, which: int) -> World:
    rest = world.running[:which] + world.running[which + 1 :]
    return replace(world, running=rest)


def _agree(one: History, other: History) -> bool:
    short = min(len(one), len(other))
    return one[:short] == other[:short]


def _done(world: World, operation: tuple[Any, ...], extend: Callable[[Any, Any], Any]) -> World:
    match operation:
        case ("extend", step):
            return replace(world, chip=extend(world.chip, step))
        case ("store", saved):
            return replace(world, disks=(*world.disks, saved))
        case ("act", history):
            if not _agree(world.seen, history):
                raise Violation(f"{world.seen} and {history}")
            return replace(world, seen=max(world.seen, history, key=len))
    return world


def stepped(
    world: World, which: int, program: Program, extend: Callable[[Any, Any], Any] = link
) -> tuple[World, LedgerError | None]:
    """One operation of one enclave; what ends, leaves. The error is its refusal."""
    one = world.running[which]
    try:
        program(Io(one.answers), one.saved, one.boot)
    except LedgerError as e:
        return stopped(world, which), e
    except Paused as wanted:
        operation = wanted.args[0]
        answer = world.chip if operation[0] == "read" else None
        world = _done(world, operation, extend)
        next_ = replace(one, answers=(*one.answers, answer))
        running = (*world.running[:which], next_, *world.running[which + 1 :])
        return replace(world, running=running), None
    return stopped(world, which), None


def explore(
    world: World,
    boots: int,
    program: Program,
    extend: Callable[[Any, Any], Any] = link,
) -> int:
    """All that an operator can make of it who starts up to ``boots`` enclaves, each from any state
    that was ever on a disk, and lets them run side by side, in any order; to stop one is to run it
    no more. Returns how many worlds there are. Raises :class:`Violation`."""
    known = {world}
    todo = [world]
    while todo:
        now = todo.pop()
        for after in _choices(now, boots, program, extend):
            if after not in known:
                known.add(after)
                todo.append(after)
    return len(known)


def _choices(
    world: World, boots: int, program: Program, extend: Callable[[Any, Any], Any]
) -> Iterator[World]:
    if world.boots < boots:
        for saved in world.disks:
            yield started(world, saved)
    for which in range(len(world.running)):
        yield stepped(world, which, program, extend)[0]


def honest(boots: int, program: Program, chip: Any = None) -> int:
    """Every way for one enclave at a time to be stopped anywhere and started again from the newest
    state, from the very first start on. Returns how many worlds there are; raises the first
    refusal."""
    first = started(World(chip, (Saved(),)), Saved())
    known, todo = {first}, [first]
    while todo:
        now = todo.pop()
        after = []
        if now.running:
            one, refusal = stepped(now, 0, program)
            if refusal is not None:
                raise refusal
            after.append(one)
        if now.boots < boots:
            calm = replace(now, running=())
            after.append(started(calm, calm.disks[-1]))
        for world in after:
            if world not in known:
                known.add(world)
                todo.append(world)
    return len(known)


def first_start(program: Program) -> World:
    """A world in which one enclave has started for the first time and ended."""
    world = started(World(None, (Saved(),)), Saved())
    while world.running:
        world, refusal = stepped(world, 0, program)
        assert refusal is None
    return replace(world, disks=world.disks[1:])


__all__ = [
    "NAME", "FakeAnchor", "Io", "Mark", "Names", "Off", "Saved", "Violation", "World", "enclave",
    "explore", "first_start", "honest", "link", "root", "started", "stepped", "stopped",
]  # fmt: skip
