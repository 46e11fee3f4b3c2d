"""Lowering to ExecuTorch, the .pte + .ptd artifact, and running it. Import what you need from the modules."""
