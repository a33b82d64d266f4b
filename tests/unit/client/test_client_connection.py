"""No request goes out but over a stream whose far end has just been attested."""

from __future__ import annotations

import ssl

import pytest

from casemate.attest.trust import Trust, Unchecked
from casemate.client import connection as module
from casemate.client.connection import Connection
from casemate.seal import requests
from casemate.server.attestation import attest_now
from casemate.spec import codec
from casemate.spec.data import Budget
from casemate.spec.errors import (
    AuthError,
    BudgetError,
    EvidenceError,
    FormatError,
    LimitError,
    NetError,
    UsageError,
)
from support.evidence import PROMISES
from support.publog import PublicLog, keys_of


def connect(fake, trust, someone, **settings):
    return Connection(fake.url, trust=trust, identity=someone, pause=lambda _: None, **settings)


def test_evidence_comes_first_and_over_the_same_stream(fakes, keys, trust, someone):
    fake = fakes(keys)
    connect(fake, trust, someone).request("GET", "/v1/datasets")
    assert [s.target.split("?")[0] for s in fake.seen] == ["/v1/attestation", "/v1/datasets"]
    assert {s.connection for s in fake.seen} == {1}


def test_many_requests_share_one_attested_stream(fakes, keys, trust, someone):
    fake = fakes(keys)
    connection = connect(fake, trust, someone)
    for _ in range(5):
        connection.request("GET", "/v1/jobs")
    assert fake.connections == 1
    assert len(fake.requests) == 5


def test_requests_are_signed_for_this_boot_with_rising_nonces(fakes, keys, trust, someone):
    fake = fakes(keys)
    connection = connect(fake, trust, someone)
    connection.request("GET", "/v1/jobs")
    connection.request("POST", "/v1/uploads", {"size": 5})
    found = [
        requests.verify(
            s.method,
            fake.url + s.target,
            s.headers,
            s.body,
            boot=keys.boot,
            lookup=lambda _: someone.public,
        )
        for s in fake.requests
    ]
    assert found == [someone.id] * 2
    nonces = [s.headers["casemate-nonce"] for s in fake.requests]
    assert len(set(nonces)) == 2
    assert nonces[0][:12] <= nonces[1][:12]


def test_a_new_stream_needs_new_evidence(fakes, keys, trust, someone):
    fake = fakes(keys, last=2)
    connection = connect(fake, trust, someone)
    for _ in range(3):
        connection.request("GET", "/v1/jobs")
    evidence = [s for s in fake.seen if s.target.startswith("/v1/attestation")]
    assert [s.connection for s in evidence] == [1, 2, 3]
    assert len({s.target for s in evidence}) == 3, "each stream has a nonce of its own"
    assert [s.connection for s in fake.requests] == [1, 2, 3]


def swapped(fakes, keys, trust, someone, tee):
    """Attest the true enclave, then let another server take its port and relay its evidence."""
    true = fakes(keys, last=2)
    connection = connect(true, trust, someone)
    connection.request("GET", "/v1/jobs")
    true.stop()
    other = keys_of(PublicLog())
    impostor = fakes(
        other, port=true.port, attest=lambda nonce: attest_now(tee, keys, PROMISES, [nonce])[0]
    )
    return connection, impostor


def test_a_server_swapped_after_attestation_gets_nothing(fakes, keys, trust, someone, tee):
    connection, impostor = swapped(fakes, keys, trust, someone, tee)
    with pytest.raises(EvidenceError) as caught:
        connection.request("POST", "/v1/quotes", {"secret": "model"})
    assert caught.value.code == "evidence.binding-tls"
    assert impostor.seen
    assert impostor.requests == []


def test_the_swap_is_seen_by_the_live_session_alone(fakes, keys, trust, someone, tee, monkeypatch):
    """Seeded bug: taking the key from the evidence instead of the session lets the impostor in."""
    connection, impostor = swapped(fakes, keys, trust, someone, tee)
    monkeypatch.setattr(module, "_spki_digest", lambda _: keys.tls.spki)
    connection.request("POST", "/v1/quotes", {"secret": "model"})
    assert [s.target for s in impostor.requests] == ["/v1/quotes"]


def test_replayed_evidence_is_refused(fakes, keys, trust, someone, tee):
    old = attest_now(tee, keys, PROMISES, [bytes(32)])[0]
    fake = fakes(keys, attest=lambda _: old)
    with pytest.raises(EvidenceError) as caught:
        connect(fake, trust, someone).request("GET", "/v1/jobs")
    assert caught.value.code.startswith("evidence.")
    assert fake.requests == []


