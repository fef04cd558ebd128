"""The HTTP application: OpenAI's endpoints, the chat page, health and metrics."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from importlib import resources
from typing import Any, Protocol

from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp

from preflight.core.errors import ExitCode, PreflightError
from preflight.serving.answering import AnswerResponse, Prompted
from preflight.serving.errors import ApiError, encode_json, quote, wrong
from preflight.serving.guard import Access, Guard
from preflight.serving.limits import Limits
from preflight.serving.metrics import Metrics
from preflight.serving.protocol import ModelStore, QueueFullError, ServedModel
from preflight.serving.requests import (
    AnswerRequest,
    Prompt,
    read_body,
    read_chat,
    read_completion,
)
from preflight.serving.responses import ChatForm, TextForm
from preflight.settings import SamplingConfig
from preflight.tokenization.chats import PromptTooLongError

_PAGE_POLICY = (
    "default-src 'none'; script-src 'nonce-{0}'; style-src 'nonce-{0}'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class AppSettings(Access, Protocol):
    """What the application reads of the settings."""

    @property
    def limits(self) -> Limits:
        """Bounds on connections and requests."""

    @property
    def sampling(self) -> SamplingConfig:
        """How tokens are chosen where a request does not say it."""


def build_app(store: ModelStore, settings: AppSettings) -> ASGIApp:
    """The application; it neither opens nor closes the store."""
    metrics = Metrics()
    api = _Api(store, settings, metrics)
    routes = [
        Route("/", api.page),
        Route("/health", api.health),
        Route("/metrics", api.metrics),
        Route("/v1/models", api.list_models),
        Route("/v1/models/{name:path}", api.describe_model),
        Route("/v1/chat/completions", api.chat, methods=["POST"]),
        Route("/v1/completions", api.complete, methods=["POST"]),
    ]
    # Redirects would repeat the Host that the client wrote.
    return Guard(Router(routes, redirect_slashes=False), settings, settings.limits, metrics)


class _Api:
    """The endpoints."""

    def __init__(self, store: ModelStore, settings: AppSettings, metrics: Metrics) -> None:
        self._store, self._settings, self._metrics = store, settings, metrics
        self._page = resources.files("preflight.serving").joinpath("assets/page.html").read_text()
        self._encoding = asyncio.Lock()  # one prompt at a time: tokenizers and templates are shared

    async def page(self, request: Request) -> Response:
        """The chat page. Only its own script and style run: they carry a number used once."""
        nonce = secrets.token_urlsafe(16)
        headers = {
            "Content-Security-Policy": _PAGE_POLICY.format(nonce),
            "Cache-Control": "no-store",
        }
        page = self._page.replace("__NONCE__", nonce)
        return Response(page, media_type="text/html", headers=headers)

    async def health(self, request: Request) -> Response:
        """That the server lives; with the key also how it is."""
        told: dict[str, Any] = {"status": "ok"}
        if request.scope["has_key"]:
            told["models"] = self._store.describe()
        return _json(told)

    async def metrics(self, request: Request) -> Response:
        """Counters for Prometheus."""
        text = self._metrics.text(self._store.describe())
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    async def list_models(self, request: Request) -> Response:
        """The names of all models, the default one first."""
        models = [self._model(name) for name in self._store.names()]
        return _json({"object": "list", "data": models})

    async def describe_model(self, request: Request) -> Response:
        """One model."""
        name = request.path_params["name"]
        if name not in self._store.names():
            raise _no_model(name)
        return _json(self._model(name))

    async def chat(self, request: Request) -> Response:
        """The next turn of a conversation."""
        wanted = read_chat(await self._read(request), self._settings.sampling)
        model = await self._open(wanted.model)
        async with self._encoding:
            prompt = await asyncio.to_thread(_encode_chat, model, wanted)
        return self._answer(model, wanted, [prompt], ChatForm(model.name))

    async def complete(self, request: Request) -> Response:
        """What follows a text."""
        wanted = read_completion(await self._read(request), self._settings.sampling)
        model = await self._open(wanted.model)
        prompts = []
        for i, prompt in enumerate(wanted.prompts):
            place = f"prompt[{i}]" if len(wanted.prompts) > 1 else "prompt"
            async with self._encoding:
                ids = await asyncio.to_thread(_encode_prompt, model, prompt, place)
            check_length(model, ids, place, wanted.max_tokens)
            prompts.append(await _add_echo(model, wanted, prompt, ids))
        return self._answer(model, wanted, prompts, TextForm(model.name))

    def _model(self, name: str) -> dict[str, Any]:
        told = self._store.describe().get(name, {})
        created = int(told.get("created", 0))
        return {"id": name, "object": "model", "created": created, "owned_by": "preflight"}

    async def _read(self, request: Request) -> dict[str, Any]:
        try:
            return await read_body(request, self._settings.limits)
        except ClientDisconnect:
            raise ApiError(400, "the body broke off") from None  # nobody reads this

    async def _open(self, name: str | None) -> ServedModel:
        """The model of that name, loaded.

        Raises:
            ApiError: 404 or 503.
        """
        names = self._store.names()
        chosen = names[0] if name is None else name
        try:
            return await self._store.open(chosen)
        except KeyError:
            raise _no_model(chosen) from None
        except PreflightError as error:
            raise ApiError(
                503, f"the model could not be loaded: {error.lines[0]}", code="model_not_loaded"
            ) from None

    def _answer(
        self,
        model: ServedModel,
        wanted: AnswerRequest,
        prompts: Sequence[Prompted],
        form: ChatForm | TextForm,
    ) -> Response:
        return AnswerResponse(model, wanted, prompts, form, self._settings.limits, self._metrics)


# ---- prompts ----------------------------------------------------------------------------------


def _encode_chat(model: ServedModel, wanted: AnswerRequest) -> Prompted:
    """The ids of a chat; an answer without a limit gets a quarter of the context at least."""
    try:
        ids = model.encode_chat(wanted.messages, wanted.max_tokens or model.context_length // 4)
    except PromptTooLongError as error:
        raise _too_long("messages", "; ".join(error.lines[:1])) from None
    except PreflightError as error:
        raise _refuse_text("messages", error) from None
    check_length(model, ids, "messages", None)
    return Prompted(tuple(ids))


def _encode_prompt(model: ServedModel, prompt: Prompt, place: str) -> list[int]:
    try:
        if isinstance(prompt, str):
            return model.encode_text(prompt)
        model.check_ids(prompt)
        return list(prompt)
    except ValueError as error:
        raise wrong(place, f"has wrong ids: {error}") from None
    except PreflightError as error:
        raise _refuse_text(place, error) from None


async def _add_echo(
    model: ServedModel, wanted: AnswerRequest, prompt: Prompt, ids: Sequence[int]
) -> Prompted:
    """A prompt, with what `echo` puts before the completion."""
    if not wanted.echo:
        return Prompted(tuple(ids))
    if isinstance(prompt, str) and wanted.sampling.logprobs is None:
        return Prompted(tuple(ids), prompt)
    try:
        scored = await model.score(ids, wanted.sampling.logprobs or 0)
    except QueueFullError as error:
        retry = {"Retry-After": str(error.retry_after_seconds)}
        raise ApiError(503, str(error), code="overloaded", headers=retry) from None
    return Prompted(tuple(ids), scored=tuple(scored))


def check_length(
    model: ServedModel, ids: Sequence[int], place: str, max_tokens: int | None
) -> None:
    """ApiError 400 for a prompt that is empty or leaves no room for a token."""
    if not ids:
        raise wrong(place, "has no token")
    room = model.context_length - (max_tokens != 0)
    if len(ids) > room:
        raise _too_long(place, f"it has {len(ids):,} tokens")


def _too_long(place: str, what: str) -> ApiError:
    return ApiError(
        400,
        f"{place} does not fit into this model's context length: {what}",
        param=place,
        code="context_length_exceeded",
    )


def _refuse_text(place: str, error: PreflightError) -> ApiError:
    """What the tokenizer or the template says of a text; other faults are the model's."""
    if error.code == ExitCode.TEXT:
        return wrong(place, "cannot be read: " + error.lines[0])
    return ApiError(503, f"the model failed: {error.lines[0]}", code="model_error")


# ---- small answers ----------------------------------------------------------------------------


def _json(value: Any) -> Response:
    headers = {"Cache-Control": "no-store"}
    return Response(encode_json(value), media_type="application/json", headers=headers)


def _no_model(name: str) -> ApiError:
    return ApiError(
        404,
        f"there is no model {quote(name)}: GET /v1/models lists them",
        param="model",
        code="model_not_found",
    )
