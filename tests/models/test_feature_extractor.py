"""Frozen features: the weights are the right ones, frozen, fitted, and there with no network."""

import socket

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from efficientnet_lite0 import load_efficientnet_lite0
from PIL import Image
from skimage import data

from rad import RADFeatureExtractor
from rad.pipeline_loading import EMBEDDED_DIR

EMBEDDED = EMBEDDED_DIR / "tf_efficientnet_lite0"


@pytest.fixture(scope="module")
def classifier() -> torch.nn.Module:
    return load_efficientnet_lite0()


@pytest.fixture
def extractor() -> RADFeatureExtractor:
    return RADFeatureExtractor.from_pretrained(EMBEDDED)


@pytest.fixture(scope="module")
def photographs() -> torch.Tensor:
    """A cat, a cup of coffee and an astronaut in [-1, 1], [3, 3, 64, 64]."""
    pictures = [Image.fromarray(getattr(data, name)()).resize((64, 64)) for name in ("cat", "coffee", "astronaut")]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


# Weights


@pytest.mark.parametrize(("picture", "classes"), [("cat", range(281, 286)), ("coffee", (967, 968))])
def test_mapped_weights_classify_photographs(classifier, picture, classes):
    """ImageNet's classes 281 .. 285 are domestic cats, 967 is espresso, 968 a cup."""
    config = timm.data.resolve_model_data_config(classifier)
    transform = timm.data.create_transform(**config, is_training=False)
    with torch.no_grad():
        probabilities = classifier(transform(Image.fromarray(getattr(data, picture)()))[None])[0].softmax(0)
    assert int(probabilities.argmax()) in classes


def test_embedded_weights_are_the_packages_rounded_to_half_precision(classifier, extractor):
    source, embedded = classifier.state_dict(), extractor.network.state_dict()
    for name, tensor in embedded.items():
        expected = source[name].half().float() if tensor.is_floating_point() else source[name]
        assert torch.equal(tensor, expected), name
    left_out = {name.split(".")[0] for name in source.keys() - embedded.keys()}
    assert left_out <= {"blocks", "conv_head", "bn2", "classifier"}  # what lies behind stride 16


