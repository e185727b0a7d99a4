"""Other libraries' networks and samplers, built at the size of ours (1.0 to 1.7 million parameters), for `sampling.py`.

`make benchmarks` installs them, pinned in peers.txt, into build/peers. They import packages that sampling never touches (torchvision, SDE solvers, FID):
empty modules of those names stand in for them.
"""
import importlib.machinery
import importlib.metadata
import sys
import types
from pathlib import Path
from unittest.mock import MagicMock

import accelerate  # noqa: F401  before the stand-ins, because it asks which packages are there
import diffusers
import torch
from torch import nn

FOLDER = Path(__file__).parents[1] / "build" / "peers"
UNUSED = ["torchvision", "torchvision.transforms", "torchvision.transforms.functional", "torchdiffeq", "torchsde", "dctorch", "dctorch.functional",
          "jsonmerge", "pytorch_fid", "pytorch_fid.inception", "pytorch_fid.fid_score"]


def stand_in(name):
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    module.__getattr__ = lambda attribute: MagicMock(name=f"{name}.{attribute}")
    sys.modules[name] = module


def package_without_init(name):
    "So that `import name.part` runs the part alone."
    package = types.ModuleType(name)
    package.__path__ = [str(FOLDER / name.replace(".", "/"))]
    sys.modules[name] = package


if not FOLDER.is_dir(): sys.exit(f"{FOLDER} is missing: run `make benchmarks`, or python -m pip install --no-deps --target {FOLDER} -r benchmarks/peers.txt")
sys.path.append(str(FOLDER))
for name in UNUSED: stand_in(name)
for name in ("k_diffusion", "k_diffusion.models", "denoising_diffusion_pytorch"): package_without_init(name)

from denoising_diffusion_pytorch.denoising_diffusion_pytorch import GaussianDiffusion, Unet as LucidrainsUnet  # noqa: E402
from k_diffusion import sampling as k_sampling  # noqa: E402
from k_diffusion.layers import Denoiser as KDenoiser  # noqa: E402
from k_diffusion.models.image_v1 import ImageDenoiserModelV1  # noqa: E402
from smalldiffusion.diffusion import Schedule as SmallSchedule, ScheduleDDPM, samples as small_samples  # noqa: E402
from smalldiffusion.model import ModelMixin, PredV  # noqa: E402
from smalldiffusion.model_unet import Unet as SmallUnet  # noqa: E402

VERSIONS = {"diffusers": diffusers.__version__, "accelerate": accelerate.__version__,
            **{name: importlib.metadata.version(name) for name in ("denoising-diffusion-pytorch", "k-diffusion", "smalldiffusion")}}


# --- speed: each library's own network under its own sampler; draw(n, calls) -> images ---

def diffusers_dpm():
    net = diffusers.UNet2DModel(16, 3, 3, block_out_channels=(32, 64, 80), layers_per_block=1, norm_num_groups=8, num_class_embeds=5,
                                down_block_types=("DownBlock2D",) * 3, up_block_types=("UpBlock2D",) * 3).eval()
    scheduler = diffusers.DPMSolverMultistepScheduler(500)
    def draw(n, calls):
        scheduler.set_timesteps(calls)
        x, labels = torch.randn(n, 3, 16, 16), torch.arange(n) % 5
        for t in scheduler.timesteps: x = scheduler.step(net(like(net, x), t, labels).sample, t, x).prev_sample
        return x
    return net, draw


def lucidrains_ddim():
    net = LucidrainsUnet(dim=24, dim_mults=(1, 2, 4), channels=3).eval()
    diffusion = GaussianDiffusion(net, image_size=16, timesteps=500, objective="pred_v", beta_schedule="cosine")
    def draw(n, calls):
        diffusion.sampling_timesteps, diffusion.ddim_sampling_eta = calls, 0.0
        return diffusion.ddim_sample((n, 3, 16, 16))
    return net, quiet(draw)


def smalldiffusion_accelerated():
    net = SmallUnet(16, 3, 3, ch=32, ch_mult=(1, 2, 2), num_res_blocks=1, attn_resolutions=(), dropout=0.0).eval()
    schedule = ScheduleDDPM(500, 2e-4, 0.04)
    def draw(n, calls):
        xt = torch.randn(n, 3, 16, 16) * schedule[-1]
        *_, x0 = small_samples(net, schedule.sample_sigmas(calls), gam=2, xt=like(net, xt))
        return x0
    return net, draw


