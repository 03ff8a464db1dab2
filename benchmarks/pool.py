"""Jobs in processes of their own, each result as it comes; stopped, no process stays behind."""

import multiprocessing
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any, TypeVar

J = TypeVar("J", bound=Hashable)


def in_processes(
    run: Callable[..., Any],
    jobs: Mapping[J, Sequence[Any]],
    workers: int,
    prepare: Callable[[], object],
) -> Iterator[tuple[J, Any]]:
    """Runs jobs in spawned processes.

    Args:
        run: Called with a job's arguments.
        jobs: By job: the arguments.
        workers: Processes.
        prepare: Called first in each of them.

    Yields:
        A job and what it returned.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, prepare) as pool:
        waiting = {pool.submit(run, *arguments): job for job, arguments in jobs.items()}
        try:
            for future in as_completed(waiting):
                yield waiting[future], future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise
