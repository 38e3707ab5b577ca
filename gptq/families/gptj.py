"""GPT-J: attention and MLP side by side on one LayerNorm; neighbouring dimensions of a part of each head are turned."""

from typing import Any

import torch
from torch import Tensor, nn

from .parts import LayerParts, ModelParts, Options, Rotary
from .reading import act_of, base_of, model_of, norm_of, paired_columns, refuse_if


class _Angles(nn.Module):
    """transformers holds a table of positions here; the angles are those of Llama with base 10,000."""

    def __init__(self, rotary_dim: int) -> None:
        super().__init__()
        self.inv_freq = 1.0 / (10000 ** (torch.arange(0, rotary_dim, 2).float() / rotary_dim))

    def forward(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        angles = positions[..., None].float() * self.inv_freq.to(x.device)
        both = torch.cat([angles, angles], -1)
        return both.cos(), both.sin()


def describe(hf: Any) -> ModelParts:
    config, base = hf.config, base_of(hf)
    heads = config.n_head
    head_dim = config.n_embd // heads
    rotary_dim = config.rotary_dim
    refuse_if(not isinstance(rotary_dim, int) or not 0 < rotary_dim <= head_dim or rotary_dim % 2, "heads turned as a whole")
    columns = paired_columns(heads, heads, head_dim, rotary_dim)
    layers = []
    for layer in base.h:
        attention, norm = layer.attn, norm_of(layer.ln_1)
        layers.append(
            LayerParts(
                attention_norm=norm,
                qkv=(attention.q_proj, attention.k_proj, attention.v_proj),
                qkv_columns=columns,
                o=attention.out_proj,
                mlp_norm=norm,
                gate_up=(layer.mlp.fc_in,),
                down=layer.mlp.fc_out,
            )
        )
    options = Options(norm="layer", gated=False, parallel=True, activation=act_of(base.h[0].mlp))
    return model_of(
        hf, layers, options, norm=norm_of(base.ln_f), heads=heads, kv_heads=heads, head_dim=head_dim,
        rotaries=(Rotary(_Angles(rotary_dim)),), rotary_dim=rotary_dim,
    )  # fmt: skip


KINDS = {"gptj": describe}
