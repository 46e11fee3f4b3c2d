"""Maps the repository's folders to the import package: kernels/ -> executorch_moe.kernels, and so on.

executorch_moe/ is the package itself, with the public names.

ExecuTorch lays its own repository out the same way. Metadata and tool settings are in pyproject.toml.
"""

import os
from pathlib import Path

from setuptools import setup

LAYERS = ("kernels", "backends", "export", "examples")


def packages() -> list[str]:
    """Import names of the layers and of every folder below them that holds Python modules."""
    root = Path(__file__).resolve().parent
    names = []
    for layer in LAYERS:
        for folder, subfolders, files in os.walk(root / layer):
            subfolders[:] = sorted(name for name in subfolders if name.isidentifier() and name != "__pycache__")
            if folder == str(root / layer) or any(name.endswith(".py") for name in files):
                names.append(".".join(("executorch_moe", *Path(folder).relative_to(root).parts)))
    return names


setup(
    packages=["executorch_moe", *packages()],
    package_dir={"executorch_moe": "executorch_moe", **{f"executorch_moe.{layer}": layer for layer in LAYERS}},
    # What is listed below and nothing else: data folders are no packages.
    include_package_data=False,
    package_data={
        "executorch_moe": ["py.typed"],
        "executorch_moe.kernels": ["**/*.json"],
        "executorch_moe.examples.tiny": ["checkpoint/*"],
    },
)