def k_diffusion_dpmpp_2m():
    inner = ImageDenoiserModelV1(3, 128, depths=(1, 2, 2), channels=(32, 64, 96), self_attn_depths=(False,) * 3, mapping_cond_dim=5).eval()
    denoiser = KDenoiser(inner, sigma_data=0.5)
    def draw(n, calls):
        sigmas = k_sampling.get_sigmas_karras(calls, 0.01, 80)
        context = torch.eye(5)[torch.arange(n) % 5]
        return k_sampling.sample_dpmpp_2m(denoiser, like(inner, torch.randn(n, 3, 16, 16) * sigmas[0]), sigmas, extra_args={"mapping_cond": context}, disable=True)
    return inner, draw


SPEED = {"diffusers, DPM-Solver++(2M)": diffusers_dpm, "denoising-diffusion-pytorch, DDIM": lucidrains_ddim,
         "smalldiffusion, accelerated": smalldiffusion_accelerated, "k-diffusion, DPM-Solver++(2M)": k_diffusion_dpmpp_2m}


def like(net, x): # the memory layout of the network
    return x.contiguous(memory_format=torch.channels_last) if channels_last(net) else x


def channels_last(net):
    weights = [p for p in net.parameters() if p.ndim == 4 and p.shape[2] > 1]
    return weights[0].is_contiguous(memory_format=torch.channels_last)


def quiet(draw): # without the library's own progress bar
    def run(*args):
        import denoising_diffusion_pytorch.denoising_diffusion_pytorch as library
        bar, library.tqdm = library.tqdm, lambda x, **_: x
        try: return draw(*args)
        finally: library.tqdm = bar
    return run


# --- quality: our network under their samplers; draw(predict, schedule, xT, calls) -> images ---

def diffusers_ddim(predict, schedule, xT, calls): return _diffusers(diffusers.DDIMScheduler(
    schedule.T, trained_betas=schedule.beta[1:].numpy(), timestep_spacing="leading", steps_offset=0, clip_sample=False, set_alpha_to_one=True), predict, xT, calls)


def diffusers_dpm_solver(predict, schedule, xT, calls): return _diffusers(diffusers.DPMSolverMultistepScheduler(
    schedule.T, trained_betas=schedule.beta[1:].numpy(), timestep_spacing="trailing", final_sigmas_type="zero"), predict, xT, calls)


def diffusers_sde_dpm_solver(predict, schedule, xT, calls): return _diffusers(diffusers.DPMSolverMultistepScheduler(
    schedule.T, trained_betas=schedule.beta[1:].numpy(), timestep_spacing="trailing", final_sigmas_type="zero", algorithm_type="sde-dpmsolver++"), predict, xT, calls)


def _diffusers(scheduler, predict, xT, calls):
    scheduler.set_timesteps(calls)
    x = xT
    for t in scheduler.timesteps: x = scheduler.step(predict(x, int(t) + 1).eps, t, x).prev_sample # its time 0 is our time 1
    return x


def smalldiffusion_samples(predict, schedule, xT, calls):
    "In smalldiffusion's units x is x_t / sqrt(alpha_bar_t), and the noise level is sigma."
    class Net(ModelMixin, nn.Module):
        input_dims = tuple(xT.shape[1:])
        def predict_eps_cfg(self, x, sigma, cond, scale):
            t = int((schedule.sigma[1:] - sigma.double()).abs().argmin()) + 1
            return predict(x * schedule.alpha_bar[t].sqrt().float(), t).eps
    sigmas = torch.tensor([*schedule.sigma[schedule.timesteps(calls)[:-1]], 0.0], dtype=torch.float64)
    *_, x0 = small_samples(Net(), sigmas, gam=2, xt=xT / schedule.alpha_bar[-1].sqrt().float())
    return x0


def k_diffusion_samples(predict, schedule, xT, calls):
    def denoiser(x, sigma):
        t = int((schedule.sigma[1:] - sigma[0].double()).abs().argmin()) + 1
        return predict(x * schedule.alpha_bar[t].sqrt().float(), t).x0
    sigmas = schedule.sigma[schedule.timesteps(calls)].float()
    return k_sampling.sample_dpmpp_2m(denoiser, xT / schedule.alpha_bar[-1].sqrt().float(), sigmas, disable=True)


QUALITY = {"diffusers, DDIM": diffusers_ddim, "diffusers, DPM-Solver++(2M)": diffusers_dpm_solver,
           "diffusers, SDE-DPM-Solver++(2M)": diffusers_sde_dpm_solver, "smalldiffusion, accelerated": smalldiffusion_samples,
           "k-diffusion, DPM-Solver++(2M)": k_diffusion_samples}
