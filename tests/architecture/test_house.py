"""The layout: who may import whom, where torch may be, what may never be called."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SRC = ROOT / "src" / "casemate"
MODULES = sorted(SRC.rglob("*.py"))

# Each runs, or builds objects from, code that its input names.
FORBIDDEN_MODULES = {
    "pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve",
    "jsonpickle",
    "torch.jit", "torch.package", "torch.hub", "sympy",
}  # fmt: skip
FORBIDDEN_CALLS = {
    "eval", "exec", "compile", "__import__", "sympify", "parse_expr",
    "torch.load", "torch.export.load", "torch.jit.load", "torch.hub.load",
    "torch._inductor.aoti_load_package",
    "yaml.load", "yaml.unsafe_load", "pickle.load", "pickle.loads", "numpy.load", "np.load",
    "pandas.read_pickle", "pd.read_pickle", "read_pickle", "torch.from_file",
}  # fmt: skip
TORCH_ROOMS = ("engine", "worker", "client/torch")
NO_ENGINE_ROOMS = ("server", "client")


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def _imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.lineno, node.module
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"


def violations(source: str) -> list[str]:
    """Calls and imports in ``source`` that run code from their input."""
    tree = ast.parse(source)
    found = []
    for line, name in _imports(tree):
        if name in FORBIDDEN_MODULES or name.split(".")[0] in FORBIDDEN_MODULES:
            found.append(f"{line}: import {name}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = _dotted(node.func)
            last = name.rsplit(".", 1)[-1]
            if name in FORBIDDEN_CALLS or last in {"sympify", "read_pickle", "from_file"}:
                found.append(f"{node.lineno}: {name}(...)")
            if any(k.arg == "allow_pickle" for k in node.keywords):
                found.append(f"{node.lineno}: allow_pickle")
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SRC)))
def test_no_code_from_input(path: Path) -> None:
    found = violations(path.read_text())
    if path.relative_to(SRC).as_posix().startswith(("cli/", "client/")):
        # The scientist's own model file runs on the scientist's own machine, by importlib.
        found = [f for f in found if "__import__" not in f]
    assert not found


@pytest.mark.parametrize(
    "bad",
    [
        "import pickle", "from pickle import loads", "import torch\ntorch.load(f)", "eval(x)",
        "import torch.jit", "torch.export.load(f)", "from sympy import sympify", "np.load(f)",
        "m.load(f, allow_pickle=True)", "torch.Tensor.from_file(f)", "pd.read_pickle(p)",
    ],
)  # fmt: skip
def test_the_search_finds(bad: str) -> None:
    assert violations(bad)


def _room(path: Path) -> str:
    return path.relative_to(SRC).as_posix()


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SRC)))
def test_torch_lives_in_its_rooms(path: Path) -> None:
    names = {name.split(".")[0] for _, name in _imports(ast.parse(path.read_text()))}
    if "torch" in names or "functorch" in names:
        assert _room(path).startswith(TORCH_ROOMS), "torch is imported outside engine and worker"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SRC)))
def test_server_and_client_never_import_the_engine(path: Path) -> None:
    room = _room(path)
    if room.startswith(NO_ENGINE_ROOMS) and not room.startswith("client/torch"):
        names = {name for _, name in _imports(ast.parse(path.read_text()))}
        assert not {n for n in names if n.startswith(("casemate.engine", "casemate.worker"))}


def test_everything_else_imports_without_torch() -> None:
    names = []
    for path in MODULES:
        room = _room(path)
        if not room.startswith(TORCH_ROOMS) and not room.endswith("__main__.py"):
            names.append("casemate." + room[:-3].replace("/", ".").removesuffix(".__init__"))
    code = (
        "import sys, importlib\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch', 'functorch', 'torchgen'):\n"
        "            raise ImportError(name)\n"
        "sys.meta_path.insert(0, Block())\n"
        f"for name in {[n.removesuffix('.') for n in names]!r}:\n"
        "    importlib.import_module(name)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_modules_fit_one_sitting() -> None:
    long = {_room(p): n for p in MODULES if (n := len(p.read_text().splitlines())) > 600}
    assert not long


def test_layers() -> None:
    tool = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([tool], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_unit_tests_mirror_src() -> None:
    rooms = {p.name for p in SRC.iterdir() if p.is_dir() and not p.name.startswith("__")}
    tested = {p.name for p in (ROOT / "tests" / "unit").iterdir() if any(p.glob("test_*.py"))}
    empty = {r for r in rooms if not any(len(f.read_text()) > 1 for f in (SRC / r).rglob("*.py"))}
    assert rooms - tested - empty == set()
