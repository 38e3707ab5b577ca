"""Floor 1: from packed GPTQ weights to logits and tokens. Handles tensors; no web, no Hub."""
