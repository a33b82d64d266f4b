"""Fusing what is computed entry by entry: islands of the joint graph, compiled by inductor.

Products, convolutions, attention, norms and pooling stay the very calls that ran without a
compiler, at the same strides, tried in every slot by :mod:`casemate.engine.probe`. Between them lie
*islands*: nodes that work entry by entry, or along one record's axis. Each island becomes one C++
kernel. It is taken where it is quicker than its nodes, and refused where one of these fails, which
together say that a record's bits depend neither on its slot nor on the other records (rule P13;
docs/adr/0007):

1. the generated source has no loop over records with a ragged end (:func:`ragged`);
2. every elementary operation of the island gives each lane of a vector the same bits whatever the
   other lanes hold (tried in a kernel of its own, so no model can hide one from it);
3. the island itself, at the run's strides and places in memory, treats all slots alike on dense
   random operands and hostile magnitudes, and with other weights than the model starts from;
4. it agrees with its nodes.

A machine without a C++ compiler stays with the nodes. inductor is imported here alone, when used.
"""

from __future__ import annotations

import atexit
import ctypes
import math
import operator
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Final

import torch

from casemate.engine import native
from casemate.engine.islands import FORMS, Island, islands
from casemate.engine.nodes import Env, Runner, mapped, needed
from casemate.engine.probe import laid, place
from casemate.engine.program import maker, resolve, uses
from casemate.engine.replay import At, Call
from casemate.engine.slots import TRIED, WIDEST, Refused, elementary, ragged, treated_alike, trial
from casemate.graph.model import Node, Ref
from casemate.graph.ops import JOINT, Batch, Value

_MARGIN: Final = 0.95
# For deciding whether to compile: the part of an island's time that is likely to be saved, seconds
# for loading inductor and its trial of operations, for each kernel, and for each operation in it.
_SAVED: Final = 0.5
_START_SECONDS: Final = 6.0
_KERNEL_SECONDS: Final = 4.0
_NODE_SECONDS: Final = 0.02
_PAYS: Final = 2.0
_RACE_SECONDS: Final = 0.5
_STOP_SECONDS: Final = 3.0
# Of all different islands: nothing asks for the time while they are lowered and tried.
MOST_NODES: Final = 2048


# --- from an island to a graph and its code ---


def _lowered(runner: Runner, island: Island, env: Env) -> Any:
    """The island as a graph of elementary ATen operations, on fake tensors laid out as ``env``."""
    from torch import fx
    from torch._inductor.decomposition import select_decomp_table
    from torch.fx.experimental.proxy_tensor import make_fx

    graph = fx.Graph()
    at: dict[str, Any] = {r: graph.placeholder(f"x{i}") for i, r in enumerate(island.reads)}
    for node in island.nodes:
        args, kwargs = runner.arguments(node, at.__getitem__, runner.rows)
        op = FORMS.get(node.op) or resolve(node.op, JOINT)
        made: Any = graph.call_function(op, tuple(args), kwargs)
        outs = runner.outs(node)
        if outs == [node.name]:
            at[node.name] = made
        else:
            at |= {o: graph.call_function(operator.getitem, (made, i)) for i, o in enumerate(outs)}
    graph.output(tuple(at[o] for o in island.makes))
    module: Any = fx.GraphModule({}, graph)
    examples = [laid(env[r], place(env[r])) for r in island.reads]
    with torch.no_grad():
        traced = make_fx(module, select_decomp_table(), tracing_mode="fake")(*examples)
    traced.graph.eliminate_dead_code()
    return traced


def _key(runner: Runner, island: Island, env: Env) -> Any:
    """What two islands share that are one but for names."""
    names = {r: i for i, r in enumerate(island.reads)}
    for node in island.nodes:
        for o in runner.outs(node):
            names[o] = len(names)

    def of(arg: Any) -> Any:
        # Equal numbers are not always the same: 1, 1.0 and True, or 0.0 and -0.0.
        return ("at", names[arg.name]) if isinstance(arg, Ref) else repr(arg)

    nodes = tuple(
        (
            n.op,
            tuple(mapped(a, of) for a in n.args),
            tuple((k, mapped(a, of)) for k, a in sorted(n.kwargs.items())),
        )
        for n in island.nodes
    )
    reads = tuple(
        (place(env[r]), env[r].dtype, runner.proved.values[r].batch) for r in island.reads
    )
    return nodes, reads, tuple(names[o] for o in island.makes)


def _folder() -> str | None:
    """Where inductor keeps what it built: ours alone, as the native helpers' (docs/adr/0006)."""
    try:
        held, path = native._cache()
        os.close(held)
        (path / "inductor").mkdir(mode=0o700, exist_ok=True)
    except (OSError, KeyError):
        return None
    return str(path / "inductor")


