"""Loading, unloading and downloading over HTTP, with tabbyAPI's names. They need an admin key where keys are needed.

Names in requests are compared with those of the models folders and never used as paths.
"""

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field
from starlette.responses import Response, StreamingResponse

from ..core.errors import GptqWebuiError
from ..core.model_ref import ModelRef
from ..loaders.text.built_in_templates import BUILT_IN
from . import prompt_fit
from .problems import Problem, of_error
from .routes import Json, admin, openai_error, route_class
from .sampling_fields import Open
from .service import Service
from .tgwui_routes import options_of

log = logging.getLogger(__name__)

_POLL_S = 0.2  # between looks at how far a load or a download is


class ModelParameters(BaseModel):
    max_seq_len: int
    max_batch_size: int
    prompt_template: str
    loader: str
    bits: int | None = None
    group_size: int | None = None
    desc_act: bool | None = None


class ListedModel(BaseModel):
    id: str
    object: str = "model"
    created: int
    owned_by: str = "gptq-webui"
    parameters: ModelParameters | None = None


class LoadRequest(Open):
    model_name: str
    max_seq_len: int | None = Field(None, ge=1)
    prompt_template: str | None = None
    loader: str | None = None
    options: dict[str, Any] | None = Field(None, description="Options of the loader, by name: dtype, device …")


class DownloadRequest(Open):
    repo_id: str = Field(description="owner/name or owner/name:branch")
    revision: str | None = None
    stream: bool = Field(False, description="Send the progress as server-sent events")


class EncodeRequest(Open):
    text: str
    add_bos_token: bool = True


class DecodeRequest(Open):
    tokens: list[int]


class TemplateRequest(Open):
    prompt_template_name: str


def build(service: Service) -> APIRouter:
    router = APIRouter(tags=["Administration"], route_class=route_class(service.keys, openai_error))

    @router.get("/v1/model", response_model=ListedModel)
    async def current() -> Response:
        """The loaded model and how it is loaded."""
        return Json((await _loaded_model(service)).model_dump())

    @router.get("/v1/model/list")
    async def listed() -> Response:
        models = [ListedModel(id=each.name, created=int(service.began)).model_dump() for each in await service.models()]
        return Json({"object": "list", "data": models})

    @router.post("/v1/model/load")
    @admin
    async def load(body: LoadRequest) -> Response:
        """Load a model in place of the loaded one. The progress comes as server-sent events, an error as the last one."""
        name = await service.find(body.model_name)
        options = options_of({**(body.options or {}), "max_seq_len": body.max_seq_len})
        service.ignore("load", body.unknown())
        await service.run(_require_loader, service, name, body.loader, options)
        return StreamingResponse(_load(service, name, body, options), media_type="text/event-stream")

    @router.post("/v1/model/unload")
    @admin
    async def unload() -> Response:
        await service.unload()
        return Json({"status": "ok"})

    @router.post("/v1/download")
    @admin
    async def download(body: DownloadRequest) -> Response:
        """Download into the first models folder. Waits for the end; with `stream`, sends the progress."""
        if (body.model_extra or {}).get("token"):
            raise Problem("unsupported", "This server takes no token over HTTP. Set HF_TOKEN where it runs.", "token")
        service.ignore("download", body.unknown())
        text = f"{body.repo_id}:{body.revision}" if body.revision and ":" not in body.repo_id else body.repo_id
        ref = service.downloads.start(text)
        if body.stream:
            return StreamingResponse(_progress(service, ref), media_type="text/event-stream")
        async for _line in _progress(service, ref):
            pass
        status = service.downloads.status(ref)
        if status is None or status.state != "done":
            raise Problem("elsewhere", status.text if status else "The download was not started.")
        return Json({"download_path": status.folder})

    @router.get("/v1/download")
    @admin
    async def downloads() -> Response:
        """The running downloads."""
        return Json({"data": [_download(each) for each in service.downloads.active()]})

    @router.post("/v1/download/stop")
    @admin
    async def stop_downloads() -> Response:
        """Stop them; what has arrived is kept."""
        service.downloads.pause()
        return Json({"status": "ok"})

    @router.get("/v1/queue")
    async def queue() -> Response:
        """How many requests run, wait, and may wait."""
        found = service.queue
        requests = [
            {"client": "" if service.keys.required else each.ticket.client, "ahead": each.ticket.ahead}
            for each in service.answers()
        ]
        return Json({"running": found.running, "waiting": found.waiting, "limit": found.limit, "requests": requests})

    @router.post("/v1/token/encode")
    async def encode(body: EncodeRequest, request: Request) -> Response:
        loaded = await service.loaded()
        ids = await service.run_for(request, lambda: prompt_fit.encode(loaded, body.text, bos=body.add_bos_token))
        return Json({"tokens": ids, "length": len(ids)})

    @router.post("/v1/token/decode")
    async def decode(body: DecodeRequest, request: Request) -> Response:
        return Json({"text": await service.run_for(request, prompt_fit.decode, await service.loaded(), body.tokens)})

    @router.get("/v1/template/list")
    async def templates() -> Response:
        return Json({"object": "list", "data": list(BUILT_IN)})

    @router.post("/v1/template/switch")
    @admin
    async def switch(body: TemplateRequest) -> Response:
        """Use a built-in chat template for the loaded model, and remember it."""
        await service.set_template(body.prompt_template_name)
        return Json({"status": "ok"})

    @router.post("/v1/template/unload")
    @admin
    async def back() -> Response:
        """Use the model's own template again."""
        await service.set_template(None)
        return Json({"status": "ok"})

    @router.get("/v1/auth/permission")
    async def permission(request: Request) -> Response:
        return Json({"permission": "admin" if request.state.caller.admin else "api"})

    return router


