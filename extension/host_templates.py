"""The chat template of a GPTQ folder for text-generation-webui's own chat.

Most folders of 2023 have none, and the host then uses Alpaca for every prompt. We have more sources: the template that
the user saved in our settings, the model card, and the model's name.
"""

from ..core.errors import GptqWebuiError
from ..core.models import LocalModel
from ..engine.settings import Settings
from ..loaders.text import chat_template


def template_for(settings: Settings, model: LocalModel, own: bool) -> str | None:
    """A Jinja template, or None for the host's choice. `own`: the host found a template in the folder."""
    try:
        if saved := settings.for_model(model.name).get("template"):
            return chat_template.named(saved).jinja
        if own:
            return None
        found = chat_template.find(model.folder, None, model.architecture)
        return found.jinja if found.is_chat else None
    except GptqWebuiError:
        return None