def test_features_are_the_backbones_stages_on_one_grid(classifier, extractor, photographs):
    """Against timm's classifier, stopped after the last block at each stride."""
    mean, std = (torch.tensor(classifier.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        x = classifier.bn1(classifier.conv_stem(((photographs + 1) / 2 - mean) / std))
        stages = []
        for i, block in enumerate(classifier.blocks):
            x = block(x)
            if i in (0, 1, 2, 4):
                stages.append(F.interpolate(x, (8, 8), mode="bilinear", antialias=True))
        features = extractor(photographs)
    expected = torch.cat(stages, dim=1)
    assert features.shape == expected.shape == (3, 16 + 24 + 40 + 112, 8, 8)
    assert (features - expected).abs().mean() < 0.01 * expected.abs().mean()  # the weights' half precision


def test_loading_needs_no_network(monkeypatch, extractor):
    def refuse(*_, **__):
        raise AssertionError("The network was asked for.")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    loaded = RADFeatureExtractor.from_pretrained(EMBEDDED)
    assert all(torch.equal(a, b) for a, b in zip(loaded.buffers(), extractor.buffers(), strict=True))


def test_from_timm_without_a_network_is_one_clear_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # not to wait for it
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        OSError, match="'tf_efficientnet_lite0' are not in the cache and cannot be downloaded"
    ) as error:
        RADFeatureExtractor.from_timm("tf_efficientnet_lite0")
    assert "start from an embedded pipeline's extractor" in str(error.value)


def test_load_network_wants_every_tensor(classifier):
    state = classifier.state_dict()
    del state["conv_stem.weight"]
    with pytest.raises(KeyError, match="conv_stem.weight"):
        RADFeatureExtractor("tf_efficientnet_lite0").load_network(state)


# Other backbones and grids


def test_a_resnet_works_too(photographs):
    extractor = RADFeatureExtractor("resnet18", out_indices=(1, 2, 3), feature_stride=4)
    assert extractor.num_channels == 64 + 128 + 256
    features = extractor(photographs)
    assert features.shape == (3, 448, 16, 16) and features.isfinite().all()


@pytest.mark.parametrize(
    ("backbone", "out_indices", "stride", "channels", "image_size"),
    [
        ("vit_tiny_patch16_224", (2, 5, 8, 11), 16, 768, None),
        ("vit_small_patch14_dinov2", (2, 5, 8, 11), 16, 1536, None),  # 128 is no multiple of 14
        ("cait_xxs24_224", (5, 11, 17, 23), 16, 768, 128),
        ("swin_tiny_patch4_window7_224", (0, 1, 2, 3), 8, 1440, 128),
        ("mambaout_femto", (0, 1, 2, 3), 8, 624, None),
    ],
)
def test_transformers_and_channels_last_networks_give_one_grid(backbone, out_indices, stride, channels, image_size):
    """Also of smaller images, to which a network of one size looks as if they were of its size."""
    extractor = RADFeatureExtractor.from_timm(backbone, resolution=128, pretrained=False)
    assert tuple(extractor.config.out_indices) == out_indices and extractor.config.image_size == image_size
    x = torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(0)) * 2 - 1
    stages = extractor.stages(x)
    assert [stage.shape[1] for stage in stages] == extractor.network.feature_info.channels()
    features, summary = extractor(x), extractor.summary(x, stages)
    assert features.shape == (2, channels, 128 // stride, 128 // stride) and features.isfinite().all()
    assert extractor(x[..., :64, :64]).shape == (2, channels, 64 // stride, 64 // stride)
    assert summary.shape == (2, extractor.num_summaries) and summary.isfinite().all()


def test_a_backbone_of_one_size_is_told_which():
    with pytest.raises(ValueError, match="swin_tiny_patch4_window7_224 takes images of one size alone: say by image"):
        RADFeatureExtractor("swin_tiny_patch4_window7_224")


def test_fewer_stages_keep_fewer_blocks(photographs):
    extractor = RADFeatureExtractor("tf_efficientnet_lite0", out_indices=(0, 1), feature_stride=4)
    assert extractor.num_channels == 16 + 24 and len(extractor.network.blocks) == 2
    assert extractor(photographs).shape == (3, 40, 16, 16)


def test_images_need_not_be_square(extractor):
    assert extractor(torch.zeros(1, 3, 64, 96)).shape == (1, 192, 8, 12)


# Frozen


def test_the_extractor_is_frozen(extractor, photographs):
    before = {name: tensor.clone() for name, tensor in extractor.state_dict().items()}
    assert not any(p.requires_grad for p in extractor.parameters())
    extractor.train()
    assert not any(module.training for module in extractor.modules())
    extractor(photographs)
    assert all(torch.equal(tensor, before[name]) for name, tensor in extractor.state_dict().items())


def test_gradients_reach_the_image(extractor, photographs):
    images = photographs[:1].clone().requires_grad_()
    extractor(images)[:, :, 4, 4].square().sum().backward()
    gradient = images.grad
    assert gradient.isfinite().all() and gradient[..., 36, 36].any()
    assert all(p.grad is None for p in extractor.parameters())


def test_features_do_not_depend_on_the_batch(extractor, photographs):
    together = extractor(photographs)
    for i in range(3):
        torch.testing.assert_close(extractor(photographs[i : i + 1])[0], together[i], rtol=1e-4, atol=1e-4)


def test_a_summary_is_mean_and_deviation_of_every_channel_at_three_sizes(extractor, photographs):
    found = extractor.summary(photographs, extractor.stages(photographs)).double().numpy()
    assert found.shape == (3, extractor.num_summaries)
    expected = []
    for times in (1, 2, 4):
        resized = torch.cat([_smaller(image, times) for image in photographs])
        for stage in extractor.stages(resized):
            values = stage.double().numpy().reshape(3, stage.shape[1], -1)
            expected += [values.mean(2), values.std(2)]
    np.testing.assert_allclose(found, np.concatenate(expected, axis=1), rtol=1e-3, atol=1e-4)


def _smaller(image: torch.Tensor, times: int) -> torch.Tensor:
    return F.interpolate(image[None], scale_factor=1 / times, mode="bilinear", antialias=True)


# Fitting


def test_fitted_channels_have_mean_zero_and_deviation_one(extractor, photographs):
    raw = extractor(photographs)
    assert extractor.fit([photographs[:2], photographs[2:]]) is extractor
    features = extractor(photographs).transpose(0, 1).flatten(1)
    np.testing.assert_allclose(features.mean(1), 0.0, atol=1e-4)
    np.testing.assert_allclose(features.std(1, correction=0), 1.0, atol=1e-3)
    scaled = raw.transpose(0, 1).flatten(1)
    np.testing.assert_allclose(extractor.channel_mean, scaled.mean(1), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(extractor.channel_std, scaled.std(1, correction=0), rtol=1e-3)


def test_fitting_again_starts_afresh(extractor, photographs):
    extractor.fit([photographs])
    first = extractor.channel_std.clone()
    extractor.fit([photographs])
    torch.testing.assert_close(extractor.channel_std, first)


def test_what_was_fitted_is_saved(extractor, photographs, tmp_path):
    extractor.fit([photographs])
    extractor.save_pretrained(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}
    assert torch.equal(RADFeatureExtractor.from_pretrained(tmp_path)(photographs), extractor(photographs))


def test_fitting_on_nothing_is_refused(extractor):
    with pytest.raises(ValueError, match="at least one batch"):
        extractor.fit([])
