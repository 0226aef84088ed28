"""Uploads folders from ``dist-ae export --format safetensors`` to the Hugging Face Hub, and downloads them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dist_ae.config import InputError
from dist_ae.saved import CONFIG, EXPORTED_WEIGHTS
from dist_ae.terminal import first_line

PREFIX = "hf:"


def push(folder: Path, name: str, files: Sequence[str]) -> str:
    """Uploads these files of an exported folder, and no others, and returns the address of the repository.

    Raises:
        InputError: the upload fails: no login, no such owner, or no network.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        address = str(api.create_repo(name, exist_ok=True))
        message = "Exported by dist-ae"
        api.upload_folder(repo_id=name, folder_path=folder, allow_patterns=list(files), commit_message=message)
    except Exception as error:  # also those of its HTTP library, which changes with the version
        raise InputError(
            f"--push-to-hub {name}: {first_line(error)}; `hf auth login` logs in. The folder is in {folder}"
        ) from None
    return address


def pull(name: str) -> Path:
    """The folder of ``hf:OWNER/NAME``, downloaded once.

    Raises:
        InputError: it cannot be downloaded.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name.removeprefix(PREFIX), allow_patterns=[CONFIG, EXPORTED_WEIGHTS]))
    except Exception as error:  # as above
        raise InputError(f"{name}: cannot be downloaded from the Hugging Face Hub: {first_line(error)}") from None
