"""Requests to the Hugging Face hub that outlast its faults.

The session, the headers and the token are those of `huggingface_hub`. Its own retries are not
used: they end after half a minute, and its listings have no timeout.
"""

from __future__ import annotations

import contextlib
import email.utils
import importlib
import os
import random
import re
import socket
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from preflight.core.errors import PreflightError
from preflight.core.libraries import import_library
from preflight.core.log import log
from preflight.core.signals import StopFlag
from preflight.core.units import format_seconds
from preflight.corpus.sources.protocol import text_error

_ENDPOINT = "https://huggingface.co"
_RETRIED_STATUS = {408, 425, 429, 500, 502, 503, 504}
_SLOWEST_BYTES_PER_SECOND = 10_000  # a connection below that is dropped as stalled
_ADVICE = "try again later: the same command continues; or give local files with --text-file"


@dataclass(frozen=True)
class Patience:
    """How long a fault of the hub or of the network is borne, in seconds.

    Attributes:
        reach: for the first connection.
        stall: without any byte, until a connection is dropped.
        total: for one request, all its tries and pauses together.
        first_pause, longest_pause: between tries; each is twice the one before.
    """

    reach: float = 2.0
    stall: float = 30.0
    total: float = 600.0
    first_pause: float = 1.0
    longest_pause: float = 60.0


class _Retry(Exception):
    """The reason to try again, and the pause that the hub asks for."""

    def __init__(self, why: str, pause: float | None = None) -> None:
        super().__init__(why)
        self.pause = pause


