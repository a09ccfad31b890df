"""Laws of the store of predictions: nothing changes in a bit, and nothing is computed twice."""

from __future__ import annotations

import pytest
import torch

from flexi_core import Schedule
from flexi_core.demo.scenes import Caption
from flexi_core.run.plan import make_plan
from flexi_core.run.replay import PredictionStore, Replay, ReplayMiss, digest
from flexi_core.run.run import Run
from flexi_core.runtime.sampling import make_noise, sample, sigmas_normal

SCHEDULES = (
    "8*(F)",
    "F|FX|FXX|FX|F",
    "F|FX|FXX|FXX",
    "F|FPP@2|FPNN@1",
    "F|FPP@2|FPPN@1",
    "F|FPP@2|FNNN",
    "FPPPPPPP@3",
    "FPPPNNNN@3",
)


@pytest.fixture
def run(tiny_model):
    """A function of (schedule text, store, sampler, seed) that returns latents and the number of network calls."""

    def run(text: str, store: PredictionStore | None = None, sampler: str = "euler", seed: int = 0):
        replay = store and Replay(store, seed)
        out, run = sample(
            tiny_model, Schedule.parse(text), sigmas_normal(tiny_model, 8), make_noise(seed, 2), [Caption()] * 2,
            sampler=sampler, cfg=2.0, replay=replay,
        )  # fmt: skip
        return out, run.network_calls

    return run


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m"])
def test_what_is_taken_from_the_store_is_bit_for_bit_what_would_be_computed(run, sampler):
    store, calls, plain_calls = PredictionStore(), 0, 0
    for text in [*SCHEDULES, *SCHEDULES]:
        plain, plainly = run(text, None, sampler)
        try:
            out, called = run(text, store, sampler)
        except ReplayMiss:
            assert sampler == "heun"  # its second question at a noise level is another one each time
            continue
        assert torch.equal(out, plain), text
        calls, plain_calls = calls + called, plain_calls + plainly
    assert calls < plain_calls / 2


def test_a_schedule_is_computed_once_and_its_neighbour_from_the_first_difference_on(run):
    store = PredictionStore()
    assert run("8*(F)", store)[1] == 8
    assert run("8*(F)", store)[1] == 0
    assert run("6*(F)|FX", store)[1] == 0
    assert run("3*(F)|FX|3*(F)", store)[1] == 3  # after the extrapolated step the latent is another one


def test_who_listens_for_what_the_network_says_is_not_answered_from_the_store():
    store, plan, x = PredictionStore(), make_plan(Schedule.parse("F"), [1.0, 0.0]), torch.ones(1)
    asked = []
    for listens in ("", "", "the sampler listens"):
        Run(plan, replay=Replay(store, 0)).predict(x, 1.0, lambda who=listens: asked.append(who) or x, must_compute=listens)
    assert asked == ["", "the sampler listens"]


def test_a_full_step_is_computed_again_where_a_partial_step_needs_its_deep_feature(run):
    store = PredictionStore()
    assert run("F|FPPPNNN@2", store)[1] == 5
    assert run("F|FPPNNNN@2", store)[1] == 0
    assert run("F|FPPPPNN@2", store)[1] == 2  # the full step for its feature, and the new partial one
    assert run("F|FPPPNNN@1", store)[1] == 4  # another depth is another prediction


def test_other_noise_or_another_scope_finds_nothing(run):
    store = PredictionStore()
    run("8*(F)", store, seed=0)
    assert run("8*(F)", store, seed=1)[1] == 8


def test_a_store_keeps_to_its_limit_and_gives_up_what_was_used_least_recently():
    x = torch.zeros(4, 8)  # 128 bytes
    store = PredictionStore(limit_bytes=300)
    for key in "ab":
        store.put(key, x)
    assert store.get("a", x.device) is not None
    store.put("c", x)
    assert "a" in store and "b" not in store and store.bytes == 256
    store.put("large", torch.zeros(100))
    assert "large" not in store and store.bytes == 256


def test_what_was_given_up_is_computed_again(run):
    store, plain = PredictionStore(limit_bytes=2 * 4 * 3 * 32 * 32 * 3), run("F|FPP@2|FPNN@1")[0]
    for _ in range(3):
        out, _ = run("F|FPP@2|FPNN@1", store)
        assert torch.equal(out, plain) and store.bytes <= store.limit_bytes


def test_a_partial_step_without_its_full_step_is_refused():
    store, x = PredictionStore(), torch.zeros(1, 2)
    plan = make_plan(Schedule.parse("FPP@1"), [3.0, 2.0, 1.0, 0.0])
    first = Replay(store, "s")
    for index in range(3):
        key, found = first.recall(plan, index, x + index, 3.0 - index)
        assert found is None
        first.keep(plan, index, key, x)
    again = Replay(store, "s")
    assert again.recall(plan, 0, x, 3.0)[1] is not None
    with pytest.raises(ReplayMiss, match="step 2"):
        again.recall(plan, 1, x + 10, 2.0)


def test_a_digest_tells_values_shapes_and_types_apart():
    x = torch.arange(6.0)
    others = [x.reshape(2, 3), x.half(), x + 1e-6, x.to(torch.bfloat16)]
    assert len({digest(t) for t in [x, *others]}) == 5 and digest(x) == digest(x.clone())
