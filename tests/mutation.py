"""Mutation testing of the ledger, policy and log code (`make mutation`, docs/mutation.md).

``python tests/mutation.py [--again] [GROUP ...]``: each group is mutated by mutmut in a copy under
build/mutation, and run against its own quick tests; ends with one line a group, the mutants that
survived, with their changes, in build/mutation/GROUP.txt, exit 1 below 95%. With ``--again`` code
and tests are taken as they are now, and only mutants that were noticed in a function that has not
changed since need not be run.

Not mutated, because no test should hold them: sentences for people (message and mend of errors) and
the letter case of strings with a space (SQL, prose).
"""

from __future__ import annotations

import json
import os
import re
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

LEDGER = [
    f"tests/unit/ledger/test_ledger_{n}.py" for n in ("jobs", "gates", "refusals", "log", "store")
]
# Group: (files under src/casemate, tests that must notice).
GROUPS: dict[str, tuple[list[str], list[str]]] = {
    "budget": (
        ["ledger/admission.py", "ledger/ledger.py", "ledger/catalog.py", "ledger/quotes.py"],
        [
            *LEDGER,
            "tests/attacks/test_ledger_race.py",
            "tests/contract/test_store_disks.py",
            "tests/unit/ledger/test_ledger_recovery.py",
        ],
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
        [
            *(f"ledger/{n}.py" for n in ("consent", "handover", "rekey", "fsck_passing")),
            "spec/consent.py",
        ],
        [
            "tests/unit/spec/test_spec_consent.py",
            *(
                f"tests/unit/ledger/test_ledger_{n}.py"
                for n in ("consent", "recovery", "handover", "passing", "log")
            ),
        ],
    ),
    "anchor": (
        ["ledger/anchor.py"],
        ["tests/unit/ledger/test_ledger_anchor.py", "tests/unit/ledger/test_ledger_refusals.py"],
    ),
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
            *(
                f"tests/unit/ledger/test_ledger_{n}.py"
                for n in ("fsck_parts", "audit", "passing", "recovery", "handover", "consent")
            ),
            "tests/attacks/test_ledger_tampering.py",
        ],
    ),
    "merkle": (
        ["spec/merkle.py", "seal/note.py", "seal/checkpoint.py", "seal/tiles.py"],
        ["tests/unit/spec/test_spec_merkle.py", "tests/unit/seal"],
    ),
    "anchors": (
        ["seal/anchors.py", "client/anchors.py"],
        ["tests/unit/seal/test_seal_anchors.py", "tests/unit/client/test_client_anchors.py"],
    ),
    "policy": (
        ["spec/data.py", "spec/rules.py", "server/permissions.py"],
        [
            "tests/unit/plan/test_plan_quote.py",
            "tests/unit/ledger/test_ledger_refusals.py",
            "tests/unit/spec/test_spec_policy.py",
            "tests/unit/spec/test_spec_data.py",
            "tests/unit/ledger/test_ledger_gates.py",
            "tests/unit/server/test_server_roles.py",
            "tests/unit/server/test_server_permissions.py",
        ],
    ),
}  # fmt: skip


# A mutant runs in a fork of the process that ran the tests before: what the code kept is let go.
# That an example fails is enough: it is not made small.
FORGET = """
import hypothesis

hypothesis.settings.register_profile(
    "mutation",
    hypothesis.settings.default,
    phases=[p for p in hypothesis.Phase if p.name not in ("shrink", "explain")],
)
hypothesis.settings.load_profile("mutation")


@pytest.fixture(scope="session", autouse=True)
def nothing_is_remembered():
    for name in {modules}:
        for found in vars(importlib.import_module(name)).values():
            getattr(found, "cache_clear", lambda: None)()
"""


