"""Random tensors of a tiny packed folder, as its file holds them and dequantised."""

import torch

import tiny


class RandomTensors:
    """`stored`: what the file holds; `dense`: the same by the layers' names, dequantised, in fp32."""

    def __init__(self, seed, bits, group_size, act_order):
        self.generator = torch.Generator().manual_seed(seed)
        self._packing = {"bits": bits, "group_size": group_size, "act_order": act_order}
        self.stored, self.dense = {}, {}

    def put(self, name, tensor):
        self.stored[name] = tensor.half()
        self.dense[name] = self.stored[name].float()

    def normal(self, name, *shape, scale=1.0):
        self.put(name, torch.randn(shape, generator=self.generator) * scale)

    def norm(self, name, size):
        self.put(name, torch.rand(size, generator=self.generator) + 0.5)

    def pack(self, name, inputs, outputs, bias=False):
        tensors, matrix = tiny.random_layer(inputs, outputs, generator=self.generator, **self._packing)
        self.stored.update({f"{name}.{part}": tensor for part, tensor in tensors.items()})
        self.dense[f"{name}.weight"] = matrix
        if bias:
            self.normal(f"{name}.bias", outputs, scale=0.3)
