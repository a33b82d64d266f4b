"""Mutation testing of the ledger, policy and log code (`make mutation`, docs/mutation.md).

``python tests/mutation.py [GROUP ...]``: each group is mutated by mutmut in a copy under
build/mutation, and run against its own quick tests; ends with one line a group, the mutants that
survived in build/mutation/GROUP.txt, exit 1 below 95%.

Not mutated, because no test should hold them: sentences for people (message and mend of errors) and
the letter case of strings with a space (SQL, prose).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "mutation"
LEAST = 95.0

LEDGER = [f"tests/unit/ledger/test_ledger_{n}.py" for n in ("jobs", "gates")]
# Group: (files under src/casemate, tests that must notice).
GROUPS: dict[str, tuple[list[str], list[str]]] = {
    "budget": (
        ["ledger/admission.py", "ledger/ledger.py", "ledger/catalog.py", "ledger/quotes.py"],
        [*LEDGER, "tests/attacks/test_ledger_race.py", "tests/contract/test_store_disks.py"],
    ),
    "log": (
        ["ledger/log.py", "ledger/store.py", "ledger/recovery.py", "spec/log.py"],
        [
            *LEDGER,
            "tests/contract/test_store_disks.py",
            "tests/unit/ledger/test_ledger_anchor.py",
            "tests/unit/ledger/test_ledger_recovery.py",
        ],
    ),
    "passing": (
        ["ledger/consent.py", "ledger/handover.py", "ledger/rekey.py", "spec/consent.py"],
        [
            "tests/unit/ledger/test_ledger_recovery.py",
            "tests/unit/ledger/test_ledger_handover.py",
        ],
    ),
    "anchor": (["ledger/anchor.py"], ["tests/unit/ledger/test_ledger_anchor.py"]),
    "disk": (
        ["ledger/vfs.py", "ledger/sealed.py", "ledger/copy.py"],
        [
            "tests/unit/ledger/test_ledger_vfs.py",
            "tests/contract/test_store_disks.py",
            "tests/attacks/test_ledger_power.py",
        ],
    ),
    "fsck": (
        [f"ledger/{n}.py" for n in (
            "fsck", "fsck_budget", "fsck_costs", "fsck_folder", "fsck_notes", "fsck_receipts",
            "fsck_replay",
        )],
        [
            "tests/unit/ledger/test_ledger_fsck.py",
            "tests/unit/ledger/test_ledger_audit.py",
            "tests/attacks/test_ledger_tampering.py",
        ],
    ),
    "merkle": (
        ["spec/merkle.py", "seal/note.py", "seal/checkpoint.py", "seal/tiles.py"],
        ["tests/unit/spec/test_spec_merkle.py", "tests/unit/seal"],
    ),
    "policy": (
        ["spec/data.py", "server/permissions.py"],
        ["tests/unit/spec", "tests/unit/server/test_server_permissions.py"],
    ),
}  # fmt: skip


def prepare(name: str) -> Path:
    """A copy of the tree with mutmut's settings for a group; earlier verdicts are dropped."""
    files, tests = GROUPS[name]
    folder = BUILD / name
    shutil.rmtree(folder, ignore_errors=True)
    ignore = shutil.ignore_patterns("__pycache__", "torture", "e2e", "*.so")
    for part in ("src", "tests"):
        shutil.copytree(ROOT / part, folder / part, ignore=ignore)
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]
    options = settings["ini_options"]
    lines = [
        "[tool.mutmut]",
        "source_paths = ['src']",
        f"only_mutate = {[f'src/casemate/{f}' for f in files]}",
        f"pytest_add_cli_args_test_selection = {[t for t in tests if (ROOT / t).exists()]}",
        "pytest_add_cli_args = ['-m', 'not full', '-p', 'no:randomly', '-x']",
        "timeout_constant = 10.0",
        "use_git_change_detection = false",
        "track_dependencies = false",
        "[tool.pytest.ini_options]",
        *(f"{key} = {json.dumps(value)}" for key, value in options.items()),
    ]
    (folder / "pyproject.toml").write_text("\n".join(lines) + "\n")
    return folder


def narrow() -> None:
    """Take out of mutmut what only touches sentences."""
    import libcst as cst
    from mutmut.mutation import file_mutation, mutators

    text = cst.SimpleString | cst.FormattedString | cst.ConcatenatedString

    def sentence(node: cst.CSTNode) -> bool:
        code = cst.Module([]).code_for_node(node) if isinstance(node, text) else ""
        return " " in code and code.rstrip("\"'").endswith((".", ";", ":"))

    def words(node: cst.BaseString) -> list[cst.BaseString]:
        made = list(mutators_string(node))
        return made[:1] if " " in getattr(node, "value", "") else made

    def arguments(node: cst.Call) -> list[cst.Call]:
        said = [i for i, arg in enumerate(node.args) if sentence(arg.value)]
        kept = [arg.value for i, arg in enumerate(node.args) if i in said]
        return [
            made
            for made in mutators_arguments(node)
            if all(any(arg.value is value for arg in made.args) for value in kept)
        ]

    mutators_string, mutators_arguments = mutators.operator_string, mutators.operator_arg_removal
    changed = {mutators_string: words, mutators_arguments: arguments}
    mutators.mutation_operators[:] = [
        (kind, changed.get(operator, operator)) for kind, operator in mutators.mutation_operators
    ]
    visitor: Any = file_mutation.MutationVisitor
    skips = visitor._skip_node_and_children
    visitor._skip_node_and_children = lambda self, node: sentence(node) or skips(self, node)


def child(folder: Path, jobs: int) -> None:
    """In a process of its own: mutmut in ``folder``."""
    os.chdir(folder)
    sys.path.insert(0, "")
    narrow()
    from mutmut.__main__ import cli

    cli(["run", "--max-children", str(jobs)], standalone_mode=False)


def verdicts(folder: Path) -> dict[str, str]:
    """Of each mutant."""
    out = subprocess.run(
        [sys.executable, "-m", "mutmut", "results", "--all", "true"],
        cwd=folder, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    pairs = (line.strip().rpartition(": ") for line in out.splitlines() if ": " in line)
    return {name: verdict for name, _, verdict in pairs}


def main(names: list[str]) -> int:
    low = False
    for name in names or list(GROUPS):
        folder = prepare(name)
        script = [sys.executable, __file__, "--child", str(folder)]
        with (BUILD / f"{name}.log").open("w") as log:
            subprocess.run(script, stdout=log, stderr=log, check=False)
        found = verdicts(folder)
        kinds = Counter(found.values())
        noticed = kinds["killed"] + kinds["timeout"]
        score = 100 * noticed / max(1, len(found))
        low |= score < LEAST
        left = [n for n, verdict in sorted(found.items()) if verdict not in ("killed", "timeout")]
        (BUILD / f"{name}.txt").write_text("".join(f"{found[n]} {n}\n" for n in left))
        print(f"{name}: {noticed} of {len(found)} noticed, {score:.1f}% {dict(kinds)}", flush=True)
    return int(low)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(Path(sys.argv[2]), int(os.environ.get("JOBS", "1")))
    else:
        sys.exit(main(sys.argv[1:]))
