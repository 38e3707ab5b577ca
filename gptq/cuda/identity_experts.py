"""Choices that are no experts: a token that takes one is given itself, times the choice's weight (LongCat)."""

from torch import Tensor, nn

_MOST_CLAMPED = 16  # tokens whose numbers beyond the last expert are left, as which kernels take them; a prompt's are spread


class WithIdentity(nn.Module):
    """Around experts on the GPU, which compute the choices that are experts; those from `num_experts` on leave a token as it is.

    Which they are is known on the device alone. So the others are computed for them too, with a weight of zero.
    """

    def __init__(self, experts: nn.Module, num_experts: int) -> None:
        super().__init__()
        self.experts, self.num_experts = experts, num_experts

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [T, H], number of each choice [T, k], its weight [T, k] -> [T, H]."""
        itself = top_k_index >= self.num_experts
        if len(hidden_states) > _MOST_CLAMPED:
            top_k_index = top_k_index % self.num_experts
        y: Tensor = self.experts(hidden_states, top_k_index, top_k_weights.masked_fill(itself, 0))
        own = top_k_weights.masked_fill(~itself, 0).sum(-1, keepdim=True)
        return y + (hidden_states * own).to(y.dtype)
