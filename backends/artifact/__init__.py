"""The files of an exported program, `.pte` and `.ptd`: writing, reading, digests, inspection."""

from .files import Artifact, artifact_paths, check, companion, no_digests, open_artifact, save

__all__ = ["Artifact", "artifact_paths", "check", "companion", "no_digests", "open_artifact", "save"]
