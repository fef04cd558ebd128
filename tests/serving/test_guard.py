"""Strangers' pages, rebound names, keys, odd heads and odd paths."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest

from preflight.serving.errors import ApiError
from preflight.serving.guard import check_access, has_key
from serving.fake_store import FakeModel, FakeSettings, FakeStore, serve

HOST = "127.0.0.1:8000"
KEYED = FakeSettings(host="0.0.0.0", api_key="s3cret")
OPEN = FakeSettings()
SHARED = FakeSettings(cors_origins=("https://chat.example",))
# Settings, Host, Origin, and the status; None: let through.
CASES = [
    (OPEN, HOST, None, None),
    (OPEN, "localhost", None, None),
    (OPEN, "LOCALHOST:1", None, None),
    (OPEN, "[::1]:8000", None, None),
    (OPEN, "127.8.9.1:80", None, None),
    (OPEN, HOST, f"http://{HOST}", None),
    (OPEN, "localhost:80", "http://localhost", None),
    (OPEN, "localhost", "https://LOCALHOST:443", None),
    (OPEN, "evil.example", None, 403),  # rebinding
    (OPEN, "evil.example:8000", "http://evil.example:8000", 403),
    (OPEN, "127.0.0.1.evil.example", None, 403),
    (OPEN, "localhost.evil.example", None, 403),
    (OPEN, "localhost.", None, 403),
    (OPEN, "0.0.0.0", None, 403),
    (OPEN, "2130706433", None, 403),
    (OPEN, "0x7f.1", None, 403),
    (OPEN, "192.168.1.7", None, 403),
    (OPEN, "127.0.0.1@evil.example", None, 400),
    (OPEN, "127.0.0.1:8000,evil.example", None, 400),
    (OPEN, "127.0.0.1:x", None, 400),
    (OPEN, "", None, 400),
    (OPEN, HOST, "http://evil.example", 403),
    (OPEN, HOST, "null", 403),
    (OPEN, HOST, "", 403),
    (OPEN, HOST, "file://", 403),
    (OPEN, HOST, "http://127.0.0.1:8001", 403),
    (OPEN, HOST, "http://127.0.0.1", 403),
    (OPEN, HOST, f"http://{HOST}.evil.example", 403),
    (OPEN, HOST, f"http://evil.example/{HOST}", 403),
    (OPEN, HOST, f"http://user@{HOST}", 403),
    (OPEN, HOST, "https://chat.example", 403),
    (SHARED, HOST, "https://chat.example", None),
    (SHARED, HOST, "http://chat.example", 403),
    (SHARED, "chat.example", "https://chat.example", 403),
    (FakeSettings(cors_origins=("*",)), HOST, "https://any.example", None),
    (KEYED, "box.lan:8000", None, None),
    (KEYED, "box.lan:8000", "http://box.lan:8000", None),
    (KEYED, "box.lan:8000", "http://evil.example", 403),
]


@pytest.mark.parametrize(("settings", "host", "origin", "status"), CASES)
def test_host_and_origin(settings, host, origin, status):
    headers = [(b"host", host.encode())]
    headers += [] if origin is None else [(b"origin", origin.encode())]
    if status is None:
        check_access(headers, settings)
        return
    with pytest.raises(ApiError) as caught:
        check_access(headers, settings)
    assert caught.value.status == status


def test_headers_that_are_there_twice_or_not_at_all():
    local, stranger = (b"host", HOST.encode()), (b"origin", b"http://evil.example")
    same = (b"origin", b"http://" + HOST.encode())
    for headers, status in (([], 400), ([local, local], 400), ([local, same, stranger], 403)):
        with pytest.raises(ApiError) as caught:
            check_access(headers, OPEN)
        assert caught.value.status == status


@pytest.mark.parametrize(
    ("value", "is_right"),
    [
        ("Bearer s3cret", True),
        ("bearer  s3cret ", True),
        ("Bearer s3cre", False),
        ("Bearer s3cret2", False),
        ("Bearer S3CRET", False),
        ("Basic s3cret", False),
        ("s3cret", False),
        ("Bearer", False),
        ("Bearer \xff", False),
        ("", False),
    ],
)
def test_keys(value, is_right):
    assert has_key([(b"authorization", value.encode("latin-1"))], "s3cret") is is_right
    assert has_key([(b"authorization", value.encode("latin-1"))], None)
    assert not has_key([], "s3cret")


@pytest.fixture(scope="module")
def keyed() -> Iterator[str]:
    settings = FakeSettings(api_key="s3cret", cors_origins=("https://chat.example",))
    with serve(FakeStore(FakeModel("fox")), settings) as url:
        yield url


@pytest.fixture(scope="module")
def local() -> Iterator[str]:
    with serve(FakeStore(FakeModel("fox"))) as url:
        yield url


def ask(url: str, method: str, path: str, **headers: str) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=10)
    connection.request(method, path, headers={k.replace("_", "-"): v for k, v in headers.items()})
    response = connection.getresponse()
    response.body = response.read()  # type: ignore[attr-defined]
    connection.close()
    return response


def test_without_the_key_only_the_page_is_shown(keyed):
    for path in ("/v1/models", "/metrics", "/v1/chat/completions", "/nothing"):
        for headers in ({}, {"Authorization": "Bearer wrong"}):
            response = ask(keyed, "GET", path, **headers)
            assert response.status == 401
            assert response.headers["WWW-Authenticate"] == "Bearer"
            assert b"s3cret" not in response.body
    assert ask(keyed, "GET", "/").status == 200
    assert json.loads(ask(keyed, "GET", "/health").body) == {"status": "ok"}
    right = {"Authorization": "Bearer s3cret"}
    assert ask(keyed, "GET", "/v1/models", **right).status == 200
    assert "models" in json.loads(ask(keyed, "GET", "/health", **right).body)


def test_pages_elsewhere_are_let_in_only_by_name(keyed, local):
    wanted = {
        "Access_Control_Request_Method": "POST",
        "Access_Control_Request_Headers": "authorization, x-stainless-os,evil header\t",
    }
    response = ask(keyed, "OPTIONS", "/v1/models", Origin="https://chat.example", **wanted)
    assert response.status == 204
    assert response.headers["Access-Control-Allow-Origin"] == "https://chat.example"
    names = response.headers["Access-Control-Allow-Headers"].split(", ")
    assert {"authorization", "content-type", "x-stainless-os"} <= set(names)
    refused = ask(keyed, "GET", "/v1/models", Origin="https://chat.example")
    assert refused.status == 401
    assert refused.headers["Access-Control-Allow-Origin"] == "https://chat.example"
    for url in (keyed, local):
        for method in ("OPTIONS", "GET", "POST"):
            response = ask(url, method, "/v1/models", Origin="https://evil.example", **wanted)
            assert response.status == 403
            assert not any(name.lower().startswith("access-control") for name in response.headers)
    assert ask(local, "OPTIONS", "/v1/models").status == 405


@pytest.mark.parametrize(
    "path",
    [
        "/../etc/passwd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/..%2f..%2fetc%2fpasswd",
        "/assets/page.html",
        "//v1/models",
        "/v1/models/../../etc/passwd",
        "/v1/models/%00",
        "/v1/models/%ff%fe",
        "/v1//models",
        "/v1/models/",
        "/health/",
        "/%68ealth%00",
        "/v1/chat/completions/x",
        "/page.html?../../x",
        "/\\..\\..\\windows",
    ],
)
def test_path_tricks_find_nothing(local, path):
    response = ask(local, "GET", path)
    assert response.status == 404
    assert json.loads(response.body)["error"]["code"] in ("not_found", "model_not_found")
    assert "Location" not in response.headers


def test_methods(local):
    for method, path in (("GET", "/v1/completions"), ("POST", "/v1/models"), ("PUT", "/")):
        response = ask(local, method, path)
        assert response.status == 405
        assert response.headers["Allow"]
    head = ask(local, "HEAD", "/")
    assert (head.status, head.body) == (200, b"")
    assert ask(local, "GET", "/", Upgrade="websocket", Connection="Upgrade").status == 200


def raw(url: str, data: bytes) -> bytes:
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname, parts.port), timeout=10) as connection:
        received = b""
        # The answer may come, and the connection be closed, before all is sent.
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            connection.sendall(data)
        with contextlib.suppress(ConnectionResetError):
            while chunk := connection.recv(65536):
                received += chunk
        return received


def test_heads_are_bounded(local):
    host = b"Host: localhost\r\nConnection: close\r\n"
    fits = b"GET /health HTTP/1.1\r\n" + host + b"X: " + b"a" * 12_000 + b"\r\n\r\n"
    assert raw(local, fits).startswith(b"HTTP/1.1 200 ")
    for size in (17_000, 200_000):
        data = b"GET /health HTTP/1.1\r\n" + host + b"X: " + b"a" * size + b"\r\n\r\n"
        status = raw(local, data)[:13]
        assert status in (b"HTTP/1.1 431 ", b"HTTP/1.1 400 ", b"")  # b"": cut off while it writes
    many = b"GET /health HTTP/1.1\r\n" + host + b"X: a\r\n" * 5_000 + b"\r\n"
    assert not raw(local, many).startswith(b"HTTP/1.1 200 ")


def test_bodies_are_bounded(local):
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    large = head + b"Connection: close\r\nContent-Length: 2000000\r\n\r\n" + b" " * 2_000_000
    assert raw(local, large).startswith(b"HTTP/1.1 413 ")
    endless = head + b"Content-Length: 99000000\r\n\r\n" + b" " * 12_000_000
    assert raw(local, endless).startswith(b"HTTP/1.1 413 ")  # it is not read to its end
    asked = head + b"Expect: 100-continue\r\nContent-Length: 99000000\r\n\r\n"
    assert raw(local, asked).startswith(b"HTTP/1.1 413 ")  # before it is sent
    chunks = b"Transfer-Encoding: chunked\r\n\r\n" + (b"10000\r\n" + b" " * 65536 + b"\r\n") * 20
    assert raw(local, head + chunks + b"0\r\n\r\n").startswith(b"HTTP/1.1 413 ")
    assert raw(local, b"\x16\x03\x01\x02\x00 TLS").startswith(b"HTTP/1.1 400 ")


def test_the_page_lets_nothing_else_run(local):
    first, second = ask(local, "GET", "/"), ask(local, "GET", "/")
    policy = first.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert policy != second.headers["Content-Security-Policy"]  # a number used once
    nonce = policy.split("script-src 'nonce-")[1].split("'")[0]
    page = first.body.decode()
    assert page.count("<script") == page.count(f'<script nonce="{nonce}"') == 1
    assert page.count("<style") == page.count(f'<style nonce="{nonce}"') == 1
    assert "__NONCE__" not in page
    assert first.headers["X-Content-Type-Options"] == "nosniff"
    for word in (' src="', "@import", "url(", "innerHTML", "outerHTML", "insertAdjacentHTML"):
        assert word not in page
