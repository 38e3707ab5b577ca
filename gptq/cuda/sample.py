"""From logits to the next tokens, on the GPU (sample.cu): its parameters and its launch."""

from typing import Any

from ...core.params import GenerationParams
from ..sampler_structure import values_of
from .gpu_kernels import Gpu
from .kernel_arguments import GUESSED, SAMPLE, SAMPLE_PARAMS, SAMPLE_THREADS
from .sequences import Sequences


def packed_params(params: GenerationParams, seed: int, banned: bool = False, masked: bool = False) -> bytes:
    """What the kernel takes of an answer's parameters. `seed` has 64 bits; `banned`: some tokens have a bias of -infinity;
    `masked`: only those of the row's mask may be chosen."""
    return SAMPLE_PARAMS.pack(**values_of(params, seed, banned, masked))


def sample(gpu: Gpu, sequences: Sequences, first: int = 0, rows: int = 1) -> None:
    """From the `logits` of some rows to their next tokens in `ids`, with their `params`."""
    if first + rows > sequences.rows:
        raise ValueError(f"rows {first} to {first + rows - 1} were to be sampled; there are {sequences.rows}.")
    gpu.run("sample", (rows,), SAMPLE_THREADS, packed_rows(sequences, first), overlap=True)


def packed_rows(sequences: Sequences, first: int) -> bytes:
    """What the kernel takes, of the rows from `first` on."""
    return SAMPLE.pack(**_fields(sequences, first))


def sample_guessed(gpu: Gpu, sequences: Sequences, rows: int) -> None:
    """Row 0's next tokens, as many as follow from right guesses: the ids of the rows after it. Those rows are idle afterwards."""
    if rows > sequences.rows:
        raise ValueError(f"{rows} rows were to be sampled; there are {sequences.rows}.")
    arguments = GUESSED.pack(**_fields(sequences, 0), guessed=rows)
    gpu.run("sample_guessed", (1,), SAMPLE_THREADS, arguments, overlap=True)


def _fields(sequences: Sequences, first: int) -> dict[str, Any]:
    """What both kernels are given, from the row `first` on."""
    return {
        "logits": sequences.logits[first],
        "params": sequences.params[first],
        "bias": sequences.bias[first],
        "masks": sequences.masks[first],
        "seen": sequences.seen[first],
        "answered": sequences.answered[first],
        "history": sequences.history[first],
        "answer_from": sequences.answer_from[first],
        "work": sequences.work[first],
        "ids": sequences.ids[first],
        "positions": sequences.positions[first],
        "host_tokens": sequences.host_tokens[first],
        "vocabulary": sequences.logits.shape[1],
        "context": sequences.history.shape[1],
    }
