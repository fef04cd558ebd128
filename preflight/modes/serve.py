"""`--serve`: checkpoints to chat with, through a page and the OpenAI interface."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import FrameType
from typing import TYPE_CHECKING, Any

from preflight.core.errors import ExitCode, PreflightError
from preflight.core.libraries import import_library
from preflight.core.log import log
from preflight.core.streams import print_error
from preflight.device.runtime import build_exact_runtime
from preflight.models.base import TokenModel
from preflight.modes.decoding_way import choose_serving, packs_when_served
from preflight.modes.quantizing import check_quantize, quantize_loaded
from preflight.serving.keys import is_loopback, load_key
from preflight.serving.limits import Limits
from preflight.serving.store import Store, find_entries
from preflight.settings import RunConfig, SamplingConfig
from preflight.tokenization import Tokenizer
from preflight.tokenization.chat_template import load_chat_template

if TYPE_CHECKING:
    from uvicorn import Server

_GRACE_SECONDS = 10.0  # in which running answers may end after Ctrl-C
_STOPPING = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP


@dataclass(frozen=True)
class AppSettings:
    """What the application is told: see `preflight.serving.app.AppSettings`."""

    host: str
    api_key: str | None
    cors_origins: tuple[str, ...]
    sampling: SamplingConfig
    limits: Limits = field(default_factory=Limits)


def run(config: RunConfig) -> int:
    """Serve until a signal comes; its exit code.

    Raises:
        PreflightError: with the code of whatever stands in the way.
    """
    app, listening = (
        import_library(f"preflight.serving.{name}", "starlette uvicorn", "--serve")
        for name in ("app", "listening")
    )
    serving = config.serving
    key = load_key(serving.host, serving.api_key_file)
    store = build_store(config)
    settings = AppSettings(serving.host, key, serving.cors_origin, config.sampling)
    with _listen(serving.host, serving.port) as listener, _noting_signals() as received:
        application = app.build_app(store, settings)
        server = listening.build_server(application, *listener.getsockname()[:2], settings.limits)
        asyncio.run(_serve(server, store, settings, listener))
    code = ExitCode.SIGINT if received[:1] == [signal.SIGINT] else ExitCode.SIGTERM
    return int(code if received else ExitCode.DONE)


def build_store(config: RunConfig) -> Store:
    """The models that the flags name; none is loaded yet.

    Raises:
        PreflightError: code CHECKPOINT or FLAGS.
    """
    name = config.finetuning.chat_template
    template = None if name is None else load_chat_template(name)
    runtime = build_exact_runtime(config.system)
    for note in runtime.notes[:2]:
        log.info(note)
    entries, rows = find_entries(config.serving.serve), config.serving.serve_rows
    quantizes = check_quantize(config)

    def prepare(model: TokenModel, tokenizer: Tokenizer) -> TokenModel:
        if quantizes:
            return quantize_loaded(model, tokenizer, config, runtime)
        return choose_serving(model, rows)

    packs = not quantizes and packs_when_served(runtime.device, runtime.dtype)
    return Store(entries, runtime, rows, template, prepare, packs=packs)


@contextlib.contextmanager
def _listen(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that is bound to the address.

    Raises:
        PreflightError: code FLAGS, when it cannot be.
    """
    try:
        [(family, *_, address), *_] = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        listener = socket.create_server(address[:2], family=family)
    except OSError as error:
        why = {
            errno.EADDRINUSE: "another program uses it",
            errno.EACCES: "this user may not use it; ports below 1024 are the system's",
            errno.EADDRNOTAVAIL: "this machine does not have that address",
        }.get(error.errno or 0, error.strerror or str(error))
        raise PreflightError(
            ExitCode.FLAGS,
            f"cannot listen on {host}, port {port}: {why}",
            "choose another --port (0: any that is free) or --host",
        ) from None
    with listener:
        yield listener


@contextlib.contextmanager
def _noting_signals() -> Iterator[list[int]]:
    """The signals that came; uvicorn ends on each, and passes it on when it has ended."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)

    before: dict[int, Any] = {}
    for name in _STOPPING:
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) != signal.SIG_IGN:
            before[number] = signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


async def _serve(
    server: Server, store: Store, settings: AppSettings, listener: socket.socket
) -> None:
    """Load the first model, then answer until a signal comes."""
    await store.open(store.names()[0])
    _announce(store, settings, listener.getsockname()[1])
    watch = asyncio.create_task(_close_when_stopping(server, store))
    await server.serve([listener])
    if server.force_exit:  # a second Ctrl-C: the engine's threads are not waited for
        print_error("stopped")
        os._exit(int(ExitCode.SIGINT))
    await watch


async def _close_when_stopping(server: Server, store: Store) -> None:
    """Let running answers end when the server has been told to stop, then cancel them."""
    while not server.should_exit:
        await asyncio.sleep(0.1)
    log.info(
        f"stopping: running answers have {_GRACE_SECONDS:.0f} s to end; Ctrl-C again stops at once"
    )
    await store.close(_GRACE_SECONDS)


def _announce(store: Store, settings: AppSettings, port: int) -> None:
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    log.info(f"chat: http://{host}:{port}/   OpenAI interface: http://{host}:{port}/v1")
    log.info(f"models: {', '.join(store.names())}   Ctrl-C stops")
    if not is_loopback(settings.host):
        log.warning("connections are not encrypted: use it within a network that you trust")
