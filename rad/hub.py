"""The Hugging Face Hub: repositories that carry their own code, downloads that run none, errors in one sentence."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import filter_repo_objects, httpx, validate_repo_id

CODE = "pipeline_rad"  # the repository's one code file; diffusers loads it as a single module
COMPONENT_CODE = "component_rad"  # what diffusers asks each component's folder for
WEIGHTS = "diffusion_pytorch_model"


# -- code of a repository -----------------------------------------------------------------------------------------


def write_code(folder: Path, modules: list[ModuleType], components: dict[str, type]) -> None:
    """Makes a saved pipeline loadable where this package is not installed, by `DiffusionPipeline.from_pretrained(...,
    trust_remote_code=True)`.

    diffusers imports a repository's code as `diffusers_modules.local.<file>`, follows relative imports one level deep
    and none in a repository with a dot in its name. So all modules go into one file without any; the files in the
    components' folders take their classes from there, which keeps them the same classes.

    Args:
        folder: Where the pipeline is saved; its model_index.json is changed.
        modules: This package's modules, each after those it imports.
        components: The class of each component.
    """
    relative_import = re.compile(r"^from \.[\w.]* import (\([^)]*\)|.*)\n", re.MULTILINE)
    sources = [relative_import.sub("", Path(module.__file__).read_text(encoding="utf-8")) for module in modules]
    if len(sources) > 1:  # one that was itself loaded from a repository has the heading already
        sources.insert(0, "# The modules of the rad package in one file, as `RADPipeline.save_pretrained` writes it.")
    (folder / f"{CODE}.py").write_text("\n\n".join(sources), encoding="utf-8")

    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    index["_class_name"] = [CODE, index["_class_name"]]
    # diffusers would look for the module that `from .pipeline_rad import ...` names in this folder. It copies the
    # components' files over one another, and Python may take the last one's bytecode for them all: they are all alike.
    classes = sorted({component.__name__ for component in components.values()})
    code = f"from . import {CODE}\n\n" + "".join(f"{name} = {CODE}.{name}\n" for name in classes)
    for name, component in components.items():
        index[name] = [COMPONENT_CODE, component.__name__]
        (folder / name / f"{COMPONENT_CODE}.py").write_text(code, encoding="utf-8")
    (folder / "model_index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


# -- up and down --------------------------------------------------------------------------------------------------


def download(
    repo_id: str,
    components: list[str],
    variant: str | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
    **kwargs: Any,
) -> Path:
    """The folder of a pipeline from the Hub: configurations and the weights of one variant, and nothing else.

    Args:
        repo_id: "user/repo".
        components: Folders to take.
        variant: As in diffusers: "fp16" are the files `diffusion_pytorch_model.fp16.safetensors`.
        revision: Branch, tag or commit.
        local_files_only: Take it from the cache.
        kwargs: cache_dir, token, force_download of `snapshot_download`.

    Raises:
        OSError: In one sentence, whatever went wrong.
    """
    dot = "" if variant is None else f".{variant}"
    shard = "-[0-9][0-9][0-9][0-9][0-9]-of-[0-9][0-9][0-9][0-9][0-9]"
    files = ["config.json", "scheduler_config.json", f"{WEIGHTS}.safetensors.index{dot}.json"]
    files += [f"{WEIGHTS}{dot}.safetensors", f"{WEIGHTS}{dot}{shard}.safetensors"]
    patterns = ["model_index.json"] + [f"{component}/{file}" for component in components for file in files]
    with one_sentence(repo_id, revision):
        folder = snapshot_download(
            repo_id, revision=revision, local_files_only=local_files_only, allow_patterns=patterns, **kwargs
        )
    return Path(folder)


def upload(
    repo_id: str,
    files: dict[str, Path],
    commit_message: str,
    repo_type: str = "model",
    space_sdk: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    """Creates the repository if need be and uploads files in one commit: all of them or none.

    Args:
        repo_id: "user/repo".
        files: Where each goes in the repository, and where it is.
        commit_message: First line of the commit.
        repo_type, space_sdk, private, token, create_pr: As in `huggingface_hub`.

    Raises:
        OSError: In one sentence, whatever went wrong.
    """
    api = HfApi(token=token)
    with one_sentence(repo_id):
        repo_id = api.create_repo(
            repo_id, repo_type=repo_type, space_sdk=space_sdk, private=private, exist_ok=True
        ).repo_id
        return api.create_commit(  # not upload_folder, which may split large uploads into several commits
            repo_id,
            [CommitOperationAdd(name, path) for name, path in files.items()],
            commit_message=commit_message,
            repo_type=repo_type,
            create_pr=create_pr,
        )


def list_files(folder: Path, ignore_patterns: list[str] | None = None) -> dict[str, Path]:
    """The files below a folder for `upload`; in the patterns, * also matches slashes."""
    paths = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path: folder / path for path in filter_repo_objects(paths, ignore_patterns=ignore_patterns)}


# -- errors -------------------------------------------------------------------------------------------------------


def check_repo_id(repo_id: str) -> None:
    """Raises OSError with one sentence if this can be no repository of the Hub."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise OSError(f"There is no folder {repo_id!r}, and it is no Hub id such as 'user/repo' either.") from error


@contextmanager
def one_sentence(repo_id: str, revision: str | None = None) -> Iterator[None]:
    """Says in one sentence what went wrong with the Hub and what to do; the error's type stays, as an OSError."""
    try:
        yield
    except (OSError, httpx.HTTPError, RuntimeError) as error:
        # Failures that made the hub's client look into its cache, or that it met in a thread, are causes
        cause = error.__cause__
        wrapped = isinstance(error, LocalEntryNotFoundError) or type(error) is RuntimeError
        reason = cause if wrapped and isinstance(cause, httpx.HTTPError) else error
        if isinstance(reason, HfHubHTTPError):
            raise type(reason)(_explain(reason, repo_id, revision), response=reason.response) from error
        if isinstance(reason, httpx.HTTPError):
            raise ConnectionError(
                f"The connection to the Hub failed or broke off while {repo_id!r} was transferred "
                f"({type(reason).__name__}): check the network and run it again."
            ) from error
        if isinstance(reason, LocalEntryNotFoundError):
            at = "" if revision is None else f" at revision {revision!r}"
            raise LocalEntryNotFoundError(
                f"{repo_id!r}{at} is not, or not wholly, in the cache, and downloads are off: load it once without "
                "local_files_only and HF_HUB_OFFLINE."
            ) from error
        raise


def _explain(error: HfHubHTTPError, repo_id: str, revision: str | None) -> str:
    status, login = error.response.status_code, "log in with `hf auth login` or pass token=..."
    if isinstance(error, GatedRepoError):
        return f"{repo_id!r} is gated: accept its conditions at {constants.ENDPOINT}/{repo_id}, then {login}."
    if isinstance(error, RepositoryNotFoundError):
        return f"There is no folder or Hub repository {repo_id!r}, or it is private: check the name, or {login}."
    if isinstance(error, RevisionNotFoundError):
        return f"{repo_id!r} has no revision {revision!r}: give a branch, a tag or a commit hash."
    if status in (401, 403):
        return f"The Hub refuses this token for {repo_id!r} ({status}): {login} that may read or write it."
    said = " ".join((error.server_message or "no reason given").split())
    return f"The Hub refuses the request for {repo_id!r} ({status}: {said})."
