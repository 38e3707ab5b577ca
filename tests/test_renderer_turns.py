"""loaders/text/renderers.py: whose turn it is while templates loop."""

import threading
import time

import pytest
from test_renderers import CHAT, HOSTILE, SHOW, limited, template_of

from gptq_webui.core.errors import BadParameter

__all__ = ["limited"]  # a fixture


def test_a_chat_waits_a_moment_for_any_number_of_loops(limited):
    """Of those that loop, two may go on for longer than a tenth of a second; the others are ended there."""
    jinja = "{% if messages|length > 2 %}" + HOSTILE["a loop in a loop"] + "{% endif %}" + SHOW
    template = template_of(jinja, limited)
    over = threading.Event()

    def loop():
        while not over.is_set():
            with pytest.raises(BadParameter):
                template.render(CHAT)

    threads = [threading.Thread(target=loop) for _ in range(6)]
    for thread in threads:
        thread.start()
    shown, until = 0, time.monotonic() + 20
    while shown < 5 and time.monotonic() < until:
        try:
            shown += template.render(CHAT[:1]) == "U1"
        except BadParameter:  # on a machine that is busy with other things
            continue
    over.set()
    for thread in threads:
        thread.join()
    assert shown == 5
