"""Runs the command line in children that die where a test says, alone or as the processes of one training.

As a script: jobs come in on stdin, one JSON object a line. The children are forked from one process that has imported everything, so
that a start or a kill costs tenths of a second and not an import of torch.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from ports import hold_port

FILES = "files"
"""The place that stands for everything that opens, renames, makes or removes something in the run folder."""

LOADED = (
    *("zppo.train.run", "zppo.cli", "zppo.lab.questions", "zppo.planning.dry_run", "zppo.planning.memory"),
    *("peft", "torch.profiler", "concurrent.futures.process", "pyarrow.compute", "pyarrow.parquet"),
)
FILE_EVENTS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir")


class Victims:
    """Starts children, one after the other, and waits for them."""

    def __init__(self) -> None:
        self.driver = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.said = ""
        self.statuses: list[int] = []

    def run(
        self,
        *argv: object,
        run: Path,
        at: str = "",
        nth: int = 1,
        do: str = "kill",
        seconds: float = 0,
        teacher: str = "",
        processes: int = 1,
        call: str = "zppo.cli:main",
        started: list[dict[str, str]] | None = None,
        **env: str,
    ) -> int:
        """The exit status of `zppo argv...`, negative for a signal that ended it; what it printed is in `said`.

        With several processes the status of each is in `statuses`, and the first one that is not 0 is returned.

        Args:
            run: the run folder.
            at: module:function whose nth call does it, before anything else; or FILES.
            do: kill, term, hup, int (signals to itself), int-twice, deaf or full-stdout (its output goes
                nowhere from then on), or full: from then on no file grows beyond 100 bytes.
            seconds: kill it from outside after this time; 0: never.
            teacher: module:function in the place of the teacher's `complete`.
            processes: that many ranks, which find one another as if torchrun had started them; no launcher ends them.
            call: what is called with `argv` in the place of the command line.
            started: what their launcher tells each of several processes, where it is not torchrun.
            env: the environment's variables, beside those of this process.
        """
        assert self.driver.stdin and self.driver.stdout
        job = {
            "argv": [str(a) for a in argv],
            "run": str(run),
            "at": at,
            "nth": nth,
            "do": do,
            "seconds": seconds,
            "teacher": teacher,
            "call": call,
            "env": [{**env, **ranked} for ranked in started or ranks(processes)],
        }
        self.driver.stdin.write(json.dumps(job) + "\n")
        self.driver.stdin.flush()
        reply = json.loads(self.driver.stdout.readline())
        self.said = " ".join(reply["said"].split())
        self.statuses = reply["statuses"]
        return next((status for status in self.statuses if status), 0)

    def close(self) -> None:
        self.driver.kill()
        self.driver.communicate()


def ranks(processes: int) -> list[dict[str, str]]:
    """What torchrun would put into the environment of each process."""
    if processes == 1:
        return [{}]
    group = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(hold_port())}
    return [{**group, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def befall(what: str) -> None:
    """What happens to the child."""
    me = os.getpid()
    if what == "kill":
        os.kill(me, signal.SIGKILL)
    elif what == "term":
        os.kill(me, signal.SIGTERM)
    elif what == "hup":
        os.kill(me, signal.SIGHUP)
    elif what == "int":
        os.kill(me, signal.SIGINT)
    elif what == "int-twice":
        stop = importlib.import_module("zppo.runs.signals")
        stop.REPEAT_SECONDS = -1.0  # type: ignore[attr-defined]
        os.kill(me, signal.SIGINT)
        os.kill(me, signal.SIGINT)
    elif what == "deaf":  # whoever read what it prints has gone
        out_of, into = os.pipe()
        os.close(out_of)
        os.dup2(into, 1)
    elif what == "full-stdout":
        os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
    elif what == "full":
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))


def find(spec: str) -> tuple[Any, str]:
    """(what holds it, its name) of module:name.name"""
    module, _, dotted = spec.partition(":")
    *above, name = dotted.split(".")
    holder: Any = importlib.import_module(module)
    for part in above:
        holder = getattr(holder, part)
    return holder, name


def lay_trap(job: dict[str, Any]) -> None:
    """Make the nth call of the named function, or the nth event on the run folder's files, do what the job says."""
    count = 0

    def tick() -> None:
        nonlocal count
        count += 1
        if count == job["nth"]:
            befall(job["do"])

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in FILE_EVENTS and str(arguments[0]).startswith(job["run"]):
            tick()

    if job["at"] == FILES:
        sys.addaudithook(hook)
    elif job["at"]:
        holder, name = find(job["at"])
        original = getattr(holder, name)

        def trapped(*args: Any, **kwargs: Any) -> Any:
            tick()
            return original(*args, **kwargs)

        setattr(holder, name, trapped)


def child(job: dict[str, Any], env: dict[str, str], out: int) -> None:
    """One command line, after the fork."""
    os.environ.update(env)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.close(out)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    status = 70
    try:
        lay_trap(job)
        if job["teacher"]:
            own, name = find(job["teacher"])
            setattr(*find("zppo.teacher.local:LocalTeacher.complete"), getattr(own, name))
        called, name = find(job["call"])
        status = getattr(called, name)(job["argv"])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def warm() -> None:
    """Once for all children what each would otherwise do: half of a short run is what libraries import at their first use."""
    for spec in LOADED:
        importlib.import_module(spec)
    from conftest import make_tiny
    from zppo.models.student_model import load_model

    importlib.import_module("pyarrow").table({"a": ["b"]}).to_pylist()  # with pandas, where it is installed
    with tempfile.TemporaryDirectory() as folder:
        make_tiny(Path(folder))
        load_model(folder, dtype=importlib.import_module("torch").float32)
    gc.collect()
    gc.freeze()  # nor does a child's collection of garbage walk through all that was imported


def serve() -> None:
    """Fork the children of a job and answer with their exit statuses and what they printed."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what an import prints is no answer
    warm()
    for line in sys.stdin:
        job = json.loads(line)
        out_of, into = os.pipe()
        pids = []
        for env in job["env"]:
            pids.append(os.fork())
            if pids[-1] == 0:
                os.close(out_of)
                child(job, env, into)
        os.close(into)
        timers = [threading.Timer(job["seconds"] or 240, os.kill, (pid, signal.SIGKILL)) for pid in pids]
        for timer in timers:
            timer.start()
        with os.fdopen(out_of, "rb") as file:
            said = file.read().decode("utf-8", "replace")
        statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        for timer in timers:
            timer.cancel()
        print(json.dumps({"statuses": statuses, "said": said}), file=answers, flush=True)


if __name__ == "__main__":
    serve()
