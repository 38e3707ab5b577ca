"""Loads a model over several ranks: starts the other processes, reads the own share beside them, and meets them."""

import logging
import tempfile
from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch

from ...core.errors import BadParameter, LoadFailed
from ...core.models import LocalModel
from ..rope import Rope
from . import model_share
from .rank_group import Parted, RankGroup
from .rank_stepper import LeadingStepper, stepper_of, use_kernels
from .ranks import Ranks

log = logging.getLogger(__name__)

Tell = Callable[[float, str], None]  # share done in 0..1, and what is done; may raise to cancel


def load(
    model: LocalModel, ranks: int, *, dtype: torch.dtype, device: str, rope: Rope, tell: Tell
) -> tuple[Any, LeadingStepper, tuple[str, ...]]:
    """(the first rank's share as a transformers model, its stepper, notes for the user). `device`: cuda or cpu.

    On GPUs rank n has GPU n. Frees everything and ends every process if it raises: GptqWebuiError with a sentence.
    """
    on_gpu = device == "cuda"
    if on_gpu and torch.cuda.device_count() < ranks:
        raise BadParameter(
            f"tensor_parallel {ranks} needs {ranks} GPUs; torch sees {torch.cuda.device_count()}. "
            "Set it to what there is, or to 1."
        )
    threads = max(1, torch.get_num_threads() // ranks)
    group = RankGroup(0, ranks)
    meeting = tempfile.TemporaryDirectory(prefix="gptq-webui-ranks-", ignore_cleanup_errors=True)
    folder = Path(meeting.name)  # as long as the group is there: NCCL's threads look into it, and wait two minutes for it
    settings = {
        "folder": str(model.folder.resolve()),
        "ranks": ranks,
        "device": device,
        "dtype": str(dtype).removeprefix("torch."),
        "rope": astuple(rope),
        "threads": threads,
    }
    others = Ranks(ranks, settings, group.leave)
    share: Any = None
    try:
        own = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
        hf, notes = model_share.load(
            model,
            group,
            dtype=dtype,
            device=own,
            rope=rope,
            arrived=lambda done, all: tell(done / all, f"Reading this process's share: {done} of {all} layers"),
        )
        slow = use_kernels(hf, threads, group)
        others.wait("loaded", lambda: tell(1.0, "Waiting for the other processes"))
        others.order("join", folder=str(folder))
        group.join(folder, own)
        share, why = stepper_of(hf, group)
        stepper = LeadingStepper(share, hf.config.get_text_config(decoder=True), group, others, meeting.cleanup)
        others.wait("joined", lambda: tell(1.0, "Waiting for the other processes"))
        stepper.trial()
    except BaseException as error:
        if isinstance(error, Parted):
            others.settle()
        lost = others.why
        others.close()
        group.leave()  # so that nothing waits for them any more
        if share is not None:
            share.close()
        group.close()
        meeting.cleanup()
        if isinstance(error, Parted):
            raise LoadFailed(lost or "The processes of the model lost each other. Press Reload in the Model tab.") from error
        raise
    if on_gpu:
        log.info("single rows are summed by %s", group.describes)
    if why:
        slow = f"{slow} Each token is launched kernel by kernel, slowly, since its graph cannot be recorded: {why}.".strip()
    return hf, stepper, (*notes, slow) if slow else notes
