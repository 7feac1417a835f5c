"""Device bundles as Python sees them: where they are, and their assets. The engine reads weights itself."""

import builtins
import json
import os
import re
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgert import gguf, settings
from edgert.errors import CorruptError, InvalidArgumentError, NotFoundError, UnsupportedError

EMBEDDED = "docs-moe"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}")


def embedded() -> Path | None:
    """The bundle that the package carries; None in a build without one."""
    path = Path(__file__).parent / "data" / f"{EMBEDDED}.edgert"
    return path if path.is_dir() else None


def models_dir() -> Path:
    """Where bundles are found by name."""
    return settings.home() / "models"


def locate(
    path_or_name: str | os.PathLike[str] | None, progress: Callable[[int, int], None] | None = None
) -> Path:
    """Return the directory of a bundle: a path, a name in models_dir(), or the embedded one (its name, or None).

    A GGUF file stands for its bundle, which is made and kept if it is not there yet: progress(done, total) counts bytes
    of the file. Raises NotFoundError saying where was looked, InvalidArgumentError for a name that is not UTF-8, and
    what converting a GGUF file raises.
    """
    if path_or_name is None:
        path_or_name = EMBEDDED
    path = Path(path_or_name)
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise InvalidArgumentError(f"{str(path)!r}: allowed is a path in UTF-8") from None
    if os.path.isdir(path):
        if os.path.exists(path / "manifest.json"):
            return path
        hint = ""
        if os.path.exists(path / "config.json"):
            hint = f": it is a checkpoint; `edgert convert {path} NAME.edgert` makes a bundle of it"
        elif files := sorted(path.glob("*.gguf")):
            hint = f": it holds GGUF files; name one of them, such as {files[0]}"
        raise NotFoundError(f"{path}: no bundle (there is no manifest.json){hint}")
    if gguf.is_gguf(path):
        return gguf.bundle_of(path, progress)
    name = str(path_or_name)
    if _NAME.fullmatch(name):  # one path component, so a name never leaves the folder
        for candidate in (models_dir() / name, models_dir() / f"{name}.edgert"):
            if (candidate / "manifest.json").exists():
                return candidate
        packaged = embedded()
        if name == EMBEDDED and packaged is not None:
            return packaged
        if not path.exists():
            raise NotFoundError(
                f"{name}: no such path, and no bundle of this name in {models_dir()} (see `edgert list`)"
            )
    if path.exists():
        raise NotFoundError(f"{path}: neither a bundle, which is a directory, nor a GGUF file")
    raise NotFoundError(f"{path}: no such bundle")


def installed() -> Iterator[tuple[str, Path]]:
    """Yield name and path of the bundles in models_dir(), then the embedded one."""
    folder = models_dir()
    if folder.is_dir():
        for path in sorted(folder.iterdir()):
            if (path / "manifest.json").is_file():
                yield path.name.removesuffix(".edgert"), path
    packaged = embedded()
    if packaged is not None:
        yield EMBEDDED, packaged


@dataclass(frozen=True)
class Bundle:
    """A validated bundle. `manifest` is docs/bundle-format.md's object; `sizes` what the engine found."""

    path: Path
    manifest: dict[str, Any]
    sizes: dict[str, Any]

    @classmethod
    def open(cls, path: Path) -> "Bundle":
        """Raises what edgert._native.open_bundle raises: NotFoundError, CorruptError, UnsupportedError, StorageError."""
        from edgert import _native, component

        if component.is_one(path):
            return cls(path, component.read_manifest(path), {})
        opened = _native.open_bundle(str(path))
        manifest = json.loads(opened.pop("manifest"))
        return cls(path, manifest, opened)

    @property
    def name(self) -> str:
        return self.path.name.removesuffix(".edgert")

    @property
    def component(self) -> dict[str, Any] | None:
        """What another engine runs (docs/bundle-format.md, "Components"); None for a decoder of edgert's own."""
        return self.manifest.get("component")

    @property
    def splits_experts(self) -> bool:
        """Whether some expert is stored as base and refinement."""
        return any(len(extent) > 5 for layer in self.manifest["experts"] for extent in layer["extents"])

    @property
    def recipe(self) -> dict[str, Any]:
        """Raises UnsupportedError where the bundle holds a component."""
        if self.component is not None:
            raise UnsupportedError(
                f"{self.path}: holds an {self.component['kind']} component, which another engine runs; there is no recipe"
            )
        recipe: dict[str, Any] = self.manifest["recipe"]
        return recipe

    @property
    def bytes(self) -> int:
        """Size of everything that the manifest names."""
        return sum(row["bytes"] for row in (*self.manifest["files"], *self.manifest["assets"]))

    def knobs(self) -> dict[str, Any]:
        """The knobs that the bundle states, by its device profile. Raises CorruptError outside their ranges."""
        where = f"{self.path / 'manifest.json'}: defaults"
        stated = self.manifest.get("defaults", {})
        if not isinstance(stated, dict) or not stated.keys() <= {"context", "memory"}:
            raise CorruptError(
                f"{where}: found {str(stated)[:80]}, allowed is an object of context and memory"
            )
        try:
            checked = {k.name: k.check(stated[k.name]) for k in settings.knobs() if k.name in stated}
        except InvalidArgumentError as error:
            raise CorruptError(f"{where}: {error}") from None
        if self.component is None and checked.get("context", 0) > self.recipe["context_length"]:
            raise CorruptError(
                f"{where}: context is {checked['context']}, more than the recipe's context_length"
            )
        return checked

    def asset(self, name: str) -> builtins.bytes | None:
        """The content of an asset, checked against its checksum; None where the bundle has none of this name."""
        from edgert import _native

        for row in self.manifest["assets"]:
            if row["name"] == name:
                content = _read_regular(self.path / name, row["bytes"])
                found = _native.xxh64(content)
                if found != row["checksum"]:
                    raise CorruptError(
                        f"{self.path / name}: checksum is {found}, the manifest says {row['checksum']}"
                    )
                return content
        return None

    def json_asset(self, name: str) -> dict[str, Any]:
        """The object in a JSON asset; empty where there is none."""
        content = self.asset(name)
        if content is None:
            return {}
        try:
            value = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise CorruptError(f"{self.path / name}: not valid JSON: {error}") from None
        if not isinstance(value, dict):
            raise CorruptError(f"{self.path / name}: found {type(value).__name__}, allowed is an object")
        return value

    def text_asset(self, name: str) -> str | None:
        """The text in an asset; None where there is none."""
        content = self.asset(name)
        try:
            return None if content is None else content.decode()
        except UnicodeDecodeError as error:
            raise CorruptError(f"{self.path / name}: byte {error.start} is not UTF-8") from None


def _read_regular(path: Path, size: int) -> bytes:
    """The content of a regular file of exactly `size` bytes; links, pipes and devices are refused."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise CorruptError(f"{path}: cannot be opened: {error.strerror}") from None
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size != size:
            raise CorruptError(f"{path}: found {status.st_size} bytes, allowed is a regular file of {size}")
        return file.read()
