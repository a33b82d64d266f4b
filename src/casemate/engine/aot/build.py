"""From a step to an artifact: one static executable with the step, our runtime, and nothing else.

torch's AOTInductor makes C++ of the step (scalar loops, no library of torch's); the runtime
(``runtime/*.cpp``) has the symbols that it asks for, the kernels of ``engine/native``, and the
training loop. Whatever else the generated code asks for fails the build by name (:data:`_ALLOWED`).
"""

from __future__ import annotations

import hashlib
import itertools
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from casemate.engine import compiled, native
from casemate.engine.aot import doors
from casemate.engine.aot.step import Step, noted
from casemate.spec.errors import ModelError

_HERE: Final = Path(__file__).parent / "runtime"
# As the helpers are built (engine/native), for this CPU; never -ffast-math.
FLAGS: Final = (
    *("-O3", "-march=native", "-std=gnu++20", "-fPIE", "-fno-math-errno", "-fno-trapping-math"),
    *("-fno-plt", "-ffunction-sections", "-fdata-sections", "-DNDEBUG", "-pipe"),
)
LINK: Final = (
    "-static-pie",
    "-s",
    "-Wl,--gc-sections",
    "-Wl,--build-id=none",
    "-Wl,-z,relro,-z,now",
)
_SETTINGS: Final = {
    "aot_inductor.package_cpp_only": True,
    "aot_inductor.package": True,
    "aot_inductor.link_libtorch": False,
    "aot_inductor.model_name_for_generated_files": "step",
    "aot_inductor.precompile_headers": False,
    "layout_optimization": False,
    "cpp.threads": 1,
    # Scalar code: a libm call is the same for every entry, and what a compiler makes vectors of is
    # one operation of IEEE 754, so no entry's bits depend on its place (P13).
    "cpp.simdlen": 1,
    "cpp.enable_floating_point_contract_flag": "off",
    "cpp.enable_unsafe_math_opt_flag": False,
    "compile_threads": 1,
    "freezing": False,
    "max_autotune": False,
    "fx_graph_cache": False,
    "size_asserts": False,
}


# What generated code may ask for beside the runtime's symbols: of the C and C++ libraries, nothing
# that opens, starts or connects anything.
_C: Final = (
    r"__cxa_|__gxx_|_Unwind_|(__dso_handle|__libc_single_threaded|_GLOBAL_OFFSET_TABLE_)$"
    r"|pthread_(mutex|rwlock|cond)_|str(chr|cmp|len|tol)$|mem(cmp|cpy|move|set)$"
    r"|(m|c|re)alloc$|free$|getenv$|__errno_location$|__dynamic_cast$|nextafterf?$"
    r"|(exp|exp2|expm1|log|log1p|log2|log10|tanh|sinh|cosh|tan|sin|cos|atan|atan2|asin|acos|erf|erfc"
    r"|lgamma|pow|sqrt|rsqrt|floor|ceil|trunc|rint|nearbyint|round|fabs|fmod|hypot|copysign|fmax"
    r"|fmin)f?$"
)
# Of namespace std: strings, streams in memory, containers, exceptions, locks.
_STD: Final = (
    "basic_string", "basic_stringbuf", "basic_stringstream", "basic_istringstream",
    "basic_ostringstream", "basic_streambuf", "basic_ios", "basic_istream", "basic_ostream",
    "basic_iostream", "ios_base", "ctype", "cerr", "endl", "__ostream_insert", "use_facet",
    "allocator", "__detail", "_Hash_bytes", "nothrow", "condition_variable", "mutex", "exception",
    "__exception_ptr", "terminate", "bad_alloc", "bad_cast", "bad_function_call",
    "bad_array_new_length", "logic_error", "length_error", "out_of_range", "invalid_argument",
    "runtime_error", "regex_error", "system_error", "_V2", "overflow_error", "range_error",
    "domain_error", "underflow_error", "bad_typeid", "bad_exception", "bad_weak_ptr",
    "bad_any_cast", "bad_optional_access", "bad_variant_access", "current_exception",
    "rethrow_exception", "uncaught_exception", "uncaught_exceptions", "collate", "num_get",
    "num_put", "numpunct", "has_facet", "getline", "ws", "flush", "_Sp_locker", "__cow_string",
)  # fmt: skip
# As C++ mangles them (itanium-cxx-abi.github.io/cxx-abi, "Mangling"): a name behind its length.
_CXX: Final = (
    r"_Z(n[aw]|d[al])|_ZT[IV]N10__cxxabiv1|_ZNK?S[abdios]|_ZSt[lr]s"
    rf"|_Z(T[ISTV])?(N[KO]?)?St(7__cxx11)?({'|'.join(f'{len(n)}{n}' for n in _STD)})"
    r"|_ZSt\d+(__throw_|_Rb_tree_|__glibcxx_assert)|_ZTIN?St6locale"
    r"|_ZNK?St6locale(C[12](Ev|ERKS_)|D[12]Ev|aSERKS_|2id|5facetD)"
)
_ALLOWED: Final = re.compile(f"{_C}|{_CXX}")
# What it may have itself: a name of the C library's would be the runtime's too.
_OWN: Final = re.compile(r"_Z|AOTInductor|cpp_|inductor_|DW\.ref\.")
_TYPES: Final = {
    torch.uint8: 0, torch.int8: 1, torch.int32: 3, torch.int64: 4, torch.float32: 6,
    torch.float64: 7, torch.bool: 11,
}  # fmt: skip
_SECONDS: Final = 900
_TOOLS: Final = "Install g++ and binutils."


