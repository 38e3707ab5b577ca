"""The host drives the transformers model itself: generate() on a thread, streaming through a stopping criterion."""

import queue
import threading

import modules.shared as shared
from modules import extensions, models


class _StopNow(Exception):
    pass


def generate_reply(question, state):
    """Yields the whole answer so far."""
    import torch

    models.load_model_if_idle_unloaded()
    with shared.generation_lock:
        shared.stop_everything = False
        custom = extensions.first_attribute("custom_generate_reply")
        if custom is not None:
            yield from custom(question, question, state, stopping_strings=[], is_chat=False)
            return
        ids = shared.tokenizer.encode(question, return_tensors="pt", add_special_tokens=True)
        texts: queue.Queue = queue.Queue()

        def heard(so_far, scores, **_):
            if shared.stop_everything:
                raise _StopNow
            texts.put(shared.tokenizer.decode(so_far[0][ids.shape[1] :], skip_special_tokens=True))
            return torch.zeros(so_far.shape[0], dtype=torch.bool)

        def run():
            try:
                with torch.no_grad():
                    shared.model.generate(
                        inputs=ids,
                        max_new_tokens=state["max_new_tokens"],
                        do_sample=False,
                        stopping_criteria=[heard],
                        **({"suppress_tokens": [shared.tokenizer.eos_token_id]} if state.get("ban_eos_token") else {}),
                    )
            except _StopNow:
                pass
            except Exception as error:
                texts.put(error)
            texts.put(None)

        threading.Thread(target=run).start()
        while (text := texts.get()) is not None:
            if isinstance(text, Exception):
                raise text
            yield text
