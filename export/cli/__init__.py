"""The command `executorch-moe`."""
