"""Back-end: ExLlamaV2, a CUDA library for 4-bit GPTQ models."""
