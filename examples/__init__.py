"""Scripts to copy from: a runner, a minimal export, and a tiny trained model."""
