"""When a phase saves a checkpoint, and how long it took in all the processes it needed."""

import time


class Pacer:
    """Says when a checkpoint is due, and counts the seconds of a phase.

    `earlier` is what `spent` gave the process that this one goes on from: seconds by the clock, and
    of all processor cores together, which do not depend on what else a machine does.
    """

    def __init__(self, interval: float, earlier: dict | None = None):
        self._interval = interval
        self._earlier = earlier or {"seconds": 0.0, "cpu_seconds": 0.0}
        self._started = self._last = time.perf_counter()
        self._cpu_started = time.process_time()

    def due(self) -> bool:
        """Return whether a checkpoint is due, and if so, count the time to the next one anew."""
        if time.perf_counter() - self._last < self._interval:
            return False
        self._last = time.perf_counter()
        return True

    def spent(self) -> dict[str, float]:
        """Return the seconds of all processes so far."""
        return {
            "seconds": self._earlier["seconds"] + time.perf_counter() - self._started,
            "cpu_seconds": self._earlier["cpu_seconds"] + time.process_time() - self._cpu_started,
        }
