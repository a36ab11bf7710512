"""What all data sets share."""

import pytest

from rad.data import AnomalyDataset, Sample


def dataset(**counts: int) -> AnomalyDataset:
    return AnomalyDataset([Sample(f"{name}{i}.png", name) for name, count in counts.items() for i in range(count)])


def test_split_holdout_takes_the_same_share_of_each_category():
    data = dataset(a=20, b=10)
    train, holdout = data.split_holdout(0.2, seed=0)
    assert sorted(train + holdout) == list(range(30)) and train == sorted(train) and holdout == sorted(holdout)
    assert [sum(data[i].category == name for i in holdout) for name in "ab"] == [4, 2]
    assert data.split_holdout(0.2, seed=0) == (train, holdout) != data.split_holdout(0.2, seed=1)


@pytest.mark.parametrize(("share", "held"), [(0.0, 0), (0.01, 2), (1.0, 10)])
def test_split_holdout_leaves_two_on_each_side_or_holds_out_none(share, held):
    train, holdout = dataset(a=12).split_holdout(share, seed=0)
    assert (len(train), len(holdout)) == (12 - held, held)


def test_split_holdout_of_some_of_the_images():
    some = list(range(0, 40, 2))
    train, holdout = dataset(a=20, b=20).split_holdout(0.2, 0, some)
    assert sorted(train + holdout) == some
    with pytest.raises(ValueError, match="'b' has 5 good images to train on; it needs at least 10"):
        dataset(a=20, b=20).split_holdout(0.2, 0, range(25))
