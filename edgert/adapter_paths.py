"""Where adapters lie, and what they are called."""

import os
from pathlib import Path


def packaged_adapters() -> list[tuple[str, Path]]:
    """Names and files of the adapters that the package carries, of the embedded bundle."""
    return [(path.stem, path) for path in sorted((Path(__file__).parent / "data").glob("*.adapter"))]


def locate_adapter(path_or_name: str | os.PathLike[str]) -> Path:
    """What is there by this path, or else the adapter of this name that the package carries; the path where neither is."""
    path = Path(path_or_name)
    return path if path.exists() else dict(packaged_adapters()).get(str(path), path)


def adapter_name(path: Path) -> str:
    """By which an adapter is known unless one is given: its directory's, with dots and all, or its file's without the ending."""
    return Path(os.path.abspath(path)).name if path.is_dir() else path.stem
