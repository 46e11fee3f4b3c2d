"""Models by their id on the Hugging Face Hub, as in Qwen/Qwen3-30B-A3B, in the cache of huggingface_hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

FILES = ("*.json", "*.safetensors", "*.model", "*.jinja", "merges.txt")
"""What an export reads: configuration, weights, tokenizer, chat template."""
_ID = re.compile(r"(?P<repository>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>[\w./-]+))?", re.ASCII)


class HubModel(NamedTuple):
    """A model on the Hub.

    Attributes:
        repository: ORGANIZATION/NAME. revision: a branch, a tag or a commit; None for the default branch.
    """

    repository: str
    revision: str | None

    @property
    def command(self) -> str:
        """The command that downloads it."""
        revision = f" --revision {self.revision}" if self.revision else ""
        return f"hf download {self.repository}{revision}"


def hub_model(model: str | Path) -> HubModel | None:
    """The model on the Hub that a name means, ORGANIZATION/NAME or ORGANIZATION/NAME@REVISION; None for other names."""
    match = _ID.fullmatch(str(model))
    return HubModel(match["repository"], match["revision"]) if match and not Path(model).exists() else None


def cached(model: HubModel) -> Path:
    """Folder of a model in huggingface_hub's cache. Nothing is downloaded.

    Raises:
        FileNotFoundError: it is not there, or not whole.
        RuntimeError: huggingface_hub is not installed.
    """
    hub = _import()
    try:
        return Path(
            hub.snapshot_download(
                model.repository, revision=model.revision, allow_patterns=list(FILES), local_files_only=True
            )
        )
    except (FileNotFoundError, hub.errors.HFValidationError) as error:
        state = "in part only" if type(error).__name__ == "IncompleteSnapshotError" else "not"
        raise FileNotFoundError(
            f"model={model.repository!r} is no folder, and it is {state} in the cache of huggingface_hub "
            f"({hub.constants.HF_HUB_CACHE}): run `{model.command}`, or add --download"
        ) from None


def download(model: HubModel) -> Path:
    """Downloads what is missing of a model into huggingface_hub's cache, with progress bars on stderr.

    An interrupted download goes on where it stopped.

    Returns:
        Its folder in the cache.

    Raises:
        RuntimeError: the Hub cannot be reached or refuses, or huggingface_hub is not installed.
    """
    hub = _import()
    name = model.repository
    try:
        return Path(hub.snapshot_download(name, revision=model.revision, allow_patterns=list(FILES)))
    except hub.errors.GatedRepoError:
        raise RuntimeError(
            f"model={name!r} is for users who accepted its license: accept it on the model's page, run "
            "`hf auth login`, then repeat this command"
        ) from None
    except hub.errors.RevisionNotFoundError:
        raise RuntimeError(
            f"model={name!r} has no revision {model.revision!r}: use a branch, tag or commit of its page"
        ) from None
    except (hub.errors.RepositoryNotFoundError, hub.errors.HFValidationError):
        raise RuntimeError(
            f"model={name!r} is not on the Hub, or private: check the spelling, or run `hf auth login` if it is yours"
        ) from None
    except (OSError, hub.errors.LocalEntryNotFoundError) as error:
        cause: BaseException = error.__cause__ or error
        reason = str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__
        raise RuntimeError(
            f"model={name!r} cannot be downloaded ({reason}): check the network and the space in "
            f"{hub.constants.HF_HUB_CACHE} and repeat this command, which continues; or run `{model.command}` "
            "elsewhere and give the folder"
        ) from error


def _import():  # type: ignore[no-untyped-def]
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError:
        raise RuntimeError(
            "models by their id on the Hub need huggingface_hub: run pip install 'executorch-moe[hf]', or give a folder"
        ) from None
    return huggingface_hub
