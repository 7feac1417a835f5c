"""Flags that several commands share; those of settings follow from their declarations."""

import argparse
import re
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgert import lossy
from edgert.cli.terminal import note, progress
from edgert.sampling import SAMPLING
from edgert.settings import Layers, Setting, knobs
from edgert.units import format_bytes

if TYPE_CHECKING:
    from edgert.cluster import Cluster
    from edgert.model import Model

Subparsers = Any  # argparse names its own type only in private


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        help="a bundle's path or its name as `edgert list` says, or a GGUF file (default: the embedded one)",
    )


def add_backend(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--backend",
        choices=("edgert", "llama.cpp", "onnx"),
        help="the engine (default: what the model needs); llama.cpp runs GGUF files",
    )


def add_adapter(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--adapter",
        metavar="PATH[:SCALE]",
        type=scaled,
        action="append",
        default=[],
        help="run with an adapter: its file, or a PEFT directory, whose effect is multiplied by SCALE (default: 1); may be repeated",
    )


def load_adapters(model: "Model", given: Iterable[tuple[Path, float]]) -> None:
    """Load what add_adapter() has read, and turn it on."""
    from edgert.adapter_paths import adapter_name

    scales: dict[str, float] = {}
    for number, (path, scale) in enumerate(given):
        name = adapter_name(path)
        info = model.load_adapter(path, f"{name}-{number}" if name in scales else name)
        note(
            f"adapter {info.name}: {info.kind}, {info.matrices} matrices, {format_bytes(info.bytes)}, scale {scale:g}"
        )
        scales[info.name] = scale
    if scales:
        model.set_adapter(scales)


def scaled(text: str) -> tuple[Path, float]:
    """PATH or PATH:SCALE."""
    path, colon, scale = text.rpartition(":")
    try:
        return (Path(path), float(scale)) if colon and path else (Path(text), 1.0)
    except ValueError:
        return Path(text), 1.0  # a colon of the path's own


def find_model(model: str | None, backend: str | None = None) -> str | Path | None:
    """What edgert.load() takes for MODEL: of a GGUF file that edgert's own engine is to run, the bundle, made first if it
    is not there, and said so."""
    from edgert import caches, gguf
    from edgert.bundle import locate
    from edgert.errors import UnsupportedError

    if model is not None and caches.is_name(model):
        model = str(caches.resolve(model))
    path = Path(model or "")
    if (
        backend == "llama.cpp"
        or not gguf.is_gguf(path)
        or (gguf.kept_bundle(path) / "manifest.json").exists()
    ):
        return model
    note(f"edgert: converting {model}, once; what is already quantised is carried over as it is")
    try:
        with progress("convert") as update:
            bundle = locate(model, update)
    except UnsupportedError:
        if backend is not None:
            raise
        return model  # load() knows whether another engine runs it
    note(f"edgert: kept as {bundle}")
    return bundle


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def add_ray(parser: argparse.ArgumentParser, verb: str) -> None:
    parser.add_argument(
        "--ray",
        metavar="ADDRESS",
        help=f"{verb} on the machines of a Ray cluster, which share the files: HOST:PORT, auto for the one that this machine is "
        "part of, local for this machine alone",
    )


def cluster_of(args: argparse.Namespace) -> "AbstractContextManager[Cluster | None]":
    """What add_ray() has read."""
    if args.ray is None:
        return nullcontext()
    from edgert.cluster import Cluster

    return Cluster(args.ray)


def add_knobs(parser: argparse.ArgumentParser) -> None:
    """The engine's knobs."""
    group = parser.add_argument_group("engine")
    add_settings(group, knobs())
    group.add_argument(
        "--exact",
        action="store_true",
        help="refuse every lossy mode, wherever it is turned on",
    )


def add_sampling(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "sampling", "what is not given comes from the model's own generation defaults"
    )
    add_settings(group, SAMPLING)
    group.add_argument(
        "--logit-bias",
        metavar="TOKEN=BIAS",
        type=_bias,
        action="append",
        help="add to the logit of a token id; may be repeated",
    )


def knob_flags(args: argparse.Namespace) -> dict[str, Any]:
    """The knobs that were given as flags, for edgert.load(). Raises InvalidArgumentError where --exact forbids one that is on."""
    given = {setting.name: getattr(args, setting.name) for setting in knobs()}
    if args.exact:
        lossy.refuse(given)
    return given


def sampling_flags(args: argparse.Namespace) -> dict[str, Any]:
    """Sampling as flags, variables and files say."""
    layers = Layers.read()
    values = {setting.name: layers.value(setting, getattr(args, setting.name)) for setting in SAMPLING}
    values["logit_bias"] = dict(args.logit_bias) if args.logit_bias else None
    return values


def add_settings(group: Any, settings: Iterable[Setting]) -> None:
    """A flag for each."""
    for setting in settings:
        options: dict[str, Any] = {"dest": setting.name, "help": _help(setting), "default": None}
        if setting.kind == "bool":
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["metavar"] = _metavar(setting)
            if setting.kind == "texts":
                options["action"] = "append"
        group.add_argument(setting.flag, **options)


def _metavar(setting: Setting) -> str:
    if setting.kind == "choice":
        return "{" + ",".join(setting.choices) + "}"
    if setting.kind == "bytes":
        return "SIZE"
    return {"texts": "TEXT", "text": "TEXT", "float": "X"}.get(setting.kind, "N")


def _help(setting: Setting) -> str:
    text = setting.help.rstrip(".").replace("%", "%%")
    return f"{text} [{setting.variable}]"


def _bias(text: str) -> tuple[int, float]:
    match = re.fullmatch(r"(\d{1,10})=(.{1,40})", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"found {text[:60]!r}, allowed is TOKEN=BIAS, for example 42=-5")
    return int(match[1]), float(match[2])
