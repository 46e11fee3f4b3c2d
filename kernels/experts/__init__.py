"""Triton kernels of `fused_experts` and their launches.

plan, problem                    from the operator's arguments to launches: path, buffers, configurations
routing                          pairs of token and expert sorted by expert, on the device
grouped_gemm, few_tokens_gemm    the two kernels for the GEMMs: many tokens, few tokens
tile, operands                   their mainloop: one output tile, and its weights in registers
elementwise                      int8 quantization of activations, and the sum over top_k
aten                             the operator in ATen: the CPU kernel, and a form that can be traced
"""
