"""Compile the anchor's contract: a JSON array of sources on stdin to an array of what
``src/casemate/client/contract/anchor.json`` holds of each; with two paths, from the one to the
other (``make contract``). Run by a Python that has the compiler; nothing else here needs it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import vyper
from vyper.compiler import compile_code


def compiled(source: str) -> dict:
    found = compile_code(source, output_formats=["abi", "bytecode", "method_identifiers"])
    return {
        "abi": found["abi"],
        "bytecode": found["bytecode"],
        "compiler": f"vyper {vyper.__version__}",
        "methods": found["method_identifiers"],
    }


if __name__ == "__main__":
    if len(sys.argv) == 3:
        made = compiled(Path(sys.argv[1]).read_text())
        Path(sys.argv[2]).write_text(json.dumps(made, indent=1, sort_keys=True) + "\n")
    else:
        print(json.dumps([compiled(source) for source in json.load(sys.stdin)]))
