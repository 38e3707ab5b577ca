"""GPT-OSS: sinks, windows in every other layer, experts with biases whose gate has limits, and gates and ups in turns."""

from typing import Any

from ..experts import PackedExperts
from .mixtures import experts_of, router_of
from .parts import ExpertParts, ModelParts, Options
from .reading import base_of, llama_layer, model_of, refuse_if

_QUICK = 1.702  # gate * sigmoid(1.702 * gate) is the quick GELU


def describe(hf: Any) -> ModelParts:
    base = base_of(hf)
    refuse_if(not isinstance(base.layers[0].mlp.experts, PackedExperts), "experts that are not packed")
    shells = [layer.mlp.experts.settings for layer in base.layers]
    refuse_if(any(each.alpha != _QUICK or each.limit != shells[0].limit for each in shells), "a gate of another kind")
    layers = []
    for layer in base.layers:
        block = layer.mlp
        experts = ExpertParts(
            router=router_of(block.router),
            experts=experts_of(block.experts, plain=False),
            choices=int(block.router.top_k),
            in_turns=True,
        )
        sinks = layer.self_attn.sinks.detach()
        layers.append(llama_layer(layer, hf.config, experts=experts, gate_up=(), down=None, sinks=sinks))
    options = Options(activation="gelu_quick", gate_limit=float(shells[0].limit), up_offset=1.0)
    return model_of(hf, layers, options)


KINDS = {"gpt_oss": describe}