def test_simulation_is_refused_unless_asked_for_by_name(fakes, keys, someone):
    fake = fakes(keys)
    hardware = Trust.sev_snp(measurements=Unchecked("any, in this test"))
    with pytest.raises(EvidenceError) as caught:
        connect(fake, hardware, someone).line()
    assert caught.value.code == "evidence.simulated-not-asked"
    assert "simulated" in caught.value.mend


def test_another_simulations_root_is_refused(fakes, keys, someone):
    fake = fakes(keys)
    with pytest.raises(EvidenceError):
        connect(fake, Trust.simulated("ab" * 32), someone).line()
    pinned = Trust.simulated(connect(fake, Trust.simulated(), someone).line().verdict.root)
    assert connect(fake, pinned, someone).line().verdict.simulated


def test_proxies_of_the_environment_are_ignored(fakes, keys, trust, someone, monkeypatch):
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    connect(fakes(keys), trust, someone).request("GET", "/v1/jobs")


def test_redirects_are_never_followed(fakes, keys, trust, someone):
    fake, elsewhere = fakes(keys), fakes(keys)
    for status in (301, 302, 307, 308):
        fake.answers["GET", "/v1/jobs"] = (status, {"location": elsewhere.url + "/v1/jobs"}, b"")
        with pytest.raises(NetError) as caught:
            connect(fake, trust, someone).request("GET", "/v1/jobs")
        assert caught.value.code == "net.redirect"
    assert elsewhere.seen == []


def test_tls_before_1_3_is_refused(fakes, keys, trust, someone):
    keys.tls.context.minimum_version = ssl.TLSVersion.TLSv1_2
    keys.tls.context.maximum_version = ssl.TLSVersion.TLSv1_2
    fake = fakes(keys)
    with pytest.raises(NetError) as caught:
        connect(fake, trust, someone).line()
    assert caught.value.code == "net.unreachable"
    assert fake.seen == []


def dropping(times):
    """An answer that promises more bytes than come, the first ``times`` times."""
    left = [times]

    def answer(_):
        left[0] -= 1
        if left[0] >= 0:
            raise ConnectionResetError
        return 200, {}, b"{}"

    return answer


def test_idempotent_requests_survive_a_lost_stream(fakes, keys, trust, someone):
    fake = fakes(keys)
    fake.answers["GET", "/v1/jobs"] = dropping(2)
    assert connect(fake, trust, someone).request("GET", "/v1/jobs").json() == {}
    nonces = [s.headers["casemate-nonce"] for s in fake.requests]
    assert len(set(nonces)) == 3, "each attempt is signed anew"
    assert fake.connections == 3


def test_other_requests_are_not_repeated(fakes, keys, trust, someone):
    fake = fakes(keys)
    fake.answers["POST", "/v1/datasets"] = dropping(1)
    with pytest.raises(NetError) as caught:
        connect(fake, trust, someone).request("POST", "/v1/datasets", {})
    assert caught.value.code == "net.lost"
    assert len(fake.requests) == 1


def test_a_server_that_never_comes_back_is_reported(fakes, keys, trust, someone):
    fake = fakes(keys)
    connection = connect(fake, trust, someone)
    connection.request("GET", "/v1/jobs")
    connection.close()
    fake.stop()
    with pytest.raises(NetError) as caught:
        connection.request("GET", "/v1/jobs")
    assert caught.value.code == "net.unreachable"
    assert fake.url in caught.value.message


def test_the_servers_errors_keep_their_class_and_code(fakes, keys, trust, someone):
    fake = fakes(keys)
    refused = BudgetError("budget.exhausted", "Too much.", mend="Ask for less.", where="ds_1")
    fake.answers["POST", "/v1/jobs"] = (409, {}, refused.to_wire())
    with pytest.raises(BudgetError) as caught:
        connect(fake, trust, someone).request("POST", "/v1/jobs", {"quote": "x"})
    assert (caught.value.code, caught.value.where, caught.value.status) == (
        "budget.exhausted",
        "ds_1",
        409,
    )


