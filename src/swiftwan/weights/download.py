"""Bring a model from the Hugging Face hub: only the files needed, only if they fit, each one verified."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swiftwan.errors import OutputError, WeightsError
from swiftwan.models.config import KNOWN_MODELS
from swiftwan.places import cache_folder
from swiftwan.weights import check

if TYPE_CHECKING:
    from huggingface_hub import HfApi

WANTED = ("model_index.json", "*/*.json", "*/*.txt", "*/*.model", "*/*.safetensors")
"""What a pipeline in diffusers layout needs: configs, tokenizer, safetensors."""

UNWANTED = ("*/*.fp16*", "*/*.bf16*", "*/*.non_ema*", "*/*/*")
"""Variants of the same weights, and folders inside components: ONNX and the like."""


def download(hub_id: str, revision: str | None = None, *, components: Sequence[str] = ()) -> Path:
    """Return the folder of a model in the hub's cache, downloading what is not there.

    A model that is complete here is taken without asking the network, at the commit it was downloaded at;
    name a ``revision`` to get another. Files already here are kept, and a broken connection is taken up
    where it broke (by ``huggingface_hub``); after a killed run the file in progress starts anew. Each large
    file's SHA-256 is compared with the hub's; a damaged file is fetched once more, it alone. With
    ``components`` only the folders of these names are brought, beside ``model_index.json``.

    Raises OutputError before the first byte when the files do not fit on the disk; WeightsError when the
    hub cannot be reached, has no such model or revision, wants an agreement first, or holds another layout.
    """
    for complete in dict.fromkeys(((), tuple(components))):
        if folder := _complete_here(hub_id, revision, complete):
            return folder
    try:
        with _hub_errors(hub_id, revision):
            return _download(hub_id, revision, components)
    except _UnreachableError:
        if folder := _left_by_another_tool(hub_id, revision, components):
            return folder
        raise


def download_file(hub_id: str, name: str) -> Path:
    """Return one file of a repository, from the hub's cache or the hub.

    Raises WeightsError when the hub cannot be reached, or has no such repository or file.
    """
    from huggingface_hub import errors, hf_hub_download

    with _hub_errors(hub_id, None):
        try:
            return Path(hf_hub_download(hub_id, name, library_name="swiftwan"))
        except errors.LocalEntryNotFoundError:
            raise
        except errors.EntryNotFoundError:
            raise WeightsError(f"{hub_id} has no file {name!r}; look at its files on the hub") from None


class _UnreachableError(WeightsError):
    """The network is at fault, not the name."""


def _download(hub_id: str, revision: str | None, components: Sequence[str]) -> Path:
    # Imported here, as below: 0.5 s that a run with a local model does not need.
    from huggingface_hub import HfApi

    commit, files = _list_files(HfApi(library_name="swiftwan"), hub_id, revision, components)
    _refuse_if_too_large(hub_id, commit, files)
    folder = _fetch(hub_id, revision, list(files))
    digests = {name: file.lfs.sha256 for name, file in files.items() if file.lfs}
    if damaged := _damaged(folder, digests):
        for name in damaged:
            (folder / name).resolve().unlink()
            (folder / name).unlink(missing_ok=True)
        _fetch(hub_id, revision, damaged)
        check.verify(folder, digests)
    record = {"folder": str(folder), "files": {name: digests.get(name) for name in files}}
    check.write_json(_record(hub_id, revision, components), record)
    return folder


def _record(hub_id: str, revision: str | None, components: Sequence[str]) -> Path:
    """Where we note that a model, or these components of it, is complete, with what its files should be."""
    name = "+".join((f"{hub_id}@{revision or 'main'}".replace("/", "--"), *sorted(components)))
    return cache_folder() / "models" / f"{name}.json"


def _complete_here(hub_id: str, revision: str | None, components: Sequence[str]) -> Path | None:
    """The model's folder when every file of an earlier download is still there and unchanged."""
    record = check.read_json(_record(hub_id, revision, components))
    if record is None:
        return None
    folder, files = Path(record["folder"]), record["files"]
    if folder.parent.parent.parent != _cache() or not all((folder / name).is_file() for name in files):
        return None
    digests = {name: digest for name, digest in files.items() if digest}
    return folder if not _damaged(folder, digests) else None


