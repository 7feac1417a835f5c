"""The runner of an Engine on other engines than edgert's own: one job after the other."""

import threading
from collections import deque

from edgert.engine import Job
from edgert.errors import CancelledError
from edgert.model import Model


class Turns:
    """Jobs in order of arrival, each to its end."""

    def __init__(self, model: Model, queue: int) -> None:
        self._model = model
        self._queue = queue
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._running: Job | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="edgert-engine", daemon=True)
        self._thread.start()

    def add(self, job: Job) -> bool:
        with self._changed:
            if len(self._waiting) >= self._queue:
                return False
            job.on_cancel = lambda: self._model.interrupt(job)
            self._waiting.append(job)
            self._changed.notify_all()
        return True

    def stats(self) -> dict[str, int]:
        with self._changed:
            return {
                "requests_running": int(self._running is not None),
                "requests_waiting": len(self._waiting),
            }

    def close(self) -> None:
        with self._changed:
            self._closed = True
            for job in (*self._waiting, *([self._running] if self._running else [])):
                job.cancel()
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._running = None
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if not self._waiting:
                    return
                job = self._running = self._waiting.popleft()
            try:
                self._answer(job)
            except Exception as error:  # noqa: BLE001 - it is the request's
                job.fail(error)

    def _answer(self, job: Job) -> None:
        job.begin()
        if job.cancelled:
            job.end("cancelled")
            return
        sequence = self._model.sequence(job.adapter, job.tokens)
        job.cached_tokens = sequence.length
        tokens = job.tokens[sequence.length :]
        try:
            while not job.cancelled:
                try:
                    sample = self._model.step(job, sequence, tokens, job.sampler)
                except CancelledError:  # meant for this job, or came too late for the one before: then again
                    continue
                if not job.take(sample):
                    return
                tokens = [sample.token]
            job.end("cancelled")
        finally:
            sequence.close()