@pytest.mark.parametrize("body", [b"<html>proxy</html>", b"{}", b"", b"\xff", b'{"error": 1}'])
def test_errors_of_another_shape_are_net_errors(fakes, keys, trust, someone, body):
    fake = fakes(keys)
    fake.answers["GET", "/v1/jobs"] = (502, {}, body)
    with pytest.raises(NetError) as caught:
        connect(fake, trust, someone).request("GET", "/v1/jobs")
    assert caught.value.code == "net.bad-error"


def test_answers_have_a_limit(fakes, keys, trust, someone):
    fake = fakes(keys)
    fake.answers["GET", "/v1/jobs"] = (200, {}, b'"' + b"x" * 5000 + b'"')
    connection = connect(fake, trust, someone)
    with pytest.raises(LimitError):
        connection.request("GET", "/v1/jobs", limit=4096)
    with pytest.raises(LimitError):
        connection.download("/v1/jobs", lambda _: None, limit=4096)
    assert connection.request("GET", "/v1/jobs").body.startswith(b'"xxx')


def test_listings_are_followed_page_by_page(fakes, keys, trust, someone):
    fake = fakes(keys)
    path, budgets = "/v1/jobs", [Budget(epsilon=float(e), delta=1e-5) for e in (1, 2, 3)]
    a, b, c = map(codec.to_json, budgets)
    pages = {
        path: (200, {"Link": '<?after=b>; rel="next"'}, [a, b]),
        f"{path}?after=b": (200, {"Link": '<?after=c>; rel="next"'}, [c]),
        f"{path}?after=c": (200, {}, []),
    }
    fake.answers["GET", path] = lambda request: pages[request.target]
    connection = connect(fake, trust, someone)
    assert connection.listing(path, Budget) == budgets
    # Never another path, and no end without an item.
    for link in ('</v1/uploads>; rel="next"', '<?after=b&x=1>; rel="next"', "<?after=b>", "x"):
        fake.answers["GET", path] = (200, {"Link": link}, [a])
        assert connection.listing(path, Budget) == budgets[:1]
    fake.answers["GET", path] = (200, {"Link": '<?after=b>; rel="next"'}, [])
    assert connection.listing(path, Budget) == []
    fake.answers["GET", path] = (200, {}, {"jobs": []})
    with pytest.raises(FormatError):
        connection.listing(path, Budget)


def test_downloads_stream_into_the_sink(fakes, keys, trust, someone):
    fake = fakes(keys)
    fake.answers["GET", "/v1/jobs/j/result"] = (200, {}, b"r" * 100_000)
    parts: list[bytes] = []
    got = connect(fake, trust, someone).download("/v1/jobs/j/result", parts.append, limit=10**6)
    assert got == 100_000
    assert b"".join(parts) == b"r" * 100_000


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:1", "127.0.0.1", "ftp://x", "", "https://", "https://h:99999",
        "https://h:x", "https://a\nb", "https://me:secret@h", None,
    ],
)  # fmt: skip
def test_only_https_addresses(url, trust, someone):
    with pytest.raises(UsageError) as caught:
        Connection(url, trust=trust, identity=someone)
    assert caught.value.code == "usage.url"


def test_without_an_identity_nothing_is_sent(fakes, keys, trust):
    fake = fakes(keys)
    with pytest.raises(AuthError):
        Connection(fake.url, trust=trust).request("GET", "/v1/jobs")
    assert fake.requests == []


@pytest.mark.parametrize(
    ("url", "kept"),
    [
        ("https://h", "https://h"),
        ("https://h:8443/path?x=1", "https://h:8443"),
        ("https://[::1]:8443", "https://[::1]:8443"),
        ("https://bücher.example", "https://xn--bcher-kva.example"),
    ],
)
def test_addresses_are_kept_without_path(url, kept, trust, someone):
    assert Connection(url, trust=trust, identity=someone).url == kept


def test_nothing_else_in_client_and_cli_opens_sockets():
    import re
    from pathlib import Path

    import casemate

    root = Path(casemate.__file__).parent
    opens = re.compile(
        r"^\s*(?:import|from) (?:socket|ssl|httpx|httpcore|http\.client|urllib(?!\.parse))\b", re.M
    )
    found = {
        p.relative_to(root).as_posix()
        for room in ("client", "cli")
        for p in (root / room).rglob("*.py")
        if opens.search(p.read_text(encoding="utf-8"))
    }
    assert found == {"client/connection.py", "cli/doctor.py"}, "doctor looks at OpenSSL's version"
