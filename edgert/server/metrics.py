"""Counters and histograms of requests, and the text that Prometheus reads."""

import threading
from bisect import bisect_left
from collections.abc import Iterable, Sequence

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class Counter:
    """Grows; one value a combination of labels."""

    kind = "counter"

    def __init__(self, name: str, help: str, labels: Sequence[str] = ()) -> None:
        self.name, self.help, self.labels = name, help, tuple(labels)
        self._lock = threading.Lock()
        self._values: dict[tuple[str, ...], float] = {} if labels else {(): 0.0}

    def add(self, amount: float = 1.0, *values: str) -> None:
        with self._lock:
            self._values[values] = self._values.get(values, 0.0) + amount

    def total(self) -> float:
        with self._lock:
            return sum(self._values.values())

    def samples(self) -> Iterable[str]:
        with self._lock:
            rows = sorted(self._values.items())
        for values, amount in rows:
            yield f"{self.name}{labelled(zip(self.labels, values, strict=True))} {shown(amount)}"


class Histogram:
    """Seconds in buckets."""

    kind = "histogram"

    def __init__(self, name: str, help: str, bounds: Sequence[float] = SECONDS) -> None:
        self.name, self.help, self._bounds = name, help, tuple(bounds)
        self._lock = threading.Lock()
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        with self._lock:
            self._counts[bisect_left(self._bounds, value)] += 1
            self._sum += value

    def quantile(self, share: float) -> float:
        """The bound under which this share of the values lies; 0 without values."""
        with self._lock:
            counts = list(self._counts)
        wanted, seen = share * sum(counts), 0
        for bound, count in zip((*self._bounds, self._bounds[-1]), counts, strict=True):
            seen += count
            if seen and seen >= wanted:
                return bound
        return 0.0

    def samples(self) -> Iterable[str]:
        with self._lock:
            counts, total = list(self._counts), self._sum
        running = 0
        for bound, count in zip((*map(shown, self._bounds), "+Inf"), counts, strict=True):
            running += count
            yield f'{self.name}_bucket{{le="{bound}"}} {running}'
        yield f"{self.name}_sum {shown(total)}"
        yield f"{self.name}_count {running}"


class Metrics:
    """What the daemon itself counts; what models count is asked of them when /metrics is read."""

    def __init__(self) -> None:
        self.requests = Counter(
            "edgert_http_requests_total", "HTTP requests by route and status", ("route", "status")
        )
        self.prompt_tokens = Counter("edgert_prompt_tokens_total", "Tokens of prompts", ("model",))
        self.cached_tokens = Counter(
            "edgert_prompt_cached_tokens_total", "Tokens of prompts that the prefix cache held", ("model",)
        )
        self.generated_tokens = Counter("edgert_generated_tokens_total", "Tokens drawn", ("model",))
        self.finished = Counter(
            "edgert_generations_total", "Generations ended, by reason", ("model", "reason")
        )
        self.request_seconds = Histogram(
            "edgert_request_seconds", "From a request's arrival to its last byte"
        )
        self.first_token_seconds = Histogram(
            "edgert_time_to_first_token_seconds", "From a request's arrival to its first token"
        )
        self.inter_token_seconds = Histogram(
            "edgert_inter_token_seconds", "Between two tokens of one generation"
        )

    def text(self) -> str:
        return exposition(
            (
                self.requests,
                self.prompt_tokens,
                self.cached_tokens,
                self.generated_tokens,
                self.finished,
                self.request_seconds,
                self.first_token_seconds,
                self.inter_token_seconds,
            )
        )


def exposition(series: Iterable[Counter | Histogram]) -> str:
    lines = []
    for one in series:
        lines += [f"# HELP {one.name} {one.help}", f"# TYPE {one.name} {one.kind}", *one.samples()]
    return "\n".join(lines) + "\n"


def labelled(labels: Iterable[tuple[str, str]]) -> str:
    inside = ",".join(f'{name}="{escaped(value)}"' for name, value in labels)
    return f"{{{inside}}}" if inside else ""


def escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


def shown(value: float) -> str:
    return str(int(value)) if float(value).is_integer() else repr(float(value))
