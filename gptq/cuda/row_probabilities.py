"""Log-probabilities of sampled tokens, for the rows that want them: computed on the GPU behind the step, read with its tokens."""

from collections.abc import Mapping

import numpy as np

from .sequences import Sequences

Found = tuple[float, tuple[tuple[int, float], ...]]  # of the sampled token; (id, log-probability) of the likeliest


class RowProbabilities:
    """Of the model's own distribution: before penalties, temperature and filters."""

    def __init__(self, sequences: Sequences, wanted: Mapping[int, int]) -> None:
        """Launches it. `wanted`: of each row, how many of the likeliest."""
        self._wanted = dict(wanted)
        rows = sequences.sent(np.array(list(wanted), np.int64))
        found = sequences.logits[rows].log_softmax(-1)
        likeliest = found.topk(min(max(wanted.values()), found.shape[1]))
        sampled = found.gather(1, sequences.ids[rows].long()[:, None])
        self._host = [each.to("cpu", non_blocking=True) for each in (sampled[:, 0], likeliest.values, likeliest.indices)]

    def read(self) -> dict[int, Found]:
        """By row. Only once the GPU has come past it."""
        sampled, values, ids = (each.tolist() for each in self._host)
        return {
            row: (sampled[at], tuple(zip(ids[at][:count], values[at][:count], strict=True)))
            for at, (row, count) in enumerate(self._wanted.items())
        }
