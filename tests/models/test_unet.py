"""The denoiser: its shapes, its agreement with diffusers' own U-Net, its labels, and its files."""

import pytest
import torch
import torch.nn.functional as F

from rad import RADUNet2DModel

SMALL = {"sample_size": 32, "block_out_channels": (32, 32, 32), "attention_head_dim": 8, "norm_num_groups": 8}


def small_unet(**overrides) -> RADUNet2DModel:
    torch.manual_seed(0)
    return RADUNet2DModel(**(SMALL | {"feature_channels": 6} | overrides)).eval()


@pytest.fixture(scope="module")
def unet() -> RADUNet2DModel:
    return small_unet()


@pytest.fixture(scope="module")
def labelled() -> RADUNet2DModel:
    return small_unet(categories=("nut", "tile"))


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32)


# Shapes


@pytest.mark.parametrize(
    ("patch_size", "feature_stride", "side"), [(1, 4, 16), (1, 8, 32), (2, 8, 32), (4, 8, 32), (4, 16, 64)]
)
def test_shapes(patch_size, feature_stride, side):
    model = small_unet(patch_size=patch_size, feature_stride=feature_stride)
    assert model.stride == 4 * patch_size
    output = model(torch.randn(2, 3, side, side), torch.tensor([5, 900]))
    assert output.sample.shape == output.variance.shape == (2, 3, side, side)
    assert output.features.shape == (2, 6, side // feature_stride, side // feature_stride)


def test_images_need_not_be_square_nor_of_the_training_size(unet):
    output = unet(torch.randn(1, 3, 48, 80), 20)
    assert output.sample.shape == (1, 3, 48, 80) and output.features.shape == (1, 6, 6, 10)


@pytest.mark.parametrize("feature_block", range(-6, 6))
def test_every_decoder_block_can_be_read(feature_block, x):
    """Three levels of two blocks, of 96, 64 and 32 channels from the inside out."""
    model = small_unet(feature_block=feature_block, block_out_channels=(32, 64, 96))
    seen = []
    model.feature_head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    output = model(x, 20)
    level = feature_block % 6 // 2
    assert seen == [(2, (96, 64, 32)[level], 2 * 2**level, 2 * 2**level)]
    assert output.features.shape == (2, 6, 4, 4)


def test_the_head_reads_the_block_that_it_names(x):
    """The output of diffusers' own residual block, or of its attention, whose channels the head then mixes."""
    last = small_unet(feature_block=5)
    seen = []
    last.unet.up_blocks[-1].resnets[-1].register_forward_hook(lambda *call: seen.append(call[-1]))
    features = last(x, 20).features
    expected = F.interpolate(last.feature_head(seen[0]), (4, 4), mode="bilinear", antialias=True)
    torch.testing.assert_close(features, expected)
    first = small_unet(feature_block=0)
    first.unet.up_blocks[0].attentions[0].register_forward_hook(lambda *call: seen.append(call[-1]))
    features = first(x, 20).features
    expected = F.interpolate(first.feature_head(seen[1]), (4, 4), mode="bilinear", antialias=True)
    torch.testing.assert_close(features, expected)


# Against diffusers

RAN_BLOCKS = {
    "patch_size": 1,
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "block_out_channels": (32, 64),
    "layers_per_block": 2,
    "downsample_type": "resnet",
    "upsample_type": "resnet",
}


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"patch_size": 1},
        {"layers_per_block": 2},
        {"categories": ("nut", "tile")},
        {"upsample_type": "resnet", "downsample_type": "resnet"},
        {"resnet_time_scale_shift": "default"},
        RAN_BLOCKS,
    ],
)
def test_the_decoder_is_that_of_diffusers(overrides, x):
    model = small_unet(**overrides)
    timesteps = torch.tensor([3, 700])
    labels = torch.tensor([1, 0]) if model.config.categories else None
    patch = model.config.patch_size
    with torch.no_grad():
        output = model(x, timesteps, labels)
        expected = model.unet(F.pixel_unshuffle(x, patch), timesteps, labels).sample
    noise, variance = (F.pixel_shuffle(half, patch) for half in expected.chunk(2, dim=1))
    torch.testing.assert_close(output.sample, noise, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.variance, variance, rtol=1e-5, atol=1e-5)


def test_a_timestep_is_a_number_or_one_for_each_image(unet, x):
    with torch.no_grad():
        for_all, for_each = unet(x, 20), unet(x, torch.tensor([20, 20]))
        mixed = unet(x, torch.tensor([20, 401]))
    assert torch.equal(for_all.sample, for_each.sample)
    torch.testing.assert_close(mixed.sample[0], for_all.sample[0])
    assert not torch.allclose(mixed.sample[1], for_all.sample[1])


# Labels


def test_the_default_label_is_the_last_unknown(labelled, x):
    with torch.no_grad():
        by_default, unknown = labelled(x, 20), labelled(x, 20, torch.tensor([2, 2]))
    assert torch.equal(by_default.sample, unknown.sample) and torch.equal(by_default.features, unknown.features)


def test_each_label_has_its_own_embedding(labelled, x):
    assert labelled.unet.class_embedding.num_embeddings == 3
    with torch.no_grad():
        samples = [labelled(x[:1], 20, torch.tensor([label])).sample for label in range(3)]
        together = labelled(x[:1].repeat(3, 1, 1, 1), 20, torch.arange(3)).sample
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert not torch.allclose(samples[first], samples[second])
    torch.testing.assert_close(together, torch.cat(samples))


