"""Training of stage models: what a batch trains, what stays, what a stopped training goes on with, and what it leaves."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel

from flexi_core import FlexiError, Schedule
from flexi_core.runtime.file_model import FileModel
from flexi_core.runtime.sampling import make_noise, sample, sigmas_normal
from flexi_core.stages.bounds import Stages
from flexi_core.stages.decoders import begin_decoder
from flexi_core.stages.embedded import EmbeddedParts, StagedModel
from flexi_core.stages.network import load_stages
from flexi_core.stages.trained_files import BASE, STAGES, write_trained
from flexi_core.stages.training import Objective, StageTrainer, StageTraining, held_out_loss, levels_of

CONFIG = {
    "in_channels": 3,
    "out_channels": 3,
    "model_channels": 32,
    "channel_mult": [1, 2],
    "num_res_blocks": [1, 1],
    "transformer_depth": [0, 1],
    "transformer_depth_output": [0, 0, 1, 1],
    "transformer_depth_middle": 1,
    "num_head_channels": 16,
    "context_dim": 64,
    "use_scale_shift_norm": True,
}
THREE = Stages((5.0, 1.0), ("high", "middle", "low"))
ENCODER = ("time_embed.", "input_blocks.", "middle_block.")
DATA = torch.rand(40, 3, 8, 8, generator=torch.Generator().manual_seed(3)) * 2 - 1


TABLE = torch.randn(4, 64, generator=torch.Generator().manual_seed(4))


def draw(rows: int, rng: torch.Generator):
    return DATA[torch.randint(len(DATA), (rows,), generator=rng)], TABLE[torch.arange(rows) % 4][:, None]


@pytest.fixture
def base(tmp_path) -> FileModel:
    """A base with random weights: its own start has zeros, which hide errors."""
    made = FileModel.untrained(CONFIG, (8, 8), tmp_path / BASE)
    generator = torch.Generator().manual_seed(0)
    for value in made.unet.requires_grad_(False).parameters():
        value.copy_(torch.randn(value.shape, generator=generator) * 0.1)
    made.class_table = TABLE
    return made


@pytest.fixture
def trainer(tmp_path, base):
    """A function that returns a trainer: trainer(name of its checkpoint, settings)."""

    def make(name: str = "a", settings=None, objective=Objective(), of=draw, **changes):  # noqa: B008 (a value)
        settings = settings or StageTraining(THREE, (32, 32, 32), batch=4, warmup=3)
        return StageTrainer(base, replace(settings, **changes), of, objective, tmp_path / f"{name}.checkpoint")

    return make


def same(a, b, names=()) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return all(torch.equal(a[name], b[name]) for name in a if name.startswith(tuple(names) or ""))


def test_one_stage_is_plain_training_of_the_network(base, trainer):
    trained = trainer(stages=Stages((), ("all",)), widths=(32,), encoder=True, ema=0.0)
    trained.run(5)
    unet, rng = copy.deepcopy(base.unet).requires_grad_(True), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(unet.parameters(), lr=2e-4, fused=True)
    for i in range(5):
        torch.rand((), generator=rng, dtype=torch.float64)  # of the stage
        x0, context = draw(4, rng)
        t = ((torch.arange(4) + torch.rand(4, generator=rng)) * 250).long()
        torch.randn(4, 1, 1, 1, generator=rng)  # of the noise's size
        noise, sigma = torch.randn(x0.shape, generator=rng), base.sigmas[t].view(-1, 1, 1, 1)
        for group in optimizer.param_groups:
            group["lr"] = 2e-4 * min(1, (i + 1) / 3)
        optimizer.zero_grad()
        with sdpa_kernel(SDPBackend.MATH):
            made = unet((x0 + sigma * noise) / (sigma**2 + 1).sqrt(), t, context)
            (made - noise).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
    own = trained.model.network(0)
    for name, value in unet.state_dict().items():
        part = own
        for key in name.split("."):
            part = part._modules[key] if key in getattr(part, "_modules", {}) else getattr(part, key)
        torch.testing.assert_close(part, value, rtol=0, atol=2e-7, msg=name)


def test_a_batch_has_levels_of_one_stage_and_trains_its_decoder_alone(base, trainer):
    seen: list[float] = []

    def weight(sigma: torch.Tensor) -> torch.Tensor:
        seen.extend(sigma.flatten().tolist())
        return torch.ones_like(sigma)

    trained = trainer(density=(0.0, 1.0, 0.0), objective=Objective(weight=weight))
    began = copy.deepcopy(trained.model)
    trained.run(40)
    assert len(seen) == 160 and {THREE.at(sigma) for sigma in seen} == {1} and len(set(seen)) > 40
    assert trained.batches == (0, 40, 0) and trained.losses[0] is None and trained.losses[1] > 0
    assert [same(began.decoders[i], trained.model.decoders[i]) for i in range(3)] == [True, False, True]
    assert same(began.unet, trained.model.unet) and same(base.unet, trained.model.unet)


def test_the_density_decides_how_often_a_stage_is_drawn(trainer):
    every, dense = trainer("every", batch=1), trainer("dense", batch=1, density=(1.0, 0.0, 3.0))
    for each in (every, dense):
        each.run(120)
    assert min(every.batches) > 25, "as published for VP: all the same"
    assert dense.batches[1] == 0 and dense.batches[2] > 2 * dense.batches[0] > 20


@pytest.mark.parametrize("own_middle", [False, True])
def test_a_frozen_encoder_stays_bit_for_bit_and_the_file_fits_the_base(tmp_path, base, trainer, own_middle):
    trained = trainer(own_middle=own_middle, widths=(64, 32, 48))
    trained.run(4)
    assert same(trained.averaged.unet, base.unet) and same(trained.model.unet, base.unet)
    assert write_trained(base, trained, tmp_path, "CC0") == [tmp_path / STAGES]
    staged, found = StagedModel(base, tmp_path / STAGES), load_stages(tmp_path / STAGES)
    assert found.widths == (64, 32, 48) and found.licence == "CC0" and found.own_middle is own_middle
    assert found.stages == THREE
    made, _ = sample(staged, Schedule.parse("6*(F)"), sigmas_normal(base, 6), make_noise(1, 2, (3, 8, 8)), cfg=1.0)
    assert made.isfinite().all()
    for stage, sigma in enumerate((9.0, 2.0, 0.5)):
        assert same(staged.network(sigma).output_blocks, trained.averaged.decoders[stage].output_blocks)


@pytest.mark.parametrize("own_middle", [False, True])
def test_untrained_decoders_of_the_bases_width_are_the_base(tmp_path, base, trainer, own_middle):
    trained = trainer(own_middle=own_middle)
    assert trained.run(0) and trained.done == 0
    write_trained(base, trained, tmp_path, "CC0")
    staged = StagedModel(base, tmp_path / STAGES)
    noise, sigmas = make_noise(1, 2, (3, 8, 8)), sigmas_normal(base, 8)
    runs = [sample(model, Schedule.parse("8*(F)"), sigmas, noise, cfg=1.0)[0] for model in (staged, base)]
    assert torch.equal(*runs)


def test_an_encoder_that_trains_is_written_as_a_base_of_its_own(tmp_path, base, trainer):
    for scratch in (True, False):
        trained = trainer(str(scratch), scratch=scratch, encoder=True, widths=(16, 32, 64))
        began = copy.deepcopy(trained.model.unet)
        trained.run(3)
        assert not any(same(began, trained.model.unet, [part]) for part in ENCODER)
        assert same(began, base.unet) is not scratch
        assert write_trained(base, trained, tmp_path, "CC0") == [tmp_path / STAGES, tmp_path / BASE]
        written = FileModel.load(tmp_path / BASE)
        assert written.latent_shape == (3, 8, 8)
        assert same(written.unet.output_blocks, trained.averaged.decoders[1].output_blocks), "the one of the base's width"
        assert StagedModel(written, tmp_path / STAGES).stages == THREE
        with pytest.raises(FlexiError, match="a base of other weights"):
            StagedModel(base, tmp_path / STAGES)
        with safe_open(tmp_path / BASE, framework="pt") as file:
            assert file.metadata()["licence"] == "CC0" and file.metadata()["iterations"] == "3"


@pytest.mark.parametrize("encoder", [False, True])
def test_a_training_that_was_killed_goes_on_bit_for_bit(tmp_path, trainer, encoder):
    changes = {"encoder": encoder, "bf16": encoder, "widths": (64, 32, 16), "scratch": encoder}
    whole, parts = trainer("whole", **changes), trainer("parts", **changes)
    whole.run(9)
    assert parts.run(4) and parts.done == 4
    parts.run(6, stop=lambda: True)
    assert parts.done == 4, "asked to stop before another iteration"
    again = trainer("parts", **changes)
    assert again.done == 4
    asked: list[int] = []
    assert not again.run(9, stop=lambda: asked.append(0) or len(asked) > 3)
    assert again.done == 7
    last = trainer("parts", **changes)
    assert last.run(9) and last.done == 9
    for part in ("model", "averaged"):
        assert same(getattr(whole, part), getattr(last, part))
    assert last.losses == whole.losses and last.batches == whole.batches
    saved, kept = (load_file(tmp_path / f"{name}.checkpoint") for name in ("whole", "parts"))
    assert saved.keys() == kept.keys() and all(torch.equal(saved[name], kept[name]) for name in saved)
    assert not list(tmp_path.glob("*.part"))


def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one(tmp_path, trainer, monkeypatch):
    trained = trainer()
    trained.run(2)
    before = (tmp_path / "a.checkpoint").read_bytes()

    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("flexi_core.tensor_files.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        trained.run(3)
    assert (tmp_path / "a.checkpoint").read_bytes() == before and not list(tmp_path.glob("*.part"))


def test_another_trainings_checkpoint_is_refused(tmp_path, base, trainer):
    trainer().run(1)
    with pytest.raises(FlexiError, match=r"another training \(batch 4, now 5; seed 0, now 1\)"):
        trainer(batch=5, seed=1)
    first = next(base.unet.parameters())
    first.add_(1)
    with pytest.raises(FlexiError, match="began from another base"):
        trainer()
    first.sub_(1)
    save_file({"rng": torch.zeros(1)}, tmp_path / "b.checkpoint")
    with pytest.raises(FlexiError, match="no checkpoint of a stage training"):
        trainer("b")
    (tmp_path / "c.checkpoint").write_bytes((tmp_path / "a.checkpoint").read_bytes()[:1000])
    with pytest.raises(FlexiError, match=r"cannot be read .*begin anew"):
        trainer("c")


def test_a_loss_that_is_no_number_stops_before_it_is_kept(tmp_path, trainer):
    trained = trainer(objective=Objective(weight=lambda sigma: sigma * float("nan")))
    with pytest.raises(FlexiError, match="the loss is nan after 1 iterations"):
        trained.run(3)
    assert not (tmp_path / "a.checkpoint").exists()


@pytest.mark.parametrize("width", [16, 48, 64])
@pytest.mark.parametrize("own_middle", [False, True])
def test_a_decoder_of_another_width_begins_with_the_bases_first_channels(base, width, own_middle):
    made = begin_decoder(EmbeddedParts, base.unet, base.unet_config, width, own_middle, scratch=False)
    had, both = base.unet.state_dict(), min(width, 32)
    blocks = made.state_dict()
    # The third output block is the first at the shallow level: 2 x width channels of the level below, and a skip of 32.
    conv, old = blocks["output_blocks.2.0.in_layers.2.weight"], had["output_blocks.2.0.in_layers.2.weight"]
    assert torch.equal(conv[:both, : 2 * both], old[:both, : 2 * both])
    assert torch.equal(conv[:both, -32:], old[:both, -32:]), "of the skip"
    assert not conv[:both, 2 * both : 2 * width].any(), "new channels have no say in the base's"
    scale, old = (of["output_blocks.2.0.emb_layers.1.weight"] for of in (blocks, had))
    for of, before in zip(scale.chunk(2), old.chunk(2), strict=True):
        assert torch.equal(of[:both], before[:both])
    gate, old = (of["output_blocks.0.1.transformer_blocks.0.ff.net.0.proj.weight"] for of in (blocks, had))
    for of, before in zip(gate.chunk(2), old.chunk(2), strict=True):
        assert torch.equal(of[: 8 * both, : 2 * both], before[: 8 * both, : 2 * both])
    assert torch.equal(blocks["out.2.weight"][:, :both], had["out.2.weight"][:, :both])
    assert not own_middle or torch.equal(blocks["middle_block.0.in_layers.2.weight"], had["middle_block.0.in_layers.2.weight"])


def test_from_scratch_a_new_decoder_predicts_nothing_yet(base):
    made = begin_decoder(EmbeddedParts, base.unet, base.unet_config, 16, False, scratch=True)
    assert not made.out[2].weight.any() and made.output_blocks[0][0].in_layers[2].weight.any()


def test_training_makes_the_held_out_loss_smaller_in_every_stage(base, trainer):
    trained = trainer(scratch=True, encoder=True, batch=8, learning_rate=2e-3, ema=0.9)

    def losses():
        network, data = trained.averaged.network, (DATA[:16], TABLE[torch.zeros(16, dtype=torch.long)][:, None])
        return held_out_loss(network, trained.levels, base.sigmas, Objective(), data, seed=5)

    before = losses()
    assert all(torch.equal(a, b) for a, b in zip(before, losses(), strict=True)), "paired: the same noise every time"
    trained.run(60)
    assert all(float(after.mean()) < 0.97 * float(of.mean()) for of, after in zip(before, losses(), strict=True))


def test_v_is_what_the_sampler_solves_for_x0(base):
    """A network that predicts v right has no error, and the sampler reads x0 from it."""
    x0, t = DATA[:4], torch.tensor([10, 300, 600, 900])
    sigma, noise = base.sigmas[t], torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    level = sigma.view(-1, 1, 1, 1)
    v = (noise - level * x0) / (level**2 + 1).sqrt()

    class Right:
        def _forward(self, x, timesteps, context):
            return v

    assert not Objective("v").errors(Right(), x0, t, sigma, noise, None).any()
    base.prediction = "v"
    for i in range(4):
        torch.testing.assert_close(base.denoised(x0[i] + sigma[i] * noise[i], sigma[i], v[i]), x0[i], rtol=1e-4, atol=1e-4)


def test_every_training_level_belongs_to_one_stage(base):
    levels = levels_of(THREE, base.sigmas)
    assert torch.equal(torch.cat(levels).sort().values, torch.arange(1000))
    assert [THREE.at(float(base.sigmas[of[0]])) for of in levels] == [0, 1, 2]
    with pytest.raises(FlexiError, match=r"the stage 'a' has none of the model's noise levels, 0\.0292 to 14\.61"):
        levels_of(Stages((20.0,), ("a", "b")), base.sigmas)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"widths": (32, 32)}, "3 stages have the widths 32, 32; give one for each"),
        ({"widths": (32, 32, 0)}, "1 to 4096 channels"),
        ({"density": (1.0, 1.0)}, "3 stages have the density 1, 1"),
        ({"density": (0.0, 0.0, 0.0)}, "not all 0"),
        ({"density": (1.0, -1.0, 1.0)}, "0 or more"),
        ({"density": (1.0, float("nan"), 1.0)}, "0 or more"),
        ({"ema": 1.0}, "keep 1 at each iteration"),
        ({"learning_rate": 0.0}, "above 0"),
        ({"learning_rate": float("nan")}, "above 0"),
        ({"warmup": -1}, "warm-up"),
        ({"scratch": True}, "an encoder that begins anew has to train"),
        ({"widths": (32, 36, 32)}, "attention heads of 16 do not fit"),
        ({"widths": (32, 64, 32), "conditioned": False}, "without conditioning, so that all decoders have its width, 32"),
    ],
)
def test_bad_settings_are_refused_in_words(base, trainer, changes, message):
    if not changes.pop("conditioned", True):
        base.class_table = None
    with pytest.raises(FlexiError, match=message):
        trainer(**changes)
