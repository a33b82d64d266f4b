"""Settings: ``config.toml`` with named enclaves, identity and trust, each with a ``CASEMATE_*``.

::

    default = "lab"
    identity = "identity.json"
    witnesses = ["witness.example+5d…"]   # who must have cosigned a log's head,
    cosignatures = 1                      # and how many of them (all, if not said)

    [enclaves.lab]
    url = "https://enclave.example:8443"
    trust = "trust.toml"     # a policy's file, "simulated", or "simulated:ROOT"

Relative paths are relative to the folder of ``config.toml``: ``CASEMATE_HOME``, else
``$XDG_CONFIG_HOME/casemate``, else ``~/.config/casemate``.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from casemate.spec.errors import AuthError, UsageError

if TYPE_CHECKING:
    from casemate.attest.trust import Trust
    from casemate.client.connection import Connection
    from casemate.client.enclave import Enclave
    from casemate.seal.identity import Identity

SIMULATED: Final = "simulated"
_KEYS: Final = {"default", "identity", "enclaves", "witnesses", "cosignatures"}
_ENCLAVE_KEYS: Final = {"url", "trust"}


def home() -> Path:
    """The folder of settings and identities."""
    if given := os.environ.get("CASEMATE_HOME"):
        return Path(given).expanduser()
    base = os.environ.get("XDG_CONFIG_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".config") / "casemate"


def _bad(message: str, where: str = "") -> UsageError:
    return UsageError(
        "usage.config", message, mend="Mend config.toml; docs/cli.md shows its form.", where=where
    )


@dataclass(frozen=True, slots=True)
class Place:
    """Where an enclave is and what evidence is asked of it."""

    url: str
    trust: str | None


def read(folder: Path | None = None) -> dict[str, Any]:
    """``config.toml`` with its keys checked; an absent file is empty."""
    path = (folder or home()) / "config.toml"
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as e:
        raise _bad(f"{path} cannot be read: {str(e)[:160]}.", str(path)) from None
    if unknown := set(found) - _KEYS:
        raise _bad(f"{path} has an unknown key {sorted(unknown)[0]!r}.", str(path))
    keys = found.get("witnesses", [])
    if not isinstance(keys, list) or not all(isinstance(k, str) for k in keys):
        raise _bad(f"{path}: witnesses is no list of verifier keys.", str(path))
    if type(found.get("cosignatures", 0)) is not int:
        raise _bad(f"{path}: cosignatures is no whole number.", str(path))
    enclaves = found.get("enclaves", {})
    if not isinstance(enclaves, dict):
        raise _bad(f"{path}: enclaves is no table.", str(path))
    for name, entry in enclaves.items():
        if (
            not isinstance(entry, dict)
            or "url" not in entry
            or set(entry) - _ENCLAVE_KEYS
            or not all(isinstance(v, str) for v in entry.values())
        ):
            raise _bad(f"{path}: enclave {name!r} needs url, and may have trust.", name)
    return found


def place(name: str | None, trust: str | None) -> Place:
    """The enclave called ``name``: a URL, or a name in ``config.toml``, or its default."""
    config = read()
    name = name or config.get("default")
    if not name:
        raise UsageError(
            "usage.enclave",
            "No enclave is named.",
            mend="Give --enclave URL, set CASEMATE_ENCLAVE, or run `casemate enclave add`.",
        )
    if "://" in name:
        return Place(name, trust)
    entry = config.get("enclaves", {}).get(name)
    if entry is None:
        raise UsageError(
            "usage.enclave",
            f"No enclave is called {name!r}.",
            mend="Name one of config.toml, or give its https address.",
            where=name,
        )
    return Place(entry["url"], trust or entry.get("trust"))


def load_trust(given: str | None) -> Trust:
    """A trust policy: a file, or ``simulated`` or ``simulated:ROOT``, asked for by name."""
    from casemate.attest.trust import Trust

    if given is None:
        raise UsageError(
            "usage.trust",
            "No trust policy is given.",
            mend="Give --trust FILE, or --trust simulated for a server that only pretends.",
        )
    simulated = given.partition(":")[0] == SIMULATED
    return Trust.parse(given if simulated else str(_path(given)))


def _path(given: str) -> Path:
    path = Path(given).expanduser()
    return path if path.is_absolute() or path.exists() else home() / path


def identity_path(given: str | None = None) -> Path:
    """Where one's keys are: given, ``config.toml``'s, or ``identity.json`` in the home."""
    return _path(given or read().get("identity", "identity.json"))


def load_identity(given: str | None = None) -> Identity:
    from casemate.seal.identity import Identity

    path, passphrase = identity_path(given), os.environ.get("CASEMATE_PASSPHRASE")
    try:
        return Identity.load(path, passphrase)
    except AuthError as e:
        if e.code != "auth.passphrase" or passphrase is not None or not sys.stdin.isatty():
            raise
    return Identity.load(path, click.prompt("Passphrase", hide_input=True, err=True))


@dataclass(frozen=True, slots=True)
class Target:
    """What the common options name; :meth:`connect` attests it."""

    enclave: str | None
    trust: str | None
    identity: str | None

    def place(self) -> Place:
        return place(self.enclave, self.trust)

    def offline_trust(self) -> Trust:
        """Under which policy stored evidence is judged: the one given, or the enclave's."""
        try:
            return load_trust(self.trust or self.place().trust)
        except UsageError as e:
            if e.code != "usage.enclave" or self.enclave:
                raise
        return load_trust(None)

    @contextmanager
    def line(self) -> Iterator[Connection]:
        """An attested connection without an identity, which remembers what it saw of the log."""
        from casemate.client.connection import Connection
        from casemate.client.memory import Memory

        found = self.place()
        connection = Connection(found.url, trust=load_trust(found.trust), memory=Memory())
        try:
            connection.line()
            yield connection
        finally:
            connection.close()

    def connect(self, *, enrol: bool = True) -> Enclave:
        from casemate.client.enclave import connect

        found = self.place()
        trust = load_trust(found.trust)
        return connect(found.url, trust=trust, identity=load_identity(self.identity), enrol=enrol)


