"""Two gloo processes for a check. One helper process imports torch once and forks a pair of ranks per check."""

from __future__ import annotations

import atexit
import base64
import functools
import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

from peft_suite.testing.case import Case, LeftOut

__all__ = ["on_two_ranks"]

LIMIT = 180  # seconds for one check


def on_two_ranks(target: str, case: Case) -> None:
    """Run ``"module:function"`` as ``function(case, rank)`` in two processes of one gloo group.

    Raises:
        LeftOut: either rank raised it.
        AssertionError: either rank failed; its traceback is the message.
    """
    if not hasattr(os, "fork"):
        raise LeftOut("two ranks are forked, which this operating system cannot do")
    import torch

    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        raise LeftOut("this torch has no gloo")
    from peft_suite import plugins

    helper = _helper()
    job = pickle.dumps({"target": target, "case": case, "plugins": list(plugins._local.values())})
    assert helper.stdin is not None and helper.stdout is not None
    helper.stdin.write(base64.b64encode(job) + b"\n")
    helper.stdin.flush()
    line = helper.stdout.readline()
    if not line:
        _helper.cache_clear()
        raise AssertionError(f"the helper process ended with code {helper.wait()} (its error output is above)")
    answers: list[dict[str, str]] = json.loads(line)
    for answer in answers:
        if answer["kind"] == "failed":
            raise AssertionError(answer["text"])
    for answer in answers:
        if answer["kind"] == "left out":
            raise LeftOut(answer["text"])


@functools.cache
def _helper() -> subprocess.Popen[bytes]:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path),
        "OMP_NUM_THREADS": "1",
    }
    if Path("/sys/class/net/lo").exists():  # the host name need not resolve
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    process = subprocess.Popen(
        [sys.executable, "-m", "peft_suite.testing.ranks"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
    )
    atexit.register(_stop, process)
    return process


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.communicate()


def _serve() -> None:
    import torch  # noqa: F401 - imported once, before forking

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        job = pickle.loads(base64.b64decode(line))
        answers.write(json.dumps(_pair(job)) + "\n")
        answers.flush()


def _pair(job: dict[str, Any]) -> list[dict[str, str]]:
    _prepare(job)
    with tempfile.TemporaryDirectory() as folder:
        children = {}
        for rank in range(2):
            child = os.fork()
            if child == 0:
                _rank(job, rank, Path(folder))
            children[child] = rank
        return _collect(children, Path(folder))


def _prepare(job: dict[str, Any]) -> None:
    """What all later pairs need as well: plugins of the asking process, the backbone's library."""
    from peft_suite import plugins

    known = {p.name for p in plugins.plugins()}
    for plugin in job["plugins"]:
        if plugin.name not in known:
            plugins.register(plugin)
    plugins.resolve(job["case"].example)


def _rank(job: dict[str, Any], rank: int, folder: Path) -> None:
    answer = {"kind": "passed", "text": ""}
    try:
        import torch
        from torch import distributed

        from peft_suite.plugins import resolve

        warnings.simplefilter("ignore")  # they are the asking process's to show
        torch.set_num_threads(1)
        distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=60)
        )
        resolve(job["target"])(job["case"], rank)
    except LeftOut as reason:
        answer = {"kind": "left out", "text": str(reason)}
    except BaseException:
        answer = {"kind": "failed", "text": f"rank {rank}: {traceback.format_exc()}"}
    (folder / f"{rank}.json").write_text(json.dumps(answer))
    os._exit(0)


def _collect(children: dict[int, int], folder: Path) -> list[dict[str, str]]:
    waiting, end = dict(children), time.monotonic() + LIMIT
    failed_at = 0.0
    while waiting and time.monotonic() < end:
        for child in list(waiting):
            if os.waitpid(child, os.WNOHANG)[0]:
                rank = waiting.pop(child)
                file = folder / f"{rank}.json"
                if not file.exists() or '"passed"' not in file.read_text():
                    failed_at = failed_at or time.monotonic()
        if failed_at and time.monotonic() - failed_at > 3:  # the other rank waits for a partner that is gone
            break
        time.sleep(0.01)
    for child in waiting:
        os.kill(child, 9)
        os.waitpid(child, 0)
    answers: list[dict[str, str]] = []
    for rank in range(2):
        file = folder / f"{rank}.json"
        if file.exists():
            answers.append(json.loads(file.read_text()))
        elif not failed_at:
            answers.append({"kind": "failed", "text": f"rank {rank} did not finish within {LIMIT} seconds"})
        elif not any((folder / f"{r}.json").exists() for r in range(2)):
            answers.append({"kind": "failed", "text": f"rank {rank} crashed"})
    return answers


if __name__ == "__main__":
    _serve()
