"""What a soak breaks: the GPU worker, its connection, and those of clients. All in the main thread, one at a time."""

import os
import random
import signal
import time
from collections.abc import Callable

from deploy.local.cluster import GPU_WORKER, Cluster
from evaluation.judge import Fault
from evaluation.relay import Relay, Relays

STEP_SECONDS = 5.0  # the trusted worker's patience with the GPU worker: some pauses are longer
PAUSES = (0.2, 1.0, 3.0, STEP_SECONDS + 2)
DOWN = (0.0, 1.0, 4.0)  # between a death of the GPU worker and its restart
SILENCE = 4.0  # between the end of a client and when the trusted worker hears of it


class Faults:
    """Strikes at random. `clients` are the relays of the clients, `offload` that of the GPU worker, if there is one."""

    def __init__(
        self, cluster: Cluster, relays: Relays, clients: list[Relay], offload: Relay | None, pick: random.Random
    ) -> None:
        self.done: list[Fault] = []
        self._cluster, self._relays, self._clients, self._offload, self._pick = cluster, relays, clients, offload, pick
        self._kinds: list[tuple[str, int, Callable[[], int | None]]] = [  # and how often, relative to each other
            ("client vanished", 3, self._vanish),
            ("client cut off", 3, self._cut_client),
        ]
        if offload is not None:
            self._kinds += [
                ("GPU worker killed", 1, self._kill),  # rarely: memory of a new process says little
                ("GPU worker paused", 2, self._pause),
                ("GPU worker cut off", 3, lambda: self._cut(offload)),
            ]
        pick.shuffle(self._kinds)

    def strike(self) -> Fault:
        """Break one thing, everything once before anything twice; returns when it works again."""
        if len(self.done) < len(self._kinds):
            kind, _, break_it = self._kinds[len(self.done)]
        else:
            kind, _, break_it = self._pick.choices(self._kinds, [weight for _, weight, _ in self._kinds])[0]
        start = time.monotonic()
        client = break_it()
        self.done.append(Fault(kind, start, time.monotonic(), client))
        return self.done[-1]

    def _kill(self) -> None:
        os.kill(self._cluster.pids[GPU_WORKER], signal.SIGKILL)
        time.sleep(self._pick.choice(DOWN))
        self._cluster.restart_gpu_worker()

    def _pause(self) -> None:
        pid = self._cluster.pids[GPU_WORKER]
        os.kill(pid, signal.SIGSTOP)
        try:
            time.sleep(self._pick.choice(PAUSES))
        finally:
            os.kill(pid, signal.SIGCONT)

    def _cut(self, relay: Relay, silence: float = 0.0) -> None:
        self._relays.drop(relay, silence)
        time.sleep(silence)

    def _cut_client(self) -> int:
        return self._of_a_client(0.0)

    def _vanish(self) -> int:
        return self._of_a_client(SILENCE)

    def _of_a_client(self, silence: float) -> int:
        client = self._pick.randrange(len(self._clients))
        self._cut(self._clients[client], silence)
        return client
