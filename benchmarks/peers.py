"""Other libraries' networks and samplers, built at the size of ours (1.0 to 1.7 million parameters).

`make benchmarks` installs them, pinned in peers.txt, into build/peers. They import packages that sampling never touches (torchvision, SDE solvers,
FID): empty modules of those names stand in for them.

NETWORKS: name -> a network that is called as net(x, t, context), like ours, so that all are timed alike.
SAMPLERS: name -> draw(predict, schedule, xT, calls) -> images: their sampler around our network, each at its best valid setting.
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

from denoising_diffusion_pytorch.denoising_diffusion_pytorch import Unet as LucidrainsUnet  # noqa: E402
from k_diffusion import sampling as k_sampling  # noqa: E402
from k_diffusion.models.image_v1 import ImageDenoiserModelV1  # noqa: E402
from smalldiffusion.diffusion import samples as small_samples  # noqa: E402
from smalldiffusion.model import ModelMixin  # noqa: E402
from smalldiffusion.model_unet import Unet as SmallUnet  # noqa: E402

VERSIONS = {"diffusers": diffusers.__version__, **{name: importlib.metadata.version(name)
            for name in ("denoising-diffusion-pytorch", "k-diffusion", "smalldiffusion")}}


# --- networks ---

class Called(nn.Module):
    "A peer's network under our signature."

    def __init__(self, net, call):
        super().__init__()
        self.net, self.call = net, call

    def forward(self, x, t, context): return self.call(self.net, x, t, context)


def diffusers_net():
    net = diffusers.UNet2DModel(16, 3, 3, block_out_channels=(32, 64, 80), layers_per_block=1, norm_num_groups=8, num_class_embeds=5,
                                down_block_types=("DownBlock2D",) * 3, up_block_types=("UpBlock2D",) * 3)
    return Called(net, lambda net, x, t, context: net(x, t, context.argmax(1)).sample)


def lucidrains_net(): return Called(LucidrainsUnet(dim=24, dim_mults=(1, 2, 4), channels=3), lambda net, x, t, context: net(x, t)) # has no context


def smalldiffusion_net():
    net = SmallUnet(16, 3, 3, ch=32, ch_mult=(1, 2, 2), num_res_blocks=1, attn_resolutions=(), dropout=0.0)
    return Called(net, lambda net, x, t, context: net(x, t.float() / 500)) # has no context; one noise level for each image


def k_diffusion_net():
    net = ImageDenoiserModelV1(3, 128, depths=(1, 2, 2), channels=(32, 64, 96), self_attn_depths=(False,) * 3, mapping_cond_dim=5)
    return Called(net, lambda net, x, t, context: net(x, t.float() / 500, mapping_cond=context))


NETWORKS = {"diffusers": diffusers_net, "denoising-diffusion-pytorch": lucidrains_net, "smalldiffusion": smalldiffusion_net, "k-diffusion": k_diffusion_net}


# --- samplers ---

def diffusers_sampler(cls, **options):
    "On the trailing grid, from T to 0; its time 0 is our time 1."
    def draw(predict, schedule, xT, calls):
        scheduler = cls(schedule.T, trained_betas=schedule.beta[1:].numpy(), timestep_spacing="trailing", **options)
        scheduler.set_timesteps(calls)
        x = xT
        for t in scheduler.timesteps: x = scheduler.step(predict(x, int(t) + 1).eps, t, x).prev_sample
        return x
    return draw


def smalldiffusion_samples(predict, schedule, xT, calls):
    "In smalldiffusion's units x is x_t / sqrt(alpha_bar_t), and the noise level is sigma. gam=2, mu=0: its accelerated sampler."
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


SAMPLERS = {
    "diffusers, DDIM": diffusers_sampler(diffusers.DDIMScheduler, clip_sample=False, set_alpha_to_one=True),
    "diffusers, DPM-Solver++(2M)": diffusers_sampler(diffusers.DPMSolverMultistepScheduler, final_sigmas_type="zero"),
    "diffusers, SDE-DPM-Solver++(2M)": diffusers_sampler(diffusers.DPMSolverMultistepScheduler, final_sigmas_type="zero", algorithm_type="sde-dpmsolver++"),
    "diffusers, UniPC": diffusers_sampler(diffusers.UniPCMultistepScheduler, final_sigmas_type="zero"),
    "smalldiffusion, accelerated": smalldiffusion_samples,
    "k-diffusion, DPM-Solver++(2M)": k_diffusion_samples,
}
