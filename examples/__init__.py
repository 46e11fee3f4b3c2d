"""Scripts to copy: a minimal export, a runner, a tiny trained model, and measurements."""
