"""The watchdog tells an engine that stands still from one that works or has nothing to do."""

from dataclasses import dataclass
from typing import Any, cast

from daemons import wait_until

import edgert
from edgert.engine import Engine
from edgert.sampling import Sampling
from edgert.server.models import Opened
from edgert.server.watchdog import Watchdog


@dataclass
class Moves:
    """A model in memory that is as far as it says."""

    at: tuple[float, ...] | None = None

    def progress(self) -> tuple[float, ...] | None:
        return self.at


class Free:
    """A Constraint that allows everything: the engine waits for it after each token."""

    def mask(self) -> None:
        return None

    def accept(self, token: int) -> bool:
        return True


def test_only_an_engine_that_stands_still_with_requests_is_stuck() -> None:
    now = [0.0]
    watchdog = Watchdog(lambda: now[0], still_s=100)
    idle, busy, stuck = Moves(), Moves((0,)), Moves((5,))
    models: list[tuple[str, Any]] = [("idle", idle), ("busy", busy), ("stuck", stuck)]

    def after(seconds: float) -> list[str]:
        now[0] += seconds
        busy.at = (int(now[0]),)
        return watchdog.stuck(cast("list[tuple[str, Opened]]", models))

    assert after(1) == after(99) == []
    assert after(1) == after(50) == ["stuck"]
    stuck.at = None  # its requests were cancelled
    assert after(1) == []
    stuck.at = (5,)  # new ones: from now on
    assert after(1) == after(99) == []
    assert after(1) == ["stuck"]
    stuck.at = (6,)
    assert after(1) == []


def test_the_progress_of_a_real_engine() -> None:
    with edgert.load(memory="64MiB", threads=1, context=256) as model:
        engine = Engine(model)
        opened = Opened(model, engine, 64 << 20)
        seen = []
        assert opened.progress() is None
        job = engine.submit(
            [5, 6],
            Sampling(max_tokens=20, ignore_eos=True),
            lambda piece: seen.append(opened.progress()),
            constraint=Free(),
        )
        assert job.done.wait(60)
        steps = [progress[0] for progress in seen if progress is not None]
        assert len(steps) >= 19 and steps == sorted(steps) and steps[0] < steps[-1]
        assert engine.drain(10)
        wait_until(lambda: opened.progress() is None)
        engine.close()