def _left_by_another_tool(hub_id: str, revision: str | None, components: Sequence[str]) -> Path | None:
    """A snapshot that ``hf download`` or diffusers left; ``read_layout`` says what it lacks, if anything."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        wanted = ["model_index.json", *(f"{name}/*" for name in components)] if components else list(WANTED)
        folder = _fetch(hub_id, revision, wanted, local_files_only=True)
    except LocalEntryNotFoundError:
        return None
    check.verify(folder, check.hub_digests(folder))
    return folder


def _cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _list_files(api: HfApi, hub_id: str, revision: str | None, components: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """The commit, and the files we want of it with size and, for large ones, SHA-256."""
    info = api.model_info(hub_id, revision=revision, files_metadata=True)
    files = {file.rfilename: file for file in info.siblings or () if _wanted(file.rfilename, components)}
    if "model_index.json" not in files:
        twin = next((k.hub_id for k in KNOWN_MODELS.values() if _same_model(k.hub_id, hub_id)), None)
        hint = f"; take '{twin}'" if twin else "; take its '-Diffusers' twin if there is one"
        raise WeightsError(f"{hub_id} has no model_index.json: it is not in diffusers layout{hint}")
    assert info.sha is not None
    return info.sha, files


def _wanted(name: str, components: Sequence[str]) -> bool:
    if components and name != "model_index.json" and name.partition("/")[0] not in components:
        return False
    return any(fnmatchcase(name, p) for p in WANTED) and not any(fnmatchcase(name, p) for p in UNWANTED)


def _same_model(diffusers_id: str, other: str) -> bool:
    return diffusers_id.lower().removesuffix("-diffusers") == other.lower()


def _refuse_if_too_large(hub_id: str, commit: str, files: Mapping[str, Any]) -> None:
    from huggingface_hub import try_to_load_from_cache

    need = sum(
        file.size or 0
        for name, file in files.items()
        if not isinstance(try_to_load_from_cache(hub_id, name, revision=commit), str)
    )
    cache = _cache()
    there = next(folder for folder in (cache, *cache.parents) if folder.is_dir())
    have = shutil.disk_usage(there).free
    if need > have:
        raise OutputError(
            f"{hub_id} needs {need / 1e9:.1f} GB more, and {cache} has {have / 1e9:.1f} GB free; "
            "free some space, or set HF_HOME to a folder on a larger disk"
        )


def _fetch(hub_id: str, revision: str | None, names: list[str], *, local_files_only: bool = False) -> Path:
    # By revision, not by commit: so the cache learns the branch too, and diffusers finds the model offline.
    from huggingface_hub import snapshot_download

    folder = snapshot_download(
        hub_id,
        revision=revision,
        allow_patterns=names,
        ignore_patterns=list(UNWANTED),
        local_files_only=local_files_only,
        library_name="swiftwan",
    )
    return Path(folder)


def _damaged(folder: Path, digests: Mapping[str, str]) -> list[str]:
    return [name for name, digest in digests.items() if check.sha256(folder / name) != digest]


@contextmanager
def _hub_errors(hub_id: str, revision: str | None) -> Iterator[None]:
    """The hub's errors in one line each, with the way out."""
    from huggingface_hub import constants, errors

    try:
        yield
    except errors.GatedRepoError:
        raise WeightsError(
            f"{hub_id} asks for an agreement: accept it at {constants.ENDPOINT}/{hub_id}, then run `hf auth login`"
        ) from None
    except errors.RevisionNotFoundError:
        raise WeightsError(f"{hub_id} has no revision {revision!r}; leave it out for the newest") from None
    except errors.RepositoryNotFoundError:
        raise WeightsError(
            f"the hub has no model {hub_id!r} that you may see; check the name, or run `hf auth login` if it is private"
        ) from None
    except errors.HFValidationError:
        raise WeightsError(f"{hub_id!r} is not a hub id; they read 'owner/name'") from None
    except errors.OfflineModeIsEnabled:
        raise _UnreachableError(
            f"{hub_id} is not complete on this machine and HF_HUB_OFFLINE is set; unset it to download"
        ) from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "no answer"
        raise WeightsError(f"the hub answered {status} for {hub_id}; try again later") from None
    except (errors.HTTPError, ConnectionError, TimeoutError, errors.LocalEntryNotFoundError) as error:
        raise _UnreachableError(
            f"{hub_id} is not complete on this machine and {constants.ENDPOINT} cannot be reached "
            f"({type(error).__name__}); check the network and run again: files already here are kept"
        ) from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(f"no space left in {_cache()} for {hub_id}; set HF_HOME to a larger disk") from None
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise OutputError(
                f"cannot write to {error.filename or _cache()}; set HF_HOME to a folder of yours"
            ) from None
        why = os.strerror(error.errno) if error.errno else type(error).__name__
        raise WeightsError(f"the download of {hub_id} broke ({why}); run again: files already here are kept") from None
