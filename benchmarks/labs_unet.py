"""The U-Net of the labs, written anew from a description of its architecture: for benchmarks and failure demos only.

Learn from `diffusion_course.unet` instead. This network keeps the labs' choices, weak ones included: BatchNorm, time as
one raw number that only the decoder sees, and (unless repaired) a shortcut with new random weights at every call.
It is made for 16x16 images: its bottleneck is a single pixel.
"""
import torch
from torch import Tensor, nn


def conv_unit(c_in: int, c_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(c_in, c_out, 3, padding=1), nn.BatchNorm2d(c_out), nn.GELU())


def block(c_in: int, c_out: int) -> nn.Sequential:
    return nn.Sequential(conv_unit(c_in, c_out), conv_unit(c_out, c_out))


class FirstBlock(nn.Module):
    "A block with a shortcut from the image. `shortcut='random'` makes its 1x1 convolution inside forward: the defect."

    def __init__(self, c_in: int, c_out: int, shortcut: str):
        super().__init__()
        self.block = block(c_in, c_out)
        self.shortcut = nn.Conv2d(c_in, c_out, 1) if shortcut == "learned" else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.block(x)
        # The wrong line: a layer born here is new at each call, is never trained and is in no state_dict.
        shortcut = self.shortcut or nn.Conv2d(x.shape[1], h.shape[1], 1, device=x.device)
        return (shortcut(x) + h) / 1.414


def embedding(d_in: int, d: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(d_in, d), nn.GELU(), nn.Linear(d, d))


class LabsUnet(nn.Module):
    """The labs' network: 1,480,771 parameters with `shortcut="random"` (as in the labs), 256 more with "learned".

    Called like ours, net(x, t, context): x (n, in_channels, 16, 16), integer t (n,), context (n, n_context) or None.
    """

    def __init__(self, in_channels: int = 3, n_feat: int = 64, n_context: int = 5, T: int = 500,
                 shortcut: str = "random"):
        super().__init__()
        if shortcut not in ("random", "learned"):
            raise ValueError(f"shortcut is {shortcut!r}; choose 'random' (as in the labs) or 'learned' (repaired).")
        self.T, self.n_context, self.predicts = T, n_context, "eps"
        f = n_feat
        self.init_conv = FirstBlock(in_channels, f, shortcut)
        self.down1 = nn.Sequential(block(f, f), block(f, f), nn.MaxPool2d(2))
        self.down2 = nn.Sequential(block(f, 2 * f), block(2 * f, 2 * f), nn.MaxPool2d(2))
        self.to_vec = nn.Sequential(nn.AvgPool2d(4), nn.GELU())
        self.time1, self.time2 = embedding(1, 2 * f), embedding(1, f)
        self.context1, self.context2 = embedding(n_context, 2 * f), embedding(n_context, f)
        self.up0 = nn.Sequential(nn.ConvTranspose2d(2 * f, 2 * f, 4, stride=4), nn.GroupNorm(8, 2 * f), nn.ReLU())
        self.up1 = nn.Sequential(nn.ConvTranspose2d(4 * f, f, 2, stride=2), block(f, f), block(f, f))
        self.up2 = nn.Sequential(nn.ConvTranspose2d(2 * f, f, 2, stride=2), block(f, f), block(f, f))
        self.out = nn.Sequential(nn.Conv2d(2 * f, f, 3, padding=1), nn.GroupNorm(8, f), nn.ReLU(),
                                 nn.Conv2d(f, in_channels, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
        if context is None: context = x.new_zeros(len(x), self.n_context)
        time = (t / self.T).to(x.dtype)[:, None]
        t1, t2 = self.time1(time)[..., None, None], self.time2(time)[..., None, None]
        c1, c2 = self.context1(context)[..., None, None], self.context2(context)[..., None, None]
        first = self.init_conv(x)
        down1 = self.down1(first)
        down2 = self.down2(down1)
        h = self.up0(self.to_vec(down2))
        h = self.up1(torch.cat([c1 * h + t1, down2], dim=1))
        h = self.up2(torch.cat([c2 * h + t2, down1], dim=1))
        return self.out(torch.cat([h, first], dim=1))
