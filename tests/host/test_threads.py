"""Several threads that call one run's network at once, as hosts with several GPUs do."""

from __future__ import annotations

import importlib
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

MIXED = "2*(F)|FPX@2|FPN@3"  # 8 steps
WAIT_S = 60  # for the other thread; only a deadlock takes so long


@pytest.fixture
def kinds(host):
    return importlib.import_module("comfy.patcher_extension").WrappersMP


@pytest.fixture
def halves(kinds):
    """A function of (model, together) that returns the model with each conditioning asked for by a thread of its own.

    Two calls of the network are in it at the same time, behind the pack's wrapper; else one after the other.
    """

    def apart(model, together):
        meeting = threading.Barrier(2)

        def calc_cond_batch(executor, model, conds, x_in, timestep, model_options):
            def ask(i):
                with torch.no_grad():
                    alone = [cond if j == i else None for j, cond in enumerate(conds)]
                    return executor(model, alone, x_in, timestep, model_options)[i]

            if not together:
                return [ask(i) for i in range(len(conds))]
            with ThreadPoolExecutor(len(conds)) as pool:
                return [*pool.map(ask, range(len(conds)))]

        def diffusion_model(executor, *args, **kwargs):
            if together:
                meeting.wait(WAIT_S)
            out = executor(*args, **kwargs)
            if together:
                meeting.wait(WAIT_S)
            return out

        model = model.clone()
        model.add_wrapper_with_key(kinds.CALC_COND_BATCH, "other", calc_cond_batch)
        model.add_wrapper_with_key(kinds.DIFFUSION_MODEL, "other", diffusion_model)
        return model

    return apart


@pytest.mark.matrix("Runs", "cond and uncond in two threads at once")
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_two_threads_in_one_run_make_the_latent_of_one(host, demo_model, apply, halves, before, record_property):
    found = []
    for together in (True, False):
        if before:
            model, handle = apply(halves(demo_model, together), MIXED)
        else:
            patched, handle = apply(demo_model, MIXED)
            model = halves(patched, together)
        found.append((host.sample(model), handle.report))
    (threads, report), (sequence, other) = found
    assert torch.equal(threads, sequence)
    assert report.letters == other.letters == "FFFPXFPN"
    assert [step.network_calls for step in report.steps] == [2, 2, 2, 2, 0, 2, 2, 0]
    assert report.evaluations == other.evaluations and not any(step.fallbacks for step in report.steps)
    record_property("does", "the latent of one thread, bit for bit")


def test_an_evaluation_that_two_threads_answer_in_full_counts_once(host, demo_model, halves):
    from flexi_core import Schedule

    model, handle = host.adapter.apply_schedule(halves(demo_model, True), Schedule.parse("4*(FP@2)"), cache_limit_mib=1e-6)
    full, _ = host.adapter.apply_schedule(halves(demo_model, True), Schedule.parse("8*(F)"))
    assert torch.equal(host.sample(model), host.sample(full))
    assert "4 evaluations ran in full: the deep feature" in str(handle.report)
    assert handle.report.letters == "F" * 8


@pytest.mark.matrix("Runs", "a model on two devices (MultiGPU), each with a thread")
def test_two_devices_of_the_host_make_the_latent_of_one_thread(host, apply, kinds, record_property):
    try:
        multigpu = importlib.import_module("comfy.multigpu")
    except ImportError:
        pytest.skip("this host has no threads for several devices")
    devices = [torch.device("cpu"), torch.device("cpu", 0)]  # two by name
    model, second = host.adapter.load_demo_model(), host.adapter.load_demo_model()
    second.pre_run()

    def sample(pooled):
        def outer_sample(executor, *args, **kwargs):
            guider, pool = executor.class_obj, multigpu.MultiGPUThreadPool(devices) if pooled else None
            patchers = dict(zip(devices, (guider.model_patcher, second), strict=True))
            guider.model_options |= {"multigpu_clones": patchers, "multigpu_thread_pool": pool}
            try:
                return executor(*args, **kwargs)
            finally:
                if pool is not None:
                    pool.shutdown()

        patched, handle = apply(model, MIXED)
        patched.add_wrapper_with_key(kinds.OUTER_SAMPLE, "other", outer_sample)
        return host.sample(patched), handle.report

    (threads, report), (sequence, other) = sample(True), sample(False)
    assert torch.equal(threads, sequence)
    assert report.letters == other.letters == "FFFPXFPN"
    assert [step.network_calls for step in report.steps] == [2, 2, 2, 2, 0, 2, 2, 0]
    record_property("does", "full, partial, removed, extrapolated steps as planned")
