"""Running an artifact: in ExecuTorch's runtime, or in the delegate host inside PyTorch."""
