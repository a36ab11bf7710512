"""Good images with drawn defects, as a data set of which all is known."""

import numpy as np
from PIL import Image

from ..image_reader import ImageInput, decode, read, white_of
from .dataset import AnomalyDataset, Sample, evenly
from .defects import DEFECTS, add_defect


class DrawnDefects(AnomalyDataset):
    """Good images, each as it is (2 i) and again with a drawn defect (2 i + 1): defects of which all is known.

    Args:
        dataset: Of good images.
        count: Take so many of them, evenly spread.
        seed: Of the defects, whose kinds take turns.
    """

    def __init__(self, dataset: AnomalyDataset, count: int, seed: int = 0) -> None:
        self.dataset, self.seed, self.picked = dataset, seed, evenly(len(dataset), count)
        samples = []
        for position, i in enumerate(self.picked):
            image, category = dataset.samples[i].image, dataset.samples[i].category
            samples += [Sample(image, category), Sample(image, category, DEFECTS[position % len(DEFECTS)])]
        super().__init__(samples)

    def original(self, index: int) -> ImageInput:
        """The good image that an image is, or was before the defect."""
        return self.dataset[self.picked[index // 2]].image

    def __getitem__(self, index: int) -> Sample:
        """The image, and the mask of its defect as an image, drawn when they are asked for."""
        i, sample = self.picked[index // 2], self.samples[index]
        image = self.dataset[i].image
        if not sample.label:
            return Sample(image, sample.category)
        rng = np.random.default_rng([self.seed, i])
        pixels, shown = np.asarray(read(image)), np.asarray(decode(image))
        bad, mask = add_defect(shown, sample.defect, rng.uniform(0.1, 1.0), rng)
        # The change alone is of 8 bits: elsewhere the picture keeps all of its own
        white = {"u": white_of(int(pixels.max())), "f": 1}[pixels.dtype.kind]
        bad = (pixels + (bad - shown.astype(np.float64)) * white / 255).clip(0, white)
        bad = bad.round() if white > 1 else bad
        return Sample(bad.astype(pixels.dtype), sample.category, sample.defect, Image.fromarray(mask))