def refuse(message: str, mend: str = 'Let the engine train: runtime="torch".') -> ModelError:
    return ModelError("model.native", message, mend=mend)


@dataclass(frozen=True, slots=True)
class Artifact:
    """``program``: a static executable. ``digest``: its SHA-256, hex."""

    program: bytes
    step: Step

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.program).hexdigest()


def generated(step: Step) -> tuple[str, list[str], list[torch.Tensor]]:
    """The step in C++ by AOTInductor, the same bytes for the same step; the kernels that it calls
    by door's name; its results, without their values."""
    from torch._inductor import aot_compile

    graph = noted(step)
    (results,) = (n.args[0] for n in graph.graph.nodes if n.op == "output")
    used = {n.target for n in graph.graph.nodes if n.op == "call_function"}
    shims = {op: [doors.declaration(name)] for name, op in doors.operations().items() if op in used}
    names = [name for name, op in doors.operations().items() if op in used]
    # What inductor makes of a graph that it sees for the first time in a process is not what it
    # makes of it ever after: the second is taken.
    for one in (graph, noted(step)):
        with compiled._settings(), tempfile.TemporaryDirectory(prefix="casemate-") as folder:
            settings = {
                **_SETTINGS, "aot_inductor.output_path": f"{folder}/made",
                "aot_inductor.custom_ops_to_c_shims": shims,
            }  # fmt: skip
            with torch.no_grad():
                aot_compile(one, tuple(step.inputs.values()), options=settings)
            (wrapper,) = Path(folder).rglob("step.wrapper.cpp")
            text = wrapper.read_text()
    return _COMMENT.sub("", text), names, [n.meta["val"] for n in results]


# Comments hold paths.
_COMMENT: Final = re.compile(r"^\s*//.*\n", re.MULTILINE)


def table(step: Step, results: Sequence[torch.Tensor]) -> str:
    """What the runtime is told of a step."""
    inputs = list(step.inputs.values())
    leaves = [inputs[i].numel() for i in range(step.trained)]

    def entry(t: torch.Tensor) -> str:
        sizes, strides = (",".join(map(str, x)) for x in (t.shape, t.stride()))
        return f"{{{_TYPES[t.dtype]}, {t.dim()}, {{{sizes}}}, {{{strides}}}}}"

    sums = [
        f"{{{i}, {t.numel()}, {_TYPES[t.dtype]}}}" for i, t in zip(step.sums, results, strict=True)
    ]
    offsets = [0, *itertools.accumulate(leaves)]
    first = step.trained + step.held
    return f"""
struct Input {{ int32_t type; int64_t dims, sizes[8], strides[8]; }};
struct Sum {{ int64_t tensor, entries; int32_t type; }};
constexpr Input INPUTS[] = {{{", ".join(map(entry, inputs))}}};
constexpr Sum SUMS[] = {{{", ".join(sums)}}};
constexpr int64_t OFFSETS[] = {{{", ".join(map(str, offsets))}}};
constexpr int64_t INPUT_COUNT = {len(inputs)}, SUM_COUNT = {len(sums)};
constexpr int64_t TRAINED_COUNT = {step.trained}, DATA_FIRST = {first};
constexpr int64_t DATA_COUNT = {len(inputs) - first - 1}, DIMENSION = {offsets[-1]};
constexpr int64_t BATCH = {step.rows}, PER_UNIT = {step.per_unit}, UNITS = BATCH / PER_UNIT;
constexpr double CLIP = {step.clip.hex()}, GRID = {step.grid.hex()};
"""


