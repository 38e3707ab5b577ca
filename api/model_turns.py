"""Which model answers a request that names one.

The loaded model answers, whatever name a request gives: programs send names like gpt-4. A local model that is not loaded
is loaded in turn where the owner allows it, else refused, since another model than the chosen one would answer.
"""

import asyncio
import contextlib
import logging
import time

from starlette.requests import Request

from ..core.errors import BadModelName, Busy, GptqWebuiError
from ..core.model_ref import ModelRef
from ..engine import load_on_request
from ..engine.engine import Engine
from ..loaders.contract.base import LoadedModel
from .model_gate import NO_MODEL
from .problems import Problem
from .service import Service

log = logging.getLogger(__name__)

_POLL_S = 0.1
_PAGE_S = 600.0  # a load waits so long for an answer in the page


async def model_for(service: Service, request: Request, name: str | None) -> LoadedModel:
    """The model of a name, or of `name:adapter`: then this request is answered with that LoRA adapter.

    Raises Problem not_found if a local model is named that may not be loaded; QueueFull, GptqWebuiError of a load."""
    wanted, adapter = await _local(service, name), ""
    if wanted is None and name and ":" in name and (found := await _with_adapter(service, name)):
        wanted, adapter = found
    request.state.adapters = ((adapter, 1.0),) if adapter else ()
    if wanted is None:
        return await service.loaded()
    if not _may_load(service, request):
        loaded = await service.loaded()
        if wanted == loaded.model.name:
            return loaded
        raise Problem(
            "not_found",
            f"{wanted} is on this machine but not loaded; {loaded.model.name} is. "
            "Load it on the page or with POST /v1/model/load, or start the server with --load-on-request.",
            "model",
        )
    if await service.gate.enter(wanted):
        try:
            await _load(service, request, wanted)
        finally:
            service.gate.changed()
    return await service.loaded()


async def unload(service: Service) -> None:
    """Unload the model when the running requests are answered. Raises QueueFull, Busy."""
    if await service.gate.enter(NO_MODEL):
        try:
            await service.unload()
        finally:
            service.gate.changed()


def _may_load(service: Service, request: Request) -> bool:
    """The switch in the page allows it to everybody who may use the API, the flag to those with the admin right."""
    return load_on_request.allowed(service.engine.settings) or (service.gate.load_on_request and request.state.caller.admin)


async def _local(service: Service, name: str | None) -> str | None:
    """The local model of that name, or of `owner/name:branch`; None if there is none."""
    loaded = service.engine.loaded
    if not name or (loaded is not None and name == loaded.model.name):
        return name or None
    if name in service.gate.foreign:
        return None
    names = {each.name for each in await service.models()}
    if name in names:
        return name
    folder = ""
    with contextlib.suppress(BadModelName):
        folder = ModelRef.parse(name).folder_name if "/" in name else ""
    if folder in names:
        return folder
    service.gate.foreign.add(name)
    return None


async def _with_adapter(service: Service, name: str) -> tuple[str, str] | None:
    """(local model, adapter) of `name:adapter`; None if there is no such model. Raises Problem not_found without the adapter."""
    base, _colon, adapter = name.rpartition(":")
    wanted = await _local(service, base)
    if wanted is None or adapter in ("", "latest"):
        return None
    there = await service.run(_adapters_beside, service.engine, wanted)
    if adapter not in there:
        raise Problem(
            "not_found",
            f"There is no LoRA adapter {adapter!r} beside {wanted}. There are: {', '.join(there) or 'none'}. Name one of them.",
            "model",
        )
    return wanted, adapter


def _adapters_beside(engine: Engine, name: str) -> list[str]:
    from ..gptq import lora

    loaded = engine.loaded
    model = loaded.model if loaded is not None and loaded.model.name == name else engine.library.get(name)
    return list(lora.beside(model.folder))


async def _load(service: Service, request: Request, name: str) -> None:
    """Load it; what was loaded before comes back if that fails. Raises GptqWebuiError."""
    engine, until = service.engine, time.monotonic() + _PAGE_S
    while engine.loaded is not None and engine.loaded.waiting:  # the page asks the model without this gate
        if time.monotonic() > until:
            raise Busy(f"{name} is not loaded: an answer in the page did not end. Send the request again.")
        await asyncio.sleep(_POLL_S)
    if await request.is_disconnected():
        raise Busy("The client left before its model was loaded. Send the request again.")
    log.info("loading %s, which a request names", name)
    try:
        await service.load(name)
    except GptqWebuiError:
        if engine.loaded is None:
            with contextlib.suppress(GptqWebuiError):
                await service.run(engine.load_previous)
        raise
