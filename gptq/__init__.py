"""Floor 1: from packed GPTQ weights to logits and tokens. Knows tensors, no web, no hub."""
