"""What each rank computes of a layer: which heads, which inner units, which rows of the vocabulary. Numbers alone, no tensors.

Ranks are processes, one for each GPU. All of them read the same residual. Query heads stay with the key head that they read;
where there are fewer key heads than ranks, a key head is copied to several, which divide its query heads. Shares need not be
of one size: 3 key heads for 2 ranks are 2 and 1.
"""

from dataclasses import dataclass
from itertools import pairwise

from ...core.errors import BadParameter


@dataclass(frozen=True)
class Span:
    """Numbers from `start`, `end` not included."""

    start: int
    end: int

    def __len__(self) -> int:
        return self.end - self.start

    def times(self, factor: int) -> "Span":
        """Of things that are `factor` numbers each."""
        return Span(self.start * factor, self.end * factor)

    def after(self, offset: int) -> "Span":
        return Span(self.start + offset, self.end + offset)


@dataclass(frozen=True)
class Heads:
    """Of one rank."""

    queries: Span
    keys: Span

    @property
    def group(self) -> int:
        """Query heads that read one key head here."""
        return len(self.queries) // len(self.keys)


def spans(count: int, ranks: int, unit: int = 1) -> list[Span]:
    """`count` numbers as one span for each rank, with borders at multiples of `unit`, as even as these allow."""
    units = -(-count // unit)
    borders = [min(rank * units // ranks * unit, count) for rank in range(ranks + 1)]
    return [Span(start, end) for start, end in pairwise(borders)]


def heads_of_ranks(heads: int, kv_heads: int, ranks: int) -> list[Heads]:
    """The heads of each rank. Raises BadParameter, which names the numbers of ranks that fit, where they cannot be divided."""
    if not _divides(heads, kv_heads, ranks):
        fitting = [each for each in range(2, 9) if _divides(heads, kv_heads, each)]
        known = ", ".join(map(str, fitting[:-1])) + (" or " if len(fitting) > 1 else "") + str(fitting[-1]) if fitting else ""
        raise BadParameter(
            f"The {heads} heads of this model, which read the keys of {kv_heads}, cannot be divided among {ranks} GPUs. "
            f"Set tensor_parallel to {known + ', or to 1 for none' if known else '1'}."
        )
    group = heads // kv_heads
    if ranks <= kv_heads:
        return [Heads(keys.times(group), keys) for keys in spans(kv_heads, ranks)]
    copies = ranks // kv_heads
    return [Heads(queries.after(key * group), Span(key, key + 1)) for key in range(kv_heads) for queries in spans(group, copies)]


def _divides(heads: int, kv_heads: int, ranks: int) -> bool:
    if min(heads, kv_heads, ranks) < 1 or heads % kv_heads:
        return False
    return ranks <= kv_heads or (ranks % kv_heads == 0 and ranks // kv_heads <= heads // kv_heads)