class HubClient:
    """Reads one data set of the hub.

    Attributes:
        label: how messages call the data set.
        stop: asked while it waits.
    """

    def __init__(self, repo: str, label: str, patience: Patience | None = None) -> None:
        self.repo, self.label = repo, label
        self.stop: StopFlag | None = None
        self._patience = patience or Patience()
        self._closed = threading.Event()
        self._is_told = False
        self._hub: Any = None
        self._utils: Any = None
        self._endpoint = _ENDPOINT
        self._http_error: type[Exception] = OSError

    def connect(self) -> None:
        """Import `huggingface_hub`, and see that the hub can be reached at all.

        Raises:
            PreflightError: code TEXT within three seconds when it cannot; FLAGS without library.
        """
        for name in ("HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_TELEMETRY"):
            os.environ.setdefault(name, "1")
        endpoint = self._endpoint = os.environ.get("HF_ENDPOINT", _ENDPOINT).rstrip("/")
        if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
            raise self._unreachable_error(endpoint, "HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE")
        why = _find_fault(endpoint, self._patience.reach)
        if why is not None:
            raise self._unreachable_error(endpoint, why, "check the network")
        self._hub = import_library("huggingface_hub", "huggingface_hub", self.label)
        self._utils = importlib.import_module("huggingface_hub.utils")
        errors = importlib.import_module("huggingface_hub.errors")
        # The HTTP library has changed its name with huggingface_hub's version; its base class has
        # not.
        bases = errors.HfHubHTTPError.__mro__
        self._http_error = next(kind for kind in bases if kind.__name__ == "HTTPError")

    def _unreachable_error(self, endpoint: str, why: str, advice: str) -> PreflightError:
        return text_error(
            self.label, f"{endpoint} cannot be reached: {why}", f"{advice}, then {_ADVICE}"
        )

    def close(self) -> None:
        """End all waiting in other threads."""
        self._closed.set()

    # ---- what is asked for ----------------------------------------------------------------------

    def read_json(self, path: str) -> tuple[Any, str | None]:
        """The JSON at ``/api/datasets/<repo>/<path>``, and the address of the next page."""
        url = path if "://" in path else f"{self._endpoint}/api/datasets/{self.repo}{path}"
        return self._be_patient(lambda: self._try_json(url), url)

    def read_small(self, path: str, commit: str, most_bytes: int) -> bytes:
        """The beginning of a file, at most so many bytes."""
        url = self._build_url(path, commit)
        return self._be_patient(lambda: self._try_small(url, most_bytes), path)

    def read_range(self, path: str, commit: str, begin: int, end: int, size: int) -> bytearray:
        """The bytes from `begin` to `end` of a file of `size` bytes.

        What came before a connection broke is kept.

        Raises:
            PreflightError: code TEXT, when the hub refuses, answers something else, or stays
                unreachable; SIGINT or SIGTERM.
        """
        url, got = self._build_url(path, commit), bytearray()
        self._be_patient(lambda: self._try_range(url, begin, end, size, got), path)
        return got

    def _build_url(self, path: str, commit: str) -> str:
        url = self._hub.hf_hub_url(
            self.repo, path, repo_type="dataset", revision=commit, endpoint=self._endpoint
        )
        return str(url)

    # ---- one try --------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _request(self, url: str, **headers: str) -> Any:
        """An answer whose status is good; its body is not read yet."""
        all_headers = {**self._utils.build_hf_headers(), **headers}
        session = self._utils.get_session()
        with session.stream(
            "GET", url, headers=all_headers, timeout=self._patience.stall
        ) as response:
            self._check_status(response)
            yield response

    def _check_status(self, response: Any) -> None:
        status, code = response.status_code, response.headers.get("X-Error-Code", "")
        if status in (200, 206):
            return
        elsewhere = urllib.parse.urlsplit(str(response.url)).netloc not in self._endpoint
        if status in _RETRIED_STATUS or (status == 403 and elsewhere):  # a signed address expired
            raise _Retry(f"the hub answers {status}", _read_pause(response.headers))
        if status in (401, 403):
            what = "the data set is gated" if code == "GatedRepo" else "no access"
            has_token = bool(self._hub.get_token())
            raise text_error(
                self.label,
                f"{what}: the hub answers {status}"
                + (" to the token that is set" if has_token else " without a token"),
                "accept its conditions on the hub's page, and log in: hf auth login, or set "
                "HF_TOKEN; if it is not gated, check its name",
                "nothing partial is published; the same command continues",
            )
        place = urllib.parse.unquote(urllib.parse.urlsplit(str(response.url)).path)
        missing = {"RevisionNotFound": "there is no such revision", "EntryNotFound": "no such file"}
        if status == 404:
            what = missing.get(code, "there is no such data set (or no such file in it)")
            raise text_error(self.label, f"{what}: {place}", "check the name after --source hf:")
        raise text_error(self.label, f"the hub answers {status} for {place}", _ADVICE)

    def _try_json(self, url: str) -> tuple[Any, str | None]:
        with self._request(url) as response:
            response.read()
            try:
                return response.json(), response.links.get("next", {}).get("url")
            except ValueError:
                raise _Retry("the hub's answer is no JSON") from None

    def _try_small(self, url: str, most_bytes: int) -> bytes:
        got = bytearray()
        with self._request(url) as response:
            for chunk in response.iter_bytes():
                got += chunk
                if len(got) > most_bytes:
                    break
        return bytes(got[:most_bytes])

    def _try_range(self, url: str, begin: int, end: int, size: int, got: bytearray) -> None:
        """Add to `got` what is missing of the range."""
        start, deadline = begin + len(got), time.monotonic() + self._patience.stall
        deadline += (end - start) / _SLOWEST_BYTES_PER_SECOND
        headers = {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
        with self._request(url, **headers) as response:
            self._check_range(response, start, end, size)
            for chunk in response.iter_bytes():
                got += chunk
                if time.monotonic() > deadline:
                    raise _Retry("the connection is slower than 10 kB/s")
                if self._closed.is_set():
                    raise _Retry("closed")
                if len(got) > end - begin:
                    break
        if len(got) > end - begin:
            del got[:]
            raise _Retry("the hub sends more than was asked for")
        if len(got) < end - begin:
            raise _Retry("the connection broke")

    def _check_range(self, response: Any, start: int, end: int, size: int) -> None:
        """Refuse an answer that is not exactly the range, of a file of exactly that size."""
        if response.status_code == 200 and (start, end) == (0, size):
            return
        found = response.headers.get("Content-Range", "")
        match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", found.strip())
        if response.status_code != 206 or match is None:
            raise text_error(
                self.label,
                f"the hub does not answer with a part of a file ({response.status_code})",
                "a proxy between may be the cause; or download it and give it with --text-file",
            )
        if tuple(map(int, match.groups())) != (start, end - 1, size):
            raise text_error(
                self.label,
                f"the hub answers with other bytes than were asked for: {found}, "
                f"not bytes {start}-{end - 1}/{size}",
                _ADVICE,
            )

    # ---- all tries ------------------------------------------------------------------------------

    def _be_patient(self, attempt: Callable[[], Any], what: str) -> Any:
        """The result of `attempt`, which is repeated while the fault may pass."""
        patience, begin = self._patience, time.monotonic()
        pause = patience.first_pause
        while True:
            try:
                return attempt()
            except _Retry as fault:
                why, asked = str(fault), fault.pause
            except self._http_error as fault:  # a timeout, a broken or refused connection
                why, asked = f"{type(fault).__name__} {fault}".strip(), None
            wait = asked if asked is not None else pause * random.uniform(0.75, 1.25)
            left = begin + patience.total - time.monotonic()
            if wait > left or self._closed.is_set():
                waited = format_seconds(time.monotonic() - begin)
                more = f", and asks to wait {format_seconds(asked)}" if asked is not None else ""
                raise text_error(
                    self.label, f"{what}: {why}{more}; given up after {waited}", _ADVICE
                ) from None
            self._tell(why)
            self._sleep(wait)
            pause = min(2 * pause, patience.longest_pause)

    def _tell(self, why: str) -> None:
        if not self._is_told:
            self._is_told = True
            total = format_seconds(self._patience.total)
            log.info(f"{self.label}: {why}; tried again for up to {total} each time")

    def _sleep(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0 and not self._closed.wait(min(left, 0.2)):
            self.leave_if_stopping()

    def leave_if_stopping(self) -> None:
        """PreflightError (SIGINT or SIGTERM) when a signal has come."""
        if self.stop is not None:
            self.stop.leave_if_stopping(
                "stopped while waiting for the hub; the same command continues"
            )


def _read_pause(headers: Any) -> float | None:
    """The seconds of ``Retry-After``, a number or a date, or until the rate limit is reset."""
    value = headers.get("Retry-After", "").strip()
    if value.isdigit():
        return float(value)
    if value:
        with contextlib.suppress(ValueError):
            return max(email.utils.parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    match = re.search(r";\s*r=0\s*;\s*t=(\d+)", headers.get("RateLimit", ""))
    return float(match[1]) if match else None


def _find_fault(endpoint: str, seconds: float) -> str | None:
    """Why no connection to `endpoint`, or to the proxy for it, is made in so many seconds."""
    parts = urllib.parse.urlsplit(endpoint)
    proxies = urllib.request.getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if proxy and parts.hostname and not urllib.request.proxy_bypass(parts.hostname):
        parts = urllib.parse.urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    address = (parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80))
    faults: list[str | None] = []

    def probe() -> None:
        try:
            socket.create_connection(address, timeout=seconds).close()
            faults.append(None)
        except OSError as error:
            faults.append(error.strerror or str(error))

    # In a thread, since a look-up of a name takes no timeout.
    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(seconds)
    return faults[0] if faults else f"no answer in {seconds:.0f} seconds"