async def _loaded_model(service: Service) -> ListedModel:
    loaded, choice = await service.loaded(), service.engine.choice
    quantize = loaded.model.quantize
    parameters = ModelParameters(
        max_seq_len=loaded.context_tokens,
        max_batch_size=loaded.parallel,
        prompt_template=loaded.template.name,
        loader=choice.loader.name if choice is not None else "",
        bits=quantize.bits if quantize else None,
        group_size=quantize.group_size if quantize else None,
        desc_act=quantize.desc_act if quantize else None,
    )
    return ListedModel(id=loaded.model.name, created=int(service.began), parameters=parameters)


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(body).encode() + b"\n\n"


def _require_loader(service: Service, name: str, loader: str | None, options: dict[str, Any]) -> None:
    """Raises LoadRefused, whose status a stream could not have any more."""
    service.engine.planner.choose(service.engine.library.get(name), loader, options)


async def _load(service: Service, name: str, body: LoadRequest, options: dict[str, Any]) -> AsyncIterator[bytes]:
    """A client that leaves does not end the load: half a load is no model."""

    async def load() -> None:
        await service.load(name, body.loader, options)
        if body.prompt_template:
            await service.set_template(body.prompt_template)

    def event(percent: int, status: str, text: str) -> bytes:
        return _event({"model_type": "model", "module": percent, "modules": 100, "status": status, "text": text})

    job = asyncio.create_task(load())
    job.add_done_callback(lambda done: done.cancelled() or done.exception())  # or asyncio reports an error that nobody fetched
    sent = -1
    while not job.done():
        status = service.engine.status
        percent = round(status.share * 100)
        if percent != sent:
            sent = percent
            yield event(percent, "processing", status.text)
        await asyncio.wait([job], timeout=_POLL_S)
    error = job.exception()  # also what is no Exception: a panic in a tokenizer's library
    if error is None:
        yield event(100, "finished", service.engine.status.text)
    else:
        yield b"data: " + openai_error(_load_problem(error)).body + b"\n\n"


def _load_problem(error: BaseException) -> Problem:
    if isinstance(error, GptqWebuiError):
        return of_error(error)
    log.error("a load over HTTP failed", exc_info=error)
    return Problem("failed", "The model could not be loaded; the server's log says why. Nothing is loaded now.")


async def _progress(service: Service, ref: ModelRef) -> AsyncIterator[bytes]:
    sent = ""
    while True:
        status = service.downloads.status(ref)
        if status is None:
            return
        if status.text != sent:
            sent = status.text
            yield _event(_download(status))
        if not status.active:
            return
        await asyncio.sleep(_POLL_S)


def _download(status: Any) -> dict[str, Any]:
    return {
        "repo": str(status.ref),
        "state": status.state,
        "share": round(status.share, 4),
        "text": status.text,
        "folder": status.folder,
    }
