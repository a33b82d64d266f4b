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
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import torch

from casemate.engine import native, probe
from casemate.engine.islands import FORMS, Island, islands
from casemate.engine.nodes import Env, Runner, from_rows, to_rows
from casemate.engine.probe import laid, place
from casemate.engine.program import maker, resolve, uses
from casemate.engine.replay import At, Call
from casemate.graph.model import ListArg, Node, Ref
from casemate.graph.ops import JOINT, Batch, Value

# Operations of an island's lowered graph that move entries or add them up along a record.
_MOVES: Final = frozenset(
    (
        "aten.view", "aten.reshape", "aten.expand", "aten.permute", "aten.unsqueeze",
        "aten.squeeze", "aten.full", "aten.full_like", "aten.slice", "aten.select", "aten.sum",
        "aten.mean", "aten.amax", "aten.amin", "aten.empty", "aten.alias", "aten.transpose",
        "aten.t", "aten.clone", "aten.gather", "aten.scalar_tensor", "aten.arange", "prims.iota",
    )
)  # fmt: skip
_LOOP: Final = re.compile(
    r"for\s*\(\s*int64_t (\w+)=static_cast<int64_t>\((\d+)L?\); "
    r"\1<static_cast<int64_t>\((\d+)L?\); \1\+=static_cast<int64_t>\((\d+)L?\)\)"
)
_WIDEST: Final = 16  # float32 in a vector; rows of a microbatch are a multiple of it
_MARGIN: Final = 0.95
_ROUNDS: Final = (4, 64)
_ENOUGH: Final = 10_000
_HOSTILE: Final = (1e20, 0.0, math.nan, math.inf, -1e38, 1e-42)
# For deciding whether to compile: the part of an island's time that is likely to be saved, seconds
# for loading inductor and its trial of operations, and for each kernel.
_SAVED: Final = 0.5
_START_SECONDS: Final = 6.0
_KERNEL_SECONDS: Final = 4.0
_PAYS: Final = 2.0
_RACE_SECONDS: Final = 0.5
_STOP_SECONDS: Final = 3.0


_Flats: TypeAlias = list[torch.Tensor | None]


