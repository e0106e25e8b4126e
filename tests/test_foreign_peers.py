"""Foreign networks against the libraries that they come from, where these are installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_foreign import Given, Net, Rough, karras, relative
from torch import Tensor, nn

import sde_gen as sg
from sde_gen import grids
from sde_gen.chain import Chain
from sde_gen.scores import from_denoiser, from_diffusers, to_diffusers
from sde_gen.solvers import ddim, ddpm, dpm_solver_pp

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def diffusers() -> Any:
    return pytest.importorskip("diffusers", reason="comes with the extra 'bench'")


@pytest.fixture(scope="module")
def unet(diffusers: Any) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        num_class_embeds=3,
    )
    return model.eval()


def start() -> Tensor:
    return torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))


LABELS = torch.tensor([0, 2, 1])


@torch.no_grad()
def loop(scheduler: Any, unet: Any, x: Tensor, **more: Any) -> Tensor:
    for t in scheduler.timesteps:
        out = unet(scheduler.scale_model_input(x, t), t, class_labels=LABELS).sample
        x = scheduler.step(out, t, x, **more).prev_sample
    return x


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("zero", [False, True], ids=["signal", "none left"])
def test_ddim_scheduler(diffusers: Any, unet: Any, prediction: str, zero: bool) -> None:
    if zero and prediction == "epsilon":
        return  # which is undefined there
    scheduler = diffusers.DDIMScheduler(
        prediction_type=prediction,
        clip_sample=False,
        rescale_betas_zero_snr=zero,
        timestep_spacing="trailing",
        beta_schedule="scaled_linear",
    )
    scheduler.set_timesteps(10)
    model = from_diffusers(unet, scheduler).given(class_labels=LABELS)
    assert isinstance(model.sde, sg.VP)
    times = [*(scheduler.timesteps + 1).tolist(), 0]
    ours = sg.solve(model.sde.probability_flow(model), start(), times, ddim())
    assert relative(ours, loop(scheduler, unet, start())) < 1e-5


def test_ddpm_scheduler(diffusers: Any, unet: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = diffusers.DDPMScheduler(clip_sample=False, timestep_spacing="trailing")
    scheduler.set_timesteps(10)
    draws = torch.randn(10, 3, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    theirs, module = iter(draws), "diffusers.schedulers.scheduling_ddpm.randn_tensor"
    monkeypatch.setattr(module, lambda *shape, **kw: next(theirs))
    model = from_diffusers(unet, scheduler).given(class_labels=LABELS)
    times = [*(scheduler.timesteps + 1).tolist(), 0]
    assert isinstance(model.sde, sg.VP)
    ours = sg.solve(model.sde.reverse(model), start(), times, ddpm(), Given(draws))
    assert relative(ours, loop(scheduler, unet, start())) < 1e-5


def test_dpm_solver_pp_scheduler(diffusers: Any, unet: Any) -> None:
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="v_prediction", timestep_spacing="trailing", final_sigmas_type="zero"
    )
    scheduler.set_timesteps(10)
    model = from_diffusers(unet, scheduler).given(class_labels=LABELS)
    times = [*(scheduler.timesteps + 1).tolist(), 0]
    assert isinstance(model.sde, sg.VP)
    ours = sg.solve(model.sde.probability_flow(model), start(), times, dpm_solver_pp())
    assert relative(ours, loop(scheduler, unet, start())) < 1e-5


def test_flow_matching_scheduler(diffusers: Any, unet: Any) -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)

    class Plain:
        timesteps = scheduler.timesteps

        def scale_model_input(self, x: Tensor, t: Tensor) -> Tensor:
            return x

        def step(self, out: Tensor, t: Tensor, x: Tensor) -> Any:
            return scheduler.step(out, t, x)

    model = from_diffusers(unet, scheduler).given(class_labels=LABELS)
    assert isinstance(model.sde, sg.RectifiedFlow)
    times = scheduler.sigmas.double()
    flow = model.sde.probability_flow(model)
    ours = sg.solve(flow, start(), times, sg.Exponential(1))
    assert relative(ours, loop(Plain(), unet, start())) < 1e-5


def test_a_folder_is_loaded(diffusers: Any, unet: Any, tmp_path: Path) -> None:
    scheduler = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    pipeline = diffusers.DDPMPipeline(unet, scheduler)
    pipeline.save_pretrained(tmp_path)
    for source in (tmp_path, str(tmp_path), pipeline):
        model = from_diffusers(source)
        assert model.shape == (1, 8, 8)
        ours = model.given(class_labels=LABELS)(start(), 300.0)
        sigma = (1 - scheduler.alphas_cumprod[299]).sqrt()
        theirs = -unet(start(), 299, class_labels=LABELS).sample / sigma
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_what_is_no_folder_says_how_to_fetch_it(diffusers: Any) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing is fetched: give DiffusionPipeline"):
        from_diffusers("nobody/no-such-pipeline")


def ours_of_images() -> sg.ScoreNetwork:
    class Images(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Net()

        def forward(self, x: Tensor, c: Tensor) -> Tensor:
            return self.inner(x.reshape(-1, 3), c.expand(len(x)).repeat_interleave(3)).view_as(x)

    torch.manual_seed(0)
    return sg.ScoreNetwork(Images(), sg.VP(), facts=sg.Facts((1, 3, 3), std=0.8))


def test_a_network_of_ours_in_a_pipeline_of_theirs(diffusers: Any) -> None:
    model = ours_of_images()
    betas = Chain(model.sde, grids.uniform(model.sde, 1000, end=0.0)).betas
    scheduler = diffusers.DDIMScheduler(
        trained_betas=betas.numpy(), clip_sample=False, timestep_spacing="trailing"
    )
    pipeline = diffusers.DDIMPipeline(to_diffusers(model, scheduler), scheduler)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        batch_size=2,
        num_inference_steps=8,
        generator=torch.Generator().manual_seed(3),
        output_type="np",
    ).images
    x = torch.randn(2, 1, 3, 3, generator=torch.Generator().manual_seed(3))
    # The clock of ours runs to 1; the chain's steps are its thousandths.
    times = [*((pipeline.scheduler.timesteps + 1) / 1000).tolist(), 0.0]
    assert isinstance(model.sde, sg.VP)
    ours = sg.solve(model.sde.probability_flow(model), x, times, ddim())
    shown = (ours / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    # The pipeline's table of alphas is in float32.
    torch.testing.assert_close(torch.from_numpy(images), shown, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp_2m"])
def test_k_diffusion(name: str, dtype: torch.dtype) -> None:
    sampling = pytest.importorskip("k_diffusion.sampling")
    net = Rough(0.1).to(dtype)
    model = from_denoiser(net, facts=sg.Facts((3,)))
    x, sigmas = 80 * start().reshape(-1, 3).to(dtype), karras().float().double()
    solver = {"euler": sg.EulerMaruyama(), "heun": sg.Heun(), "dpmpp_2m": dpm_solver_pp()}[name]
    ours = sg.solve(model.sde.probability_flow(model), x, sigmas, solver)
    theirs = getattr(sampling, f"sample_{name}")(net, x, sigmas.to(dtype), disable=True)
    # Both are rounded: in float32 theirs is up to 1.3e-5 from the result in float64, ours 0.6e-5.
    assert relative(ours, theirs) < (2e-5 if dtype == torch.float32 else 1e-10)


def test_wrappers_of_k_diffusion(unet: Any) -> None:
    """A network of step numbers in k-diffusion's wrapper, and by itself: one score."""
    external = pytest.importorskip("k_diffusion.external")
    abar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)

    def eps(x: Tensor, t: Tensor, **kw: Any) -> Tensor:
        out: Tensor = unet(x, t, class_labels=LABELS).sample
        return out

    wrapped = external.DiscreteEpsDDPMDenoiser(eps, abar, quantize=False)
    model = from_denoiser(wrapped, facts=sg.Facts((1, 8, 8)))
    low, high = model.span
    assert low == pytest.approx(float(((1 - abar[0]) / abar[0]).sqrt()), rel=1e-4)
    assert high == pytest.approx(float(((1 - abar[-1]) / abar[-1]).sqrt()), rel=1e-4)
    x = start()
    sigma = ((1 - abar[200]) / abar[200]).sqrt()
    theirs = (wrapped(x, sigma.expand(3)) - x) / sigma**2
    torch.testing.assert_close(model(x, float(sigma)), theirs, rtol=1e-4, atol=1e-4)
