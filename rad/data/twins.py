"""Twins of good images: the same with a defect of which all is known, by which a fit chooses what to judge by."""

import numpy as np

from .defects import DEFECTS, add_defect
from .pasting import paste_defects

TRIES = 10  # a defect that happens to be invisible is made anew


def defective_twins(
    image: np.ndarray, other: np.ndarray, number: int, seed: int = 0
) -> list[tuple[np.ndarray, np.ndarray]]:
    """A good image with a drawn defect, and once more with a pasted one.

    Drawn defects are thin or small, pasted ones of any size up to half the image; neither knows a product.

    Args:
        image: uint8 [S, S, 3], at least 32 pixels a side.
        other: Another good image of the same category, likewise, whose texture may be pasted.
        number: Of the image: kinds of drawn defects take turns.
        seed: Of both defects, together with the number.

    Returns:
        Images, likewise, and masks, bool [S, S]; empty ones where nothing shows on this image.
    """
    rng = np.random.default_rng([seed, number])
    twins = []
    for turn in range(len(DEFECTS)):  # on some surfaces a kind does not show at all
        try:
            twins.append(add_defect(image, DEFECTS[(number + turn) % len(DEFECTS)], rng.random(), rng))
            break
        except ValueError:
            continue
    else:
        twins.append((image, np.zeros(image.shape[:2], bool)))
    for _ in range(TRIES):
        pasted, mask = paste_defects(image.astype(np.float32), other.astype(np.float32), rng)
        if mask.any():
            break
    return [*twins, (pasted.round().astype(np.uint8), mask)]