def prepare(name: str, again: bool) -> Path:
    """A copy of the tree with mutmut's settings for a group."""
    files, tests = GROUPS[name]
    folder = BUILD / name
    if not again:
        shutil.rmtree(folder, ignore_errors=True)
    for meta in folder.glob("mutants/src/**/*.meta"):  # mutmut lets what has a verdict stand
        found = json.loads(meta.read_text())
        codes = found["exit_code_by_key"]
        found["exit_code_by_key"] = {n: c if c in NOTICED else None for n, c in codes.items()}
        meta.write_text(json.dumps(found))
    stats = folder / "mutants" / "mutmut-stats.json"
    if stats.exists():  # which tests reach which function is looked for anew
        unknown = {"tests_by_mangled_function_name": {}, "duration_by_test": {}}
        stats.write_text(json.dumps(json.loads(stats.read_text()) | unknown))
    ignore = shutil.ignore_patterns("__pycache__", "torture", "e2e", "*.so")
    copies = [(ROOT / "src", folder / "src")]
    copies += [(ROOT / "tests", to / "tests") for to in (folder, folder / "mutants")]
    for source, to in copies:
        shutil.copytree(source, to, ignore=ignore, dirs_exist_ok=True)
        if source.name == "tests":
            modules = ["casemate." + f.removesuffix(".py").replace("/", ".") for f in files]
            conftest = to / "conftest.py"
            text = "import importlib\n" + conftest.read_text() + FORGET.format(modules=modules)
            conftest.write_text(text)
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]
    lines = [
        "[tool.mutmut]",
        "source_paths = ['src']",
        f"only_mutate = {[f'src/casemate/{f}' for f in files]}",
        f"pytest_add_cli_args_test_selection = {[t for t in tests if (ROOT / t).exists()]}",
        "pytest_add_cli_args = ['-m', 'not full', '-x', '--assert=plain', '--tb=no']",
        "timeout_constant = 10.0",  # seconds, of a mutant that never ends: twice that of a core
        "timeout_multiplier = 2.0",
        "use_git_change_detection = false",
        "track_dependencies = false",
        "[tool.pytest.ini_options]",
        *(f"{key} = {json.dumps(value)}" for key, value in settings["ini_options"].items()),
    ]
    for to in (folder, folder / "mutants"):
        if to.exists():
            (to / "pyproject.toml").write_text("\n".join(lines) + "\n")
    return folder


def narrow() -> None:
    """Take out of mutmut what only touches sentences."""
    import libcst as cst
    from mutmut.mutation import file_mutation, mutators

    # A sentence is built of literals, or stands in a variable of one of these names.
    text = cst.SimpleString | cst.FormattedString | cst.ConcatenatedString

    def sentence(node: cst.CSTNode) -> bool:
        if isinstance(node, cst.Name):
            return node.value in ("message", "sentence", "mend", "ask")
        code = cst.Module([]).code_for_node(node) if isinstance(node, text) else ""
        words = " " in code and re.match(r"[a-z]*[\"'][a-z][^=?]* ", code)
        return bool(words) or (" " in code and code.rstrip("\"'").endswith((".", ";", ":")))

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


def child(folder: Path, jobs: str) -> None:
    """In a process of its own: mutmut in ``folder``."""
    os.chdir(folder)
    sys.path.insert(0, "")
    narrow()
    from mutmut.__main__ import cli

    cli(["run", "--max-children", jobs], standalone_mode=False)


# Exit codes of the tests with a mutant: failed, or out of time; mutmut's own for "no tests".
NOTICED = {1: "failed", 3: "failed", -24: "time", 24: "time", 36: "time", 152: "time", 255: "time"}
NO_TESTS = 33


def verdicts(folder: Path) -> dict[str, int | None]:
    """Of each mutant; None: not run."""
    out: dict[str, int | None] = {}
    for meta in sorted(folder.glob("mutants/src/**/*.meta")):
        out |= json.loads(meta.read_text())["exit_code_by_key"]
    return out


def changes(folder: Path, names: list[str]) -> str:
    """What each of these mutants changed."""
    script = (
        "import sys\nfrom mutmut.mutation.diff_apply import get_diff_for_mutant as diff\n"
        "for name in sys.argv[1:]:\n    print('##', name)\n"
        "    print(*(x for x in diff(name).splitlines()"
        " if x[:1] in '+-' and x[:3] not in ('+++', '---')), sep='\\n')\n"
    )
    run = [sys.executable, "-c", script, *names]
    return subprocess.run(run, cwd=folder, capture_output=True, text=True, check=False).stdout


def main(words: list[str]) -> int:
    again, low = "--again" in words, False
    for name in [w for w in words if w != "--again"] or list(GROUPS):
        folder = prepare(name, again)
        script = [sys.executable, __file__, "--child", str(folder), os.environ.get("JOBS", "1")]
        with (BUILD / f"{name}.log").open("w") as log:
            subprocess.run(script, stdout=log, stderr=log, check=False)
        found = verdicts(folder)
        kinds = Counter(NOTICED.get(code or 0, "no tests" if code == NO_TESTS else "survived")
                        if code is not None else "not run" for code in found.values())  # fmt: skip
        left = sorted(n for n, code in found.items() if code not in NOTICED)
        score = 100 * (len(found) - len(left)) / max(1, len(found))
        low |= score < LEAST
        (BUILD / f"{name}.txt").write_text(changes(folder, left))
        print(f"{name}: {len(found) - len(left)} of {len(found)} noticed, {score:.1f}%",
              dict(kinds), flush=True)  # fmt: skip
    return int(low)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(Path(sys.argv[2]), sys.argv[3])
    else:
        sys.exit(main(sys.argv[1:]))
