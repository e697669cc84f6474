"""Tasks as Ray runs them: on any free cores, or in a pool of processes that keep their GPUs."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from cpcscale.cluster import session
from cpcscale.errors import UserError


class RayTasks:
    """Tasks of the Ray that this process has joined or started."""

    def __init__(self, function: Callable[..., Any], shared: tuple[Any, ...], cpus: float) -> None:
        session.connect()
        import ray

        everywhere, here = ray.put(shared), tuple(session.versions().items())

        def call(item: Any) -> Any:
            session.refuse_other_versions(*here)
            return function(item, *ray.get(everywhere))

        self._task = ray.remote(num_cpus=cpus)(call)
        self.width = int(ray.cluster_resources().get("CPU", 1))

    def submit(self, item: Any) -> Any:
        return self._task.remote(item)

    def wait(self, references: set[Any]) -> Sequence[Any] | set[Any]:
        import ray

        done: list[Any]
        done, _ = ray.wait(list(references), num_returns=1)
        return done

    def result(self, reference: Any) -> Any:
        import ray

        try:
            return ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise error.cause from None
            # Ray cannot unpickle the function there, and has only this text for it.
            if "failed to import" in str(error) and (lacks := re.search(r"No module named '([^']+)'", str(error))):
                raise UserError(f"a node has no package {lacks[1]}: install the same packages on every node") from None
            raise
        except (
            ray.exceptions.WorkerCrashedError,
            ray.exceptions.RayActorError,
            ray.exceptions.OutOfMemoryError,
        ) as error:
            raise process_died(str(error).splitlines()[0]) from None

    def close(self, unfinished: set[Any], *, interrupted: bool) -> None:
        import ray

        # At a stop Ray ends the tasks with this process, and Ray 2.60 aborts a process at an answer from a cancelled
        # task.
        for reference in () if interrupted else unfinished:
            ray.cancel(reference)


class _Process:
    """The actor of a `RayPool`."""

    def __init__(self, function: Callable[..., Any], everywhere: list[Any]) -> None:
        import ray

        self._function, [self._shared] = function, ray.get(everywhere)

    def begin(self, here: tuple[tuple[str, str], ...]) -> None:
        """Returns once the process is there. Raises UserError where it has other versions."""
        session.refuse_other_versions(*here)

    def run(self, item: Any) -> Any:
        return self._function(item, *self._shared)


class RayPool(RayTasks):
    """Tasks in processes of Ray that hold their GPU, and what they loaded, until all tasks are done.

    Ray would end the process of a task that has a GPU with the task; kept for the next one, it would have its first GPU
    even if Ray gave that one another. A process gets its next task when it has ended one, so none waits for a process
    that other jobs keep from starting.
    """

    def __init__(
        self, function: Callable[..., Any], shared: tuple[Any, ...], cpus: float, gpus: float, count: int
    ) -> None:
        session.connect()
        import ray

        room = {"GPU": gpus, "CPU": cpus}
        fits = [min(int(node.get(name, 0) / each) for name, each in room.items()) for node in session.live_nodes()]
        self.width = max(1, min(count, sum(fits)))
        # Kept, for a process that is started anew asks for it again.
        self._everywhere, here = [ray.put(shared)], tuple(session.versions().items())
        # As often as Ray tries a task anew whose node is lost.
        kept = {"max_restarts": 3, "max_task_retries": 3}
        process = ray.remote(num_cpus=cpus, num_gpus=gpus, **kept)(_Process)
        self._processes = [process.remote(function, self._everywhere) for _ in range(self.width)]
        self._waiting: deque[tuple[Future[Any], Any]] = deque()
        # By what Ray says when it is done: the process, and what waits for its result.
        self._busy: dict[Any, tuple[Any, Future[Any] | None]] = {
            each.begin.remote(here): (each, None) for each in self._processes
        }
        self._idle: list[Any] = []

    def submit(self, item: Any) -> Future[Any]:
        reference: Future[Any] = Future()
        self._waiting.append((reference, item))
        self._begin()
        return reference

    def _begin(self) -> None:
        while self._idle and self._waiting:
            process, (reference, item) = self._idle.pop(), self._waiting.popleft()
            self._busy[process.run.remote(item)] = process, reference

    def wait(self, references: set[Any]) -> set[Any]:
        while not (done := {each for each in references if each.done()}):
            [answer] = super().wait(set(self._busy))
            process, reference = self._busy.pop(answer)
            if reference is None:
                # It says why a process could not start.
                super().result(answer)
            else:
                reference.set_result(answer)
            self._idle.append(process)
            self._begin()
        return done

    def result(self, reference: Future[Any]) -> Any:
        return super().result(reference.result())

    def close(self, unfinished: set[Any], *, interrupted: bool) -> None:
        import ray

        for process in () if interrupted else self._processes:
            ray.kill(process)


def process_died(why: str) -> UserError:
    """The error of a task whose process ended before it."""
    return UserError(
        f"a process died at its task ({why}): it may have run out of memory; give it more, or fewer tasks at a time "
        "(workers, num_cpus), and run again"
    )
