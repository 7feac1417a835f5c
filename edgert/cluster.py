"""Work of conversions and evaluations spread over the machines of a Ray cluster (extra `ray`).

The machines share a file system: checkpoint and bundles have the same paths on all of them, and what one wrote and synced the
others read. Results are those of one machine, to the bit where the machines have the same instruction set: every extent of a
bundle is packed by itself, every window of a text is scored by itself, and sums are taken here, in the text's order.
"""

import os
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from edgert import __version__
from edgert.errors import CancelledError, InvalidArgumentError, StorageError, UnsupportedError

if TYPE_CHECKING:
    from edgert.converters.bundle import Pack
    from edgert.converters.pack import Packed, Part
    from edgert.evaluate import Evaluation, Scored

_POLL_S = 0.2
_CONNECT_S = 5.0
_LOCAL_STORE_BYTES = 256 << 20  # for what travels between processes, where Ray is started here


class Cluster:
    """A context manager around Ray: joins the cluster at `address` (HOST:PORT, "auto" for the one that this machine is part
    of), or begins one of this machine alone ("local").

    Raises StorageError where there is none, UnsupportedError where another edgert runs there.
    """

    def __init__(self, address: str) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        import ray

        _check_reachable(address)

        self._ray = ray
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        if address == "local":
            quiet |= {"include_dashboard": False, "object_store_memory": _LOCAL_STORE_BYTES}
            quiet["_node_ip_address"] = "127.0.0.1"  # whoever reaches Ray may run anything
        try:
            ray.init(address=address, **quiet)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise StorageError(f"ray: no cluster at {address}: {error}") from None
        try:
            self._machines = {
                node["NodeID"]: int(node["Resources"]["CPU"])
                for node in ray.nodes()
                if node["Alive"] and node["Resources"].get("CPU", 0) >= 1
            }
            self._check_versions()
        except BaseException:
            ray.shutdown()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._ray.shutdown()

    @property
    def cores(self) -> int:
        """Of all machines together."""
        return sum(self._machines.values())

    def packing(self, paths: Mapping[int, Path]) -> Callable[["Pack"], "Pack"]:
        """What runs pack_extent() and its like on the cluster; `paths` are those of open files."""
        task = self._ray.remote(num_cpus=1, max_retries=0)(_pack)

        def packed(
            work: "Pack",
            parts: "Sequence[Part]",
            file: int,
            offset: int,
            remainder_file: int | None,
            advance: Callable[[int], None],
            stop: threading.Event,
        ) -> "Packed":
            beside = None if remainder_file is None else paths[remainder_file]
            done = task.remote(work, [_with_moments(part) for part in parts], paths[file], offset, beside)
            result: Packed = self._wait(done, stop)
            advance(sum(part.source.bytes for part in parts))
            return result

        return lambda work: partial(packed, work)

    def evaluate(
        self,
        model: Path,
        tokens: Sequence[int],
        knobs: Mapping[str, Any],
        *,
        reference: Path | None = None,
        adapters: Sequence[tuple[Path, float]] = (),
        stride: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> "Evaluation":
        """edgert.evaluate.evaluate() with the model loaded once on every machine, whose windows each takes in turn."""
        from ray.util import ActorPool
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        from edgert.evaluate import evaluate_windows

        actor = self._ray.remote(_Scorer)
        scorers = [
            actor.options(
                num_cpus=cores, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)
            ).remote()
            for node, cores in self._machines.items()
        ]
        stated = [{"threads": cores, **knobs} for cores in self._machines.values()]
        opening = [
            scorer.open.remote(model, reference, own, list(adapters))
            for scorer, own in zip(scorers, stated, strict=True)
        ]
        about, other = self._get(opening)[0]

        def score(windows: Iterable[tuple[list[int], int]]) -> Iterator["Scored"]:
            pool = ActorPool(scorers)
            for scored in pool.map(lambda one, window: one.score.remote(*window), list(windows)):
                yield from scored

        return evaluate_windows(
            about, tokens, score, reference=other, context=None, stride=stride, progress=progress
        )

    def _check_versions(self) -> None:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        task = self._ray.remote(num_cpus=1, max_retries=0)(_version)
        for node, found in zip(
            self._machines,
            self._get(
                [
                    task.options(
                        scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)
                    ).remote()
                    for node in self._machines
                ]
            ),
            strict=True,
        ):
            if found != __version__:
                raise UnsupportedError(
                    f"ray: machine {node[:12]}: found edgert {found}, allowed is {__version__}"
                )

    def _wait(self, reference: Any, stop: threading.Event) -> Any:
        while not self._ray.wait([reference], timeout=_POLL_S)[0]:
            if stop.is_set():
                self._ray.cancel(reference)
                raise CancelledError("the conversion was cancelled")
        return self._get(reference)

    def _get(self, references: Any) -> Any:
        """Its value. Raises what was raised there."""
        try:
            return self._ray.get(references)
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except self._ray.exceptions.RayError as error:
            raise StorageError(f"ray: {str(error).splitlines()[0]}") from None


