"""Training batches whose content depends on the seed and the batch's number alone: not on the process that asks, on
how many there are, or on whether the run was interrupted."""

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset, Sampler

from ..image_processor import RADImageProcessor, to_input
from .camera import through_another_camera
from .dataset import AnomalyDataset
from .pasting import paste_defects


@dataclass(frozen=True)
class Draw:
    """One image of a batch.

    Attributes:
        index: Which image.
        size: Side of the square it is cropped to.
        seed: Of its augmentation, defect, timestep and noise.
    """

    index: int
    size: int
    seed: int


@dataclass(frozen=True)
class Item:
    """What a batch is made of.

    Attributes:
        image: A good image [3, S, S], uint8 or float in [0, 1].
        label: Its class label.
        draw: What to make of it.
        other: An image of its class whose texture may be pasted on it, likewise; None for no defect.
    """

    image: torch.Tensor
    label: int
    draw: Draw
    other: torch.Tensor | None = None


class TrainingSampler(Sampler[list[Draw]]):
    """Endless batches over `num_images` images, each epoch in another order; a `batch_sampler` of a DataLoader.

    A share of the batches is made of crops, which cost less and bring more noise levels to a batch; the others hold
    fewer whole images, about as many pixels, to keep the network at home on them.

    Args:
        batch_size: Crops in the batch of one process, or whole images where there are no crops.
        resolution: Side of the whole images in pixels.
        crop_size: Side of the crops; `resolution` for none.
        crop_prob: Share of batches made of crops.
        start: Batches to leave out, those of the run that this one continues.
        rank, num_processes: This process takes every `num_processes`-th image of each global batch.
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        resolution: int,
        crop_size: int,
        crop_prob: float,
        seed: int = 0,
        start: int = 0,
        rank: int = 0,
        num_processes: int = 1,
    ) -> None:
        if not 0 < crop_size <= resolution:
            raise ValueError(f"The crop size must lie in 1 .. {resolution}, the resolution, got {crop_size}.")
        self.num_images, self.batch_size, self.seed, self.start = num_images, batch_size, seed, start
        self.resolution, self.crop_size, self.crop_prob = resolution, crop_size, crop_prob
        self.num_whole = max(1, round(batch_size * (crop_size / resolution) ** 2)) if crop_prob else batch_size
        self.rank, self.num_processes = rank, num_processes

    @property
    def images_per_batch(self) -> float:
        """Expected number of images in a global batch."""
        return self.num_processes * (self.crop_prob * self.batch_size + (1 - self.crop_prob) * self.num_whole)

    def _order(self, rng: np.random.Generator) -> Iterator[int]:
        while True:
            yield from rng.permutation(self.num_images).tolist()

    def __iter__(self) -> Iterator[list[Draw]]:
        rng = np.random.default_rng(self.seed)
        order = self._order(rng)
        for number in itertools.count():  # from the first on: drawing costs microseconds, and skips without a trace
            crop = rng.random() < self.crop_prob
            size = self.crop_size if crop else self.resolution
            count = self.num_processes * (self.batch_size if crop else self.num_whole)
            batch = [Draw(next(order), size, int(rng.integers(2**63))) for _ in range(count)]
            if number >= self.start:
                yield batch[self.rank :: self.num_processes]


class DecodedImages(Mapping[int, torch.Tensor]):
    """Images by their index in a data set, all in one tensor: each tensor that another process is given takes a file
    handle, of which there are about a thousand.

    Args:
        images: [3, S, S] each, uint8 or float in [0, 1]; where any is, all become float. They are taken out of the
            dictionary one after another, so that there are never two copies of all.
    """

    def __init__(self, images: dict[int, torch.Tensor]) -> None:
        self.rows = {index: row for row, index in enumerate(images)}
        is_float = any(image.is_floating_point() for image in images.values())
        shape = next(iter(images.values())).shape if images else ()
        self.pixels = torch.empty(len(images), *shape, dtype=torch.float32 if is_float else torch.uint8)
        for index, row in self.rows.items():
            image = images.pop(index)
            self.pixels[row] = image / 255 if is_float and not image.is_floating_point() else image

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.pixels[self.rows[index]]

    def __iter__(self) -> Iterator[int]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)


class TrainingImages(Dataset):
    """Good images at the training resolution, indexed by `Draw`.

    Args:
        dataset: The good images.
        indices: Those of them to train on.
        labels: Class label of every image of the data set.
        processor: Resizes them.
        decoded: Images [3, S, S], uint8 or float in [0, 1], by index of the data set; those that are not in it are
            decoded when asked for.
        paste_prob: Share of the images that get a defect (RAN: 0).
        camera_prob: Share of the images that are seen through another camera (RAN: 0).
    """

    def __init__(
        self,
        dataset: AnomalyDataset,
        indices: list[int],
        labels: list[int],
        processor: RADImageProcessor,
        decoded: Mapping[int, torch.Tensor],
        paste_prob: float = 0.0,
        camera_prob: float = 0.0,
    ) -> None:
        self.dataset, self.indices, self.labels = dataset, indices, labels
        self.processor, self.decoded = processor, decoded
        self.paste_prob, self.camera_prob = paste_prob, camera_prob
        self.members: dict[int, list[int]] = defaultdict(list)
        for position, index in enumerate(indices):
            self.members[labels[index]].append(position)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, draw: Draw) -> Item:
        label, rng = self.labels[self.indices[draw.index]], np.random.default_rng(draw.seed)
        other = self._image(rng.choice(self.members[label])) if rng.random() < self.paste_prob else None
        image, rng = self._image(draw.index), np.random.default_rng([draw.seed, 2])
        if rng.random() < self.camera_prob:
            image = (through_another_camera(to_input(image), rng) + 1) / 2
        return Item(image, label, draw, other)

    def _image(self, position: int) -> torch.Tensor:
        index = self.indices[position]
        if index in self.decoded:
            return self.decoded[index]
        return to_pixels(self.processor.resize(self.dataset[index].image)[0])

    def chunks(self, size: int = 16) -> Iterator[torch.Tensor]:
        """All images in order as the networks' input, [B, 3, S, S] in [-1, 1] with B up to `size`."""
        for start in range(0, len(self), size):
            yield torch.stack([to_input(self._image(i)) for i in range(start, min(start + size, len(self)))])


