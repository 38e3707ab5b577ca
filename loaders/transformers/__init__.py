"""Back-end: transformers with our own packed layers. Opens every GPTQ layout, and 16-bit models."""
