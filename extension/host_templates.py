"""The chat template of a GPTQ folder for text-generation-webui's own chat.

Most folders of 2023 carry none, and the host then writes every prompt as Alpaca. We know more: what the user saved in
our settings, the model card, the model's name.
"""

from ..core.errors import GptqWebuiError
from ..core.models import LocalModel
from ..engine.settings import Settings
from ..loaders.text import chat_template


def template_for(settings: Settings, model: LocalModel, own: bool) -> str | None:
    """Jinja, or None to leave the choice to the host. `own`: the folder has a template that the host found."""
    try:
        if saved := settings.for_model(model.name).get("template"):
            return chat_template.named(saved).jinja
        if own:
            return None
        found = chat_template.find(model.folder, None, model.architecture)
        return found.jinja if found.is_chat else None
    except GptqWebuiError:
        return None