_OPTIONS: Final = (
    click.option("--enclave", "-e", envvar="CASEMATE_ENCLAVE", metavar="NAME|URL",
                 help="A named enclave, or its https address."),
    click.option("--trust", envvar="CASEMATE_TRUST", metavar="FILE|simulated[:ROOT]",
                 help="Trust policy; a simulated TEE must be asked for by name."),
    click.option("--identity", "-i", envvar="CASEMATE_IDENTITY", metavar="FILE",
                 help="One's keys (default: identity.json in the home folder)."),
)  # fmt: skip


trust_option = click.option(
    "--trust",
    envvar="CASEMATE_TRUST",
    metavar="FILE|simulated[:ROOT]",
    help="Trust policy for the evidence inside; simulation must be asked for by name.",
)


def target_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options that name enclave, trust and identity, as one ``target`` argument."""
    from functools import wraps

    @wraps(command)
    def run(
        *args: Any,
        enclave: str | None,
        trust: str | None,
        identity: str | None,
        **kwargs: Any,
    ) -> Any:
        return command(*args, target=Target(enclave, trust, identity), **kwargs)

    made: Callable[..., Any] = run
    for option in reversed(_OPTIONS):
        made = option(made)
    return made


def witness_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds ``--witness`` and ``--cosignatures`` as one ``witnesses`` argument."""
    from functools import wraps

    @wraps(command)
    def run(*args: Any, witness: tuple[str, ...], cosignatures: int | None, **kwargs: Any) -> Any:
        from casemate.client.heads import Witnesses

        config = {} if witness else read()
        needed = config.get("cosignatures") if cosignatures is None else cosignatures
        keys = witness or config.get("witnesses", ())
        return command(*args, witnesses=Witnesses.of(keys, needed), **kwargs)

    made: Callable[..., Any] = run
    for option in (
        click.option("--cosignatures", type=click.IntRange(1), metavar="K",
                     help="How many of the witnesses are needed (default: all of them)."),
        click.option("--witness", multiple=True, metavar="VKEY",
                     help="A witness who must have cosigned the log's head; may be repeated."),
    ):  # fmt: skip
        made = option(made)
    return made


def forget_enclave(name: str) -> bool:
    """Take a named enclave out of ``config.toml``; whether it stood there."""
    config = read()
    if name not in config.get("enclaves", {}):
        return False
    del config["enclaves"][name]
    if config.get("default") == name:
        del config["default"]
    _write(config)
    return True


def add_enclave(name: str, entry: Place, *, default: bool) -> Path:
    """Write a named enclave into ``config.toml``; the file is written anew, whole."""
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,40}", name):
        raise _bad(f"{name!r} cannot name an enclave: use letters, digits, '-' and '_'.", name)
    config = read()
    fields = {"url": entry.url, "trust": entry.trust}
    config.setdefault("enclaves", {})[name] = {k: v for k, v in fields.items() if v is not None}
    if default or "default" not in config:
        config["default"] = name
    return _write(config)


def _write(config: dict[str, Any]) -> Path:
    """``config.toml``, whole."""
    path = home() / "config.toml"
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
        file.write(_toml(config))
    Path(file.name).replace(path)
    return path


def _toml(config: dict[str, Any]) -> str:
    """The few forms that ``read`` admits: strings, a list of them, a number, tables of strings."""
    import json

    lines = [f"{k} = {json.dumps(v)}" for k, v in config.items() if not isinstance(v, dict)]
    for name, entry in config.get("enclaves", {}).items():
        lines += ["", f"[enclaves.{name}]"]
        lines += [f"{k} = {json.dumps(v)}" for k, v in entry.items()]
    return "\n".join(lines) + "\n"