def to_pixels(image: np.ndarray) -> torch.Tensor:
    """An image as `RADImageProcessor.resize` gives it, [3, S, S]."""
    return torch.from_numpy(image).permute(2, 0, 1).contiguous()


@dataclass(frozen=True)
class TrainingCollator:
    """Makes a batch of `TrainingImages` items: augmented images, defects, noise and timesteps.

    Args:
        max_timestep: t is uniform in 0 .. max_timestep - 1.
        unknown_label: The class label that takes the place of some; None for no labels.
        label_dropout: Share of the labels that it takes the place of, so that the network also learns to do without
            (RAN: 0).
        rotation: Largest angle in degrees of the share `rotation_prob` of the images (RAN: 5).
        random_flip: Mirror at random, both ways.
    """

    max_timestep: int
    unknown_label: int | None = None
    label_dropout: float = 0.1
    rotation: float = 0.0
    rotation_prob: float = 0.0
    random_flip: bool = False

    def __call__(self, items: list[Item]) -> dict[str, torch.Tensor]:
        """Returns x_0 and noise [B, 3, size, size] float32, timesteps, indices and, with labels, class_labels [B]; and
        where defects are to be pasted, `defective`, x_0 with some."""
        draws = [item.draw for item in items]
        size = draws[0].size
        generators = [torch.Generator().manual_seed(draw.seed) for draw in draws]
        u = torch.stack([torch.rand(8, generator=g) for g in generators], dim=1)  # [8, B]
        noise = torch.stack([torch.randn(3, size, size, generator=g) for g in generators])
        x_0 = torch.stack([to_input(item.image) for item in items])
        angles = (u[0] * 2 - 1) * self.rotation * (u[1] < self.rotation_prob)
        flips = torch.where(u[2:4] < 0.5, -1.0, 1.0) if self.random_flip else torch.ones_like(u[2:4])
        batch = {
            "x_0": crop_and_rotate(x_0, size, u[4:6], angles, flips),
            "noise": noise,
            "timesteps": (u[6] * self.max_timestep).long().clamp_max(self.max_timestep - 1),
            "indices": torch.tensor([draw.index for draw in draws]),
        }
        if any(item.other is not None for item in items):
            pairs = zip(batch["x_0"], items, strict=True)
            batch["defective"] = torch.stack([_with_defect(image, item) for image, item in pairs])
        if self.unknown_label is not None:
            unknown = u[7] < self.label_dropout
            labels = torch.tensor([item.label for item in items])
            batch["class_labels"] = torch.where(unknown, self.unknown_label, labels)
        return batch


def _with_defect(image: torch.Tensor, item: Item) -> torch.Tensor:
    """A cropped image [3, size, size] in [-1, 1], with a defect if its item asks for one."""
    if item.other is None:
        return image
    rng, size = np.random.default_rng([item.draw.seed, 1]), item.draw.size
    top, left = (int(rng.integers(side - size + 1)) for side in item.other.shape[1:])
    texture = to_input(item.other[:, top : top + size, left : left + size])
    good, texture = ((x.permute(1, 2, 0).numpy() + 1) * 127.5 for x in (image, texture))
    pasted, _ = paste_defects(good, texture, rng)
    changed = torch.from_numpy((pasted != good).any(2))  # all else stays exactly as it was
    return torch.where(changed, torch.from_numpy(pasted).permute(2, 0, 1) / 127.5 - 1, image)


def crop_and_rotate(
    images: torch.Tensor, size: int, position: torch.Tensor, angles: torch.Tensor, flips: torch.Tensor
) -> torch.Tensor:
    """Crop, rotation and flip of a batch in one resampling (bicubic; what turns in from outside is mirrored).

    Args:
        images: [B, C, H, W] in [-1, 1].
        size: Side of the result in pixels; a crop keeps the scale.
        position: Of the crop inside the image, top and left, [2, B] in [0, 1].
        angles: [B] in degrees.
        flips: 1 or -1 along each axis, width and height, [2, B].
    """
    batch, channels, height, width = images.shape
    if size == height == width and not angles.any() and bool((flips == 1).all()):
        return images
    # Whole pixels, so that an image that is not rotated is not resampled either
    top = (position[0] * (height - size + 1)).floor()
    left = (position[1] * (width - size + 1)).floor()
    radians = angles * (math.pi / 180)
    cos, sin = radians.cos(), radians.sin()
    rows = torch.stack([cos * flips[0], -sin * flips[1], (2 * left + size - width) / size], dim=1) * (size / width)
    columns = torch.stack([sin * flips[0], cos * flips[1], (2 * top + size - height) / size], dim=1) * (size / height)
    grid = F.affine_grid(torch.stack([rows, columns], dim=1), [batch, channels, size, size], align_corners=False)
    return F.grid_sample(images, grid, mode="bicubic", padding_mode="reflection", align_corners=False).clamp(-1, 1)
