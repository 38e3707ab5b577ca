"""Which model answers a request that names one.

The loaded model answers, whatever name a request gives: programs send names like gpt-4. Only the name of a local model
that is not loaded is refused, since another model than the chosen one would answer.
"""

from ..loaders.contract.base import LoadedModel
from .problems import Problem
from .service import Service


async def model_for(service: Service, name: str | None) -> LoadedModel:
    """Raises Problem not_found if another local model than the loaded one is named; NotLoaded, Busy, AnswerFailed."""
    loaded = await service.loaded()
    if name and name != loaded.model.name and name in {each.name for each in await service.models()}:
        raise Problem(
            "not_found",
            f"{name} is on this machine but not loaded; {loaded.model.name} is. Load it on the page or with POST /v1/model/load.",
            "model",
        )
    return loaded
