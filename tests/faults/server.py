"""A process that has loaded everything once and forks for each case: start-up without its cost.

One JSON object a line on stdin, one on stdout: ``start`` forks and answers with the process id,
``wait`` answers with its wait status, or null when it outlives the time given. It never computes
anything itself: torch's threads do not survive a fork.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import signal
import sys
import time
import traceback
from typing import Any, NoReturn


def run_case(job: dict[str, Any]) -> NoReturn:
    """In the forked process: the streams, then the driver; its result is the exit code."""
    code = 99
    try:
        from faults import drivers

        libc, die_with_parent = ctypes.CDLL(None), 1  # PR_SET_PDEATHSIG
        libc.prctl(die_with_parent, signal.SIGKILL)
        os.chdir(job["cwd"])
        for number, path in ((0, os.devnull), (1, job["stdout"]), (2, job["stderr"])):
            flags = os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_APPEND
            descriptor = os.open(path, flags, 0o644)
            os.dup2(descriptor, number)
            os.close(descriptor)
        sys.stdin = open(0, encoding="utf-8")  # noqa: SIM115  # ours has been read from already
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(
                number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            )
        drivers.lighten()
        for name in job.get("breaks", ()):
            drivers.BREAKS[name]()
        if job.get("stopped"):  # until a tracer has come
            os.kill(os.getpid(), signal.SIGSTOP)
        code = int(drivers.DRIVERS[job["driver"]](*job["arguments"]))
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def wait_for(pid: int, seconds: float) -> int | None:
    """The wait status of a child, None when it still runs after `seconds`."""
    deadline, pause = time.monotonic() + seconds, 0.001
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status
        if time.monotonic() > deadline:
            return None
        time.sleep(pause)
        pause = min(pause * 1.2, 0.02)


def serve() -> None:
    """Answer until stdin ends."""
    # Here, since each process that multiprocessing starts for a case imports this file again, and
    # torch would take it seconds.
    from faults import drivers

    drivers.build_byte_tokenizer().fingerprint  # noqa: B018
    gc.freeze()
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print(json.dumps({"ready": True}), file=replies, flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        if "start" in job:
            pid = os.fork()
            if pid == 0:
                run_case(job["start"])
            reply: Any = pid
        else:
            reply = wait_for(*job["wait"])
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    serve()
