"""A discriminator on frozen features: it knows artificial defects, where all else knows good images only."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn


class RADDiscriminator(ModelMixin, ConfigMixin):
    """Tells artificial defects from the good image around them; a small decoder on the extractor's stages.

    Distances from good images find what is odd in itself; a large region that is odd only beside the rest of its own
    image takes a wide view and an idea of what a defect is. As in DRAEM (Zavrtanik et al., ICCV 2021) artificial
    defects give that idea, and as in SimpleNet (Liu et al., CVPR 2023) the features stay frozen.

    Args:
        stage_channels: Channels of the stages it reads, finest first, each half as fine as the one before.
        widths: Channels of the decoder at each of them; multiples of 8.
    """

    @register_to_config
    def __init__(
        self, stage_channels: tuple[int, ...] = (24, 40, 112), widths: tuple[int, ...] = (40, 80, 112)
    ) -> None:
        super().__init__()
        if len(stage_channels) != len(widths):
            raise ValueError(f"stage_channels and widths must be of one length, got {stage_channels} and {widths}.")
        self.standardise = nn.ModuleList(nn.BatchNorm2d(channels, affine=False) for channels in stage_channels)
        self.lateral = nn.ModuleList(_block(*pair, 1) for pair in zip(stage_channels, widths, strict=True))
        # Two coarser levels and the mean over the image: what is odd depends on all of it
        self.down = nn.ModuleList(nn.Sequential(*[_block(widths[-1], widths[-1]) for _ in range(2)]) for _ in range(2))
        finer = [widths[-1], *widths[::-1]]
        self.up = nn.ModuleList(
            _block(coarse + fine, fine) for coarse, fine in zip([widths[-1], *finer], finer, strict=False)
        )
        self.out = nn.Conv2d(widths[0], 1, kernel_size=1)

    def forward(self, stages: list[torch.Tensor]) -> torch.Tensor:
        """Logits of a defect at every position of the finest stage, [B, h, w].

        Args:
            stages: Of the extractor, [B, C_i, h / 2^i, w / 2^i]; the finest are left out if there are more than
                `stage_channels`.
        """
        stages = stages[len(stages) - len(self.lateral) :]
        parts = zip(self.lateral, self.standardise, stages, strict=True)
        levels = [lateral(standardise(stage)) for lateral, standardise, stage in parts]
        for down in self.down:
            levels.append(down(F.avg_pool2d(levels[-1], 2)))
        hidden = levels[-1] + levels[-1].mean((2, 3), keepdim=True)
        for up, level in zip(self.up, levels[-2::-1], strict=True):
            hidden = F.interpolate(hidden, level.shape[-2:], mode="bilinear")
            hidden = up(torch.cat([hidden, level], dim=1))
        return self.out(hidden)[:, 0]

    def fit(
        self,
        batches: Iterator[tuple[list[torch.Tensor], torch.Tensor]],
        num_steps: int,
        learning_rate: float = 1e-3,
        progress: Callable[[float], None] = lambda loss: None,
    ) -> "RADDiscriminator":
        """Trains on images with artificial defects.

        Args:
            batches: Stages of images, and their masks [B, h, w] at the finest stage, share of each position in [0, 1].
            num_steps: Batches to train on; AdamW's learning rate rises to its peak and falls back in between.
            progress: Called with the loss after each step.

        Raises:
            ValueError: The loss is no longer finite.
        """
        optimizer = torch.optim.AdamW(self.parameters(), learning_rate, weight_decay=1e-4)
        rise = 0.05 if num_steps > 20 else 0.3  # the scheduler divides by its steps less one
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, num_steps, pct_start=rise)
        self.train()
        for _ in range(num_steps):
            stages, mask = next(batches)
            with torch.autocast(mask.device.type, torch.bfloat16, enabled=computes_bf16(mask.device)):
                logits = self(stages)
            loss = _loss(logits.float(), (mask > 0.3).float(), 1 + 4 * (mask > 0).float())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if not loss.isfinite():
                raise ValueError(f"Training the discriminator diverged (loss {loss.item()}): lower the learning rate.")
            progress(loss.item())
        return self.eval()


def computes_bf16(device: torch.device) -> bool:
    """Whether a device computes in bfloat16: processors that do not emulate it, several times slower than float32."""
    processor = torch.cpu.get_capabilities()
    return device.type != "cpu" or bool(processor.get("avx512_bf16") or processor.get("amx_bf16"))


def _block(channels: int, width: int, kernel_size: int = 3) -> nn.Sequential:
    convolution = nn.Conv2d(channels, width, kernel_size, padding=kernel_size // 2)
    return nn.Sequential(convolution, nn.GroupNorm(8, width), nn.SiLU())


def _loss(logits: torch.Tensor, target: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Cross-entropy, and Dice so that small defects count too."""
    entropy = F.binary_cross_entropy_with_logits(logits, target, weight)
    found = logits.sigmoid()
    overlap, total = (found * target).sum((1, 2)), (found + target).sum((1, 2))
    return entropy + 0.5 * (1 - (2 * overlap + 1) / (total + 1)).mean()
