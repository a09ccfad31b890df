"""Heartbeats of the workers of one study: the candidate of a worker that fell silent is tried again.

Optuna's own heartbeats are kept by its databases alone, neither through its gRPC proxy nor in a journal file. These are an
attribute of the trial, so that they are the same on every storage, and through two storages of one database; and whoever
looks measures the silence on a clock of its own, so that no two machines need to agree on the time.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

log = logging.getLogger(__name__)

GRACE = 60.0  # seconds
_BEATS = 3  # in the time of grace
_TRIES = 3  # a candidate that took so many workers with it is not tried again
_BEAT = "beat"  # user attribute: [how many, the worker's time of grace, the worker]


class Heartbeat:
    """The heartbeat of one worker of a study, and its watch over the others.

    Args:
        study: that several workers share.
        grace: seconds of silence after which this worker's candidate may be taken for lost.
    """

    def __init__(self, study: optuna.Study, grace: float = GRACE) -> None:
        self._study, self._grace, self._name = study, grace, f"{socket.gethostname()}:{os.getpid()}"
        self._seen: dict[int, tuple[list, float]] = {}  # trial number -> its last beat, and when it was new here

    @contextmanager
    def beating(self, trial: optuna.Trial) -> Iterator[None]:
        """Beat while a trial is evaluated; hand its candidate back to the study where the evaluation is broken off."""
        with suppress(UpdateFinishedTrialError):  # taken since it was drawn: the evaluation's first word meets the same
            trial.set_user_attr(_BEAT, [0, self._grace, self._name])
        stop = threading.Event()
        thread = threading.Thread(target=self._beat, args=(trial, stop), daemon=True)
        thread.start()
        try:
            yield
        except BaseException as error:
            if isinstance(error, (UpdateFinishedTrialError, ValueError)) and self._was_taken(trial.number):
                log.warning("candidate %d took too long to give a sign of life; another worker has it now", trial.number)
                return
            with suppress(Exception):  # the first error is the one to tell
                self._give_back(self._trial(trial.number), blame=not isinstance(error, KeyboardInterrupt))
            raise
        finally:
            stop.set()
            thread.join()

    def watch(self, trials: Sequence[FrozenTrial]) -> int:
        """Hand the candidates of workers that fell silent back to the study; return how many others are at work.

        Args:
            trials: all of the study, between two candidates of this worker.
        """
        running = [trial for trial in trials if trial.state is TrialState.RUNNING]
        now, before = time.monotonic(), self._seen
        self._seen, at_work = {}, 0
        for trial in running:
            beat = trial.user_attrs.get(_BEAT, [0, self._grace])
            last, since = before.get(trial.number, (None, now))
            self._seen[trial.number] = (beat, since if beat == last else now)
            if now - self._seen[trial.number][1] > beat[1]:
                self._give_back(trial, blame=True)
            else:
                at_work += 1
        return at_work

    def _beat(self, trial: optuna.Trial, stop: threading.Event) -> None:
        count = 0
        while not stop.wait(self._grace / _BEATS):
            count += 1
            try:
                trial.set_user_attr(_BEAT, [count, self._grace, self._name])
            except UpdateFinishedTrialError:
                return
            except Exception as error:  # a storage that is away for a moment; the search itself says so if it stays away
                log.info("candidate %d: no heartbeat (%s)", trial.number, error)

    def _give_back(self, trial: FrozenTrial, blame: bool) -> None:
        try:
            self._study.tell(trial.number, state=TrialState.FAIL)
        except (UpdateFinishedTrialError, ValueError):  # another worker was faster, or it has finished after all
            return
        if "schedule" not in trial.user_attrs:
            return  # nothing was drawn yet
        tries = trial.user_attrs.get("tries", 1)
        if blame and tries >= _TRIES:
            log.warning("candidate %d is not tried again: %d workers were lost with it", trial.number, tries)
            return
        again = optuna.create_trial(
            state=TrialState.WAITING,
            params=trial.params,
            distributions=trial.distributions,
            user_attrs={"schedule": trial.user_attrs["schedule"], "tries": tries + blame},
        )
        self._study.add_trial(again)

    def _was_taken(self, number: int) -> bool:
        return self._trial(number).state is TrialState.FAIL

    def _trial(self, number: int) -> FrozenTrial:
        return self._study.get_trials(deepcopy=False)[number]
