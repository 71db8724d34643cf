"""The Hugging Face hub, through its own client, where that is installed. What is downloaded is said before it is."""

import sys
from pathlib import Path
from types import ModuleType

from vavae_fast.errors import BadInput

# What a pipeline is read from, ours or the reference's; a repository's other files stay where they are.
FILES = ("config.json", "manifest.json", "README.md", "*.safetensors", "latents_stats.pt", "lightningdit*.pt", "vavae*.pt")


def fetch(repository: str, revision: str | None, local_files_only: bool) -> Path:
    """The folder of a repository's files in the hub's cache, downloaded where they are not there yet; `BadInput` in one line."""
    hub = _client(repository)
    if not local_files_only:
        at = f" at {revision}" if revision else ""
        print(f"{repository}: no such path here; fetching it{at} from the Hugging Face hub, as far as its cache lacks it: {', '.join(FILES)}",
              file=sys.stderr)  # fmt: skip
    try:
        return Path(hub.snapshot_download(repository, revision=revision, allow_patterns=list(FILES), local_files_only=local_files_only))
    except (OSError, ValueError) as error:
        raise BadInput(_reason(repository, error)) from None


def push(folder: Path, repository: str, private: bool, token: str | None, revision: str | None, message: str) -> str:
    """Upload a pipeline's folder, into a new repository where there is none; returns the commit's address."""
    api = _client(repository).HfApi(token=token)
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repository, folder_path=folder, revision=revision, commit_message=message).commit_url)
    except (OSError, ValueError) as error:
        raise BadInput(_reason(repository, error)) from None


def _client(repository: str) -> ModuleType:
    try:
        import huggingface_hub
    except ImportError:
        missing = "not a path here, and huggingface_hub, which would look for it on the hub, is not installed"
        raise BadInput(f"{repository}: {missing}; check the path, or pip install 'vavae-fast[hub]'") from None
    return huggingface_hub


def _reason(repository: str, error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{repository}: not a path here, and the hub says: {(lines or [type(error).__name__])[-1][:200]}; check the name, or log in"
