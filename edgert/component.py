"""Bundles whose model another engine runs: an ONNX encoder, a GGUF for llama.cpp.

Read here, not by the native engine: it has no part in them. The same first line, checksums and rules of names as any
other bundle; docs/bundle-format.md, "Components", states the rest.
"""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from edgert import _native
from edgert.converters.files import InputFile, read_small_file
from edgert.converters.strict_json import parse_json
from edgert.errors import CorruptError, EdgertError, NotFoundError, UnsupportedError

FORMAT_VERSION = 1
KINDS = ("onnx", "gguf")
_START = re.compile(rb'\{"checksum":"([0-9a-f]{16})",\n')
_KEY = b'"component":'
_MAX_MANIFEST_BYTES = 16 << 20
FILE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,200}")
_CHECKSUM = re.compile(r"[0-9a-f]{16}")
_READ_BYTES = 4 << 20
_KEYS = {
    "component", "format_version", "bundle_id", "files", "assets", "provenance", "device", "defaults",
}  # fmt: skip


def is_one(path: Path) -> bool:
    """Whether the bundle at `path` holds a component: that is the manifest's first key."""
    try:
        with InputFile(path / "manifest.json") as file:
            start = bytes(file.read(0, min(file.bytes, 64)))
    except EdgertError:
        return False  # what opens it then says why
    match = _START.match(start)
    return match is not None and start.startswith(_KEY, match.end())


def file_names(path: Path) -> frozenset[str]:
    """The files of the component at `path`; none where there is no readable one."""
    try:
        manifest = read_manifest(path) if is_one(path) else {"files": ()}
    except EdgertError:
        return frozenset()
    return frozenset(row["name"] for row in manifest["files"])


def read_manifest(path: Path) -> dict[str, Any]:
    """The checked manifest; the files are there and have the sizes that it states.

    Raises NotFoundError, CorruptError naming the key, UnsupportedError for a newer version, StorageError.
    """
    where = path / "manifest.json"
    raw = bytes(read_small_file(where, _MAX_MANIFEST_BYTES))
    match = _START.match(raw)
    if match is None:
        raise CorruptError(f"{where}: byte 0: the first line is not that of a bundle")
    found, stated = _native.xxh64(memoryview(raw)[match.end() :]), match[1].decode()
    if found != stated:
        raise CorruptError(f"{where}: checksum is {found}, the first line says {stated}")
    manifest = parse_json(b"{" + raw[match.end() :], str(where))
    _Check(str(where)).manifest(manifest)
    for row in (*manifest["files"], *manifest["assets"]):
        try:
            with InputFile(path / row["name"]) as file:
                size = file.bytes
        except NotFoundError as error:
            raise CorruptError(f"{error}, but the manifest names it") from None
        if size != row["bytes"]:
            raise CorruptError(f"{path / row['name']}: found {size} bytes, the manifest says {row['bytes']}")
    return dict(manifest)


def verify(path: Path, progress: Callable[[int, int], None] | None = None) -> int:
    """Read every file and check its checksum; returns bytes read. progress(done_bytes, total_bytes)."""
    manifest = read_manifest(path)
    rows = [*manifest["files"], *manifest["assets"]]
    total, done = sum(row["bytes"] for row in rows), 0
    for row in rows:
        before = done

        def advance(count: int, before: int = before) -> None:
            if progress is not None:
                progress(before + count, total)

        found = checksum_of(path / row["name"], advance)
        if found != row["checksum"]:
            raise CorruptError(
                f"{path / row['name']}: checksum is {found}, the manifest says {row['checksum']}"
            )
        done += row["bytes"]
    return done + os.stat(path / "manifest.json").st_size


def checksum_of(path: Path, advance: Callable[[int], None] | None = None) -> str:
    """XXH64 of a regular file; `advance` is told of the bytes done."""
    checksum = _native.Xxh64()
    with InputFile(path) as file:
        for offset in range(0, file.bytes, _READ_BYTES):
            piece = file.read(offset, min(_READ_BYTES, file.bytes - offset))
            checksum.update(piece)
            if advance is not None:
                advance(offset + len(piece))
    return checksum.hexdigest()


def check_files(path: Path, manifest: Mapping[str, Any]) -> None:
    """Read the files of a component and compare their checksums. Raises CorruptError."""
    for row in manifest["files"]:
        found = checksum_of(path / row["name"])
        if found != row["checksum"]:
            raise CorruptError(
                f"{path / row['name']}: checksum is {found}, the manifest says {row['checksum']}"
            )


class _Check:
    """Refuses, by key, a manifest that is not what the format allows."""

    def __init__(self, where: str) -> None:
        self._where = where

    def manifest(self, manifest: Mapping[str, Any]) -> None:
        version = manifest.get("format_version")
        if type(version) is not int or version < 1:
            self._fail("format_version", version, f"{FORMAT_VERSION}")
        if version > FORMAT_VERSION:
            raise UnsupportedError(
                f"{self._where}: format_version is {version}; this edgert reads up to {FORMAT_VERSION}: a newer one is needed"
            )
        for key in sorted(_KEYS - manifest.keys()):
            raise CorruptError(f"{self._where}: key {key!r} is missing")
        for key in sorted(manifest.keys() - _KEYS):
            raise CorruptError(f"{self._where}: unknown key {key!r}")
        if not isinstance(manifest["bundle_id"], str) or not re.fullmatch(
            "[0-9a-f]{32}", manifest["bundle_id"]
        ):
            self._fail("bundle_id", manifest["bundle_id"], "32 hexadecimal digits")
        names = [self._row(key, row) for key in ("files", "assets") for row in self._list(manifest, key)]
        if len(set(names)) != len(names):
            raise CorruptError(f"{self._where}: files, assets: a name is there twice")
        part = manifest["component"]
        if not isinstance(part, dict):
            self._fail("component", part, "an object")
        if part.get("kind") not in KINDS:
            raise UnsupportedError(
                f"{self._where}: component.kind: found {str(part.get('kind'))[:40]!r}, this edgert runs {', '.join(KINDS)}"
            )
        if part.get("file") not in names:
            self._fail("component.file", part.get("file"), "one of the files")
        if part["kind"] == "onnx":
            self._onnx(part)

    def _onnx(self, part: Mapping[str, Any]) -> None:
        pooling = part.get("pooling")
        if pooling not in (None, "mean", "cls", "last", "max"):
            self._fail("component.pooling", pooling, "mean, cls, last, max or null")
        if type(part.get("normalize")) is not bool:
            self._fail("component.normalize", part.get("normalize"), "true or false")
        prompts = part.get("prompts")
        if not isinstance(prompts, dict) or not all(isinstance(text, str) for text in prompts.values()):
            self._fail("component.prompts", prompts, "an object of texts")
        if part.get("default_prompt") not in (None, *prompts):
            self._fail("component.default_prompt", part.get("default_prompt"), "the name of a prompt or null")
        outputs = [row.get("name") for row in self._list(part, "outputs") if isinstance(row, dict)]
        if part.get("output") not in (None, *outputs):
            self._fail("component.output", part.get("output"), "the name of an output or null")
        for key in ("max_length", "dimensions"):
            value = part.get(key)
            if value is not None and (type(value) is not int or not 1 <= value <= 1 << 20):
                self._fail(f"component.{key}", value, f"1 to {1 << 20} or null")
        for key in ("inputs", "outputs"):
            for tensor in self._list(part, key):
                if not isinstance(tensor, dict) or not isinstance(tensor.get("name"), str):
                    self._fail(f"component.{key}", tensor, "objects of name, type and shape")

    def _list(self, value: Mapping[str, Any], key: str) -> Sequence[Any]:
        rows = value.get(key)
        if not isinstance(rows, list):
            self._fail(key, rows, "a list")
        return rows

    def _row(self, key: str, row: Any) -> str:
        if not isinstance(row, dict) or row.keys() != {"name", "bytes", "checksum"}:
            self._fail(key, row, "objects of name, bytes and checksum")
        name, size, checksum = row["name"], row["bytes"], row["checksum"]
        if not isinstance(name, str) or not FILE_NAME.fullmatch(name) or name == "manifest.json":
            self._fail(f"{key}: name", name, "one path component of letters, digits, '.', '_' and '-'")
        if type(size) is not int or not 0 <= size < 1 << 62:
            self._fail(f"{key}: {name}: bytes", size, "a size")
        if not isinstance(checksum, str) or not _CHECKSUM.fullmatch(checksum):
            self._fail(f"{key}: {name}: checksum", checksum, "16 hexadecimal digits")
        return name

    def _fail(self, key: str, found: object, allowed: str) -> NoReturn:
        raise CorruptError(f"{self._where}: {key}: found {str(found)[:80]!r}, allowed is {allowed}")
