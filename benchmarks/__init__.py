"""Records of runs on a GPU, and the tools that write them. Not installed with the package."""
