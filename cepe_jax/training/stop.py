"""The requests that a run save and end: a signal to its one process, or preemption of any of many."""

import signal

import jax
from jax.experimental import multihost_utils


class StopRequests:
    """Within the block SIGTERM and Ctrl-C ask for an end instead of ending the process; a second one ends it at once.

    Of many processes each gets the first signal at another step, and jax's own handler lets all agree on one: a
    handler of ours would replace it.
    """

    def __enter__(self):
        self.received: signal.Signals | None = None
        self._before = {}
        if jax.process_count() == 1:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame) -> None:
        self.received = signal.Signals(number)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def after(self, step: int) -> bool:
        """Return True if the run must end after `step`; each process must ask at every step."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self.received is not None
