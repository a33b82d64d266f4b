"""A real server in a process of its own on a real folder, over real TLS, and the clients of the
simulation in front of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import ssl
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from casemate.seal import requests
from casemate.seal.identity import Identity
from casemate.spec import codec
from casemate.spec.evidence import Attestation
from torture.model import Model
from torture.world import Answer
from torture.zygote import Child, Zygote

START_SECONDS = 60.0


def _context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # the server is our own child
    return context


_TLS = _context()


class Line:
    """One connection: a request, then its answer (HTTP/1.1, with a length)."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._lock = asyncio.Lock()

    async def send(self, method: str, path: str, head: dict[str, str], body: bytes) -> Answer:
        async with self._lock:
            if self._streams is None:
                self._streams = await asyncio.open_connection("127.0.0.1", self._port, ssl=_TLS)
            reader, writer = self._streams
            lines = [f"{method} {path} HTTP/1.1", *(f"{k}: {v}" for k, v in head.items()), "", ""]
            try:
                writer.write("\r\n".join(lines).encode() + body)
                return await self._read(reader, method)
            except BaseException:
                self.close()
                raise

    @staticmethod
    async def _read(reader: asyncio.StreamReader, method: str) -> Answer:
        top = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in top[1:] if line)
        size = 0 if method == "HEAD" else int(headers.get("content-length", "0"))
        return Answer(int(top[0].split()[1]), headers, await reader.readexactly(size))

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].transport.abort()
            self._streams = None


@dataclass
class RealWorld:
    """The part of :class:`torture.world.World` that clients use."""

    seed: int
    zygote: Zygote
    state: Path
    journal: Path
    model: Model = field(default_factory=Model)
    seen: Counter[str] = field(default_factory=Counter)
    boots: int = 0
    seal_key: bytes | None = None
    bug: str = ""

    def __post_init__(self) -> None:
        self.draw = random.Random(self.seed)
        self.child: Child | None = None
        self._up = asyncio.Event()
        self._lines: dict[str, Line] = {}
        self._boot, self._port = b"", 0

    def token(self, count: int) -> bytes:
        return self.draw.getrandbits(8 * count).to_bytes(count, "big")

    policy: ClassVar[dict[str, Any]] = {}
    careful: ClassVar[float] = 0.0

    async def pause(self) -> None:
        await asyncio.sleep(self.draw.random() * 0.004)

    def fork(self, **options: Any) -> Child:
        self.child = self.zygote.start(
            self.state, journal=str(self.journal), log=str(self.state) + ".log", bug=self.bug,
            **options,
        )  # fmt: skip
        return self.child

    def last_words(self) -> str:
        return Path(f"{self.state}.log").read_text("utf-8", "replace")[-2000:]

    async def attach(self) -> None:
        """Wait until the child listens, and learn its keys. Raises RuntimeError when it ended."""
        assert self.child is not None
        ready, pid = self.state / "server.json", self.child.pid
        async with asyncio.timeout(START_SECONDS):
            while True:
                with contextlib.suppress(OSError, ValueError):
                    facts = json.loads(ready.read_bytes())
                    if facts["pid"] == pid:
                        break
                if not self.child.alive:
                    raise RuntimeError("the server ended before it listened")
                await asyncio.sleep(0.002)
        self._port = int(facts["url"].rpartition(":")[2])
        line = Line(self._port)
        nonce = os.urandom(32).hex()
        answer = await line.send("GET", f"/v1/attestation?nonce={nonce}", {"host": "x"}, b"")
        line.close()
        binding = codec.decode(Attestation, answer.body).binding
        self._boot, self.seal_key = binding.boot, binding.hpke_key
        self.boots += 1
        self.model.unheard.clear()
        self._up.set()

    def gone(self) -> None:
        """The server is dead: forget how to reach it."""
        self._up.clear()
        self.seal_key = None
        for line in self._lines.values():
            line.close()
        self._lines.clear()

    async def send(
        self, who: Identity, method: str, path: str, body: object = None, **headers: str
    ) -> Answer | None:
        await self._up.wait()
        data = body if isinstance(body, bytes) else b"" if body is None else codec.encode(body)
        head = {name.replace("_", "-"): value for name, value in headers.items()}
        url = f"https://127.0.0.1:{self._port}"
        nonce = self.boots.to_bytes(6, "big") + self.token(requests.NONCE_BYTES - 6)
        head |= {"host": url[8:], "content-length": str(len(data))}
        signed = requests.sign(who, method, url + path, head, data, boot=self._boot, nonce=nonce)
        line = self._lines.setdefault(who.id, Line(self._port))
        with contextlib.suppress(OSError, EOFError, asyncio.LimitOverrunError):
            return await line.send(method, path, signed, data)
        return None

    async def remember(self, who: Identity) -> bool:
        """Only the simulation's clients keep heads."""
        return False

    def check_witnessed(self, request: str, kinds: tuple[str, ...]) -> None:
        """Real servers have no witnesses here."""

    def look(self, question: Any, *more: object) -> None:
        """Nobody looks into a real server while it runs."""

    def read(self) -> Counter[str]:
        """How often workers began to read, by request digest."""
        with contextlib.suppress(FileNotFoundError):
            return Counter(self.journal.read_text().split())
        return Counter()
