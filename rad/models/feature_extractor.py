"""Frozen ImageNet features: what RAN's feature head predicts and what the normality model is a Gaussian of."""

from collections.abc import Iterable
from typing import Any

import timm
import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config

ANY_SIZE = {"dynamic_img_size": True, "dynamic_img_pad": True}  # what timm's plain ViTs are told to take any


class RADFeatureExtractor(ModelMixin, ConfigMixin):
    """A frozen timm backbone read at several strides, resized to one grid and concatenated (RAN, section 3.3).

    The constructor builds the architecture only; weights come from `from_timm` or, with a saved pipeline, from
    `from_pretrained`, which downloads nothing from timm.

    Args:
        backbone: Any timm model that supports `features_only`; RAN uses "tf_efficientnet_b4".
        out_indices: The stages to read; (0, 1, 2, 3) are strides 2, 4, 8, 16 in an EfficientNet. Of a transformer of
            one stride, such as a ViT, they are blocks.
        feature_stride: Pixels per position of the grid that every stage is resized to; RAN's 64 x 64 grid on
            256 x 256 images is 4.
        image_size: Side in pixels to which images are resized for a backbone that takes one size alone, such as Swins;
            None for the others.
    """

    @register_to_config
    def __init__(
        self,
        backbone: str = "tf_efficientnet_lite0",
        out_indices: tuple[int, ...] = (0, 1, 2, 3),
        feature_stride: int = 8,
        image_size: int | None = None,
    ) -> None:
        super().__init__()
        self.network = _create(backbone, out_indices, image_size)
        info = self.network.feature_info
        if hasattr(self.network, "blocks"):  # EfficientNets keep the stages after the last one read
            last = max(int(name.split(".")[1]) for name in info.module_name() if name.startswith("blocks."))
            self.network.blocks = self.network.blocks[: last + 1]
        self.num_channels = sum(info.channels())
        cfg = self.network.pretrained_cfg
        self.register_buffer("pixel_mean", torch.tensor(cfg["mean"]).view(1, 3, 1, 1))
        self.register_buffer("pixel_std", torch.tensor(cfg["std"]).view(1, 3, 1, 1))
        self.register_buffer("channel_mean", torch.zeros(self.num_channels))
        self.register_buffer("channel_std", torch.ones(self.num_channels))
        self.requires_grad_(False)
        self.eval()

    @classmethod
    def from_timm(
        cls, backbone: str = "tf_efficientnet_b4", resolution: int = 256, pretrained: bool = True, **kwargs: Any
    ) -> "RADFeatureExtractor":
        """A backbone with timm's ImageNet weights, downloaded on first use, and settings that suit it.

        Args:
            backbone: As in the constructor.
            resolution: Side of the images; only a backbone that takes one size alone keeps to it.
            pretrained: False for random weights.
            kwargs: Of the constructor. Of a transformer of one stride four blocks are read by default, evenly spread,
                on a grid of 16 pixels per position.

        Raises:
            OSError: The weights are not cached and cannot be downloaded.
        """
        fixed = timm.get_pretrained_cfg_value(backbone, "fixed_input_size") and not _takes_any_size(backbone)
        kwargs = {"image_size": resolution if fixed else None} | kwargs
        extractor = cls(backbone, **kwargs)
        strides = extractor.network.feature_info.reduction()
        if len(set(strides)) == 1 < len(strides):
            depth = len(timm.create_model(backbone).blocks)
            blocks = tuple(depth * part // 4 - 1 for part in range(1, 5))
            extractor = cls(backbone, **{"out_indices": blocks, "feature_stride": 16} | kwargs)
        if not pretrained:
            return extractor
        try:
            weights = _create(backbone, extractor.config.out_indices, extractor.config.image_size, pretrained=True)
        except Exception as error:  # timm raises whatever its hub client raises: requests, httpx, hub or OS errors
            raise OSError(
                f"The ImageNet weights of timm's {backbone!r} are not in the cache and cannot be downloaded "
                f"({error}). "
                "Without a network, start from an embedded pipeline's extractor (backbone 'tf_efficientnet_lite0')."
            ) from error
        extractor.load_network(weights.state_dict())
        return extractor

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> "RADFeatureExtractor":
        """As in diffusers, but that the network is built before it is loaded: some of timm's hold constants that are
        not among the saved weights."""
        return super().from_pretrained(*args, **kwargs | {"low_cpu_mem_usage": False})

    def load_network(self, state_dict: dict[str, torch.Tensor]) -> None:
        """Copies weights in timm's naming; stages that are not read are left out, every other tensor must be there."""
        own = self.network.state_dict()
        self.network.load_state_dict({name: state_dict[name] for name in own})

    def train(self, mode: bool = True) -> "RADFeatureExtractor":
        """Stays in evaluation mode: the features are frozen."""
        return super().train(False)

    @torch.no_grad()
    def fit(self, batches: Iterable[torch.Tensor]) -> "RADFeatureExtractor":
        """Sets the mean and standard deviation of each channel from good images.

        RAN weighs raw channels equally, so those of the largest variance rule the error; here each counts alike.

        Args:
            batches: Images [B, 3, H, W] in [-1, 1].

        Returns:
            Itself.

        Raises:
            ValueError: There is no batch.
        """
        self.channel_mean.zero_()
        self.channel_std.fill_(1.0)
        count, total, squares = 0, torch.zeros(()), torch.zeros(())
        for images in batches:
            features = self(images).double().transpose(0, 1).flatten(1)
            count += features.shape[1]
            total, squares = total + features.sum(1), squares + features.square().sum(1)
        if count == 0:
            raise ValueError("fit needs at least one batch of good images, got none.")
        mean = total / count
        self.channel_mean.copy_(mean)
        self.channel_std.copy_((squares / count - mean.square()).clamp_min(1e-12).sqrt())
        return self

    def stages(self, images: torch.Tensor) -> list[torch.Tensor]:
        """The backbone's stages for images [B, 3, H, W] in [-1, 1], finest first, [B, C_i, h_i, w_i] each;
        every channel is in units of its deviation on good images once `fit` has run."""
        if (size := self.config.image_size) and images.shape[-2:] != (size, size):
            images = F.interpolate(images, (size, size), mode="bilinear", antialias=True)
        stages = self.network(((images + 1.0) / 2.0 - self.pixel_mean) / self.pixel_std)
        if str(getattr(self.network, "output_fmt", "NCHW")).endswith("NHWC"):
            stages = [stage.permute(0, 3, 1, 2) for stage in stages]
        counts = [stage.shape[1] for stage in stages]
        means, stds = (x.view(-1, 1, 1).split(counts) for x in (self.channel_mean, self.channel_std))
        return [(stage - mean) / std for stage, mean, std in zip(stages, means, stds, strict=True)]

    def join(self, stages: list[torch.Tensor], images: torch.Tensor) -> torch.Tensor:
        """Stages of these images resized to one grid and concatenated, as `forward` gives them."""
        size = [side // self.config.feature_stride for side in images.shape[-2:]]
        return torch.cat([F.interpolate(stage, size, mode="bilinear", antialias=True) for stage in stages], dim=1)

    def summary(self, images: torch.Tensor, stages: list[torch.Tensor]) -> torch.Tensor:
        """What an image is like as a whole, [B, num_summaries]: mean and deviation over positions of every channel, at
        the images' size, a half and a quarter of it, so that large faint differences count too.

        Args:
            images: [B, 3, H, W] in [-1, 1].
            stages: Theirs, from `stages`.
        """
        stages = list(stages)
        for scale in (1 / 2, 1 / 4):
            stages += self.stages(F.interpolate(images, scale_factor=scale, mode="bilinear", antialias=True))
        return torch.cat([x for stage in stages for x in _mean_and_std(stage.float())], dim=1)

    @property
    def num_summaries(self) -> int:
        """Numbers in a `summary`."""
        return 6 * self.num_channels

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Features of images [B, 3, H, W] in [-1, 1]: [B, num_channels, H / feature_stride, W / feature_stride]."""
        return self.join(self.stages(images), images)


def _takes_any_size(backbone: str) -> bool:
    """Whether a backbone of one input size can be told to take any, as timm's plain ViTs can."""
    try:
        timm.create_model(backbone, **ANY_SIZE)
    except TypeError:
        return False
    return True


def _create(backbone: str, out_indices: Iterable[int], image_size: int | None, pretrained: bool = False) -> Any:
    """timm's network that gives these stages."""
    options: dict[str, Any] = {"pretrained": pretrained, "features_only": True, "out_indices": tuple(out_indices)}
    if image_size:
        return timm.create_model(backbone, img_size=image_size, **options)
    if not timm.get_pretrained_cfg_value(backbone, "fixed_input_size"):
        return timm.create_model(backbone, **options)
    try:
        return timm.create_model(backbone, **ANY_SIZE, **options)
    except TypeError as error:
        raise ValueError(
            f"The backbone {backbone} takes images of one size alone: say by image_size which."
        ) from error


def _mean_and_std(stage: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return stage.mean((2, 3)), stage.std((2, 3), correction=0)
