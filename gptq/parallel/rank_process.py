"""A rank in a process of its own: loads its share and follows the orders of the first one (ranks.py).

Standard output belongs to the orders, so what libraries print goes to standard error. When the orders end, the process ends
at once, whatever it waits for.
"""

import json
import os
import queue
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any, BinaryIO

from .ranks import in_a_sentence

_LATER_S = 1.0


def main() -> None:
    """The program of the process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    said = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    orders: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    settings = json.loads(sys.stdin.buffer.readline() or b"null")
    if settings is None:
        return
    threading.Thread(target=_listen, args=(orders,), name="gptq-webui orders", daemon=True).start()
    try:
        _follow(settings, orders, said)
    except BaseException as error:
        if why := in_a_sentence(error):
            _say(said, {"error": why})
        else:
            time.sleep(_LATER_S)  # the one that is gone is heard first
        os._exit(1)  # the others wait for this one's part


def _listen(orders: "queue.SimpleQueue[dict[str, Any]]") -> None:
    for line in sys.stdin.buffer:
        orders.put(json.loads(line))
    os._exit(0)


def _say(said: BinaryIO, values: dict[str, Any]) -> None:
    try:
        said.write(json.dumps(values).encode("ascii") + b"\n")
        said.flush()
    except OSError:
        os._exit(0)  # nobody is there to hear it


def _follow(settings: dict[str, Any], orders: "queue.SimpleQueue[dict[str, Any]]", said: BinaryIO) -> None:
    import torch

    from ...core.models import LocalModel
    from ..rope import Rope
    from . import model_share
    from .rank_group import RankGroup
    from .rank_stepper import stepper_of, use_kernels

    device = torch.device(f"cuda:{settings['rank']}" if settings["device"] == "cuda" else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(settings["threads"])
    group = RankGroup(settings["rank"], settings["ranks"])
    hf, _notes = model_share.load(
        LocalModel.read(Path(settings["folder"])),
        group,
        dtype=getattr(torch, settings["dtype"]),
        device=device,
        rope=Rope(*settings["rope"]),
    )
    use_kernels(hf, settings["threads"], group)
    _say(said, {"state": "loaded"})
    order = orders.get()
    group.join(Path(order["folder"]), device)
    stepper, _why = stepper_of(hf, group)
    _say(said, {"state": "joined"})
    memories: dict[int, Any] = {}
    with torch.inference_mode():
        while True:
            order = orders.get()
            for each in order["forget"]:
                memories.pop(each, None)
            _do(stepper, memories, **order)


def _do(stepper: Any, memories: dict[int, Any], do: str, memory: int, forget: list[int], **values: Any) -> None:
    """One order: what the first rank does with its own memory of that number, and no more."""
    if do == "context":
        stepper.limit(values["tokens"])
    elif do == "begin":
        memories[memory] = stepper.begin()
    elif do == "fork":
        memories[values["to"]] = memories[memory].fork(values["length"])
    elif do == "cut":
        memories[memory].cut(values["length"])
    elif do == "restart":
        memories[memory].restart()
    elif do == "step":
        stepper.step(memories[memory], values["ids"][0])
    else:
        getattr(stepper, {"read": "prefill", "all": "all_logits", "hidden": "hidden"}[do])(memories[memory], values["ids"])
