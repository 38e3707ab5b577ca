"""Back-end: auto-gptq, or GPTQModel, its maintained successor."""
