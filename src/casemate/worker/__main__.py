"""``python -m casemate.worker FD``: serve one job on the connected Unix socket FD, then end."""

from __future__ import annotations

import socket
import sys


def main() -> int:
    if len(sys.argv) != 2 or not sys.argv[1].isdigit():
        print("usage: python -m casemate.worker FD", file=sys.stderr)
        return 2
    from casemate.worker.session import serve

    with socket.socket(fileno=int(sys.argv[1])) as sock:
        return serve(sock)


if __name__ == "__main__":
    sys.exit(main())
