"""The Hugging Face Hub: fetching a consistent snapshot, pushing in one commit, and its errors as one line each."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datasets.exceptions import DatasetsError
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from blob_hf.utils.errors import BlobError

HttpError: Any = HfHubHTTPError.__bases__[0]  # of the HTTP library that this huggingface_hub is built on


@contextmanager
def fetching(what: str, name: str, local_flag: str) -> Iterator[None]:
    """Turn any failure to get `name` from the Hub or the disk into one line with the two ways on."""
    try:
        yield
    except BlobError:
        raise
    except (OSError, ValueError, HttpError, DatasetsError) as error:
        why = "it is a file; a folder is needed" if os.path.isfile(name) else reason(error)
        raise BlobError(
            f"cannot get the {what} {name!r} from a local folder or the Hugging Face Hub ({why}). "
            f"Give a local path with {local_flag}, or run without network by --demo where the script has it"
        ) from error


def snapshot(
    repo: str,
    patterns: Sequence[str],
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | None = None,
) -> Path:
    """Local folder with the files of *one* commit of a Hub repo, so that they belong together.

    Args:
        repo: `user/name`.
        patterns: Files to fetch, as glob patterns.
        revision: Branch, tag or commit.

    Raises:
        BlobError: No such repo, file or revision; private without a token; the connection failed.
    """
    try:
        folder = snapshot_download(
            repo, allow_patterns=list(patterns), revision=revision, token=token, cache_dir=cache_dir
        )
    except HFValidationError as error:
        raise BlobError(f"{repo!r} is neither a folder nor the name of a Hub repo (user/name)") from error
    except (OSError, ValueError, HttpError) as error:
        at = f" at revision {revision!r}" if revision else ""
        raise BlobError(
            f"{repo!r}{at} is not a local folder, and cannot be had from the Hugging Face Hub: {reason(error)}"
        ) from error
    return Path(folder)


def push(
    folder: str | os.PathLike[str],
    repo: str,
    commit_message: str,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    keep: Sequence[str] = (),
    replace: Sequence[str] = (),
) -> str:
    """Upload a folder to a Hub repo (made if needed) in one commit: all of it or nothing.

    Args:
        keep: Files that stay as they are in the repo, if it has them.
        replace: Files that the repo has no longer, unless they are uploaded.

    Returns:
        Address of the commit.

    Raises:
        BlobError: It failed; nothing was committed.
    """
    api = HfApi(token=token)
    with pushing(repo, "push again"):
        name = api.create_repo(repo, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr:
            api.create_branch(name, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=name,
            folder_path=os.fspath(folder),
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
            delete_patterns=list(replace),
            ignore_patterns=[file for file in keep if api.file_exists(name, file, revision=revision)],
        )
        return commit.commit_url


@contextmanager
def pushing(repo: str | None, advice: str) -> Iterator[None]:
    """Turn any failure to push into one line."""
    try:
        yield
    except (OSError, HttpError, HFValidationError) as error:
        raise BlobError(
            f"cannot push to {repo!r} on the Hugging Face Hub: {reason(error)}; nothing was committed, {advice}"
        ) from error


def reason(error: BaseException) -> str:
    """Why something could not be had, in half a line."""
    if isinstance(error, RepositoryNotFoundError):
        return "no such repo, or it is private or gated: log in with `hf auth login` or pass token="
    if isinstance(error, RevisionNotFoundError):
        return "the repo has no such revision"
    if isinstance(error, HfHubHTTPError) and error.response is not None and error.response.status_code in (401, 403):
        return "access denied: log in with `hf auth login` or pass a token= that may write to it"
    if isinstance(error, (LocalEntryNotFoundError, OfflineModeIsEnabled)):
        return "it is not in the local cache, and the Hub cannot be reached"
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return text[:200] or type(error).__name__
