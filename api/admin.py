"""Loading, unloading and downloading over HTTP, in tabbyAPI's words. They need an admin key where keys are asked for.

Names from outside are compared with the names of the models folders and are never used as paths.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field
from starlette.responses import Response, StreamingResponse

from ..core.errors import GptqWebuiError
from ..core.model_ref import ModelRef
from ..loaders.text.built_in_templates import BUILT_IN
from .openai import text_of
from .problems import Problem, of_error
from .routes import Json, admin, openai_error, route_class
from .sampling_fields import Open
from .service import Service, require_text
from .tgwui_routes import options_of

_LOOK_S = 0.2


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
    options: dict[str, Any] | None = Field(None, description="As the loader's options are called: dtype, device …")


class DownloadRequest(Open):
    repo_id: str = Field(description="owner/name or owner/name:branch")
    revision: str | None = None
    stream: bool = Field(False, description="Tell the progress as server-sent events")


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
        """The loaded model, as it is loaded."""
        return Json((await _gpu(service)).model_dump())

    @router.get("/v1/model/list")
    async def listed() -> Response:
        cards = [ListedModel(id=each.name, created=int(service.began)).model_dump() for each in service.models()]
        return Json({"object": "list", "data": cards})

    @router.post("/v1/model/load")
    @admin
    async def load(asked: LoadRequest) -> Response:
        """In place of the loaded model; the progress comes as server-sent events."""
        name = service.find(asked.model_name)
        options = options_of({**(asked.options or {}), "max_seq_len": asked.max_seq_len})
        service.ignore("load", asked.unknown())
        model = service.engine.library.get(name)
        service.engine.planner.choose(model, asked.loader, options)  # a refusal has its own status
        return StreamingResponse(_load(service, name, asked, options), media_type="text/event-stream")

    @router.post("/v1/model/unload")
    @admin
    async def unload() -> Response:
        await service.run(service.engine.unload)
        return Json({"status": "ok"})

    @router.post("/v1/download")
    @admin
    async def download(asked: DownloadRequest) -> Response:
        """Into the first models folder. Waits for the end, or streams the progress."""
        if (asked.model_extra or {}).get("token"):
            raise Problem("unsupported", "A token is not taken over HTTP. Set HF_TOKEN where the server runs.", "token")
        service.ignore("download", asked.unknown())
        require_text(asked.repo_id + (asked.revision or ""))
        text = f"{asked.repo_id}:{asked.revision}" if asked.revision and ":" not in asked.repo_id else asked.repo_id
        ref = service.downloads.start(text)
        if asked.stream:
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
        """The downloads that run."""
        return Json({"data": [_download(each) for each in service.downloads.active()]})

    @router.post("/v1/download/stop")
    @admin
    async def stop_downloads() -> Response:
        """Stop them; what arrived is kept."""
        service.downloads.pause()
        return Json({"status": "ok"})

    @router.get("/v1/queue")
    async def queue() -> Response:
        """How many requests are answered, wait, and may wait."""
        line = service.queue
        running = [
            {"client": "" if service.keys.required else each.place.client, "ahead": each.place.ahead}
            for each in service.answers()
        ]
        return Json({"running": line.running, "waiting": line.waiting, "limit": line.limit, "requests": running})

    @router.get("/props")
    async def props() -> Response:
        loaded = await service.loaded()
        settings = {"n_ctx": loaded.context_tokens}
        return Json(
            {"total_slots": loaded.parallel, "chat_template": loaded.template.jinja, "default_generation_settings": settings}
        )

    @router.post("/v1/token/encode")
    async def encode(asked: EncodeRequest) -> Response:
        ids = await service.encode((await service.loaded()), asked.text, bos=asked.add_bos_token)
        return Json({"tokens": ids, "length": len(ids)})

    @router.post("/v1/token/decode")
    async def decode(asked: DecodeRequest) -> Response:
        return Json({"text": text_of((await service.loaded()), asked.tokens)})

    @router.get("/v1/template/list")
    async def templates() -> Response:
        return Json({"object": "list", "data": list(BUILT_IN)})

    @router.post("/v1/template/switch")
    @admin
    async def switch(asked: TemplateRequest) -> Response:
        """Use one of the built-in chat templates for the loaded model, and remember that."""
        service.engine.set_template(asked.prompt_template_name)
        return Json({"status": "ok"})

    @router.post("/v1/template/unload")
    @admin
    async def back() -> Response:
        """The model's own template again."""
        service.engine.set_template(None)
        return Json({"status": "ok"})

    @router.get("/v1/auth/permission")
    async def permission(request: Request) -> Response:
        return Json({"permission": "admin" if request.state.caller.admin else "api"})

    return router


async def _gpu(service: Service) -> ListedModel:
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


async def _load(service: Service, name: str, asked: LoadRequest, options: dict[str, Any]) -> AsyncIterator[bytes]:
    """It is not ended by a client that leaves: half a load is no model."""
    job = asyncio.create_task(service.load(name, asked.loader, options))
    job.add_done_callback(lambda done: done.cancelled() or done.exception())  # heard, even if nobody listens any more
    told = -1
    while not job.done():
        share = round(service.engine.status.share * 100)
        if share != told:
            told = share
            yield _event(
                {
                    "model_type": "model",
                    "module": share,
                    "modules": 100,
                    "status": "processing",
                    "text": service.engine.status.text,
                }
            )
        await asyncio.wait([job], timeout=_LOOK_S)
    try:
        job.result()
        if asked.prompt_template:
            service.engine.set_template(asked.prompt_template)
        yield _event({"model_type": "model", "module": 100, "modules": 100, "status": "finished"})
    except GptqWebuiError as error:
        yield b"data: " + openai_error(of_error(error)).body + b"\n\n"


async def _progress(service: Service, ref: ModelRef) -> AsyncIterator[bytes]:
    told = ""
    while True:
        status = service.downloads.status(ref)
        if status is None:
            return
        if status.text != told:
            told = status.text
            yield _event(_download(status))
        if not status.active:
            return
        await asyncio.sleep(_LOOK_S)


def _download(status: Any) -> dict[str, Any]:
    return {
        "repo": str(status.ref),
        "state": status.state,
        "share": round(status.share, 4),
        "text": status.text,
        "folder": status.folder,
    }
