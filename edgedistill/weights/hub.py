"""Models of a Hugging Face hub: `org/name@<revision>`, fetched once into the cache folder.

Only what a student needs is fetched: configuration, tokenizer, chat template, model card and
safetensors. What was cut off goes on where it stopped; each file is then held against the hash that
the hub names for it. `HF_ENDPOINT`, `HF_TOKEN` and `HF_HUB_OFFLINE` work as for the client itself.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlparse

from edgedistill.artifacts import write_json
from edgedistill.errors import StorageError, WeightsError
from edgedistill.progress import Progress, Task
from edgedistill.weights.cache import CACHE_VARIABLE, cache_folder, digest, locked, size
from edgedistill.weights.folder import (
    CARD,
    CONFIG,
    INDEX,
    JSON,
    TEMPLATE,
    TOKENIZER,
    WEIGHTS,
    no_safetensors,
    shards,
)

NAME = r"[A-Za-z0-9](?:[\w.-]*[A-Za-z0-9])?"
SHORT = re.compile(rf"({NAME}/{NAME})(?:@(.*))?")
REVISION = re.compile(r"[0-9a-f]{40}")
COMPLETE = "edgedistill.json"  # written last: names and sizes of all files that were fetched
SPARE_BYTES = 64 << 20


@dataclass(frozen=True)
class HubModel:
    """A model repository at a full commit hash."""

    repo: str
    revision: str

    def __str__(self) -> str:
        return f"{self.repo}@{self.revision}"

    @property
    def folder(self) -> Path:
        """Where it is kept."""
        return cache_folder() / "hub" / self.repo.replace("/", "--") / self.revision

    @property
    def complete(self) -> bool:
        """Whether all its files are on this machine; judged by their sizes."""
        try:
            known = json.loads((self.folder / COMPLETE).read_bytes())
            return all(size(self.folder / name) == count for name, count in known.items())
        except (OSError, ValueError, AttributeError):
            return False


def hub_model(weights: str) -> HubModel | None:
    """`org/name@<revision>`; None: it has another form.

    Raises:
        WeightsError: the revision is missing, or a branch, a tag or a short hash.
    """
    found = SHORT.fullmatch(weights)
    if found is None:
        return None
    repo, revision = found[1], found[2]
    if revision is None or not REVISION.fullmatch(revision):
        said = f"{revision!r} can come to mean another one" if revision else "there is none"
        raise WeightsError(
            f"a hub model needs its full revision, and {said}",
            where=weights,
            hint=f"write {repo}@<40 hex digits>; `git ls-remote {_endpoint()}/{repo} HEAD` prints "
            "them, and the page of a commit shows them; a folder beside the recipe is ./name",
        )
    return HubModel(repo, revision)


def fetch_model(
    model: HubModel, progress: Progress, accept: Callable[[Path], object] = lambda config: None
) -> Path:
    """The folder of a hub model, fetched where it is not there yet. `accept` gets config.json
    before any weights are fetched, and may raise.

    Raises:
        WeightsError: the hub does not give it; says whether the network, the repository, the
            revision, the permission or the files are missing.
        StorageError: no space for it, or the cache folder cannot be written.
    """
    if model.complete:
        return model.folder
    try:
        model.folder.mkdir(parents=True, exist_ok=True)
        with locked(model.folder.with_suffix(".lock"), str(model), progress):
            if not model.complete:
                _fetch(model, progress, accept)
    except OSError as error:
        raise StorageError(
            f"cannot keep {model} here: {error.strerror or error}",
            where=str(error.filename or model.folder),
            hint=f"free some space there, or set {CACHE_VARIABLE} to a folder that can be written",
        ) from error
    return model.folder


def _fetch(model: HubModel, progress: Progress, accept: Callable[[Path], object]) -> None:
    files = _Listing(model)
    accept(files.fetch(CONFIG))
    names = files.needed()
    total = sum(files.bytes_of(name) for name in names)
    there = [size(model.folder / name) or size(model.folder / f"{name}.part") for name in names]
    missing = total - sum(there)
    if (free := shutil.disk_usage(model.folder).free) < missing + SPARE_BYTES:
        raise StorageError(
            f"{model} needs {missing / 1e6:,.0f} MB; {free / 1e6:,.0f} MB are free",
            where=str(model.folder),
            hint=f"free some space, or set {CACHE_VARIABLE} to a folder on another disk",
        )
    with progress.task(f"fetch {model.repo}", total / 1e6, "MB") as task:
        for name in names:
            files.fetch(name, task)
    write_json(model.folder / COMPLETE, {name: size(model.folder / name) for name in names})


class _Listing:
    """The files of a repository at one revision, with their sizes and hashes."""

    def __init__(self, model: HubModel) -> None:
        os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported, here or later
        try:
            from huggingface_hub import HfApi
        except ImportError:
            raise WeightsError(
                "huggingface_hub is not installed", hint='in the checkout: pip install -e ".[hub]"'
            ) from None
        self._model = model
        try:
            info = HfApi(endpoint=_endpoint()).model_info(
                model.repo, revision=model.revision, files_metadata=True
            )
        except Exception as error:  # it lets its HTTP client's exceptions through
            _translate(model, error)
        if info.sha != model.revision:
            _refuse(model, f"the hub gives revision {info.sha} for it")
        self._files: Mapping[str, Any] = {file.rfilename: file for file in info.siblings or ()}
        if CONFIG not in self._files:
            _refuse(model, f"it has no {CONFIG}: this is no transformers model")

    def needed(self) -> list[str]:
        """What a student is made of, the small files first."""
        if WEIGHTS in self._files:
            weights = [WEIGHTS]
        elif INDEX in self._files:
            index = self.fetch(INDEX)
            weights = [INDEX, *shards(index.read_bytes(), f"{self._model}/{INDEX}")]
        else:
            _refuse(self._model, no_safetensors(self._files))
        if TOKENIZER not in self._files:
            _refuse(self._model, f"it has no {TOKENIZER}")
        wanted = [*JSON, TEMPLATE, CARD, *(n for n in self._files if n.startswith("LICENSE"))]
        if absent := [name for name in weights if name not in self._files]:
            _refuse(self._model, f"{INDEX} names {absent[0]}, which is not there")
        return [*(name for name in wanted if name in self._files), *weights]

    def bytes_of(self, name: str) -> int:
        return int(self._files[name].size or 0)

    def fetch(self, name: str, task: Task | None = None) -> Path:
        """One file, whole and with the hash that the hub names.

        Raises:
            WeightsError: the hub does not give it, or other bytes.
        """
        target = self._model.folder / name
        if target.is_file() and self._right(name, target):
            if task is not None:
                task.advance(size(target) / 1e6)
            return target
        part = target.with_name(f"{name}.part")
        try:
            self._download(name, part, task)
        except Exception as error:  # it lets its HTTP client's exceptions through
            _translate(self._model, error)
        if not self._right(name, part):
            part.unlink()
            _refuse(self._model, f"{name} came with other bytes than the hub names; it is removed")
        os.replace(part, target)
        return target

    def _download(self, name: str, part: Path, task: Task | None) -> None:
        """Append what is missing: the client's own hf_hub_download begins a file again when the
        process was killed."""
        from huggingface_hub import get_hf_file_metadata, hf_hub_url
        from huggingface_hub.file_download import http_get

        utils: Any = importlib.import_module("huggingface_hub.utils")
        utils.logging.set_verbosity_error()  # it warns of every try
        model, headers = self._model, utils.build_hf_headers()
        url = hf_hub_url(model.repo, name, revision=model.revision, endpoint=_endpoint())
        about = get_hf_file_metadata(url, headers=headers)
        if urlparse(about.location).netloc != urlparse(url).netloc:
            headers.pop("authorization", None)  # the storage's link is signed
        with part.open("ab") as stream:
            if stream.tell() > self.bytes_of(name):
                stream.truncate(0)
            if stream.tell() < self.bytes_of(name):
                http_get(
                    about.location,
                    stream,
                    resume_size=stream.tell(),
                    headers=headers,
                    expected_size=self.bytes_of(name),
                    tqdm_class=_bar_of(task),
                )
            elif task is not None:
                task.advance(stream.tell() / 1e6)

    def _right(self, name: str, path: Path) -> bool:
        """Large files are known by their sha256, small ones by git's sha1."""
        file = self._files[name]
        if file.lfs is not None:
            return bool(digest(path, cache_folder()) == file.lfs.sha256)
        data = path.read_bytes()
        sha1 = hashlib.sha1(b"blob %d\0%b" % (len(data), data), usedforsecurity=False)
        return bool(file.blob_id is None or sha1.hexdigest() == file.blob_id)


