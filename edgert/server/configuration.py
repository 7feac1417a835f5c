"""What the daemon can be told, and the models that it serves. Imports nothing of the extra `serve`."""

import ipaddress
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgert.adapter_paths import adapter_name
from edgert.errors import InvalidArgumentError, NotFoundError
from edgert.settings import Layers, Setting
from edgert.units import parse_bytes

_MODELS = Setting("models", "texts", "the models to serve", ())
SERVER = (
    Setting("host", "text", "the address to listen on (default: 127.0.0.1)", "127.0.0.1"),
    Setting("port", "int", "the port; 0: any free one (default: 8343)", 8343, 0, 65535),
    Setting(
        "api_key_file", "text", "a file of keys, one a line, of which every request has to bear one", None
    ),
    Setting(
        "allow_unauthenticated",
        "bool",
        "listen on an address that other machines reach without asking for a key",
        False,
    ),
    Setting(
        "allowed_hosts",
        "texts",
        "a name under which clients may reach the server, besides localhost, addresses and this machine's own; may be repeated",
        (),
    ),
    Setting(
        "cors_origins",
        "texts",
        "an origin whose pages may use the server, or *; may be repeated",
        (),
    ),
    Setting(
        "keep_alive",
        "float",
        "unload a model that nobody used for so many seconds; 0: only when another needs its memory",
        0.0,
        0,
        1e7,
        unit="s",
    ),
    Setting("queue", "int", "requests that may wait for a model; more get 503", 64, 1, 100_000),
    Setting("max_body", "bytes", "the largest body of a request (default: 4MiB)", 4 << 20, 1024, 1 << 28),
    Setting("max_connections", "int", "connections at a time", 256, 1, 100_000),
    Setting("header_timeout", "float", "seconds for a request's headers", 10.0, 0.1, 3600, unit="s"),
    Setting("body_timeout", "float", "seconds for a request's body", 30.0, 0.1, 3600, unit="s"),
    Setting(
        "send_timeout",
        "float",
        "seconds that a client may leave what it is sent unread",
        60.0,
        0.1,
        3600,
        unit="s",
    ),
    Setting(
        "drain_timeout",
        "float",
        "seconds that running requests are given when the server is told to stop",
        30.0,
        0,
        3600,
        unit="s",
    ),
    Setting(
        "log_format", "choice", "lines for people, or one JSON object each", "text", choices=("text", "json")
    ),
    Setting(
        "device",
        "text",
        "the device profile that states memory, context and kernels where nothing else does",
        None,
    ),
)
SETTINGS = (_MODELS, *SERVER)

_MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/@+-]{0,200}", re.ASCII)
_ADAPTER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@+-]{0,200}", re.ASCII)
_MAX_KEY_FILE_BYTES = 1 << 16
_MIN_KEY_CHARACTERS = 8


@dataclass(frozen=True)
class ServedAdapter:
    """`scale` 0: loaded, and off until a request names it or /lora-adapters turns it on."""

    name: str
    path: Path
    scale: float


@dataclass(frozen=True)
class ServedModel:
    """A model that requests may name. `source` is what edgert.load() takes; `memory_bytes` its part of the budget where
    that is stated; a pinned one is loaded at the start and never unloaded."""

    name: str
    source: str
    memory_bytes: int | None = None
    pinned: bool = False
    adapters: tuple[ServedAdapter, ...] = ()


