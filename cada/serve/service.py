"""
An index as a service over HTTP: searches; embeddings in OpenAI's form; images ranked again in that of Cohere and vLLM.

    cada serve INDEX

One process, one model. The page of `cada page` is at `/` where Gradio is installed. Where the index is brought up to
date meanwhile, the service goes on with the new one.
"""

import asyncio
import base64
import binascii
import hmac
import ipaddress
import math
import os
import re
import signal
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from uuid import uuid4

import numpy as np
import torch
import uvicorn
from anyio import CapacityLimiter
from anyio.to_thread import run_sync
from fastapi import APIRouter, Depends, FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.security import HTTPBearer
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

import cada.gallery.page
from cada.data.images import open_image
from cada.files import CADAError, counted, one_line, printable
from cada.gallery.index import LiveIndex, open_index
from cada.serve.batches import (
    Batcher,
    RequestError,
    embed_images,
    embed_sentences,
    rank_images,
    search_images,
    search_sentences,
)
from cada.serve.messages import (
    DATA_URL,
    Embedding,
    EmbeddingAnswer,
    EmbeddingRequest,
    ErrorAnswer,
    Found,
    Health,
    Model,
    Models,
    Problem,
    Relevance,
    RerankAnswer,
    RerankRequest,
    SearchAnswer,
    SearchRequest,
    Usage,
    told,
)


KEY = "CADA_API_KEY"
MAX_BODY = 10_000_000  # bytes
MAX_WAITING = 256  # requests
DRAINING = 60  # seconds at the end for requests at work
_DECODERS = 2  # images decoded at once, as one may have 90 million pixels
_ASKING = {"/search", "/v1/embeddings", "/rerank", "/v1/rerank", "/v2/rerank"}
_PATHS = _ASKING | {"/v1/models", "/health", "/metrics", "/openapi.json"}


class Service:
    """
    What the routes share: the index, the requests that wait, and what is counted.

    Args:
        live: the index; its model is loaded.
        key: what requests have to know; `None` for no key.
        max_waiting: requests that may wait or be at work; a further one is sent away with status 503.
    """

    def __init__(self, live: LiveIndex, key: str | None = None, max_waiting: int = MAX_WAITING):
        self.live, self.key, self.max_waiting, self.waiting = live, key, max_waiting, 0
        name = live.gallery.model_name
        self.model_name = Path(name).name if os.path.isabs(name) else name
        self.metrics = CollectorRegistry()
        ProcessCollector(registry=self.metrics)
        self.requests = Counter("cada_requests", "Requests answered", ["path", "status"], registry=self.metrics)
        self.seconds = Histogram("cada_request_seconds", "Time to the answer", ["path"], registry=self.metrics)
        sizes = (1, 2, 4, 8, 16, 32, 64)
        batches = Histogram("cada_batch_requests", "Computed together", buckets=sizes, registry=self.metrics)
        waiting = Gauge("cada_requests_waiting", "Requests that wait or are at work", registry=self.metrics)
        waiting.set_function(lambda: self.waiting)
        images = Gauge("cada_index_images", "Images in the index", registry=self.metrics)
        images.set_function(lambda: len(live.gallery))
        self.batcher = Batcher(live, batches.observe)
        self._decoders = CapacityLimiter(_DECODERS)
        self._latest = 1.0  # seconds that the request took which was answered last

    def check_model(self, name: str | None) -> None:
        """Status 404, as of OpenAI and vLLM, for another model than the one that is here."""
        if name not in (None, self.model_name):
            raise HTTPException(
                404, f"The model {name!r:.200} is not here. Ask for {self.model_name!r}, or leave `model` out."
            )

    def check_search(self, *question) -> None:
        """A `RequestError` for what the index, or its model, cannot answer; see [`GalleryIndex.check`]."""
        try:
            self.live.gallery.check(*question)
        except CADAError as error:
            raise RequestError(str(error)) from error

    async def pixel_values(self, **urls: str) -> torch.Tensor:
        """Images `(images, 3, height, width)` from data URLs; a `RequestError` names what is wrong."""
        return await run_sync(self._decode, urls, limiter=self._decoders)

    def _decode(self, urls: dict[str, str]) -> torch.Tensor:
        processor, images = self.live.gallery.processor, []
        for name, url in urls.items():
            head, comma, content = url.partition(",")
            try:
                if not comma or not head.endswith(";base64"):
                    raise CADAError("there is no `;base64,` before its content")
                content = base64.b64decode(content, validate=True)
                image = open_image({"bytes": content, "path": None}, processor.image_size)
            except (CADAError, binascii.Error, ValueError) as error:
                raise RequestError(f"{name}: the image cannot be read: {one_line(error)}. Repair it.") from error
            images.append(processor(images=image, return_tensors="pt")["pixel_values"])
        return torch.cat(images)

    def knows_key(self, authorization: bytes) -> bool:
        """Whether a header names the key: `Bearer KEY`, or as a browser asks for it: `Basic` with any user name."""
        kind, _, given = authorization.partition(b" ")
        if kind.lower() == b"basic":
            with suppress(binascii.Error):
                given = base64.b64decode(given).partition(b":")[2]
        elif kind.lower() != b"bearer":
            return False
        return hmac.compare_digest(given.strip(), self.key.encode())

    def count(self, path: str, status: int, seconds: float) -> None:
        """Note an answer."""
        label = path if path in _PATHS else "page"
        self.requests.labels(label, status).inc()
        self.seconds.labels(label).observe(seconds)
        if path in _ASKING and status == 200:
            self._latest = seconds

    @property
    def retry_after(self) -> int:
        """Seconds after which a request that is sent away may come again: what the latest one took."""
        return max(1, math.ceil(self._latest))


