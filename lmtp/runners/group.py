"""The processes that compute one model together, connected by torch.distributed on the loopback interface and by Unix
sockets (links.py).

The first process is the server's own. It starts the others, tells them what to do, and ends all of them when one dies
or hangs. They end with it: the system kills them with the thread that started them (prctl(2), PR_SET_PDEATHSIG).
"""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Store, TCPStore

from lmtp.runners.links import Links, pairs
from lmtp.settings import ROOT

START_SECONDS = 120.0
"""For the processes to start."""
LOAD_SECONDS = 3600.0
"""For the slowest process to load its part of the model."""
HANG_SECONDS = 4.0
"""How long a process may let the others wait in the middle of a step."""
REPORT_SECONDS = 0.5
"""How long to wait for the reason after a connection has broken."""
PR_SET_PDEATHSIG = 1


class GroupError(RuntimeError):
    """The group can compute no more; the message says which process is to blame."""


class Group:
    """One process's place in the group."""

    def __init__(self, store: Store, rank: int, count: int, links: Links) -> None:
        self.rank, self.count, self.links = rank, count, links
        on_gpu = torch.cuda.is_available()
        if on_gpu:
            torch.cuda.set_device(rank)
        # Otherwise gloo listens at the address of the machine's name.
        previous = os.environ.get("GLOO_SOCKET_IFNAME")
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        try:
            dist.init_process_group(
                "nccl" if on_gpu else "gloo",
                store=store,
                rank=rank,
                world_size=count,
                timeout=timedelta(seconds=START_SECONDS),
                device_id=torch.device("cuda", rank) if on_gpu else None,
            )
        finally:
            if previous is None:
                del os.environ["GLOO_SOCKET_IFNAME"]
            else:
                os.environ["GLOO_SOCKET_IFNAME"] = previous

    def receive(self) -> tuple[int, Tensor]:
        """Wait for what the first process tells: a code, and numbers ``[n]``."""
        code, length = self.links.receive(torch.empty(2, dtype=torch.int64)).tolist()
        return code, self.links.receive(torch.empty(length, dtype=torch.int64))

    def tell(self, code: int, numbers: Tensor | Sequence[int] = ()) -> None:
        """Tell the others what to do next. The others themselves tell nobody."""

    def least(self, number: int) -> int:
        """The smallest of the numbers that the processes give."""
        with self.computing():
            return min(int(given) for given in self.links.exchange(torch.tensor([number])))

    @contextmanager
    def computing(self, *passing: type[Exception]) -> Iterator[None]:
        """What is computed inside takes all processes. All raise an error of ``passing`` at one point."""
        yield

    def wait_at_most(self, seconds: float) -> None:
        """Bound how long a process waits for the others in the middle of what they compute."""
        if self.rank == 0:  # it takes part in everything, and the others also wait for work
            self.links.wait_at_most(seconds)
        for group in list(dist.distributed_c10d._world.pg_map):
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


class Leader(Group):
    """The first process's place: it starts, tells and ends the others."""

    def __init__(self, count: int, module: str) -> None:
        """``module`` is run in each of the others; it calls `follow`. Raises GroupError where they do not start."""
        self.problem = ""
        """Why the group can compute no more; empty while it can."""
        self.count = count
        self._closed = False
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._threads = torch.get_num_threads()
        if not torch.cuda.is_available():
            torch.set_num_threads(max(self._threads // count, 1))
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
            store = TCPStore(
                "127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=os.dup(listener.fileno())
            )
        environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
        ours, *theirs = pairs(count)
        self.links = Links(0, ours)
        self.processes = []
        for rank, links in enumerate(theirs, start=1):
            arguments = [port, rank, count, os.getpid(), *(link.fileno() for link in links)]
            self.processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", module, *map(str, arguments)],
                    cwd=ROOT,
                    env=environment | {"LOCAL_RANK": str(rank)},
                    stdin=subprocess.DEVNULL,
                    stdout=2,  # the log
                    pass_fds=[link.fileno() for link in links],
                )
            )
            for link in links:
                link.close()
        self._watchers = [
            threading.Thread(target=self._watch, args=(rank, process), name=f"process {rank}", daemon=True)
            for rank, process in enumerate(self.processes, start=1)
        ]
        for watcher in self._watchers:
            watcher.start()
        try:
            self._wait_for(store)
            with self.computing():
                super().__init__(store, 0, count, self.links)
        except BaseException:
            self.close()
            raise

    def tell(self, code: int, numbers: Tensor | Sequence[int] = ()) -> None:
        """See Group.tell. Raises GroupError."""
        body = numbers if isinstance(numbers, Tensor) else torch.tensor(numbers, dtype=torch.int64)
        with self.computing():
            self.links.send(torch.cat([torch.tensor([code, len(body)]), body]))

    @contextmanager
    def computing(self, *passing: type[Exception]) -> Iterator[None]:
        """See Group.computing. Any other error leaves the processes at different points, so it ends the group, and
        GroupError is raised."""
        self.check()
        try:
            yield
        except passing:
            raise
        except Exception as error:
            self._ended.wait(REPORT_SECONDS)
            self._end(f"a process of {self.count} that compute the model failed or did not answer: {_line(error)}")
            raise GroupError(self.problem) from error

    def check(self) -> None:
        """Raise GroupError if the group can compute no more."""
        if self.problem:
            raise GroupError(self.problem)

    def close(self) -> None:
        """End the other processes, and wait until they are gone. The first process can then start another group."""
        self._end("the group of processes is closed")
        for watcher in self._watchers:
            watcher.join()
        if not self._closed:
            self._closed = True
            self.links.close()
            torch.set_num_threads(self._threads)
            if dist.is_initialized():
                dist.destroy_process_group()

    def _wait_for(self, store: Store) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not store.check([str(rank) for rank in range(1, self.count)]):
            self.check()
            if time.monotonic() > deadline:
                raise GroupError(f"the processes that PARALLEL asks for did not start within {START_SECONDS:g} s")
            time.sleep(0.02)

    def _watch(self, rank: int, process: "subprocess.Popen[bytes]") -> None:
        code = process.wait()
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}; see its log"
        self._end(f"process {rank + 1} of {self.count} that compute the model {how}")
        self._ended.set()

    def _end(self, problem: str) -> None:
        with self._lock:
            self.problem = self.problem or problem
        for process in self.processes:
            process.kill()


def follow() -> Group:
    """Join the group as its first process asked by the arguments of this one."""
    port, rank, count, parent, *links = map(int, sys.argv[1:])
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before that
        sys.exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the first process decides
    store = TCPStore("127.0.0.1", port, is_master=False)
    store.set(str(rank), "")
    return Group(store, rank, count, Links(rank, [socket.socket(fileno=link) for link in links]))


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
