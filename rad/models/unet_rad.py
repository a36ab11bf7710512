"""The denoiser: diffusers' U-Net on pixel patches, with a second head that predicts frozen features of x_0."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin, UNet2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.resnet import ResnetBlock2D
from diffusers.utils import BaseOutput
from torch import nn

from .detail import DetailBranch
from .wiener import WienerFilter

NUM_DETAIL_LAYERS = 5  # which see 11 x 11 pixels


@dataclass
class RADUNet2DOutput(BaseOutput):
    """What one forward pass predicts at x_t.

    Attributes:
        sample: The noise eps or, of a network with a Wiener filter, x0_hat, as the scheduler's `prediction_type` says;
            [B, C, H, W].
        variance: v in the learned range, about [-1, 1], [B, C, H, W].
        features: Features of x_0, [B, feature_channels, H / feature_stride, W / feature_stride].
        linear_error: Mean squared error that the Wiener filter alone would make of a good image, [B]; None without.
    """

    sample: torch.Tensor
    variance: torch.Tensor | None = None  # optional only for accelerate, which rebuilds outputs from a dict
    features: torch.Tensor | None = None
    linear_error: torch.Tensor | None = None


class RADUNet2DModel(ModelMixin, ConfigMixin):
    """diffusers' `UNet2DModel` with learned variance, pixel patches, a feature head and category labels.

    `RADUNet2DModel.from_named_config("ran")` is the published network (552 M parameters without its feature head).

    Args:
        sample_size: Side of the square training images in pixels; other multiples of the total stride work too.
        patch_size: Pixels per side that one position of the U-Net holds (pixel-unshuffle in, pixel-shuffle out);
            1 is RAN, 4 makes a small network fast on a CPU.
        down_block_types, up_block_types, block_out_channels, layers_per_block, attention_head_dim, downsample_type,
            upsample_type, resnet_time_scale_shift, norm_num_groups, dropout: As in `UNet2DModel`.
        feature_block: The residual block of the decoder that the feature head reads, from 0; RAN reads the 11th of
            18, so 10. Negative counts from the end.
        feature_channels, feature_stride: The extractor's channels, and pixels per position of its grid.
        wiener: Let the network improve on a Wiener filter of good images, which `wiener_filter.fit` measures; its
            output is x0_hat then. A network on patches has no room for their noise, so it cannot predict it well.
        detail_channels: Width of a branch at the images' own resolution, which finishes x0_hat; 0 for none. It needs
            the Wiener filter.
        categories: Names of the categories it is trained on, in the order of the class labels; none for a network
            without labels. One more embedding stands for an unknown category.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        sample_size: int = 256,
        in_channels: int = 3,
        patch_size: int = 4,
        down_block_types: tuple[str, ...] = ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types: tuple[str, ...] = ("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        block_out_channels: tuple[int, ...] = (64, 128, 192),
        layers_per_block: int = 1,
        attention_head_dim: int = 64,
        downsample_type: str = "conv",
        upsample_type: str = "conv",
        resnet_time_scale_shift: str = "scale_shift",
        norm_num_groups: int = 32,
        dropout: float = 0.0,
        feature_block: int = 3,
        feature_channels: int = 192,
        feature_stride: int = 8,
        categories: tuple[str, ...] = (),
        wiener: bool = False,
        detail_channels: int = 0,
    ) -> None:
        super().__init__()
        if detail_channels and not wiener:
            raise ValueError("detail_channels needs wiener=True: the branch improves on an estimate of x_0.")
        num_decoder_blocks = len(up_block_types) * (layers_per_block + 1)
        if not -num_decoder_blocks <= feature_block < num_decoder_blocks:
            raise ValueError(
                f"feature_block must name one of {num_decoder_blocks} decoder blocks, got {feature_block}."
            )
        self.unet = UNet2DModel(
            sample_size=sample_size // patch_size,
            in_channels=in_channels * patch_size**2,
            out_channels=2 * in_channels * patch_size**2,
            down_block_types=down_block_types,
            up_block_types=up_block_types,
            block_out_channels=block_out_channels,
            layers_per_block=layers_per_block,
            attention_head_dim=attention_head_dim,
            downsample_type=downsample_type,
            upsample_type=upsample_type,
            resnet_time_scale_shift=resnet_time_scale_shift,
            norm_num_groups=norm_num_groups,
            attn_norm_num_groups=norm_num_groups,
            dropout=dropout,
            num_class_embeds=len(categories) + 1 if categories else None,
        )
        self.wiener_filter = WienerFilter(in_channels, sample_size) if wiener else None
        if wiener:  # from which training starts
            nn.init.zeros_(self.unet.conv_out.weight)
            nn.init.zeros_(self.unet.conv_out.bias)
        embedding_dim = self.unet.time_embedding.linear_2.out_features
        self.detail = (
            DetailBranch(in_channels, detail_channels, NUM_DETAIL_LAYERS, embedding_dim) if detail_channels else None
        )
        self.feature_block = feature_block % num_decoder_blocks
        width = block_out_channels[::-1][self.feature_block // (layers_per_block + 1)]
        self.feature_head = nn.Sequential(
            nn.GroupNorm(norm_num_groups, width), nn.SiLU(), nn.Conv2d(width, feature_channels, kernel_size=1)
        )

    @classmethod
    def from_named_config(cls, name: str, **overrides: Any) -> "RADUNet2DModel":
        """A network with random weights, by name: "small" (that of the embedded checkpoints, 8 M parameters), "base"
        (92 M, for a GPU) or "ran" (as published, 553 M)."""
        if name not in NAMED_CONFIGS:
            raise ValueError(f"The model configuration must be one of {sorted(NAMED_CONFIGS)}, got {name!r}.")
        return cls(**(NAMED_CONFIGS[name] | overrides))

    @torch.no_grad()
    def with_categories(self, categories: tuple[str, ...]) -> "RADUNet2DModel":
        """This network for other categories, to be trained further.

        A category that it knows keeps its embedding; others start as the "unknown category". A network without labels
        behaves as this one does on an unknown category.
        """
        model = RADUNet2DModel(**(dict(self.config) | {"categories": tuple(categories)}))
        state_dict, known = self.state_dict(), list(self.config.categories)
        rows = state_dict.pop("unet.class_embedding.weight", None)
        if rows is None:
            rows = torch.zeros(1, self.unet.time_embedding.linear_2.out_features)
        if categories:
            names = [*categories, None]
            rows = [rows[known.index(name)] if name in known else rows[-1] for name in names]
            state_dict["unet.class_embedding.weight"] = torch.stack(rows)
        else:
            bias = "unet.time_embedding.linear_2.bias"
            state_dict[bias] = state_dict[bias] + rows[-1]
        model.load_state_dict(state_dict)
        return model

    @property
    def stride(self) -> int:
        """Side of the image must be a multiple of this many pixels."""
        return self.config.patch_size * 2 ** (len(self.config.block_out_channels) - 1)

    def labels_of(self, categories: Sequence[str | None]) -> torch.Tensor | None:
        """Class labels [B] of categories by name: one that it was not trained on gets the "unknown category"
        embedding. None for a network without categories."""
        trained = list(self.config.categories)
        if not trained:
            return None
        labels = [trained.index(name) if name in trained else len(trained) for name in categories]
        return torch.tensor(labels, device=self.device)

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor | int, class_labels: torch.Tensor | None = None
    ) -> RADUNet2DOutput:
        """Predicts noise or x_0, variance and features at x_t in one pass.

        Args:
            sample: x_t, [B, C, H, W], better in float32 whatever type the network has; H and W multiples of `stride`.
            timestep: Steps of the full chain, an int or [B].
            class_labels: [B] in 0 .. len(categories), where the last means "unknown", also the default.
        """
        if sample.shape[-1] % self.stride or sample.shape[-2] % self.stride:
            raise ValueError(
                f"The sides of the image must be multiples of {self.stride} pixels, got {tuple(sample.shape[-2:])}."
            )
        if class_labels is not None and not self.config.categories:
            raise ValueError("class_labels were given, but this network was trained without categories.")
        unet, batch, dtype = self.unet, sample.shape[0], self.unet.conv_in.weight.dtype

        # 1. Time and category embedding
        timestep = torch.as_tensor(timestep, device=sample.device).expand(batch)
        emb = unet.time_embedding(unet.time_proj(timestep).to(dtype))
        if unet.class_embedding is not None:
            if class_labels is None:
                class_labels = torch.full((batch,), len(self.config.categories), device=sample.device)
            emb = emb + unet.class_embedding(class_labels)

        # 2. Encoder
        hidden = unet.conv_in(F.pixel_unshuffle(sample.to(dtype), self.config.patch_size))
        skips = [hidden]
        for block in unet.down_blocks:
            hidden, residuals = block(hidden, emb)
            skips.extend(residuals)
        hidden = unet.mid_block(hidden, emb)

        # 3. Decoder, written out so that the feature head can read any of its residual blocks
        features: torch.Tensor
        position = 0
        for block in unet.up_blocks:
            attentions = getattr(block, "attentions", [None] * len(block.resnets))
            for resnet, attention in zip(block.resnets, attentions, strict=True):
                hidden = torch.cat([hidden, skips.pop()], dim=1)
                if torch.is_grad_enabled() and block.gradient_checkpointing:
                    hidden = block._gradient_checkpointing_func(resnet, hidden, emb)
                else:
                    hidden = resnet(hidden, emb)
                if attention is not None:
                    hidden = attention(hidden)
                if position == self.feature_block:
                    features = self.feature_head(hidden)
                position += 1
            for upsampler in block.upsamplers or []:
                hidden = upsampler(hidden, emb) if isinstance(upsampler, ResnetBlock2D) else upsampler(hidden)

        # 4. Outputs
        hidden = unet.conv_out(unet.conv_act(unet.conv_norm_out(hidden)))
        prediction, variance = (F.pixel_shuffle(x, self.config.patch_size) for x in hidden.chunk(2, dim=1))
        linear_error = None
        if self.wiener_filter is not None:
            prediction, linear_error = self.wiener_filter(sample, timestep, prediction)
            if self.detail is not None:
                x, snr = self.wiener_filter.scale(sample, timestep)
                prediction = self.detail(prediction, x, snr.rsqrt(), linear_error, emb)
        size = [side // self.config.feature_stride for side in sample.shape[-2:]]
        if list(features.shape[-2:]) != size:
            features = F.interpolate(features.float(), size, mode="bilinear", antialias=True)
        return RADUNet2DOutput(prediction, variance, features, linear_error)


NAMED_CONFIGS: dict[str, dict[str, Any]] = {
    "small": {"wiener": True, "detail_channels": 32},
    "base": {
        "wiener": True,
        "detail_channels": 64,
        "patch_size": 2,
        "down_block_types": ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        "block_out_channels": (128, 256, 384, 512),
        "layers_per_block": 2,
        "feature_block": 5,
    },
    "ran": {
        "patch_size": 1,
        "down_block_types": ("ResnetDownsampleBlock2D",) * 3 + ("AttnDownBlock2D",) * 3,
        "up_block_types": ("AttnUpBlock2D",) * 3 + ("ResnetUpsampleBlock2D",) * 3,
        "block_out_channels": (256, 256, 512, 512, 1024, 1024),
        "layers_per_block": 2,
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "feature_block": 10,
        "feature_channels": 272,
        "feature_stride": 4,
    },
}
