"""The real fetch function, against a server on the loopback."""

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from casemate.spec.errors import NetError
from casemate.tee import fetch


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        status, body = {
            "/ok": (200, b"body"), "/moved": (302, b"-"), "/none": (404, b"gone"),
            "/long": (200, b"x" * 5000),
        }[self.path]  # fmt: skip
        self.send_response(status)
        if status == 302:
            self.send_header("Location", "/ok")
        self.send_header("SGX-Header", "Value; %0A")
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        data = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.headers["Metadata"].encode() + data)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def url():
    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_reply_with_its_headers(url):
    reply = fetch.https(fetch.Ask(f"{url}/ok"))
    assert (reply.status, reply.body) == (200, b"body")
    assert reply.headers["sgx-header"] == "Value; %0A"


def test_a_post(url):
    asked = fetch.Ask(f"{url}/post", {"Metadata": "true"}, b"body")
    assert fetch.https(asked).body == b"truebody"


def test_redirects_are_not_followed(url):
    assert fetch.https(fetch.Ask(f"{url}/moved")).status == 302
    for path in ("moved", "none"):
        with pytest.raises(NetError) as e:
            fetch.answered(fetch.https, fetch.Ask(f"{url}/{path}"))
        assert e.value.code == "net.collateral"


def test_a_long_answer_is_cut_off(url, monkeypatch):
    monkeypatch.setattr(fetch, "MAX_BODY", 4999)
    with pytest.raises(NetError, match="too long"):
        fetch.https(fetch.Ask(f"{url}/long"))


@pytest.mark.parametrize("bad", ["http://127.0.0.1:1/x", "ftp://x/y", "http://[::bad/", "nothing"])
def test_nobody_there(bad):
    with pytest.raises(NetError) as e:
        fetch.https(fetch.Ask(bad))
    assert e.value.code == "net.collateral"
