"""What a server's wheel stands on, as CycloneDX 1.6: ``python deploy/sbom.py CYCLONEDX_PY FILE``.

The packages are those that uv takes for ``casemate[server]`` within constraints.txt, each with the
hashes of its files (torch has none: its builds differ by machine). The same sources give the same
bytes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
UNHASHED = {"torch"}


def hashes(component: dict[str, Any]) -> list[dict[str, str]]:
    """Hashes of a component, or of the files that it refers to."""
    found = list(component.get("hashes", ()))
    for reference in component.get("externalReferences", ()):
        found += reference.get("hashes", ())
    return found


def problems(bom: dict[str, Any]) -> list[str]:
    """What a component lacks, one line each."""
    parts = bom.get("components", [])
    out = [] if parts else ["it lists nothing"]
    for part in parts:
        if not part.get("version"):
            out.append(f"{part['name']} has no version")
        if not hashes(part) and part["name"] not in UNHASHED:
            out.append(f"{part['name']} has no hash")
    return out


def make(tool: str, requirements: Path) -> dict[str, Any]:
    """The document for pinned requirements."""
    command = [tool, "requirements", str(requirements), "--pyproject", str(ROOT / "pyproject.toml"),
               "--output-reproducible", "--spec-version", "1.6"]  # fmt: skip
    made = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    found: dict[str, Any] = json.loads(made.stdout)
    return found


def main(tool: str, out: Path) -> int:
    uv = Path(sys.executable).with_name("uv")
    with tempfile.TemporaryDirectory() as folder:
        pinned = Path(folder) / "requirements.txt"
        subprocess.run(
            [uv, "pip", "compile", "--quiet", "--python", sys.executable, "--extra", "server",
             "--no-header", "--no-annotate", "--generate-hashes",
             "-c", ROOT / "constraints.txt", "-o", pinned, ROOT / "pyproject.toml"],
            check=True,
        )  # fmt: skip
        bom = make(tool, pinned)
    found = problems(bom)
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(bom, indent=1, sort_keys=True) + "\n")
    print("\n".join(found) or f"{out}: {len(bom['components'])} components")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
