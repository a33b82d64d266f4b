"""Archives that run code when they are opened (pickle, TorchScript, torch.export, numpy) or that
unfold (zip), offered wherever casemate takes a model, a table, a result or a receipt.

Each archive leaves a mark when it runs. None does; each is refused as bytes that are not in form.
"""

from __future__ import annotations

import ast
import hashlib
import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from casemate.client import models, receipts, weights
from casemate.client.data import encode
from casemate.engine import prepare as prepare_
from casemate.graph import pack
from casemate.spec import codec, table, tensors
from casemate.spec.errors import CasemateError
from casemate.spec.job import JobRequest
from support import engine_lab as lab
from support.worker_lab import KEY, Failed, Prepare, ask, worker

SRC = Path(__file__).parents[2] / "src" / "casemate"
SCHEMA = lab.schema(4, 2, 16)


class Runs:
    """What runs as soon as it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


class Scripted(nn.Module):
    """TorchScript that writes its input into its weights (BastionAI's released attack)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.weight.data.copy_(x[0])
        return (x * self.weight).sum(1)


def saved(save: Callable[[Any], Any]) -> bytes:
    file = io.BytesIO()
    save(file)
    return file.getvalue()


def zipped(**entries: bytes) -> bytes:
    def save(file: Any) -> None:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as z:
            for name, data in entries.items():
                z.writestr(name, data)

    return saved(save)


def _script(mark: Path) -> bytes:
    return saved(lambda f: torch.jit.save(torch.jit.script(Scripted()), f))


def _exported(mark: Path) -> bytes:
    program = torch.export.export(nn.Linear(4, 2), (torch.zeros(3, 4),))
    return saved(lambda f: torch.export.save(program, f))


def _metadata(mark: Path) -> bytes:
    """safetensors whose free text carries a pickle."""
    header = {
        "__metadata__": {"format": pickle.dumps(Runs(mark)).hex()},
        "w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
    }
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(4)


def _gguf(mark: Path) -> bytes:
    return b"GGUF" + (3).to_bytes(4, "little") + (2**60).to_bytes(8, "little") * 2


ARCHIVES: dict[str, Callable[[Path], bytes]] = {
    "pickle": lambda mark: pickle.dumps(Runs(mark)),
    "pickle, protocol 0": lambda mark: pickle.dumps(Runs(mark), protocol=0),
    "pickle after a length": lambda mark: (lambda p: len(p).to_bytes(8, "little") + p)(
        pickle.dumps(Runs(mark)).ljust(128, b" ")
    ),
    "torch.save": lambda mark: saved(lambda f: torch.save({"w": Runs(mark)}, f)),
    "torch.save, old form": lambda mark: saved(
        lambda f: torch.save(Runs(mark), f, _use_new_zipfile_serialization=False)
    ),
    "TorchScript": _script,
    "torch.export": _exported,
    "numpy of objects": lambda mark: saved(
        lambda f: np.save(f, np.array([Runs(mark)], dtype=object), allow_pickle=True)
    ),
    "numpy archive": lambda mark: saved(lambda f: np.savez(f, w=np.zeros(4))),
    "zip bomb": lambda mark: zipped(graph=bytes(50_000_000)),
    "zip of a pickle": lambda mark: zipped(**{"data.pkl": pickle.dumps(Runs(mark))}),
    "safetensors with a pickle in its text": _metadata,
    "GGUF of 2^60 tensors": _gguf,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(archive, mark) by name, each made once."""
    folder = tmp_path_factory.mktemp("archives")
    found = {}
    for i, (name, make) in enumerate(ARCHIVES.items()):
        mark = folder / f"ran{i}"
        found[name] = (make(mark), mark)
    return found


def _packed(archive: bytes) -> bytes:
    """The archive as the graph of a packed model that is well formed around it."""
    text = archive + b" " * (-len(archive) % 8)
    return len(text).to_bytes(8, "little") + text + tensors.dump({})


def _weights(archive: bytes) -> bytes:
    """The archive as the weights."""
    graph, _ = lab.mlp([4, 2])
    text = codec.encode(graph)
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + archive


def _prepare(data: bytes) -> None:
    digest = "sha256:" + hashlib.sha256(data).hexdigest()
    prepare_.prepare(data, digest, (SCHEMA,), lab.BINDINGS, lab.spec_of(4, 1), 8 << 30)


def _file(suffix: str, read: Callable[[Path], Any]) -> Callable[[bytes, Path], Any]:
    def take(data: bytes, folder: Path) -> Any:
        path = folder / f"given{suffix}"
        path.write_bytes(data)
        return read(path)

    return take


def _encode(path: Path) -> Any:
    return encode(path, name="t", bounds=(0.0, 1.0))


DOORS: dict[str, Callable[[bytes, Path], Any]] = {
    "a packed model": lambda data, _: pack.unpack(data),
    "the graph of a packed model": lambda data, _: pack.unpack(_packed(data)),
    "the weights of a packed model": lambda data, _: pack.unpack(_weights(data)),
    "the worker's model": lambda data, _: _prepare(data),
    "a model file": _file(".cmm", models.load),
    "a model file by its old name": _file(".pt", models.load),
    "the wire form of a table": lambda data, _: table.check(SCHEMA, data),
    "a result": lambda data, _: weights.load(data),
    "a request": lambda data, _: codec.decode(JobRequest, data),
    "a receipt": _file(".json", receipts.load_bundle),
    "a CSV": _file(".csv", _encode),
    "a Parquet file": _file(".parquet", _encode),
    "a table by its own name": _file(".pkl", _encode),
}


@pytest.mark.parametrize("archive", ARCHIVES)
@pytest.mark.parametrize("door", DOORS)
def test_runs_code_by_an_archive(door: str, archive: str, made: Any, tmp_path: Path) -> None:
    data, mark = made[archive]
    with pytest.raises(CasemateError) as e:
        DOORS[door](data, tmp_path)
    assert e.value.code.split(".")[0] in ("format", "data", "usage", "receipt"), str(e.value)
    assert e.value.mend
    assert not mark.exists()


def test_the_archives_would_run(made: Any) -> None:
    """What is refused above is no paper tiger."""
    data, mark = made["pickle"]
    pickle.loads(data)  # noqa: S301 - our own
    assert mark.exists()
    mark.unlink()
    script = torch.jit.load(io.BytesIO(made["TorchScript"][0]))
    script(torch.full((1, 4), 7.0))
    assert script.weight.tolist() == [7.0] * 4


def test_a_real_worker_refuses_a_pickle(made: Any) -> None:
    """As the server hands it over: sealed, in a process of its own."""
    data, mark = made["pickle"]
    message = Prepare(
        key=KEY,
        model_digest="sha256:" + hashlib.sha256(data).hexdigest(),
        schemas=(SCHEMA,),
        inputs=lab.BINDINGS,
        train=lab.spec_of(4, 1),
        memory_bytes=4 << 30,
        threads=1,
    )
    with worker() as (sock, _):
        said = ask(sock, message, lab.sealed_fd(KEY, data))
    assert isinstance(said, Failed)
    assert (said.phase, said.code) == ("prepare", "format.model")
    assert not mark.exists()


# No door may be opened by a later hand.

FORBIDDEN = {
    "pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml", "zipfile",
    "tarfile", "gzip", "bz2", "lzma", "runpy", "h5py",
}  # fmt: skip
CALLS = {
    "torch.load", "torch.jit.load", "torch.export.load", "torch.package.PackageImporter", "np.load",
    "numpy.load", "torch.hub.load", "eval", "exec", "torch.ops.load_library", "torch.from_file",
    "torch.classes.load_library", "__import__", "pd.read_pickle", "torch.utils.data.DataLoader",
}  # fmt: skip


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def found_in(text: str) -> list[str]:
    out = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            out += [a.name for a in node.names if a.name.split(".")[0] in FORBIDDEN]
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            out += [node.module] if node.module.split(".")[0] in FORBIDDEN else []
        elif isinstance(node, ast.Call) and dotted(node.func) in CALLS:
            out.append(dotted(node.func))
    return out


def test_no_source_opens_such_an_archive() -> None:
    files = sorted(SRC.rglob("*.py"))
    assert len(files) > 100
    bad = {str(f.relative_to(SRC)): found_in(f.read_text(encoding="utf-8")) for f in files}
    # A backup is a tar that the enclave itself sealed; its files are listed and read one by one.
    assert {f: names for f, names in bad.items() if names} == {"server/backup.py": ["tarfile"]}


@pytest.mark.parametrize(
    "text",
    ["import pickle", "from torch import nn\nimport torch\ntorch.load('x')", "eval('1')",
     "from zipfile import ZipFile", "import numpy as np\nnp.load('x')"],
)  # fmt: skip
def test_a_door_that_is_opened_is_found(text: str) -> None:
    assert found_in(text)
