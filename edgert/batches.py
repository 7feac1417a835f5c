"""The runner of an Engine on edgert's own engine: the native scheduler, and the thread that hands out its events."""

import threading
import weakref

from edgert import _native
from edgert.backends.native import NativeModel
from edgert.engine import Job


class Batches:
    """Jobs run together in batches; see native/src/engine/scheduler.h."""

    def __init__(self, model: NativeModel, queue: int) -> None:
        self._model = model
        self._scheduler = _native.Scheduler(model.native, queue=queue)
        self._lock = threading.Lock()
        self._jobs: dict[int, Job] = {}
        self._thread = threading.Thread(target=self._run, name="edgert-engine", daemon=True)
        self._thread.start()
        # Its thread must not outlive the interpreter.
        self._finalizer = weakref.finalize(self, self._scheduler.close)

    def add(self, job: Job) -> bool:
        adapters, patches, top_k = self._model.mix(job.adapter)
        with self._lock:  # no event of it is looked at before it is known
            number = self._scheduler.submit(
                adapters=adapters,
                patches=patches,
                top_k=top_k,
                prompt=job.tokens,
                sampler=job.sampler,
                max_tokens=job.reply.limit,
                ends=list(job.reply.ends),
                paced=job.constraint is not None,
            )
            if number is None:
                return False
            self._jobs[number] = job
            scheduler = self._scheduler
            job.on_cancel = lambda: scheduler.cancel(number)
            job.on_ready = lambda: scheduler.proceed(number)
        if job.cancelled:
            job.on_cancel()
        return True

    def stats(self) -> dict[str, int]:
        return self._scheduler.statistics()

    def close(self) -> None:
        self._scheduler.close()
        self._thread.join()

    def _run(self) -> None:
        while events := self._scheduler.events():
            for event in events:
                self._handle(event)

    def _handle(self, event: _native.RequestEvent) -> None:
        with self._lock:
            job = self._jobs.get(event.request)
            if event.finish_reason is not None:
                self._jobs.pop(event.request, None)
        if job is None:
            return
        job.cached_tokens, job.queue_s = event.cached_tokens, event.queue_s
        if event.sample is not None:
            more = job.take(event.sample)
            if event.finish_reason is not None:
                job.end(event.finish_reason)  # nothing where the job had ended by itself, as it should
            elif not more:
                self._scheduler.cancel(event.request)
        elif event.finish_reason == "error":
            try:
                event.raise_error()
            except Exception as error:  # noqa: BLE001 - it is the request's
                job.fail(error)
        else:
            job.end("cancelled")
