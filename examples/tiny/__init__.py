"""A Qwen3-MoE model small enough to be committed, and the script that trained it."""