class Refused(Exception):
    """The compiled form cannot be taken."""


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
        if isinstance(arg, Ref):
            return ("at", names[arg.name])
        return tuple(of(x) for x in arg.items) if isinstance(arg, ListArg) else arg

    nodes = tuple(
        (n.op, tuple(of(a) for a in n.args), tuple((k, of(a)) for k, a in sorted(n.kwargs.items())))
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


def ragged(source: str, rows: int) -> str | None:
    """A loop in generated C++ that may run different code on some records; ``None`` if none does.

    Whatever axis holds the records of a microbatch has a multiple of ``rows`` entries, alone or
    merged with others, and vectors divide that: a loop with a ragged end is over a record's own
    axes. A loop that is not understood is one.
    """
    if rows % _WIDEST:
        return "rows are no multiple of a vector"
    for kernel in re.findall(r"r'''(.*?)'''", source, re.DOTALL):
        loops = list(_LOOP.finditer(kernel))
        if len(loops) != len(re.findall(r"\bfor\s*\(", kernel)) or re.search(
            r"\b(while|goto|omp)\b", kernel
        ):
            return "a found_loop that is not understood"
        for found in loops:
            first, end, step = (int(found[i]) for i in (2, 3, 4))
            if first != 0:
                return "a found_loop that does not start at zero"
            if end % step and (end % rows == 0 or math.gcd(end, rows) == rows):
                return found[0]
    return None


def _foreign(source: str) -> bool:
    """Whether the code calls more than its own kernels."""
    return "extern_kernels." in source or "torch.ops." in source.split("def call(", 1)[-1]


def _alike(
    call: Callable[[list[torch.Tensor]], Sequence[torch.Tensor]],
    operands: Sequence[tuple[torch.Tensor, Value]],
    values: Sequence[Value],
    rows: int,
) -> list[bool]:
    """Which results of ``call`` treat all slots alike, on operands (tensor, its value); ``values``
    are those of its results.

    As :func:`casemate.engine.probe.same_in_every_slot`, and more: at magnitudes from 1e-30 to 1e30
    each record goes through every place of a vector, and among records of its size; and there is
    more to put into the other records.
    """
    generator = torch.Generator().manual_seed(0)  # tries kernels, guards nothing
    alike = [True] * len(values)
    places = [place(t) for t, _ in operands]
    own = [None if v.batch is None else to_rows(t, v, rows) for t, v in operands]
    shared = [v.batch is not None and rows > 1 and t.stride()[v.batch.axis] == 0
              for t, v in operands]  # fmt: skip

    def outputs(flats: _Flats, weights: _Flats) -> list[torch.Tensor]:
        given = []
        for (t, v), flat, weight, at in zip(operands, flats, weights, places, strict=True):
            if flat is not None:
                given.append(laid(from_rows(flat, v), at))
            else:
                given.append(t if weight is None else weight)
        found = call(given)
        return [to_rows(t, v, rows).contiguous() for t, v in zip(found, values, strict=True)]

    def compare(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor], at: Any, to: Any) -> None:
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            alike[i] = alike[i] and probe._same(x[at], y[to])

    rounds, done, round_ = _ROUNDS[0], [0] * len(values), 0
    while round_ < rounds and any(alike):
        tried: _Flats = []
        weights: _Flats = []
        for (t, _), flat, one, at in zip(operands, own, shared, places, strict=True):
            drawn, weight = flat, None
            if round_ and t.is_floating_point():
                if flat is None:
                    weight = torch.randn(t.shape, generator=generator, dtype=t.dtype)
                    weight = laid(weight if round_ % 2 else weight.abs() + 0.5, at)
                else:
                    drawn = probe._drawn(flat.shape, round_, generator).to(t.dtype)
            if drawn is not None:
                drawn = drawn[:1].expand(drawn.shape).clone() if one else drawn.clone()
            tried.append(drawn)
            weights.append(weight)
        first = outputs(tried, weights)
        orders = [torch.randperm(rows, generator=generator)]
        if round_ == _ROUNDS[0] - 1:
            orders += [torch.arange(rows).roll(k) for k in range(1, min(rows, _WIDEST))]
            floats = [t for t in tried if t is not None and t.is_floating_point() and t.numel()]
            orders += [t.abs().amax(1).argsort() for t in floats]
        for order in orders:
            turned = outputs([None if t is None else t[order] for t in tried], weights)
            compare(first, turned, order, slice(None))
        keep = (torch.arange(rows) + round_) % 4
        for k in range(len(_HOSTILE)) if round_ < _ROUNDS[0] else [round_]:
            mixed = [None if t is None else t.clone() for t in tried]
            for m, one in zip(mixed, shared, strict=True):
                if m is not None and not one:
                    for role in (1, 2, 3):
                        if m.is_floating_point():
                            m[keep == role] = _HOSTILE[(k + role) % len(_HOSTILE)]
                        elif k % 2:
                            m[keep == role] = m[:1].clone()
            compare(first, outputs(mixed, weights), keep == 0, keep == 0)
        done = [n + t.numel() for n, t in zip(done, first, strict=True)]
        round_ += 1
        if round_ == rounds and min(done, default=_ENOUGH) < _ENOUGH and rounds < _ROUNDS[1]:
            rounds += 1
    return alike


def _elementary(graphs: Sequence[Any]) -> dict[Any, Any]:
    """The operations of lowered graphs that work entry by entry, once each. ``Refused`` for one
    that is neither such nor a move of entries or a sum along a record."""
    found: dict[Any, Any] = {}
    for graph in graphs:
        for node in graph.graph.nodes:
            if node.op != "call_function" or node.target is operator.getitem:
                continue
            if torch.Tag.pointwise not in node.target.tags:
                name = str(node.target).rpartition(".")[0]
                if name not in _MOVES and str(node.target) != "prims.convert_element_type.default":
                    raise Refused(f"{node.target} has no lane-wise form")
            args = tuple(_kind(a) for a in node.args)
            kwargs = tuple((k, _kind(a)) for k, a in sorted(node.kwargs.items()))
            if torch.Tag.pointwise in node.target.tags:
                found.setdefault((node.target, args, kwargs), node)
    return found


def _kind(arg: Any) -> Any:
    if isinstance(arg, torch.fx.Node):
        return ("tensor", arg.meta["val"].dtype)
    return tuple(_kind(a) for a in arg) if isinstance(arg, list | tuple) else arg


_TRIED: Final = 1 << 14  # entries, each a record of its own


