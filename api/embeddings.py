"""Texts as vectors: the last hidden states of the loaded model, their mean or that of the last token, of length 1.

The model was not made for it: the answers say so in a header. It serves programs that need some vector.
"""

import asyncio
import base64
import struct
import threading
from typing import Literal

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from .model_turns import model_for
from .openai_prompts import sources_of
from .problems import Problem
from .routes import Json, openai_error, route_class
from .sampling_fields import Open
from .service import Service

_MOST_TEXTS = 64
NOTE = "The loaded model writes text; it was not made for embeddings."


class EmbeddingRequest(Open):
    input: str | list[str] | list[int] | list[list[int]] = Field(min_length=1)
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    pooling: Literal["mean", "last"] = "mean"
    dimensions: int | None = Field(None, ge=1)


class _Texts:
    suffix = None

    def __init__(self, prompt: object) -> None:
        self.prompt = prompt


async def vectors_of(service: Service, request: Request, texts: object, pooling: str) -> tuple[list[list[float]], int]:
    """(a vector for each text or list of ids, tokens of all). Raises Problem, BadParameter."""
    loaded = await service.loaded()
    sources, _ends = await service.run_for(request, sources_of, loaded, _Texts(texts), "input")
    if len(sources) > _MOST_TEXTS:
        raise Problem("invalid", f"One request may have up to {_MOST_TEXTS} texts; found {len(sources)}.", "input")
    prompts = [await service.fit(request, each, 0, loaded=loaded) for each in sources]
    ids = [each.prompt.ids for each in prompts]
    cancel = threading.Event()
    watcher = asyncio.create_task(_watch(request, cancel))
    try:
        found = await service.run_for(request, loaded.embed, ids, pooling, cancel)
    finally:
        watcher.cancel()
    return found, sum(len(each) for each in ids)


async def _watch(request: Request, cancel: threading.Event) -> None:
    """Nothing is computed for a client that has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    cancel.set()


def build(service: Service) -> APIRouter:
    router = APIRouter(tags=["OpenAI"], route_class=route_class(service.keys, openai_error))

    @router.post("/v1/embeddings")
    async def embeddings(body: EmbeddingRequest, request: Request) -> Response:
        """Vectors of texts, from the last hidden states of the loaded model."""
        service.ignore("openai", [*body.unknown(), *(["dimensions"] if body.dimensions else [])])
        await model_for(service, request, body.model)
        if request.state.adapters:
            raise Problem("unsupported", "Embeddings are computed without LoRA adapters. Leave the adapter out.", "model")
        vectors, tokens = await vectors_of(service, request, body.input, body.pooling)

        def written(vector: list[float]) -> object:
            if body.encoding_format == "float":
                return vector
            return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()

        data = [{"object": "embedding", "index": at, "embedding": written(each)} for at, each in enumerate(vectors)]
        loaded = await service.loaded()
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        answer = {"object": "list", "data": data, "model": loaded.model.name, "usage": usage}
        return Json(answer, headers={"x-note": NOTE})

    return router
