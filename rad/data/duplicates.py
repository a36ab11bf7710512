"""Photos of the same part among good ones: copies, bursts, the same saved again. They count as one."""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

SIDE = 128  # pixels of a sketch
REACH = 4  # by which a part may have moved between two photos, in these pixels
NUM_NEAREST = 5  # photos that each is compared with; a burst is found link by link
ALIKE = 0.3  # of the difference between any two photos
EQUAL = 0.1, 1.0  # of what a photo shows, and grey levels at most: alike, whatever the others are
NUM_PAIRS = 1000  # that tell how much photos differ


def fingerprint(pixels: np.ndarray) -> int:
    """A positive number that pictures [H, W, C] or [C, H, W] of the same pixels share; 0 for one of a single colour.

    Args:
        pixels: At the model's resolution, of any type.
    """
    axes = (1, 2) if pixels.shape[0] == 3 else (0, 1)
    if (pixels.min(axes) == pixels.max(axes)).all():
        return 0
    return int.from_bytes(hashlib.blake2b(np.ascontiguousarray(pixels).tobytes(), digest_size=7).digest(), "big") + 1


def sketch(x_0: torch.Tensor) -> torch.Tensor:
    """The grey detail of images [B, 3, S, S] in [-1, 1] without light and shade, [B, 128, 128], in grey levels."""
    grey = F.interpolate(127.5 * x_0.mean(1, keepdim=True), (SIDE, SIDE), mode="area")
    return (grey - F.avg_pool2d(F.pad(grey, [8] * 4, mode="reflect"), 17, stride=1))[:, 0]


def check_different(
    prints: Sequence[int],
    sketches: Sequence[torch.Tensor] | torch.Tensor,
    categories: Sequence[str],
    least: int,
    of: Sequence[str] = (),
) -> list[int]:
    """Whether good images show enough different parts; which image shows which.

    Args:
        prints: The `fingerprint` of each image.
        sketches: Of each, [128, 128].
        categories: Of each, likewise.
        least: Different parts that each category needs.
        of: Names of the images, if they are to be told.

    Returns:
        For each image the first one that shows the same part, often itself.

    Raises:
        ValueError: There are images of one colour, or enough images but too few different ones.
    """
    plain = [i for i, value in enumerate(prints) if value == 0]
    if plain:
        named = f" (the first is {of[plain[0]]})" if of else ""
        raise ValueError(
            f"{len(plain)} of {len(prints)} good images{named} are of one colour and show no part: take them out."
        )
    parts = list(range(len(prints)))
    for category in sorted(set(categories)):
        own = [i for i, name in enumerate(categories) if name == category]
        first = {prints[i]: place for place, i in reversed(list(enumerate(own)))}
        pairs = [(first[prints[i]], place) for place, i in enumerate(own)]
        pairs += same_parts(torch.stack([sketches[i] for i in own]))
        graph = coo_array((np.ones(len(pairs)), np.transpose(pairs)), shape=(len(own), len(own)))
        _, part_of = connected_components(graph, directed=False)
        shown = {part: i for i, part in reversed(list(zip(own, part_of, strict=True)))}
        for i, part in zip(own, part_of, strict=True):
            parts[i] = shown[part]
        num_parts = len(shown)
        if num_parts < least <= len(own):  # fewer than `least` are told without a look
            raise ValueError(
                f"Category {category!r} has {len(own)} good images, {len(own) - num_parts} of which are copies of "
                f"others or show the same part; it needs at least {least} different ones."
            )
    return parts


def same_parts(sketches: torch.Tensor) -> list[tuple[int, int]]:
    """Pairs of photos of one category that differ far less than any two do, wherever the part lies.

    Two photos of the same part differ by camera and place alone. They are laid over each other to a fraction of a
    pixel (at the cross-correlation's peak, refined by a parabola); what then differs is compared with what differs
    between photos picked at random, so that products whose parts are much alike have their own measure.

    Args:
        sketches: [N, 128, 128].
    """
    count = len(sketches)
    if count < 2:
        return []
    # 1. Candidates: amplitude spectra do not change where a part moves
    window = torch.hann_window(SIDE, periodic=False).sqrt()
    spectra = torch.fft.rfft2(sketches * window[:, None] * window)
    amplitudes = spectra.abs().flatten(1)
    num_nearest = min(NUM_NEAREST, count - 1)
    nearest = []
    for rows in torch.arange(count).split(256):
        distance = torch.cdist(amplitudes[rows], amplitudes)
        distance[torch.arange(len(rows)), rows] = torch.inf
        nearest.append(distance.topk(num_nearest, largest=False).indices)
    first, second = torch.arange(count).repeat_interleave(num_nearest), torch.cat(nearest).flatten()

    # 2. What differs between any two
    rng = np.random.default_rng(0)
    random = torch.from_numpy(rng.integers(count, size=NUM_PAIRS))
    others = (random + torch.from_numpy(rng.integers(1, count, size=NUM_PAIRS))) % count
    usual = aligned_difference(sketches, spectra, random, others).median()

    # 3. Pairs that differ less
    content = sketches.square().mean((1, 2)).sqrt()
    least = (EQUAL[0] * content[first].minimum(content[second])).clamp_max(EQUAL[1])
    alike = aligned_difference(sketches, spectra, first, second) <= (ALIKE * usual).maximum(least)
    return list(zip(first[alike].tolist(), second[alike].tolist(), strict=True))


def aligned_difference(
    sketches: torch.Tensor, spectra: torch.Tensor, first: torch.Tensor, second: torch.Tensor
) -> torch.Tensor:
    """Root mean square of what differs between sketches [N, S, S] once laid over each other, of M pairs, [M].

    Args:
        spectra: Of the windowed sketches, [N, S, S / 2 + 1].
        first, second: Of each pair, [M].
    """
    found, last, inner = [], 2 * REACH, slice(2 * REACH, -2 * REACH)
    rows, columns = torch.fft.fftfreq(SIDE)[:, None], torch.fft.rfftfreq(SIDE)
    for a, b in zip(first.split(64), second.split(64), strict=True):
        correlation = torch.fft.irfft2(spectra[a] * spectra[b].conj(), s=(SIDE, SIDE))
        near = correlation.roll((REACH, REACH), (1, 2))[:, : last + 1, : last + 1]
        y, x = torch.unravel_index(near.flatten(1).argmax(1), near.shape[1:])
        one, y, x = torch.arange(len(a)), y.clamp(1, last - 1), x.clamp(1, last - 1)

        def refined(before: torch.Tensor, peak: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
            curvature = (before - 2 * peak + after).clamp_max(-1e-9)
            return (0.5 * (before - after) / curvature).clamp(-0.5, 0.5)

        down = y - REACH + refined(near[one, y - 1, x], near[one, y, x], near[one, y + 1, x])
        right = x - REACH + refined(near[one, y, x - 1], near[one, y, x], near[one, y, x + 1])
        turns = rows * down.view(-1, 1, 1) + columns * right.view(-1, 1, 1)
        shift = torch.polar(torch.ones_like(turns), -2 * torch.pi * turns)
        moved = torch.fft.irfft2(torch.fft.rfft2(sketches[b]) * shift, s=(SIDE, SIDE))
        difference = (sketches[a] - moved)[:, inner, inner]
        found.append(difference.square().mean((1, 2)).sqrt())
    return torch.cat(found)
