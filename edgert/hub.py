"""Models on the Hugging Face hub: what a name stands for, and the files that a conversion needs of it.

huggingface_hub does the talking: HF_ENDPOINT, HF_TOKEN or the token that `hf auth login` left, HF_HOME, HF_HUB_CACHE and
HF_HUB_OFFLINE mean what they mean there. What arrives is compared with the checksum that the hub states.
"""

import hashlib
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from edgert.errors import (
    CorruptError,
    EdgertError,
    InvalidArgumentError,
    NotFoundError,
    StorageError,
    UnsupportedError,
)

PREFIX = "hf:"
_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_SPEC = re.compile(rf"hf:(?P<repo>{_NAME}/{_NAME})(?:@(?P<revision>[^:@]+))?(?::(?P<file>[^:]+))?")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,250}")
_COMPONENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+ -]{0,254}")
_PART = re.compile(r"(?P<stem>.+)-\d{5}-of-\d{5}\.gguf")

_SETTINGS = frozenset({
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
    "chat_template.json", "quantize_config.json", "quantization_config.json", "model.safetensors.index.json",
})  # fmt: skip
_ENCODER_SETTINGS = frozenset({
    "config.json", "tokenizer.json", "tokenizer_config.json", "modules.json", "sentence_bert_config.json",
    "config_sentence_transformers.json",
})  # fmt: skip
_MAX_FILES = 10_000
_READ_BYTES = 4 << 20
_ATTEMPTS = 4  # without a byte more