def _error(status: int, message: str, kind: str = "invalid_request_error", param: str | None = None, **headers):
    answer = ErrorAnswer(error=Problem(message=printable(message), type=kind, param=param and printable(param)))
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return JSONResponse(answer.model_dump(), status, headers=named)


class _Gate:
    """What a request passes first: key or host, the number of those that wait, its size. It counts the answers."""

    def __init__(self, app, service: Service):
        self.app, self.service = app, service

    def _refusal(self, path: str, headers: dict[bytes, bytes]) -> Response | None:
        service, host = self.service, headers.get(b"host", b"").decode("latin-1")
        if not service.key and not _is_loopback(re.sub(r":\d*$", "", host).strip("[]")):
            # A page of another name that points to this machine, say.
            return _error(400, f"The host {host!r:.200} is not served without a key. Call 127.0.0.1, or set {KEY}.")
        if service.key and path != "/health":
            if not service.knows_key(headers.get(b"authorization", b"")):
                message = f"The key is missing or wrong. Send the header `Authorization: Bearer KEY` (see {KEY})."
                return _error(401, message, WWW_Authenticate='Basic realm="cada", charset="UTF-8"')
        if path in _ASKING and service.waiting >= service.max_waiting:
            message = f"{service.waiting} requests wait already. Come again later."
            return _error(503, message, "overloaded_error", Retry_After=str(service.retry_after))
        return None

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        path, begin, status = scope["path"], time.monotonic(), 500
        headers = dict(scope["headers"])
        announced, size = int(headers.get(b"content-length", b"0")), 0

        async def limited():
            nonlocal size
            message = await receive() if announced <= MAX_BODY else {}
            size += len(message.get("body", b""))
            if max(announced, size) > MAX_BODY:
                raise HTTPException(
                    413, f"The body has more than {MAX_BODY:,} bytes. Send less at once, or smaller images."
                )
            return message

        async def noting(message):
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        refusal = self._refusal(path, headers)
        waits = refusal is None and path in _ASKING
        self.service.waiting += waits
        try:
            await (refusal or self.app)(scope, limited, noting)
        finally:
            self.service.waiting -= waits
            self.service.count(path, status, time.monotonic() - begin)


