"""GPTQ on NVIDIA GPUs: kernels in CUDA C, compiled in this process by the NVRTC that torch carries."""