@dataclass(frozen=True, slots=True)
class Spec:
    """What hf:ORG/NAME[@REVISION][:FILE] says; `file` is a path in the repository or a quantisation such as Q4_K_M."""

    repo: str
    revision: str | None = None
    file: str | None = None

    @property
    def name(self) -> str:
        """What the bundle is called unless it is told otherwise."""
        own = self.repo.rpartition("/")[2]
        if self.file is None:
            return own
        if self.file.endswith(".gguf"):
            part = _PART.fullmatch(PurePosixPath(self.file).name)
            return part["stem"] if part else PurePosixPath(self.file).stem
        return own if self.file.endswith(".onnx") else f"{own}-{self.file}"


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a repository. `sha256` of its content, or `git_sha1` of it as git counts it."""

    path: str
    bytes: int
    sha256: str | None = None
    git_sha1: str | None = None


def parse_spec(text: str) -> Spec:
    """Raises InvalidArgumentError for what is not hf:ORG/NAME[@REVISION][:FILE], and for names that leave their place."""
    match = _SPEC.fullmatch(text)
    if match is None or ".." in match["repo"]:
        raise InvalidArgumentError(
            f"{text[:200]!r}: allowed is hf:ORG/NAME, hf:ORG/NAME@REVISION or hf:ORG/NAME:FILE"
        )
    revision, file = match["revision"], match["file"]
    if revision is not None and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise InvalidArgumentError(
            f"{text[:200]!r}: {revision[:80]!r} is not the name of a branch, tag or commit"
        )
    if file is not None and not is_safe(file):
        raise InvalidArgumentError(
            f"{text[:200]!r}: {file[:80]!r} is not a file in the repository or a quantisation"
        )
    return Spec(match["repo"], revision, file)


def is_safe(path: str) -> bool:
    """Whether a path in a repository stays where it is put (CVE-2024-37032, CVE-2024-45436)."""
    return len(path) <= 512 and all(
        _COMPONENT.fullmatch(part) and ".." not in part for part in path.split("/")
    )


def choose(files: Sequence[RemoteFile], spec: Spec) -> list[RemoteFile]:
    """The files that a conversion of `spec` reads, and no others: not `original/`, no pickles, one format of several.

    Raises NotFoundError, UnsupportedError or InvalidArgumentError saying what is there instead.
    """
    by_path = {file.path: file for file in files if is_safe(file.path)}
    if spec.file is not None:
        return _chosen_file(by_path, spec, spec.file)
    shards = [path for path in by_path if "/" not in path and path.endswith(".safetensors")]
    if shards and "modules.json" not in by_path:
        index = "model.safetensors.index.json" in by_path
        wanted = [path for path in shards if index or path == "model.safetensors"]
        if wanted:
            return [by_path[path] for path in sorted({*wanted, *_SETTINGS.intersection(by_path)})]
    if "onnx/model.onnx" in by_path or "model.onnx" in by_path:
        return _encoder(by_path, "onnx/model.onnx" if "onnx/model.onnx" in by_path else "model.onnx")
    weights = sorted(path for path in by_path if path.endswith(".gguf"))
    groups = sorted({_PART.sub(r"\g<stem>", path).removesuffix(".gguf") for path in weights})
    if len(groups) == 1:
        return [by_path[path] for path in weights]
    if groups:
        raise InvalidArgumentError(
            f"hf:{spec.repo}: {len(groups)} GGUF models; name one as hf:{spec.repo}:FILE: {', '.join(groups[:8])}"
        )
    pickles = [path for path in by_path if path.endswith((".bin", ".pth", ".pt", ".ckpt"))]
    if pickles:
        raise UnsupportedError(
            f"hf:{spec.repo}: {pickles[0]}: pickled weights can run code when they are loaded and are not fetched; a repository "
            "with safetensors or GGUF is needed"
        )
    raise NotFoundError(f"hf:{spec.repo}: neither safetensors nor GGUF nor ONNX in it")


def _chosen_file(by_path: dict[str, RemoteFile], spec: Spec, wanted: str) -> list[RemoteFile]:
    if wanted.endswith(".onnx") and wanted in by_path:
        return _encoder(by_path, wanted)
    weights = sorted(path for path in by_path if path.endswith(".gguf"))
    if wanted in by_path and wanted.endswith(".gguf"):
        found = {wanted}
    else:  # a quantisation: a word of the name
        tag = re.compile(rf"(?:^|[-._/]){re.escape(wanted)}(?:[-._/]|$)", re.IGNORECASE)
        found = {path for path in weights if tag.search(path.removesuffix(".gguf"))}
    stems = {stem(path) for path in found}
    if len(stems) > 1:
        raise InvalidArgumentError(
            f"hf:{spec.repo}: {wanted!r} fits {', '.join(sorted(found)[:6])}; name one of them"
        )
    if not stems:
        there = ", ".join(weights[:8]) or "no GGUF at all"
        raise NotFoundError(f"hf:{spec.repo}: no file or quantisation {wanted!r}; there is {there}")
    return [by_path[path] for path in weights if stem(path) in stems]


def stem(path: str) -> str:
    """What the parts of a split GGUF share."""
    part = _PART.fullmatch(path)
    return part["stem"] if part else path


def _encoder(by_path: dict[str, RemoteFile], model: str) -> list[RemoteFile]:
    beside = {path for path in by_path if path.startswith((f"{model}_data", f"{model}.data"))}
    settings = _ENCODER_SETTINGS | {
        path for path in by_path if re.fullmatch(r"\w+_Pooling/config\.json", path)
    }
    return [by_path[path] for path in sorted({model, *beside, *settings.intersection(by_path)})]


class Hub:
    """The hub that HF_ENDPOINT names. Every method raises NotFoundError, StorageError, UnsupportedError or CorruptError."""

    def __init__(self) -> None:
        import huggingface_hub

        self._library: Any = huggingface_hub
        self._endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or None
        self._api = huggingface_hub.HfApi(endpoint=self._endpoint)

    def files(self, spec: Spec) -> tuple[str, list[RemoteFile]]:
        """The commit that the revision stands for, and its files."""
        with explained(spec):
            info = self._api.model_info(spec.repo, revision=spec.revision, files_metadata=True)
        if info.sha is None or not re.fullmatch("[0-9a-f]{40}", info.sha):
            raise CorruptError(f"hf:{spec.repo}: the hub states no commit")
        rows = info.siblings or []
        if len(rows) > _MAX_FILES:
            raise UnsupportedError(
                f"hf:{spec.repo}: {len(rows)} files; at most {_MAX_FILES} are looked through"
            )
        return info.sha, [
            RemoteFile(row.rfilename, row.size or 0, row.lfs.sha256 if row.lfs else None, row.blob_id)
            for row in rows
        ]

    def keep(self, spec: Spec, commit: str, file: RemoteFile) -> Path:
        """Fetch a file into the cache of Hugging Face. Raises CorruptError where the checksum differs, and removes it."""
        with explained(spec):
            found = self._library.hf_hub_download(
                spec.repo, file.path, revision=commit, endpoint=self._endpoint, cache_dir=cache_dir()
            )
        _check(Path(os.path.realpath(found)), file, f"hf:{spec.repo}: {file.path}")
        return Path(found)

    def fetch(self, spec: Spec, commit: str, file: RemoteFile, path: Path) -> None:
        """Fetch a file to `path`, which it replaces in one step. What a broken connection left beside it, in this process
        or another, is gone on with. Raises CorruptError where the checksum differs, and removes it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.part")
        failures = 0
        while True:
            before = part.stat().st_size if part.exists() else 0
            if before == file.bytes and part.exists():
                break
            try:
                self._go_on(spec, commit, file, part, before if before < file.bytes else 0)
                if part.stat().st_size <= before:  # an answer that ends in order, and too early
                    raise StorageError(
                        f"hf:{spec.repo}: {file.path}: found {part.stat().st_size} bytes, the hub says {file.bytes}"
                    )
            except StorageError:
                progressed = part.exists() and part.stat().st_size > before
                failures = 1 if progressed else failures + 1
                if failures == _ATTEMPTS:
                    raise
                time.sleep(0.5 * 2**failures)
        _check(part, file, f"hf:{spec.repo}: {file.path}")
        os.replace(part, path)

    def _go_on(self, spec: Spec, commit: str, file: RemoteFile, part: Path, begin: int) -> None:
        with self._stream(spec, commit, file, f"bytes={begin}-" if begin else None) as response:
            whole = response.status_code == 200  # also where the range was overlooked
            with open(part, "wb" if whole else "ab") as content:
                for piece in response.iter_raw():
                    content.write(piece)
                    if content.tell() > file.bytes:
                        raise CorruptError(
                            f"hf:{spec.repo}: {file.path}: more than the {file.bytes} bytes it should have"
                        )

    @contextmanager
    def _stream(self, spec: Spec, commit: str, file: RemoteFile, wanted: str | None) -> Iterator[Any]:
        from huggingface_hub import utils as library_utils

        utils: Any = library_utils  # whose stubs leave these out
        url = self._library.hf_hub_url(spec.repo, file.path, revision=commit, endpoint=self._endpoint)
        headers = {**utils.build_hf_headers(), "Accept-Encoding": "identity"}
        if wanted is not None:
            headers["Range"] = wanted
        session = utils.get_session()
        with explained(spec), session.stream("GET", url, headers=headers, follow_redirects=True) as response:
            utils.hf_raise_for_status(response)
            yield response

    def cached(self, spec: Spec) -> Path:
        """The snapshot in the cache of Hugging Face, without asking the hub."""
        try:
            found = self._library.snapshot_download(
                spec.repo, revision=spec.revision, cache_dir=cache_dir(), local_files_only=True
            )
        except (OSError, ValueError):
            raise NotFoundError(
                f"hf:{spec.repo}: not in the cache {cache_dir()}, and the hub is not asked (offline)"
            ) from None
        return Path(found)

    def start(self, spec: Spec, commit: str, file: RemoteFile, length: int) -> bytes:
        """The first `length` bytes of a file."""
        content = bytearray()
        with self._stream(spec, commit, file, f"bytes=0-{length - 1}") as response:
            for piece in response.iter_raw():
                content += piece
                if len(content) >= length:  # also where the range was overlooked
                    break
        if len(content) < length:
            raise StorageError(
                f"hf:{spec.repo}: {file.path}: found {len(content)} bytes, {length} were asked for"
            )
        return bytes(content[:length])