@contextmanager
def _settings() -> Iterator[None]:
    """inductor's, for one thread and loops as :func:`ragged` reads them; a cache folder that
    nobody else writes to, so that nobody else's code is loaded."""
    from torch._inductor import config
    from torch._inductor.runtime.cache_dir_utils import temporary_cache_dir

    changed = {
        "cpp.threads": 1, "cpp.enable_loop_tail_vec": True, "cpp.enable_tiling_heuristics": True,
        "cpp.enable_unsafe_math_opt_flag": False, "cpp.enable_floating_point_contract_flag": "off",
        "layout_optimization": False, "size_asserts": False, "fx_graph_cache": False,
        "compile_threads": 1, "freezing": False, "keep_output_stride": True,
        "cpp_wrapper": False, "max_autotune": False,
    }  # fmt: skip
    folder = _folder()
    with (
        tempfile.TemporaryDirectory(prefix="casemate-", ignore_cleanup_errors=True) as scratch,
        temporary_cache_dir(folder or scratch),
        config.patch(changed),
        _path(),
    ):
        yield


@contextmanager
def _path() -> Iterator[None]:
    """A worker has no ``PATH``, and without one the compiler does not find its parts."""
    if "PATH" in os.environ:
        yield
        return
    os.environ["PATH"] = os.defpath
    try:
        yield
    finally:
        del os.environ["PATH"]


def _built(graph: Any) -> tuple[Callable[[list[Any]], Any], str]:
    """inductor's function of a list of tensors, and its source."""
    from torch._inductor.compile_fx import compile_fx_inner

    examples = [n.meta["val"] for n in graph.graph.nodes if n.op == "placeholder"]
    made: Any = compile_fx_inner(graph, examples)
    return made, str(made.source_code)


# --- what P13 asks of it ---


def _foreign(source: str) -> bool:
    """Whether the code calls more than its own kernels."""
    return "extern_kernels." in source or "torch.ops." in source.split("def call(", 1)[-1]


def _lanes(graphs: Sequence[Any], rows: int) -> set[Any]:
    """Keys of the elementary operations that fail: their compiled form looks at other lanes."""
    found = elementary(graphs)
    if not found:
        return set()
    graph, examples = trial(list(found.values()))
    call, source = _built(graph)
    if ragged(source, rows):
        raise Refused("the trial of elementary operations has a ragged loop")
    one = [Value("f32", (1,), Batch(0))] * max(len(examples), len(found))
    with torch.inference_mode():
        alike = treated_alike(
            call, list(zip(examples, one, strict=False)), one[: len(found)], TRIED
        )
    return {key for key, ok in zip(found, alike, strict=True) if not ok}


# --- the function with islands in it ---


def function(
    runner: Runner,
    inputs: Sequence[str],
    wanted: Sequence[str],
    instead: Mapping[str, Any],
    fused: Sequence[tuple[Island, Callable[[list[Any]], Any]]],
    more: Sequence[Call] = (),
) -> Callable[..., Sequence[Any]]:
    """As :meth:`casemate.engine.nodes.Runner.function`, with islands in place of their nodes."""
    ends = needed(wanted, more)
    order = runner.order(inputs, ends)
    units: list[tuple[tuple[Node, ...], Island | None]] = [(i.nodes, i) for i, _ in fused]
    inside = {n.name for i, _ in fused for n in i.nodes}
    calls = {id(i): call for i, call in fused}
    units += [((n,), None) for n in order if n.name not in inside]
    unit_of = {n.name: k for k, (nodes, _) in enumerate(units) for n in nodes}
    reads = [
        island.reads if island else tuple(dict.fromkeys(uses(nodes[0]))) for nodes, island in units
    ]
    sequence: list[int] = []
    done: set[int] = set()

    def emit(k: int) -> None:
        stack = [k]
        while stack:
            top = stack[-1]
            todo = [unit_of[maker(r)] for r in reads[top] if maker(r) in unit_of]
            todo = [j for j in todo if j not in done]
            if todo:
                stack += todo
                continue
            stack.pop()
            if top not in done:
                done.add(top)
                sequence.append(top)

    for node in order:  # an island waits for its first reader
        if node.name not in inside:
            emit(unit_of[node.name])
    for name in ends:
        if maker(name) in unit_of:
            emit(unit_of[maker(name)])
    steps = []
    for k in sequence:
        nodes, island = units[k]
        if island:
            operands = [At(r) for r in island.reads]
            steps.append(Call(calls[id(island)], [operands], {}, list(island.makes)))
        else:
            steps.append(runner.as_call(nodes[0], instead))
    return runner.replayed(steps, inputs, wanted, more)