def test_a_label_that_does_not_exist_is_refused(labelled, x):
    with pytest.raises((ValueError, IndexError)):
        labelled(x, 20, torch.tensor([0, 3]))


# Refusals


@pytest.mark.parametrize("shape", [(1, 3, 40, 32), (1, 3, 32, 24), (1, 3, 8, 8)])
def test_sides_that_do_not_fit_are_refused(unet, shape):
    with pytest.raises(ValueError, match="multiples of 16 pixels, got"):
        unet(torch.zeros(shape), 20)


@pytest.mark.parametrize("feature_block", [6, -7])
def test_a_decoder_block_that_does_not_exist_is_refused(feature_block):
    with pytest.raises(ValueError, match=f"one of 6 decoder blocks, got {feature_block}"):
        small_unet(feature_block=feature_block)


def test_an_unknown_configuration_is_refused():
    with pytest.raises(ValueError, match=r"\['base', 'ran', 'small'\], got 'large'"):
        RADUNet2DModel.from_named_config("large")


# The published network


def test_the_published_network():
    """552.8 M parameters in the U-Net, as OpenAI's 256 x 256 one without labels: feature head not counted."""
    with torch.device("meta"):
        model = RADUNet2DModel.from_named_config("ran")
        seen = []
        model.feature_head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
        output = model(torch.zeros(1, 3, 256, 256), 20)
    assert sum(p.numel() for p in model.unet.parameters()) == 552_814_086
    assert sum(p.numel() for p in model.feature_head.parameters()) == 2 * 512 + 512 * 272 + 272
    assert model.unet.conv_out.out_channels == 6
    assert seen == [(1, 512, 64, 64)]  # the 11th of 18 blocks
    assert output.sample.shape == output.variance.shape == (1, 3, 256, 256)
    assert output.features.shape == (1, 272, 64, 64)
    attention = [block.attentions[0].heads for block in model.unet.up_blocks if hasattr(block, "attentions")]
    assert attention == [1024 // 64, 1024 // 64, 512 // 64]  # 64 channels a head at 8, 16 and 32


def test_named_configurations_can_be_changed():
    with torch.device("meta"):
        model = RADUNet2DModel.from_named_config("small", sample_size=128, categories=("nut",))
    assert model.config.sample_size == 128 and model.config.patch_size == 4
    assert model.unet.class_embedding.num_embeddings == 2


# Files and training


def test_save_and_load_are_bit_exact_and_safetensors_only(labelled, x, tmp_path):
    labelled.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    loaded = RADUNet2DModel.from_pretrained(tmp_path)
    assert list(loaded.config.categories) == ["nut", "tile"]
    state, loaded_state = labelled.state_dict(), loaded.state_dict()
    assert state.keys() == loaded_state.keys()
    assert all(torch.equal(state[name], loaded_state[name]) for name in state)
    with torch.no_grad():
        assert torch.equal(labelled(x, 20).features, loaded(x, 20).features)


@pytest.mark.parametrize("overrides", [{}, RAN_BLOCKS])
def test_gradient_checkpointing_gives_the_same_gradients(overrides, x):
    model = small_unet(**overrides).train()

    def gradients():
        model.zero_grad()
        output = model(x, torch.tensor([20, 401]))
        (output.sample.square().mean() + output.variance.mean() + output.features.square().mean()).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    expected = gradients()
    model.enable_gradient_checkpointing()
    runs = []
    hook = model.unet.up_blocks[0].resnets[0].register_forward_pre_hook(lambda *_: runs.append(1))
    actual = gradients()
    hook.remove()
    assert len(runs) == 2  # forward, and once more during the backward pass
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_every_parameter_is_trained(labelled, x):
    labelled.zero_grad()
    output = labelled(x, torch.tensor([20, 401]), torch.tensor([0, 1]))
    (output.sample.square().mean() + output.variance.square().mean() + output.features.square().mean()).backward()
    assert [name for name, p in labelled.named_parameters() if p.grad is None] == []
    labelled.zero_grad()


# The branch at the images' own resolution


def test_an_untrained_detail_branch_changes_nothing(x):
    plain, detailed = small_unet(wiener=True), small_unet(wiener=True, detail_channels=8)
    missing = detailed.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert missing and all(name.startswith("detail.") for name in missing)
    for t in (0, torch.tensor([20, 900])):
        assert torch.equal(plain(x, t).sample, detailed(x, t).sample)


def test_what_the_detail_branch_adds_is_in_units_of_the_linear_error(x):
    """A branch that says 1 everywhere adds the root of the error that the filter alone would make."""
    plain, detailed = small_unet(wiener=True), small_unet(wiener=True, detail_channels=8)
    detailed.load_state_dict(plain.state_dict(), strict=False)
    torch.nn.init.ones_(detailed.detail.out.bias)
    before, after = (model(x, torch.tensor([20, 900])) for model in (plain, detailed))
    expected = before.sample + before.linear_error.sqrt().view(-1, 1, 1, 1)
    assert torch.allclose(after.sample, expected, atol=1e-6)


def test_a_detail_branch_needs_an_estimate_of_x_0():
    with pytest.raises(ValueError, match="detail_channels needs wiener=True"):
        small_unet(detail_channels=8)