def _bar_of(task: Task | None) -> Any:
    """A bar for the hub's client that passes on to ours, and shows nothing itself."""
    theirs: Any = importlib.import_module("huggingface_hub.utils.tqdm").tqdm

    def begin(bar: Any, *arguments: Any, **named: Any) -> None:
        theirs.__init__(bar, *arguments, **{**named, "disable": True})
        advance(bar, named.get("initial") or 0)

    def advance(bar: Any, count: float | None = 1) -> None:
        if task is not None:
            task.advance((count or 0) / 1e6)

    return type("Bar", (theirs,), {"__init__": begin, "update": advance})


def _endpoint() -> str:
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def _translate(model: HubModel, error: Exception) -> NoReturn:
    """What the hub's client raises, as an error that says what is missing."""
    from huggingface_hub import errors

    page = f"{_endpoint()}/{model.repo}"
    if isinstance(error, EnvironmentError) and error.errno is not None:
        raise error  # the disk's
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.OfflineModeIsEnabled):
        _refuse(model, "it is not on this machine, and HF_HUB_OFFLINE forbids to fetch it", error)
    if isinstance(error, errors.GatedRepoError) or status == 403:
        told = f"accept its terms at {page}, and set HF_TOKEN to a token of that account"
        _refuse(model, "the hub gives it only to those who may have it", error, told)
    if isinstance(error, errors.RevisionNotFoundError):
        told = f"`git ls-remote {page} HEAD` prints one"
        _refuse(model, f"the hub has no revision {model.revision} of {model.repo}", error, told)
    if isinstance(error, errors.RepositoryNotFoundError) or status == 401:
        told = f"look it up at {page}; for a private one set HF_TOKEN"
        _refuse(model, f"the hub has no public repository {model.repo}", error, told)
    if isinstance(error, errors.EntryNotFoundError) and status == 404:
        _refuse(model, "the hub lists a file and does not give it", error)
    if status is not None:
        _refuse(model, f"the hub answers with status {status}", error, "try again later")
    http = type(error).__module__.partition(".")[0].startswith("http")
    if not http and not isinstance(error, OSError | errors.EntryNotFoundError):
        raise error  # no trouble of the hub's
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    there = model.folder.is_dir() and any(size(file) for file in model.folder.iterdir())
    told = "try again when the network is there"
    told = f"what was fetched is kept: {told}" if there else told
    _refuse(model, f"{_endpoint()} cannot be reached: {first}", error, told)


def _refuse(
    model: HubModel, what: str, cause: Exception | None = None, hint: str | None = None
) -> NoReturn:
    raise WeightsError(
        what, where=str(model), hint=hint or "choose another student.weights"
    ) from cause
