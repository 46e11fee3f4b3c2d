"""Triton kernels of `fused_experts` and their launches.

plan, problem                    from the operator's arguments to launches: path, buffers, configurations
routing                          pairs of token and expert sorted by expert, on the device
matvec, few_tokens_gemm, grouped_gemm    the three kernels for the GEMMs: about one token, few tokens, many tokens
tile, operands                   their mainloop: one output tile, and its weights in registers
elementwise                      int8 quantization of activations, and the sum over top_k
aten                             the operator in ATen: the CPU kernel, and a form that can be traced
"""