def build_app(service: Service) -> FastAPI:
    """The routes."""

    @asynccontextmanager
    async def lifespan(app):
        work = asyncio.create_task(service.batcher.run())
        yield
        work.cancel()

    errors = {"4XX": {"model": ErrorAnswer, "description": "What is wrong with the request"}}
    app = FastAPI(
        title="CADA",
        description="Find a person by a sentence.",
        version="1",
        docs_url=None,  # it would load scripts from the internet
        redoc_url=None,
        lifespan=lifespan,
        responses=errors,
    )
    app.add_middleware(_Gate, service=service)
    _answer_errors(app)
    keyed = APIRouter(dependencies=[Depends(HTTPBearer(auto_error=False, description=f"{KEY}, where it is set"))])
    _add_search(keyed, service)
    _add_models(keyed, service)
    _add_metrics(keyed, service)
    app.include_router(keyed)

    @app.get("/health")
    async def health() -> Health:
        """Whether the service is there. Needs no key."""
        return Health()

    return app


_BUSY = {503: {"model": ErrorAnswer, "description": "Too many requests wait: come again after `Retry-After` seconds"}}


def _answer_errors(app: FastAPI) -> None:
    @app.exception_handler(RequestValidationError)
    async def invalid(request, error: RequestValidationError):
        names, sentences = zip(*map(told, error.errors()[:5]))
        return _error(400, " ".join(sentences), param=names[0])

    @app.exception_handler(RequestError)
    async def wrong(request, error: RequestError):
        return _error(400, one_line(error))

    @app.exception_handler(CADAError)
    async def broken(request, error: CADAError):  # the index or its images are gone, say
        return _error(500, one_line(error), "server_error")

    @app.exception_handler(HTTPException)
    async def refused(request, error: HTTPException):
        message = str(error.detail)
        if message in ("Not Found", "Method Not Allowed"):
            message = f"{request.method} {request.url.path}: {message}. GET /openapi.json tells what there is."
        return _error(error.status_code, message, **(error.headers or {}))

    @app.exception_handler(Exception)
    async def failed(request, error: Exception):
        return _error(500, "This failed. More stands where the service was started.", "server_error")


def _add_search(keyed: APIRouter, service: Service) -> None:
    @keyed.post("/search", responses=_BUSY)
    async def search(body: SearchRequest) -> SearchAnswer:
        """Rank the images of the index for a sentence, or for the image of a person."""
        is_sentence = body.image is None
        rerank = body.rerank if is_sentence else 0
        service.check_search(body.top, rerank, body.where, body.min_probability, is_sentence)
        ask, where = service.batcher.ask, tuple(body.where)
        if is_sentence:
            question = (body.sentence, body.top)
            ranking = await ask(search_sentences, question, rerank, where, body.min_probability)
        else:
            pixel_values = await service.pixel_values(image=body.image)
            ranking = await ask(search_images, (pixel_values, body.top), where)
        found = [] if ranking.nobody_fits else ranking[: body.top]
        results = [Found(**asdict(result)) for result in found]
        return SearchAnswer(results=results, read_up_to=ranking.read_up_to, left_out=ranking.left_out)


def _add_models(keyed: APIRouter, service: Service) -> None:
    @keyed.get("/v1/models")
    async def models() -> Models:
        """The model, in OpenAI's form."""
        return Models(data=[Model(id=service.model_name)])

    @keyed.get("/v1/models/{name:path}")  # a name on the Hub has a slash
    async def model(name: str) -> Model:
        """The model by its name, in OpenAI's form."""
        service.check_model(name)
        return Model(id=name)

    @keyed.post("/v1/embeddings", responses=_BUSY)
    async def embeddings(body: EmbeddingRequest) -> EmbeddingAnswer:
        """Normalised features of sentences and images, in OpenAI's form."""
        service.check_model(body.model)
        dimension = service.live.gallery.record["dimension"]
        if body.dimensions not in (None, dimension):
            raise RequestError(f"`dimensions` is {body.dimensions}, and the model has {dimension}. Leave it out.")
        images = {f"input.{place}": url for place, url in enumerate(body.input) if url.startswith(DATA_URL)}
        texts = [text for text in body.input if not text.startswith(DATA_URL)]
        features = torch.empty(len(body.input), dimension)
        is_image = torch.tensor([text.startswith(DATA_URL) for text in body.input])
        tokens = 0
        if texts:
            features[~is_image], tokens = await service.batcher.ask(embed_sentences, texts, size=len(texts))
        if images:
            pixel_values = await service.pixel_values(**images)
            features[is_image] = await service.batcher.ask(embed_images, pixel_values, size=len(images))
        form = _as_base64 if body.encoding_format == "base64" else torch.Tensor.tolist
        data = [Embedding(index=place, embedding=form(feature)) for place, feature in enumerate(features)]
        usage = Usage(prompt_tokens=tokens, total_tokens=tokens)
        return EmbeddingAnswer(data=data, model=service.model_name, usage=usage)

    # Cohere's client asks for the last, vLLM has all three.
    @keyed.post("/rerank", responses=_BUSY)
    @keyed.post("/v1/rerank", include_in_schema=False)
    @keyed.post("/v2/rerank", include_in_schema=False)
    async def rerank(body: RerankRequest) -> RerankAnswer:
        """Rank images for a sentence by both matchings, in the form of Cohere and vLLM."""
        service.check_model(body.model)
        if body.return_documents:
            raise RequestError("`return_documents`: a result tells the `index` of its document. Leave it out.")
        urls = {f"documents.{place}": url for place, url in enumerate(body.documents)}
        pixel_values = await service.pixel_values(**urls)
        ranking, tokens = await service.batcher.ask(rank_images, (body.query, pixel_values), size=len(urls))
        results = [Relevance(index=place, relevance_score=score) for place, score in ranking[: body.top_n]]
        usage = Usage(prompt_tokens=tokens, total_tokens=tokens)
        return RerankAnswer(id=f"rerank-{uuid4().hex}", model=service.model_name, results=results, usage=usage)


