"""Training batches: the same whoever asks for them, and really augmented."""

import os
from itertools import islice
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch

from rad.data.batches import (
    DecodedImages,
    Draw,
    TrainingCollator,
    TrainingImages,
    TrainingSampler,
    crop_and_rotate,
)
from rad.image_processor import to_input

SAMPLER = {"num_images": 10, "resolution": 64, "crop_size": 32, "crop_prob": 0.5, "seed": 3}


def batches(count, **config):
    return list(islice(TrainingSampler(**SAMPLER | config), count))


def test_processes_share_the_batches_of_one_process():
    one = batches(20, batch_size=8)
    shares = [batches(20, batch_size=4, rank=rank, num_processes=2) for rank in range(2)]
    for whole, first, second in zip(one, *shares, strict=True):
        assert whole[0::2] == first and whole[1::2] == second


def test_a_resumed_run_meets_the_batches_that_are_left():
    assert batches(20, batch_size=4)[7:] == batches(13, batch_size=4, start=7)


def test_every_epoch_shows_every_image_once_in_another_order():
    drawn = [draw.index for batch in batches(40, batch_size=4) for draw in batch]
    epochs = [drawn[i : i + 10] for i in range(0, 60, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_whole_images_take_no_more_pixels_than_crops():
    sizes = {(batch[0].size, len(batch)) for batch in batches(40, batch_size=8)}
    assert sizes == {(32, 8), (64, 2)}


def test_without_crops_the_batch_size_counts_whole_images():
    assert {(batch[0].size, len(batch)) for batch in batches(10, batch_size=3, crop_prob=0.0)} == {(64, 3)}
    assert {(batch[0].size, len(batch)) for batch in batches(10, batch_size=3, crop_size=64)} == {(64, 3)}


def test_expected_images_per_batch():
    sampler = TrainingSampler(**SAMPLER, batch_size=8)
    measured = np.mean([len(batch) for batch in islice(sampler, 4000)])
    assert abs(measured - sampler.images_per_batch) < 0.15


def test_a_crop_larger_than_the_image_is_refused():
    with pytest.raises(ValueError, match="1 .. 64"):
        TrainingSampler(10, 4, 64, 65, 0.5)


def items(draws, paste_prob=0.0, camera_prob=0.0):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (20, 3, 32, 32), generator=generator, dtype=torch.uint8)
    labels = [index % 3 for index in range(20)]
    found = TrainingImages(None, list(range(20)), labels, None, dict(enumerate(images)), paste_prob, camera_prob)
    return [found[draw] for draw in draws]


def test_an_image_of_a_batch_does_not_depend_on_its_neighbours():
    collate = TrainingCollator(500, unknown_label=3, rotation=5.0, rotation_prob=0.5, random_flip=True)
    draws = [Draw(index, 16, 100 + index) for index in range(6)]
    together = collate(items(draws, 1.0))
    alone = [collate(items([draw], 1.0)) for draw in draws]
    for name, values in together.items():
        assert torch.allclose(values.float(), torch.cat([batch[name] for batch in alone]).float(), atol=1e-6), name


def test_timesteps_are_uniform_and_one_label_in_ten_is_unknown():
    collate = TrainingCollator(50, unknown_label=3)
    batch = collate(items([Draw(i % 20, 1, i) for i in range(4000)]))
    counts = torch.bincount(batch["timesteps"], minlength=50)
    assert len(counts) == 50 and counts.min() > 40 and counts.max() < 130
    assert 0.08 < (batch["class_labels"] == 3).float().mean() < 0.12
    known = batch["class_labels"] != 3
    assert torch.equal(batch["class_labels"][known], batch["indices"][known] % 3)
    assert abs(batch["noise"].mean()) < 0.03 and abs(batch["noise"].std() - 1) < 0.03


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_share_of_unknown_labels_is_the_one_asked_for(share):
    collate = TrainingCollator(50, unknown_label=3, label_dropout=share)
    unknown = collate(items([Draw(i % 20, 1, i) for i in range(1000)]))["class_labels"] == 3
    assert abs(unknown.float().mean() - share) < 0.05 * (0 < share < 1) + 1e-9


def test_the_share_of_images_seen_through_another_camera_is_the_one_asked_for():
    draws = [Draw(i % 20, 16, i) for i in range(400)]
    plain, found = items(draws), items(draws, camera_prob=0.3)
    changed = np.array(
        [not torch.equal(to_input(a.image), to_input(b.image)) for a, b in zip(plain, found, strict=True)]
    )
    assert 0.24 < changed.mean() < 0.36
    again = items(draws[5:6], camera_prob=0.3)
    assert torch.equal(again[0].image, found[5].image)


def test_the_share_of_images_with_a_defect_is_the_one_asked_for():
    found = items([Draw(i % 20, 16, i) for i in range(400)], 0.3)
    chosen = torch.tensor([item.other is not None for item in found])
    batch = TrainingCollator(50)(found)
    changed = (batch["defective"] != batch["x_0"]).flatten(1).float().mean(1)  # of its values
    assert 0.24 < chosen.float().mean() < 0.36
    assert (changed[~chosen] == 0).all() and (changed[chosen] > 0).float().mean() > 0.5  # some cannot be seen
    assert batch["defective"].abs().max() <= 1
    assert "defective" not in TrainingCollator(50)([item for item in found if item.other is None])


def test_a_texture_is_taken_from_the_same_class():
    found = items([Draw(i % 20, 16, i) for i in range(60)], 1.0)
    same = {label: [item.image for item in found if item.label == label] for label in range(3)}
    for item in found:
        assert any(torch.equal(item.other, image) for image in same[item.label])


def test_no_labels_without_categories():
    assert "class_labels" not in TrainingCollator(50)(items([Draw(0, 16, 0)]))


def test_crops_are_not_resampled():
    images = torch.rand(6, 3, 32, 32) * 2 - 1
    crops = crop_and_rotate(images, 16, torch.rand(2, 6), torch.zeros(6), torch.ones(2, 6))
    for image, crop in zip(images, crops, strict=True):
        windows = image.unfold(1, 16, 1).unfold(2, 16, 1).permute(1, 2, 0, 3, 4).reshape(-1, 3, 16, 16)
        assert (windows - crop).abs().amax((1, 2, 3)).min() < 1e-4


def test_crops_reach_every_corner():
    image = torch.arange(32.0).view(1, 1, 1, 32).expand(2, 1, 32, 32) / 32
    corners = torch.tensor([[0.0, 0.999], [0.0, 0.999]])
    first, last = crop_and_rotate(image, 16, corners, torch.zeros(2), torch.ones(2, 2))
    assert torch.allclose(first, image[0, :, :16, :16], atol=1e-4)
    assert torch.allclose(last, image[0, :, 16:, 16:], atol=1e-4)


def test_rotation_turns_by_the_angle():
    rows = torch.linspace(-0.7, 0.7, 64).view(1, 1, 64, 1).expand(3, 1, 64, 64)  # a gradient from top to bottom
    angles = torch.tensor([-5.0, 0.0, 3.0])
    turned = crop_and_rotate(rows, 64, torch.zeros(2, 3), angles, torch.ones(2, 3))[:, 0, 16:48, 16:48]
    down = (turned[:, 1:] - turned[:, :-1]).mean((1, 2))
    right = (turned[:, :, 1:] - turned[:, :, :-1]).mean((1, 2))
    assert torch.allclose(
        torch.rad2deg(torch.atan2(right, down)).abs(), angles.abs(), atol=0.2
    )  # bicubic wavers a little


def test_flips_mirror_each_axis():
    images = torch.rand(4, 3, 16, 16)
    flips = torch.tensor([[1.0, -1.0, 1.0, -1.0], [1.0, 1.0, -1.0, -1.0]])
    flipped = crop_and_rotate(images, 16, torch.zeros(2, 4), torch.zeros(4), flips)
    expected = torch.stack([images[0], images[1].flip(2), images[2].flip(1), images[3].flip(1, 2)])
    assert torch.allclose(flipped, expected, atol=1e-4)


def test_rotation_share_is_the_one_asked_for():
    collate = TrainingCollator(50, rotation=5.0, rotation_prob=0.3)
    draws = [Draw(0, 32, seed) for seed in range(600)]
    plain = TrainingCollator(50)(items(draws[:1]))["x_0"][0]
    changed = (collate(items(draws))["x_0"] - plain).abs().amax((1, 2, 3)) > 1e-3
    assert 0.24 < changed.float().mean() < 0.36


# Given to other processes


def test_a_thousand_images_take_one_file_handle_when_another_process_is_given_them():
    decoded = DecodedImages({i: torch.full((3, 2, 2), i % 256, dtype=torch.uint8) for i in range(0, 2000, 2)})
    images = TrainingImages(None, list(decoded), [0] * 2000, None, decoded)
    before = len(os.listdir("/proc/self/fd"))
    content = ForkingPickler.dumps(images)  # as a worker that is not forked gets it
    assert len(os.listdir("/proc/self/fd")) < before + 10
    again = ForkingPickler.loads(content)
    assert torch.equal(again._image(7), decoded[14]) and again._image(7).unique().tolist() == [14]


def test_images_of_8_bits_beside_floats_become_floats():
    images = {3: torch.full((3, 2, 2), 255, dtype=torch.uint8), 5: torch.full((3, 2, 2), 0.25)}
    decoded = DecodedImages(images)
    assert not images, "there are two copies of each"
    assert decoded[3].unique().tolist() == [1.0] and decoded[5].unique().tolist() == [0.25]
    assert list(decoded) == [3, 5] and len(DecodedImages({})) == 0
