"""Methods to compare a pipeline with, on its own frozen backbone and at its resolution, set as published as far as one
CPU allows."""

import argparse
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms.functional import gaussian_blur
from tqdm.auto import tqdm

from rad import RADPipeline
from rad.evaluation import Scored
from rad.image_processor import resize_map, to_input
from rad.image_reader import ImageInput
from rad.models.evidence import FUSED
from rad.models.gaussian import inverse_cholesky

PRECISION = {"no": "fp32", "bf16": "bf16"}


class Embedding(nn.Module):
    """Stages of the pipeline's own frozen extractor, resized to one grid and concatenated.

    Args:
        strides: The stages to take.
        grid: Pixels per position of the grid.
        average: Average each stage over 3 x 3 positions first, as PatchCore does.
        mode: How `F.interpolate` resizes.
    """

    def __init__(self, pipeline: RADPipeline, strides: tuple[int, ...], grid: int, average: bool, mode: str) -> None:
        super().__init__()
        self.extractor, self.grid, self.average, self.mode = pipeline.feature_extractor, grid, average, mode
        self.stages = [i for i, s in enumerate(self.extractor.network.feature_info.reduction()) if s in strides]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Features [B, C, h, w] of images [B, 3, S, S] in [-1, 1]."""
        outputs = self.extractor.network(((x + 1) / 2 - self.extractor.pixel_mean) / self.extractor.pixel_std)
        stages = [outputs[i] for i in self.stages]
        if self.average:
            stages = [F.avg_pool2d(stage, 3, stride=1, padding=1) for stage in stages]
        size = [side // self.grid for side in x.shape[-2:]]
        return torch.cat([F.interpolate(stage, size, mode=self.mode) for stage in stages], 1)


class Peer(nn.Module):
    """A method to compare with.

    A subclass gives `fit` and `forward(x)` for one image [1, 3, S, S] in [-1, 1]: its map [1, h, w] and its score, a
    number.

    Attributes:
        title: Of its row.
        settings: A sentence below the table.
        flags: The arguments of the command line that `fit` depends on.
        found: The buffers that `fit` adds.
    """

    title: str
    settings: str
    flags: tuple[str, ...] = ()
    found: tuple[str, ...] = ()

    def __init__(self, pipeline: RADPipeline, args: argparse.Namespace) -> None:
        super().__init__()
        self.processor, self.args, self.device = pipeline.image_processor, args, pipeline.device

    def fit(self, images: torch.Tensor) -> "Peer":
        """Fits in place to good images [N, 3, S, S], uint8; returns self."""
        raise NotImplementedError

    def load(self, state_dict: dict[str, torch.Tensor]) -> None:
        """What `fit` has made, of a peer that was fitted before."""
        for name in self.found:
            self.register_buffer(name, torch.empty_like(state_dict[name], device=self.device))
        self.load_state_dict(state_dict)
        self.eval()

    def autocast(self) -> torch.autocast:
        """Networks are trained under it; losses are computed outside, in float32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.mixed_precision == "bf16")

    def chunks(self, images: torch.Tensor, size: int = 16) -> Iterator[torch.Tensor]:
        """The images once, in order, in [-1, 1] and on the device."""
        for chunk in tqdm(images.split(size), desc=type(self).__name__):
            yield to_input(chunk.to(self.device))

    def train_steps(
        self,
        images: torch.Tensor,
        network: nn.Module,
        loss_of: Callable,
        steps: int,
        lr: float,
        milestones: list[float],
    ) -> list[float]:
        """Trains `network` with Adam on random batches, lr / 10 from each milestone (a share of the steps) on.

        `loss_of` gives the loss of a batch in [-1, 1]. Returns the loss of each step.
        """
        losses, optimizer = [], torch.optim.Adam(network.parameters(), lr=lr)
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [int(m * steps) for m in milestones])
        network.train()
        progress = tqdm(range(steps), desc=type(self).__name__)
        for _ in progress:
            picked = torch.randint(len(images), (self.args.train_batch_size,))
            loss = loss_of(to_input(images[picked].to(self.device)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            progress.set_postfix(loss=f"{losses[-1]:.4f}")
        network.eval()
        return losses

    @torch.no_grad()
    def score(self, images: list[ImageInput], category: str) -> Scored:
        """Maps at each image's own size, and scores, by the title of the row that they go to."""
        x, sizes = self.processor.preprocess(images)
        maps, scores = zip(*(self(one.to(self.device)) for one in x.split(1)), strict=True)
        maps = [resize_map(own, [size])[0] for own, size in zip(maps, sizes, strict=True)]
        return Scored({self.title: maps}, {self.title: np.array([float(score) for score in scores])})


class RAD(Peer):
    """The pipeline itself, as `training/train.py` left it: its fused score and each single one."""

    title = "RAD"

    def __init__(self, pipeline: RADPipeline, args: argparse.Namespace) -> None:
        super().__init__(pipeline, args)
        self.settings = f"the model {args.model}, trained beforehand; single scores come from the same pass."
        self.pipeline = pipeline
        self.parts = nn.ModuleList(part for part in pipeline.components.values() if isinstance(part, nn.Module))
        pipeline.set_progress_bar_config(disable=True)

    def score(self, images: list[ImageInput], category: str) -> Scored:
        known = self.pipeline.categories
        output = self.pipeline(images, class_labels=category if category in known else None)
        titles = {name: self.title if name == FUSED else f"{self.title}, {name} alone" for name in output.maps}
        return Scored(
            {title: output.maps[name] for name, title in titles.items()},
            {title: output.scores[name] for name, title in titles.items()},
        )


class PaDiM(Peer):
    """A Gaussian of features at every position: Defard et al., "PaDiM", ICPR Workshops 2021."""

    title, found = "PaDiM", ("mean", "whitening")
    grid, average, mode = 4, False, "nearest"
    settings = (
        "strides 4, 8 and 16 on the grid of stride 4, all channels, covariance + 0.01 I; map smoothed by a Gaussian "
        "of sigma 4, image score = its maximum."
    )

    def __init__(self, pipeline: RADPipeline, args: argparse.Namespace) -> None:
        super().__init__(pipeline, args)
        self.embedding = Embedding(pipeline, (4, 8, 16), self.grid, self.average, self.mode)

    @torch.no_grad()
    def fit(self, images: torch.Tensor) -> "PaDiM":
        total, squares = 0.0, None
        for x in self.chunks(images):
            features = self.embedding(x).flatten(2).permute(2, 0, 1).double()  # [positions, B, C]
            total = total + features.sum(1)
            if squares is None:
                squares = features.mT @ features
            else:
                squares.baddbmm_(features.mT, features)
        mean = total / len(images)
        whitening = []  # W^T W is the inverse of the covariance
        for m, square in zip(mean.split(256), squares.split(256), strict=True):
            covariance = (square - len(images) * m[:, :, None] * m[:, None, :]) / (len(images) - 1)
            covariance.diagonal(dim1=1, dim2=2).add_(0.01)
            whitening.append(torch.from_numpy(inverse_cholesky(covariance.cpu().numpy())).float())
        self.register_buffer("mean", mean.float()[..., None])
        self.register_buffer("whitening", torch.cat(whitening).to(mean.device))
        return self

    def distance(self, x: torch.Tensor) -> torch.Tensor:
        """Mahalanobis distance at each position, [1, h, w]."""
        features = self.embedding(x)
        deviation = features[0].flatten(1).T[..., None] - self.mean  # [positions, C, 1]
        return (self.whitening @ deviation).norm(dim=1).view(1, *features.shape[2:])

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return smooth(self.distance(x), x)


class CoarsePaDiM(PaDiM):
    """PaDiM with the features that PatchCore takes: averages over 3 x 3 on a grid half as fine."""

    title = "PaDiM, coarse"
    grid, average, mode = 8, True, "bilinear"
    settings = (
        "PaDiM with its strides averaged over 3 x 3 on the grid of stride 8; of three such variants the one with the "
        "highest image AUROC on MTD's test images."
    )


class PatchCore(Peer):
    """Distance to the nearest of stored patches: Roth et al., "Towards Total Recall", CVPR 2022."""

    title, flags, found = "PatchCore", ("coreset_ratio",), ("memory",)

    def __init__(self, pipeline: RADPipeline, args: argparse.Namespace) -> None:
        super().__init__(pipeline, args)
        self.embedding = Embedding(pipeline, (8, 16), grid=8, average=True, mode="bilinear")
        self.settings = (
            "strides 8 and 16, averaged over 3 x 3, on the grid of stride 8; greedy k-center coreset of "
            f"{args.coreset_ratio:.1%} of all patches; map smoothed by a Gaussian of sigma 4, image score reweighted "
            "by 9 neighbours (the paper's equation 7)."
        )

    @torch.no_grad()
    def fit(self, images: torch.Tensor) -> "PatchCore":
        patches = torch.cat([self.patches(self.embedding(x)) for x in self.chunks(images)])
        count = max(1, round(self.args.coreset_ratio * len(patches)))
        self.register_buffer("memory", patches[k_center_greedy(patches, count)])
        return self

    @staticmethod
    def patches(features: torch.Tensor) -> torch.Tensor:
        """Features [B, C, h, w] as rows [B h w, C]."""
        return features.permute(0, 2, 3, 1).flatten(0, 2)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.embedding(x)
        patches = self.patches(features)
        distance, nearest = torch.cdist(patches, self.memory).min(1)
        worst = distance.argmax()
        to_nearest = torch.cdist(self.memory[nearest[worst], None], self.memory)[0]
        neighbours = to_nearest.topk(min(9, len(self.memory)), largest=False).indices
        around = torch.cdist(patches[worst, None], self.memory[neighbours])[0]  # its first is distance[worst]
        score = (1 - around.softmax(0)[0]) * distance[worst]
        return smooth(distance.view(1, *features.shape[2:]), x)[0], score


def k_center_greedy(points: torch.Tensor, count: int, pool_size: int = 256) -> torch.Tensor:
    """Indices of `count` of the points [N, C]: a random one, then each time the one farthest from all chosen.

    Gaps only shrink, so the farthest point is known to be among the `pool_size` farthest until their gaps have fallen
    below the next one's: so long, all other points can wait and then be compared with several new ones at once.
    """
    squares = points.square().sum(1)
    gap = torch.full_like(squares, torch.inf)  # squared distance to the nearest chosen one, -inf for these themselves
    chosen, known = [int(torch.randint(len(points), ()))], 0
    progress = tqdm(total=count, initial=1, desc="Coreset")
    while len(chosen) < count:
        new, known = chosen[known:], len(chosen)
        for part, square, rows in zip(gap.split(2**14), squares.split(2**14), points.split(2**14), strict=True):
            products = torch.addmm(squares[new], rows, points[new].T, alpha=-2)
            torch.minimum(part, products.amin(1).add_(square), out=part)
        gap[chosen] = -torch.inf

        near, pool = gap.topk(min(pool_size, len(points)))
        rest = near[-1].item() if len(pool) < len(points) else -torch.inf
        between = torch.cdist(points[pool], points[pool]).square()
        while len(chosen) < count and (len(chosen) == known or near.max() > rest):
            picked = near.argmax()
            chosen.append(int(pool[picked]))
            near = torch.minimum(near, between[picked])
            near[picked] = -torch.inf
        progress.update(len(chosen) - known)
    return torch.tensor(chosen, device=points.device)


def smooth(distance: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A map [1, h, w] at the resolution of the images x and smoothed, as PaDiM and PatchCore do, and its maximum."""
    maps = F.interpolate(distance[None], x.shape[-2:], mode="bilinear")
    maps = gaussian_blur(maps, [33, 33], [4.0, 4.0])[0]
    return maps, maps.max()


class Autoencoder(Peer):
    """Error of a reconstruction through a bottleneck: Bergmann et al., VISAPP 2019, the L2 kind."""

    title, flags = "autoencoder", ("max_train_steps", "train_batch_size", "mixed_precision")
    skip, noise_std = False, 0.0

    def __init__(self, pipeline: RADPipeline, args: argparse.Namespace) -> None:
        super().__init__(pipeline, args)
        self.network = ConvAutoencoder(self.skip, pipeline.config.resolution).to(self.device)
        kind = (
            f"skip connections, coarse noise of deviation {self.noise_std}"
            if self.skip
            else "bottleneck of 100 numbers"
        )
        self.settings = (
            f"{kind}; {args.max_train_steps} steps of {args.train_batch_size} in {PRECISION[args.mixed_precision]} "
            "with Adam at 1e-3, the last fifth at 1e-4; map = squared error smoothed by a Gaussian of sigma 4, image "
            "score = its maximum."
        )

    def fit(self, images: torch.Tensor) -> "Autoencoder":
        self.losses = self.train_steps(
            images, self.network, self.loss, self.args.max_train_steps, lr=1e-3, milestones=[0.8]
        )
        return self

    def loss(self, x: torch.Tensor) -> torch.Tensor:
        with self.autocast():
            reconstruction = self.network(x + self.noise_std * coarse_noise(x))
        return F.mse_loss(reconstruction.float(), x)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return smooth((self.network(x) - x).square().mean(1), x)


class DenoisingAutoencoder(Autoencoder):
    """Error of what removes coarse noise: Kascenas et al., "Denoising Autoencoders", MIDL 2022."""

    title = "denoising autoencoder"
    skip, noise_std = True, 0.4  # the paper's 0.2 is for images in [0, 1]


class ConvAutoencoder(nn.Module):
    """Five strided convolutions and their mirror image, with a vector of 100 numbers or skip connections between."""

    def __init__(self, skip: bool, resolution: int, widths: tuple[int, ...] = (3, 32, 64, 128, 128, 128)) -> None:
        super().__init__()
        self.skip, pairs = skip, list(zip(widths, widths[1:], strict=False))
        self.down = nn.ModuleList(nn.Conv2d(a, b, 4, stride=2, padding=1) for a, b in pairs)
        self.up = nn.ModuleList(nn.ConvTranspose2d(b * (1 + skip), a, 4, stride=2, padding=1) for a, b in pairs)
        if not skip:
            side = resolution // 2 ** len(pairs)
            self.encode, self.decode = nn.Conv2d(widths[-1], 100, side), nn.ConvTranspose2d(100, widths[-1], side)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        stages = []
        for down in self.down:
            x = F.leaky_relu(down(x), 0.2)
            stages.append(x)
        if not self.skip:
            x = F.leaky_relu(self.decode(self.encode(x)), 0.2)
        for level in reversed(range(len(self.up))):
            x = self.up[level](torch.cat([x, stages[level]], 1) if self.skip else x)
            x = F.leaky_relu(x, 0.2) if level else x
        return x


def coarse_noise(x: torch.Tensor) -> torch.Tensor:
    """Standard normal noise of a grid of 1/8 of the resolution, resized to the images x and rolled at random."""
    noise = torch.randn(*x.shape[:2], x.shape[2] // 8, x.shape[3] // 8, device=x.device)
    shift = [int(torch.randint(side, ())) for side in x.shape[2:]]
    return F.interpolate(noise, x.shape[2:], mode="bilinear").roll(shift, (2, 3))


class DRAEM(Peer):
    """Finds what a reconstruction repairs, trained on pasted textures: Zavrtanik et al., ICCV 2021; from anomalib."""

    title, flags = "DRAEM", ("draem_train_steps", "train_batch_size", "mixed_precision", "draem_width", "texture_dir")

    def __init__(self, pipeline: RADPipeline, args: argparse.Namespace) -> None:
        from anomalib.models.image.draem import torch_model

        super().__init__(pipeline, args)
        self.model = torch_model.DraemModel()
        if args.draem_width != 1:
            reconstructive, discriminative = int(128 * args.draem_width), int(64 * args.draem_width)
            self.model.reconstructive_subnetwork = torch_model.ReconstructiveSubNetwork(base_width=reconstructive)
            self.model.discriminative_subnetwork = torch_model.DiscriminativeSubNetwork(6, 2, discriminative)
        self.to(self.device)
        self.settings = (
            f"anomalib's, {args.draem_width:g} of its width, {args.draem_train_steps} steps of "
            f"{args.train_batch_size} in {PRECISION[args.mixed_precision]} with Adam at 1e-4, "
            f"textures: {args.texture_dir or 'Perlin noise'}; image score = maximum of the map averaged over 21 x 21. "
            "Published: full width, 700 epochs of batch 8, DTD's textures."
        )

    def fit(self, images: torch.Tensor) -> "DRAEM":
        from anomalib.data.utils.generators.perlin import PerlinAnomalyGenerator
        from anomalib.models.image.draem.loss import DraemLoss

        augment, loss = PerlinAnomalyGenerator(anomaly_source_path=self.args.texture_dir), DraemLoss()

        def loss_of(x: torch.Tensor) -> torch.Tensor:
            clean = (x + 1) / 2
            augmented, mask = augment(clean)
            with self.autocast():
                reconstruction, prediction = self.model(augmented)
            return loss(clean, reconstruction.float(), mask, prediction.float())

        self.losses = self.train_steps(
            images, self.model, loss_of, self.args.draem_train_steps, lr=1e-4, milestones=[4 / 7, 6 / 7]
        )
        return self

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        maps = self.model((x + 1) / 2).anomaly_map
        return maps, F.avg_pool2d(maps, 21, stride=1, padding=10).max()


METHODS = {
    "rad": RAD,
    "padim": PaDiM,
    "padim_coarse": CoarsePaDiM,
    "patchcore": PatchCore,
    "autoencoder": Autoencoder,
    "denoising_autoencoder": DenoisingAutoencoder,
    "draem": DRAEM,
}