@dataclass(frozen=True, slots=True)
class Fused:
    """call: as ``Runner.function`` gives. islands: how many are compiled; refused: why others are
    not, once each. seconds: what all of it took."""

    call: Callable[..., Sequence[Any]]
    islands: int
    nodes: int
    refused: tuple[str, ...]
    seconds: float

    def untaken(self, plain: Callable[..., Sequence[Any]]) -> Fused:
        """As if nothing had been compiled."""
        why = (*self.refused, "the whole is no quicker")
        return Fused(plain, 0, 0, why, self.seconds)

    def __str__(self) -> str:
        if self.islands:
            return f"compiled: {self.islands} islands of {self.nodes} operations"
        return f"compiled: none, {(*self.refused, 'there is no island')[0]}"[:300]


class Later:
    """A :func:`fuse` in a thread of its own, for a library's user who does not want to wait.

    Compiled and plain code differ in bits, so a run takes what is ready between steps alone: within
    one, a record's bits would depend on its microbatch.
    """

    def __init__(self, make: Callable[[], Fused]) -> None:
        self._made: Fused | None = None

        def run() -> None:
            self._made = make()
            atexit.unregister(self.stop)

        self._thread = threading.Thread(target=run, name="casemate-compile", daemon=True)
        atexit.register(self.stop)
        self._thread.start()

    def stop(self) -> None:
        """Give up, for the process ends: a thread that torch's code is called from must not be cut
        off there. One that waits for the compiler may be, so nobody waits long."""
        atexit.unregister(self.stop)
        if self._thread.is_alive() and self._thread.ident is not None:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(
                ctypes.c_ulong(self._thread.ident), ctypes.py_object(SystemExit)
            )
            self._thread.join(_STOP_SECONDS)

    def over(self) -> bool:
        """Whether it has ended, with or without a result."""
        return not self._thread.is_alive()

    def ready(self) -> Fused | None:
        """What was made, once it is there."""
        return self._made if self.over() else None

    def wait(self, seconds: float | None = None) -> Fused | None:
        """As :meth:`ready`, after at most that long."""
        self._thread.join(seconds)
        return self.ready()


def available() -> bool:
    """Whether inductor finds the compiler it calls."""
    import shlex
    import shutil

    return shutil.which(shlex.split(os.environ.get("CXX", "g++"))[0]) is not None


def fuse(
    runner: Runner,
    inputs: Sequence[str],
    wanted: Sequence[str],
    env: Env,
    instead: Mapping[str, Any],
    seconds: float = math.inf,
    more: Sequence[Call] = (),
) -> Fused:
    """The function of ``Runner.function`` with islands compiled, all that are worth it.

    env: every value of the nodes as a run has it. instead: nodes that other functions replace,
    which stay. seconds: islands that are not begun by then stay nodes. Never raises for want of a
    compiler.
    """
    begun = time.monotonic()
    ends = needed(wanted, more)
    order = runner.order(inputs, ends)
    found = islands(runner, order, ends, frozenset(instead))
    refused: dict[str, None] = {} if available() else {"no C++ compiler": None}
    if refused or runner.rows % WIDEST:
        found = []
    taken: list[tuple[Island, Callable[[list[Any]], Any]]] = []
    try:
        with _settings() if found else nullcontext():
            kinds: dict[Any, list[Island]] = {}
            for island in found:
                kinds.setdefault(_key(runner, island, env), []).append(island)
            lowered: dict[Any, Any] = {}
            room = MOST_NODES
            for key, same in kinds.items():
                if len(same[0].nodes) > room:
                    refused["there are too many operations"] = None
                    continue
                room -= len(same[0].nodes)
                try:
                    lowered[key] = _lowered(runner, same[0], env)
                    elementary([lowered[key]])
                except Refused as e:
                    refused[str(e)] = None
                    lowered.pop(key, None)
            bad = _lanes(list(lowered.values()), runner.rows)
            # What saves most first: by the entries that its nodes touch.
            weight = {
                key: len(kinds[key]) * sum(
                    env[o].numel() for n in kinds[key][0].nodes for o in runner.outs(n)
                )
                for key in lowered
            }  # fmt: skip
            for key in sorted(lowered, key=weight.__getitem__, reverse=True):
                if time.monotonic() - begun > seconds:
                    refused["no time was left"] = None
                    break
                try:
                    call = _taken(runner, kinds[key][0], env, lowered[key], bad)
                except Refused as e:
                    refused[str(e)] = None
                    continue
                taken += [(island, call) for island in kinds[key]]
    except Refused as e:
        refused[str(e)] = None
    except Exception as e:  # whatever the compiler did, the nodes are still there
        first, *_ = [*str(e).splitlines(), ""]
        refused[f"{type(e).__name__}: {first[:120]}"] = None
        taken = []
    return Fused(
        function(runner, inputs, wanted, instead, taken, more), len(taken),
        sum(len(i.nodes) for i, _ in taken), tuple(refused), time.monotonic() - begun,
    )  # fmt: skip


