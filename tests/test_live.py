"""A run as it goes on, for people who watch."""

import pytest
import torch

from flexi_core import Schedule
from flexi_core.run.live import LiveRun
from flexi_core.run.plan import make_plan
from flexi_core.run.report import RunReport
from flexi_core.run.run import FULL_DEPTH, Run

LEVELS = [float(level) for level in range(6, 0, -1)] + [0.0]


def sampled(text, send):
    """Return a finished run whose steps were told as they began, and what tells them."""
    plan = make_plan(Schedule.parse(text), LEVELS)
    live = LiveRun(send, plan)
    run = Run(plan, watch=live.step)
    for sigma in plan.sampled(torch.tensor(LEVELS)).tolist()[:-1]:

        def compute(sigma=sigma):
            run.records[plan.step_index(sigma)].calls[FULL_DEPTH] += 1
            run.records[plan.step_index(sigma)].network_calls += 1
            return torch.zeros(1, 3, 4, 4)

        run.predict(torch.zeros(1, 3, 4, 4), sigma, compute)
    return run, live


def test_each_step_is_told_as_it_begins_and_what_came_out_at_the_end():
    told = []
    run, live = sampled("FXNFXX", told.append)
    live.end(RunReport(run, 2.0, ["A note."]))
    *steps, last = told
    assert [message["done"] for message in steps] == [0, 1, 3, 4, 5]
    assert {message["letters"] for message in steps} == {"FXNFXX"}
    assert steps[2]["words"].startswith("Step 4 of 6: full")
    assert last["done"] is None and last["letters"] == run_letters(run)
    assert last["words"].startswith("2.00 s instead of about ")
    assert "\n3.00x fewer MACs than all steps full.\n" in last["details"]
    assert "A note." in last["details"] and "2 full" in last["details"] and "3 extrapolated" in last["details"]


def run_letters(run):
    return RunReport(run, 1.0).letters


def test_the_time_left_follows_from_the_work_that_is_done():
    told = []
    sampled("F|F|F|F|F|F", told.append)
    assert "left" not in told[0]["words"]
    assert all("s left" in message["words"] for message in told[1:])


@pytest.mark.parametrize("fails", [1, 3])
def test_a_run_goes_on_without_a_page_that_fails(fails, caplog):
    told = []

    def send(message):
        told.append(message)
        if len(told) == fails:
            raise ConnectionError("the page is gone")

    run, live = sampled("3*(FX)", send)
    live.end(RunReport(run, 1.0))
    assert run_letters(run) == "FXFXFX"
    assert len(told) == fails, "nothing is told after that"
    assert caplog.text.count("could not be shown") == 1


def test_a_run_that_was_stopped_says_so():
    told = []
    _, live = sampled("3*(FX)", told.append)
    live.end(None)
    assert told[-1]["words"] == "The run was stopped." and told[-1]["done"] is None


def test_a_run_left_to_plain_sampling_says_why():
    told = []
    LiveRun(told.append, None).end(RunReport(None, 1.5, ["The schedule stood down."]))
    assert told == [told[0]] and told[0]["words"].startswith("Plain sampling")
    assert told[0]["details"] == "The schedule stood down." and told[0]["letters"] == ""
