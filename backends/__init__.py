"""Lowering to ExecuTorch, the .pte + .ptd artifact, and runtimes for it. Import from the modules."""
