"""A Qwen3-MoE model that tells fairy tales, and the script that trained it."""
