"""GPTQ on NVIDIA cards: kernels in CUDA C, compiled in this process by the NVRTC that torch carries."""