def _check_reachable(address: str) -> None:
    """Ray itself would try for a minute."""
    host, _, port = address.rpartition(":")
    if address in ("auto", "local"):
        return
    if not host or not port.isascii() or not port.isdigit():
        raise InvalidArgumentError(f"ray: found {address!r:.80}, allowed are HOST:PORT, auto and local")
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise StorageError(f"ray: no cluster at {address}: {error}") from None


# --- what the machines do ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class About:
    """Of a model that is loaded elsewhere."""

    name: str
    context: int
    vocab_size: int


class _Scorer:
    """A model, and its reference, on one machine."""

    def __init__(self) -> None:
        self._stack = ExitStack()

    def open(
        self,
        model: Path,
        reference: Path | None,
        knobs: dict[str, Any],
        adapters: list[tuple[Path, float]],
    ) -> tuple[About, About | None]:
        """No constructor, because what one raises does not come back as it is."""
        import edgert

        self._model = self._stack.enter_context(edgert.load(model, **knobs))
        scales = {}
        for number, (path, scale) in enumerate(adapters):
            scales[self._model.load_adapter(path, str(number)).name] = scale
        if scales:
            self._model.set_adapter(scales)
        same = {**knobs, "context": self._model.context}
        self._reference = (
            None if reference is None else self._stack.enter_context(edgert.load(reference, **same))
        )
        return _about(self._model), None if self._reference is None else _about(self._reference)

    def score(self, window: list[int], first: int) -> list["Scored"]:
        from edgert.evaluate import score

        return list(score(self._model, window, first, self._reference))


def _about(model: Any) -> About:
    return About(model.name, model.context, model.vocab_size)


def _version() -> str:
    return __version__


def _pack(work: "Pack", parts: "Sequence[Part]", path: Path, offset: int, beside: Path | None) -> "Packed":
    """Into files that are there, synced before it is said to be done."""
    with ExitStack() as stack:
        file = _opened(stack, path)
        remainder_file = None if beside is None else _opened(stack, beside)
        packed = work(parts, file, offset, remainder_file, lambda count: None, threading.Event())
        for one in (file, remainder_file):
            if one is not None:
                os.fsync(one)
    return packed


def _opened(stack: ExitStack, path: Path) -> int:
    try:
        file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        raise StorageError(
            f"{path}: is not there on {os.uname().nodename}; a cluster needs a shared file system"
        ) from None
    stack.callback(os.close, file)
    return file


def _with_moments(part: "Part") -> "Part":
    """With the moments that its errors are weighed by read here, so that they travel."""
    if part.moments is None or part.is_exact:
        return replace(part, moments=None)
    return replace(part, moments=replace(part.moments, read=partial(_itself, part.moments.read())))


def _itself(value: Any) -> Any:
    return value
