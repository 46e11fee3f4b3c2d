"""The grouped GEMM for sm_90 in Gluon, Triton's lower-level language: warps that load and warps that multiply."""
