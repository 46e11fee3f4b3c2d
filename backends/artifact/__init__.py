"""The files of an exported program, `.pte` and `.ptd`: writing, reading, digests, and what is inside them."""

from .files import Artifact, artifact_paths, check, companion, no_digests, open_artifact, save

__all__ = ["Artifact", "artifact_paths", "check", "companion", "no_digests", "open_artifact", "save"]
