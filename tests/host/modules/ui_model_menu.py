"""The host's Model tab: a failed load shows its traceback."""

import traceback

import modules.shared as shared
from modules.models import load_model, unload_model


def load_model_wrapper(selected_model, loader, autoload=False):
    if not autoload:  # chosen in the list, not loaded
        yield f'### {selected_model}\n\n- Settings updated: Click "Load" to load the model'
        return
    try:
        yield f"Loading `{selected_model}`..."
        unload_model()
        shared.model, shared.tokenizer = load_model(selected_model, loader)
        yield f"Successfully loaded `{selected_model}`." if shared.model is not None else f"Failed to load `{selected_model}`."
    except Exception:
        yield traceback.format_exc()
