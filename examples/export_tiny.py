"""Exports a Mixture-of-Experts model with ExecuTorch's own API; only the experts and the partitioner are new.

python examples/export_tiny.py      writes demo/tiny_logits.pte and .ptd
"""

import torch
from executorch.exir import ExecutorchBackendConfig, to_edge_transform_and_lower
from transformers import AutoModelForCausalLM

import executorch_moe as moe
from executorch_moe.export.models.pretrained import resolve

gpu = torch.cuda.is_available()
model = AutoModelForCausalLM.from_pretrained(resolve("tiny"), dtype=torch.bfloat16 if gpu else torch.float32)
model.config.use_cache = False
moe.quantize_experts_(model, scheme="w4a16", group_size=32)
with torch.no_grad():
    program = torch.export.export(model, (torch.zeros(1, 16, dtype=torch.int64),))
partitioner = moe.MoECudaPartitioner() if gpu else moe.MoECpuPartitioner()
edge = to_edge_transform_and_lower(program, partitioner=[partitioner])
moe.save(edge.to_executorch(ExecutorchBackendConfig(external_constants=True)), "demo/tiny_logits.pte")