def _trial(nodes: Sequence[Any]) -> tuple[Any, list[torch.Tensor]]:
    """One graph of all these operations, each on operands of its own, one run over memory."""
    from torch import fx
    from torch.fx.experimental.proxy_tensor import make_fx

    graph = fx.Graph()
    generator = torch.Generator().manual_seed(0)
    examples: list[torch.Tensor] = []
    outs = []
    for node in nodes:

        def operand(arg: Any) -> Any:
            if isinstance(arg, fx.Node):
                dtype = arg.meta["val"].dtype
                if dtype.is_floating_point:
                    made = torch.rand(_TRIED, generator=generator) + 0.5
                elif dtype == torch.bool:
                    made = torch.rand(_TRIED, generator=generator) < 0.5
                else:
                    made = torch.randint(-2, 3, (_TRIED,), generator=generator)
                examples.append(made.to(dtype))
                return graph.placeholder(f"x{len(examples)}")
            return [operand(a) for a in arg] if isinstance(arg, list | tuple) else arg

        args = tuple(operand(a) for a in node.args)
        kwargs = {k: operand(a) for k, a in node.kwargs.items()}
        outs.append((node.target, args, kwargs))
    made = [graph.call_function(*o) for o in outs]
    graph.output(tuple(made))
    return make_fx(fx.GraphModule({}, graph), tracing_mode="fake")(*examples), examples


def _lanes(graphs: Sequence[Any], rows: int) -> set[Any]:
    """Keys of the elementary operations that fail: their compiled form looks at other lanes."""
    found = _elementary(graphs)
    if not found:
        return set()
    graph, examples = _trial(list(found.values()))
    call, source = _built(graph)
    if ragged(source, rows):
        raise Refused("the trial of elementary operations has a ragged loop")
    one = [Value("f32", (1,), Batch(0))] * max(len(examples), len(found))
    with torch.inference_mode():
        alike = _alike(call, list(zip(examples, one, strict=False)), one[: len(found)], _TRIED)
    return {key for key, ok in zip(found, alike, strict=True) if not ok}


# --- the function with islands in it ---


def function(
    runner: Runner,
    inputs: Sequence[str],
    wanted: Sequence[str],
    instead: Mapping[str, Any],
    fused: Sequence[tuple[Island, Callable[[list[Any]], Any]]],
) -> Callable[..., Sequence[Any]]:
    """As :meth:`casemate.engine.nodes.Runner.function`, with islands in place of their nodes."""
    order = runner.order(inputs, wanted)
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
    for name in wanted:
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
    return runner.replayed(steps, inputs, wanted)


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
) -> Fused:
    """The function of ``Runner.function`` with islands compiled, all that are worth it.

    env: every value of the nodes as a run has it. instead: nodes that other functions replace,
    which stay. seconds: islands that are not begun by then stay nodes. Never raises for want of a
    compiler.
    """
    begun = time.monotonic()
    order = runner.order(inputs, wanted)
    found = islands(runner, order, wanted, frozenset(instead))
    refused: dict[str, None] = {} if available() else {"no C++ compiler": None}
    if refused or runner.rows % _WIDEST:
        found = []
    taken: list[tuple[Island, Callable[[list[Any]], Any]]] = []
    try:
        with _settings() if found else nullcontext():
            kinds: dict[Any, list[Island]] = {}
            for island in found:
                kinds.setdefault(_key(runner, island, env), []).append(island)
            lowered: dict[Any, Any] = {}
            for key, same in kinds.items():
                try:
                    lowered[key] = _lowered(runner, same[0], env)
                    _elementary([lowered[key]])
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
        function(runner, inputs, wanted, instead, taken), len(taken),
        sum(len(i.nodes) for i, _ in taken), tuple(refused), time.monotonic() - begun,
    )  # fmt: skip


def _taken(
    runner: Runner, island: Island, env: Env, graph: Any, bad: set[Any]
) -> Callable[[list[Any]], Any]:
    """The island's compiled form, or ``Refused``: see the module."""
    if bad & _elementary([graph]).keys():
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
        if not all(_alike(call, operands, results, runner.rows)):
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
    return torch.allclose(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()), equal_nan=True)


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
    if runner.rows % _WIDEST or not available():
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
    cost = _START_SECONDS + _KERNEL_SECONDS * len(kinds)
    return _SAVED * seconds * microbatches > _PAYS * cost