def runtime(table: str, names: Sequence[str], parts: Sequence[str] | None = None) -> str:
    """The runtime's source, with doors to these kernels. parts: of these files alone (tests)."""

    def part(found: re.Match[str]) -> str:
        return (_HERE / f"{found[1]}.cpp").read_text() if parts is None or found[1] in parts else ""

    text = re.sub(r'#include "(\w+)\.cpp"\n', part, (_HERE / "main.cpp").read_text())
    made = {
        "TABLE": table,
        "NORMS": native._source("norms").decode(),
        "DOORS": 'extern "C" {\n' + "\n".join(map(doors.definition, names)) + "\n}\n",
        "AES": native._source("aes").decode(),
    }
    for name, source in made.items():
        text = text.replace(f"// {name}\n", source)
    return text


def headers() -> list[str]:
    """The compiler's flags for torch's headers, of which nothing is linked."""
    include = Path(torch.__file__).parent / "include"
    folders = [f"-I{include}", f"-I{include}/torch/csrc/api/include"]
    return [*folders, "-DTORCH_INDUCTOR_CPP_WRAPPER", "-DSTANDALONE_TORCH_HEADER"]


def build(step: Step) -> Artifact:
    """Raises ``ModelError`` ``model.native`` for a step that cannot be compiled so, naming what is
    in the way, and where there is no compiler."""
    compiler = _compiler()
    text, names, results = generated(step)
    sources = {
        "step": (text, ("-ffp-contract=off", *headers())),
        "runtime": (runtime(table(step, results), names), headers()),
        "noise": (native._source("noise").decode(), ()),
    }
    with tempfile.TemporaryDirectory(prefix="casemate-") as folder:
        for name, (source, more) in sources.items():
            flags = [*FLAGS, *more, "-x", "c++", "-", "-c", "-o", f"{name}.o"]
            _run([*compiler, *flags], source, folder)
        check_symbols(
            _symbols(folder, "step.o", "-u"),
            _symbols(folder, "runtime.o", "--defined-only"),
            _symbols(folder, "step.o", "-g", "--defined-only"),
        )
        objects = [f"{name}.o" for name in sources]
        _run([*compiler, *LINK, *objects, "-lquadmath", "-o", "made"], "", folder)
        return Artifact(Path(folder, "made").read_bytes(), step)


def check_symbols(wanted: Sequence[str], have: Sequence[str], own: Sequence[str] = ()) -> None:
    """Raises ``ModelError`` ``model.native`` for a symbol that generated code may not ask for, or
    may not have itself (``own``)."""
    for name in sorted(set(wanted) - set(have)):
        if not _ALLOWED.match(name):
            raise refuse(f"The compiled step asks for {name!r}, which the runtime does not have.")
    for name in sorted(own):
        if not _OWN.match(name):
            raise refuse(f"The compiled step has its own {name!r}, which is not a step's to have.")


def _compiler() -> list[str]:
    try:
        return native.compiler()
    except FileNotFoundError as e:
        raise refuse(f"There is {e}.", mend=_TOOLS) from None


def _run(command: list[str], source: str, folder: str) -> str:
    try:
        return native._run(command, source.encode(), folder, _SECONDS).decode()
    except subprocess.CalledProcessError as e:
        told = e.stderr.decode(errors="replace")[-2000:]
        raise refuse(f"The compiler refused the step: {told}") from None
    except FileNotFoundError:
        raise refuse(f"There is no {command[0]}.", mend=_TOOLS) from None


def _symbols(folder: str, file: str, *which: str) -> list[str]:
    listed = _run(["nm", *which, "-P", file], "", folder)
    return [line.split()[0] for line in listed.splitlines() if line]