def _taken(
    runner: Runner, island: Island, env: Env, graph: Any, bad: set[Any]
) -> Callable[[list[Any]], Any]:
    """The island's compiled form, or ``Refused``: see the module."""
    if bad & elementary([graph]).keys():
        raise Refused("an operation looks at other lanes")
    made, source = _built(graph)
    found_loop = ragged(source, runner.rows)
    if found_loop:
        raise Refused(f"a ragged loop: {found_loop}")
    if _foreign(source):
        raise Refused("it calls more than its own kernels")
    values = runner.proved.values
    call: Callable[[list[Any]], Any] = getattr(made, "current_callable", None) or made
    operands = [(env[r], values[r]) for r in island.reads]
    results = [values[o] for o in island.makes]
    with torch.inference_mode():
        plain = _nodes(runner, island)
        for at in (env, _other_weights(runner, island, env)):
            found = call([at[r] for r in island.reads])
            for o, t, wanted in zip(island.makes, found, plain(at), strict=True):
                if place(t) != place(env[o]) or t.dtype != env[o].dtype:
                    raise Refused("its results lie otherwise in memory")
                if not _close(t, wanted):
                    raise Refused("it does not agree with its nodes")
        if not all(treated_alike(call, operands, results, runner.rows)):
            raise Refused("slots are not treated alike")
        pair = race(lambda: call([t for t, _ in operands]), lambda: plain(env))
    if pair[0] > _MARGIN * pair[1]:
        raise Refused("it is no quicker than its nodes")
    return call


def _other_weights(runner: Runner, island: Island, env: Env) -> Env:
    """The values, with floats that are no records' drawn afresh: a model may start from zero."""
    generator = torch.Generator().manual_seed(0)
    drawn = {
        r: laid(torch.randn(env[r].shape, generator=generator).to(env[r].dtype), place(env[r]))
        for r in island.reads
        if runner.proved.values[r].batch is None and env[r].is_floating_point()
    }
    return {**env, **drawn}


def _close(a: torch.Tensor, b: torch.Tensor) -> bool:
    if not a.is_floating_point():
        return torch.equal(a, b)
    largest = float(torch.where(b.isfinite(), b, 0).abs().max())
    return torch.allclose(a, b, rtol=1e-4, atol=1e-5 * largest, equal_nan=True)


def _nodes(runner: Runner, island: Island) -> Callable[[Env], Any]:
    """The island's nodes one after another, as the function that is not compiled runs them."""
    run = runner.function(list(island.reads), list(island.makes))
    return lambda env: run({**runner.fixed, **env}, *(env[r] for r in island.reads))


def race(a: Callable[[], object], b: Callable[[], object]) -> tuple[float, float]:
    """Seconds of both, interleaved: the least of some."""
    best, begun = [math.inf, math.inf], time.perf_counter()
    for round_ in range(7):
        for i, call in enumerate((a, b)):
            start = time.perf_counter()
            call()
            best[i] = min(best[i], time.perf_counter() - start)
        if round_ and time.perf_counter() - begun > _RACE_SECONDS:
            break
    return best[0], best[1]


def could_pay(seconds: float) -> bool:
    """Whether compiling could save more than it takes in a run of so many seconds."""
    return _SAVED * seconds > _PAYS * (_START_SECONDS + _KERNEL_SECONDS)


def pays(
    runner: Runner,
    inputs: Sequence[str],
    wanted: Sequence[str],
    env: Env,
    instead: Mapping[str, Any],
    microbatches: int,
) -> bool:
    """Whether :func:`fuse` is likely to save a run of so many microbatches more than it takes.
    Loads nothing; ``env`` and ``instead`` as there."""
    if runner.rows % WIDEST or not available():
        return False
    kinds: dict[Any, list[Island]] = {}
    for island in islands(runner, runner.order(inputs, wanted), wanted, frozenset(instead)):
        kinds.setdefault(_key(runner, island, env), []).append(island)
    seconds = 0.0
    with torch.inference_mode():
        for same in kinds.values():
            plain = _nodes(runner, same[0])
            best = math.inf
            for _ in range(3):
                start = time.perf_counter()
                plain(env)
                best = min(best, time.perf_counter() - start)
            seconds += len(same) * best
    nodes = sum(len(same[0].nodes) for same in kinds.values())
    cost = _START_SECONDS + _KERNEL_SECONDS * len(kinds) + _NODE_SECONDS * nodes
    return _SAVED * seconds * microbatches > _PAYS * cost
