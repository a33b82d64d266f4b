"""docs/evidence.md against the code: its codes are all codes, its policy loads."""

import ast
import re
from pathlib import Path

import casemate.attest
from casemate.attest.trust import Trust

DOC = (Path(__file__).resolve().parents[3] / "docs" / "evidence.md").read_text()
# Helpers that put a stage before the reason that they are called with.
STAGES = {"abi.py": "parse-", "collateral.py": "collateral-"}


def codes_in_source() -> set[str]:
    found = set()
    for path in Path(casemate.attest.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
                continue
            if node.func.id not in ("refusal", "_refuse") or not node.args:
                continue
            first = node.args[0]
            stage = STAGES.get(path.name, "") if node.func.id == "_refuse" else ""
            if isinstance(first, ast.Constant):
                found.add(stage + first.value)
            elif isinstance(first, ast.JoinedStr) and isinstance(first.values[0], ast.Constant):
                if first.values[0].value not in STAGES.values():
                    found.add(first.values[0].value + "*")
            else:  # collateral.py picks between two reasons
                found |= {"collateral-both", "collateral-missing"}
    return found


def test_the_table_of_codes_is_whole():
    table = set(re.findall(r"^\| ([a-z-]+\*?) \|", DOC.split("## Codes")[1], re.M)) - {
        "code",
        "---",
    }
    assert len(table) > 30
    assert table == codes_in_source()


def test_the_policy_loads(tmp_path):
    text = re.search(r"```toml\n(.*?)```", DOC, re.S)[1]
    path = tmp_path / "trust.toml"
    path.write_text(text)
    assert not Trust.load(path).simulation