def _check(path: Path, file: RemoteFile, where: str) -> None:
    """Compare a fetched file with what the hub states of it. Raises CorruptError, and removes the file."""
    size = os.stat(path).st_size
    if file.sha256 is None and file.git_sha1 is None:
        return
    digest = (
        hashlib.sha256()
        if file.sha256 is not None
        else hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    )
    with open(path, "rb") as content:
        while piece := content.read(_READ_BYTES):
            digest.update(piece)
    stated = file.sha256 or file.git_sha1
    if digest.hexdigest() != stated:
        os.unlink(path)
        raise CorruptError(
            f"{where}: {digest.name} is {digest.hexdigest()}, the hub says {stated}; try again"
        )


def cache_dir() -> Path:
    """Where huggingface_hub keeps what it fetched: HF_HUB_CACHE, HF_HOME/hub, or ~/.cache/huggingface/hub."""
    stated = os.environ.get("HF_HUB_CACHE")
    if stated:
        return Path(stated)
    home = os.environ.get("HF_HOME")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return (Path(home) if home else base / "huggingface") / "hub"


def is_offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


@contextmanager
def explained(spec: Spec) -> Iterator[None]:
    """The errors of huggingface_hub as ours: without URLs, which may be signed, and without the token."""
    from huggingface_hub import errors

    where = f"hf:{spec.repo}" + (f"@{spec.revision}" if spec.revision else "")
    try:
        yield
    except EdgertError:
        raise
    except errors.GatedRepoError:
        raise NotFoundError(
            f"{where}: access has to be asked for on its page; then `hf auth login`, or set HF_TOKEN"
        ) from None
    except errors.RevisionNotFoundError:
        raise NotFoundError(f"{where}: no such revision") from None
    except errors.EntryNotFoundError as error:
        raise NotFoundError(f"{where}: a file is missing: {_first_line(error)}") from None
    except errors.OfflineModeIsEnabled:
        raise StorageError(
            f"{where}: the hub cannot be asked: HF_HUB_OFFLINE is set (see --offline)"
        ) from None
    except errors.HfHubHTTPError as error:
        if error.response.status_code in (401, 404):
            raise NotFoundError(
                f"{where}: no such model, or a private one: then `hf auth login`, or set HF_TOKEN"
            ) from None
        raise StorageError(f"{where}: the hub answered {error.response.status_code}") from None
    except Exception as error:
        if isinstance(error, OSError) and error.filename is not None:  # ours: the disk
            raise
        raise StorageError(
            f"{where}: the hub cannot be reached: {type(error).__name__}: {_first_line(error)}"
        ) from None


def _first_line(error: BaseException) -> str:
    text = (str(error).splitlines() or [""])[0]
    return re.sub(r"https?://\S+", "URL", text)[:200]
