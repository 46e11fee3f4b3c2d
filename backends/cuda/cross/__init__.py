"""Cross-compilation: lowering for an NVIDIA GPU that is not in this machine."""