@dataclass(frozen=True)
class Configuration:
    """Checked settings of the daemon, by the names in SERVER. `models` is empty where those of `edgert list` are served."""

    models: tuple[ServedModel, ...] = ()
    host: str = "127.0.0.1"
    port: int = 8343
    keys: tuple[bytes, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    keep_alive: float = 0.0
    queue: int = 64
    max_body: int = 4 << 20
    max_connections: int = 256
    header_timeout: float = 10.0
    body_timeout: float = 30.0
    send_timeout: float = 60.0
    drain_timeout: float = 30.0
    log_format: str = "text"

    @classmethod
    def of(cls, given: Mapping[str, Any], layers: Layers) -> "Configuration":
        """Flags (`given`, None where there is none), variables and files.

        Raises InvalidArgumentError by setting, also for an address that others reach without a key; NotFoundError for a
        key file that is not there.
        """
        values = {setting.name: _value(setting, given, layers) for setting in SETTINGS}
        del values["device"]
        key_file = values.pop("api_key_file")
        open_to_all = values.pop("allow_unauthenticated")
        keys = () if key_file is None else read_keys(Path(key_file))
        values["models"] = served_models(values["models"])
        for origin in values["cors_origins"]:
            _check_origin(origin)
        for name in values["allowed_hosts"]:
            if not re.fullmatch(r"[A-Za-z0-9._-]{1,253}", name, re.ASCII):
                raise InvalidArgumentError(
                    f"allowed_hosts: found {name!r:.80}, allowed is a name without scheme and port, such as board.lan"
                )
        if not keys and not open_to_all and not is_loopback(values["host"]):
            raise InvalidArgumentError(
                f"host: {values['host'] or 'every address'} can be reached from other machines: give --api-key-file, or "
                "--allow-unauthenticated if everybody who reaches it may use it"
            )
        return cls(keys=keys, **values)


def _value(setting: Setting, given: Mapping[str, Any], layers: Layers) -> Any:
    flag = given.get(setting.name)
    found = layers.value(setting, None if flag == [] else flag)
    return setting.default if found is None else found


def device_of(given: Mapping[str, Any], layers: Layers) -> str | None:
    setting = next(setting for setting in SERVER if setting.name == "device")
    name: str | None = layers.value(setting, given.get("device"))
    return name


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def served_models(stated: Sequence[str]) -> tuple[ServedModel, ...]:
    """Raises InvalidArgumentError for a name that comes twice."""
    models = tuple(map(served_model, stated))
    names = [model.name for model in models]
    for name in names:
        if names.count(name) > 1:
            raise InvalidArgumentError(f"models: {name!r:.80} comes twice; give one of them name=OTHER")
    return models


def served_model(text: str) -> ServedModel:
    """MODEL[,name=NAME][,memory=SIZE][,pin][,adapter=[NAME=]PATH[:SCALE]]..., with MODEL as edgert.load() takes it."""
    source, *options = text.split(",")
    name, memory, pinned = default_name(source), None, False
    adapters: list[ServedAdapter] = []
    for option in options:
        key, _, value = option.partition("=")
        if key == "name":
            name = value
        elif key == "memory":
            memory = parse_bytes(value, f"models: {source}: memory")
        elif option == "pin":
            pinned = True
        elif key == "adapter":
            adapters.append(served_adapter(value))
        else:
            raise InvalidArgumentError(
                f"models: {source}: found {option!r:.60}, allowed are name=NAME, memory=SIZE, pin and "
                "adapter=[NAME=]PATH[:SCALE]"
            )
    if not source or not _MODEL_NAME.fullmatch(name):
        raise InvalidArgumentError(
            f"models: found the name {name!r:.80}, allowed are letters, digits and . _ - / @ + (say name=NAME)"
        )
    return ServedModel(name, source, memory, pinned, tuple(adapters))


def default_name(source: str) -> str:
    """The last part of a path; of a name in a cache (hf:…) all of it, in the letters that a name may have."""
    if os.sep in source and ":" not in source:
        source = Path(source).name
    for ending in (".edgert", ".gguf"):
        source = source.removesuffix(ending)
    return re.sub(r"[^A-Za-z0-9._/@+-]", "-", source, flags=re.ASCII)


def served_adapter(text: str) -> ServedAdapter:
    """[NAME=]PATH[:SCALE]."""
    name, equals, rest = text.rpartition("=")
    path, colon, scale = rest.rpartition(":")
    factor = 0.0
    if colon:
        try:
            factor = float(scale)
        except ValueError:
            path = rest  # a colon of the path's own
    else:
        path = rest
    name = name if equals else adapter_name(Path(path))
    if not _ADAPTER_NAME.fullmatch(name):
        raise InvalidArgumentError(
            f"adapter: found the name {name!r:.80}, allowed are letters, digits and . _ - @ + (say NAME=PATH)"
        )
    return ServedAdapter(name, Path(path), factor)


def read_keys(path: Path) -> tuple[bytes, ...]:
    """The keys in a file, one a line; empty lines and lines that begin with # are left out. Raises NotFoundError, and
    InvalidArgumentError where there is none, or one that is too short or holds spaces or control characters."""
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_KEY_FILE_BYTES + 1)
    except FileNotFoundError:
        raise NotFoundError(f"api_key_file: there is no file {path}") from None
    lines = [line.strip() for line in content.splitlines()]
    keys = tuple(line for line in lines if line and not line.startswith(b"#"))
    if not keys or len(content) > _MAX_KEY_FILE_BYTES:
        raise InvalidArgumentError(
            f"api_key_file: {path} holds no key, or more than {_MAX_KEY_FILE_BYTES} bytes"
        )
    for number, key in enumerate(keys, start=1):
        if len(key) < _MIN_KEY_CHARACTERS or not all(33 <= byte <= 126 for byte in key):
            raise InvalidArgumentError(
                f"api_key_file: {path}: key {number}: allowed are at least {_MIN_KEY_CHARACTERS} printable ASCII "
                "characters without spaces"
            )
    return keys


def _check_origin(origin: str) -> None:
    if origin != "*" and not re.fullmatch(r"https?://[A-Za-z0-9.\[\]:-]{1,255}", origin, re.ASCII):
        raise InvalidArgumentError(
            f"cors_origins: found {origin!r:.80}, allowed is an origin such as http://localhost:3000, or *"
        )