def _as_base64(feature: torch.Tensor) -> str:
    return base64.b64encode(np.asarray(feature, dtype="<f4").tobytes()).decode()


def _add_metrics(keyed: APIRouter, service: Service) -> None:
    @keyed.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """Counts and times, for Prometheus."""
        return Response(generate_latest(service.metrics), media_type=CONTENT_TYPE_LATEST)


class _Server(uvicorn.Server):
    """Ends the page's open connections when it begins to drain, which would last as long as the browser."""

    def __init__(self, config: uvicorn.Config, ending: Callable[[], None]):
        super().__init__(config)
        self.ending = ending

    def handle_exit(self, sig, frame) -> None:
        self.ending()
        super().handle_exit(sig, frame)


def _is_loopback(host: str) -> bool:
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host.lower() == "localhost"


def _check_host(host: str, key: str | None) -> None:
    """A `CADAError` for what is no address, and without a key for one of the network."""
    if ":" in host or not any(map(str.isalpha, host)):  # a name has letters
        try:
            ipaddress.ip_address(host)
        except ValueError as error:
            raise CADAError(f"--host {host!r} is no address. Give one such as 0.0.0.0, or leave it out.") from error
    if not key and not _is_loopback(host):
        raise CADAError(
            f"--host {host} is for other machines, too. Set {KEY} to a key that they have to send, or leave --host "
            "out."
        )


def serve_until_stopped(index: Path, model: str | None, device: str | None, host: str, port: int) -> None:
    """
    The service of an index, until Ctrl+C or SIGTERM; requests at work are answered then, for at most `DRAINING`
    seconds.

    Raises:
        CADAError: for a wrong address, one of the network without a key, a port that is taken, or no index.
    """
    key = os.environ.get(KEY)
    _check_host(host, key)
    live = LiveIndex(open_index(index, model, device))
    service = Service(live, key)
    live.gallery.model  # noqa: B018  # loads it
    app = build_app(service)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that also then the page's copies are deleted
    with ExitStack() as stack:
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            listening = stack.enter_context(socket.create_server((host, port), family=family))
            # asyncio does it for sockets of its own only, and without it an answer waits 40 ms for the client.
            listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except OSError as error:
            raise CADAError(
                f"{host}, port {port} cannot be used: {error}. Choose another --port or --host."
            ) from error
        ending = lambda: None  # noqa: E731
        if cada.gallery.page.gr is not None:
            ending = stack.enter_context(cada.gallery.page.mounted(app, live))
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=DRAINING)
        images = counted(len(live.gallery), "image")
        print(
            f"Serving {images} with the model {service.model_name} at http://{host}:{port}/ Ctrl+C ends it.",
            flush=True,
        )
        with suppress(KeyboardInterrupt):  # the way to end it
            _Server(config, ending).run([listening])
