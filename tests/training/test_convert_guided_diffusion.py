"""The conversion of OpenAI's checkpoint, against a plain forward pass of the original written from its description."""

import pickle
from dataclasses import dataclass

import convert_guided_diffusion
import pytest
import torch
import torch.nn.functional as F

from rad import RADUNet2DModel
from rad.models import guided_diffusion
from rad.models.guided_diffusion import load_guided_diffusion
from rad.models.unet_rad import NAMED_CONFIGS

HEAD = 16  # channels of an attention head; OpenAI: 64


# The original


@dataclass
class Original:
    """guided-diffusion's U-Net: what each of its blocks does, from its hyperparameters."""

    channels: int
    mult: tuple[int, ...]
    num_res_blocks: int
    attention: tuple[int, ...]  # levels, from 0

    def blocks(self) -> dict[str, list[tuple[str, int, int]]]:
        """For each numbered block its steps: kind, channels in, channels out."""
        width = self.channels
        inputs, outputs, skips = [[("conv", 3, width)]], [], [width]
        for level, mult in enumerate(self.mult):
            for _ in range(self.num_res_blocks):
                inputs.append([("res", width, width := mult * self.channels)])
                inputs[-1] += [("attention", width, width)] * (level in self.attention)
                skips.append(width)
            if level < len(self.mult) - 1:
                inputs.append([("down", width, width)])
                skips.append(width)
        middle = [("res", width, width), ("attention", width, width), ("res", width, width)]
        for level, mult in reversed(list(enumerate(self.mult))):
            for i in range(self.num_res_blocks + 1):
                outputs.append([("res", width + skips.pop(), width := mult * self.channels)])
                outputs[-1] += [("attention", width, width)] * (level in self.attention)
                outputs[-1] += [("up", width, width)] * (level > 0 and i == self.num_res_blocks)
        assert not skips
        return (
            {f"input_blocks.{n}": steps for n, steps in enumerate(inputs)}
            | {"middle_block": middle}
            | {f"output_blocks.{n}": steps for n, steps in enumerate(outputs)}
        )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        width, emb = self.channels, 4 * self.channels
        weights = {
            "time_embed.0": (emb, width),
            "time_embed.2": (emb, emb),
            "out.0": (width,),
            "out.2": (6, width, 3, 3),
        }
        for block, steps in self.blocks().items():
            for i, (kind, before, after) in enumerate(steps):
                name = f"{block}.{i}"
                if kind == "conv":
                    weights[name] = (after, before, 3, 3)
                elif kind == "attention":
                    weights[f"{name}.norm"] = (after,)
                    weights[f"{name}.qkv"] = (3 * after, after, 1)
                    weights[f"{name}.proj_out"] = (after, after, 1)
                else:
                    weights[f"{name}.in_layers.0"] = (before,)
                    weights[f"{name}.in_layers.2"] = (after, before, 3, 3)
                    weights[f"{name}.emb_layers.1"] = (2 * after, emb)
                    weights[f"{name}.out_layers.0"] = (after,)
                    weights[f"{name}.out_layers.3"] = (after, after, 3, 3)
                    if before != after:
                        weights[f"{name}.skip_connection"] = (after, before, 1, 1)
        shapes = {"label_emb.weight": (1000, emb)}
        for name, shape in weights.items():
            shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
        return shapes

    def random_weights(self) -> dict[str, torch.Tensor]:
        """No tensor is zero, unlike in a freshly made network, and outputs stay near unit size."""
        return {
            name: torch.randn(shape) / max(torch.Size(shape[1:]).numel(), 1) ** 0.5
            if len(shape) > 1
            else name.endswith("weight") + 0.3 * torch.randn(shape)
            for name, shape in self.shapes().items()
        }

    def forward(self, state, x: torch.Tensor, timesteps: torch.Tensor, label_emb: torch.Tensor) -> torch.Tensor:
        """Noise and variance, [B, 6, H, W]; `label_emb` is [B, 4 * channels]."""

        def layer(name, function, *inputs, **options):
            return function(*inputs, state[f"{name}.weight"], state[f"{name}.bias"], **options)

        def norm(name, x):
            return F.group_norm(x, 32, state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-5)

        def residual(name, kind, x):
            hidden = F.silu(norm(f"{name}.in_layers.0", x))
            if kind == "up":
                hidden, x = (h.repeat_interleave(2, -1).repeat_interleave(2, -2) for h in (hidden, x))
            elif kind == "down":
                hidden, x = (h.unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2)).mean((-1, -3)) for h in (hidden, x))
            hidden = layer(f"{name}.in_layers.2", F.conv2d, hidden, padding=1)
            scale, shift = layer(f"{name}.emb_layers.1", F.linear, F.silu(emb))[:, :, None, None].chunk(2, 1)
            hidden = norm(f"{name}.out_layers.0", hidden) * (1 + scale) + shift
            hidden = layer(f"{name}.out_layers.3", F.conv2d, F.silu(hidden), padding=1)
            if f"{name}.skip_connection.weight" in state:
                x = layer(f"{name}.skip_connection", F.conv2d, x)
            return x + hidden

        def attention(name, x):
            flat = x.flatten(2)
            heads = layer(f"{name}.qkv", F.conv1d, norm(f"{name}.norm", flat)).split(3 * HEAD, dim=1)
            mixed = []
            for head in heads:
                q, k, v = head.split(HEAD, dim=1)
                weights = (q.transpose(1, 2) @ k / HEAD**0.5).softmax(-1)  # [B, to, from]
                mixed.append(v @ weights.transpose(1, 2))
            return x + layer(f"{name}.proj_out", F.conv1d, torch.cat(mixed, 1)).view_as(x)

        half = self.channels // 2
        angles = timesteps[:, None] * 10_000.0 ** (-torch.arange(half) / half)
        emb = layer("time_embed.0", F.linear, torch.cat([angles.cos(), angles.sin()], 1))
        emb = layer("time_embed.2", F.linear, F.silu(emb)) + label_emb
        hidden, skips = x, []
        for block, steps in self.blocks().items():
            if block.startswith("output"):
                hidden = torch.cat([hidden, skips.pop()], 1)
            for i, (kind, *_) in enumerate(steps):
                name = f"{block}.{i}"
                if kind == "conv":
                    hidden = layer(name, F.conv2d, hidden, padding=1)
                else:
                    hidden = attention(name, hidden) if kind == "attention" else residual(name, kind, hidden)
            if block.startswith("input"):
                skips.append(hidden)
        return layer("out.2", F.conv2d, F.silu(norm("out.0", hidden)), padding=1)

    def config(self) -> dict:
        """The arguments of `RADUNet2DModel` that make it this network."""
        down = ["AttnDownBlock2D" if i in self.attention else "ResnetDownsampleBlock2D" for i in range(len(self.mult))]
        up = ["AttnUpBlock2D" if i in self.attention else "ResnetUpsampleBlock2D" for i in range(len(self.mult))]
        return {
            "sample_size": 16,
            "down_block_types": tuple(down),
            "up_block_types": tuple(up[::-1]),
            "block_out_channels": tuple(mult * self.channels for mult in self.mult),
            "layers_per_block": self.num_res_blocks,
            "attention_head_dim": HEAD,
            "feature_block": 1,
            "feature_channels": 6,
        }


SMALL = Original(32, (1, 2), 1, attention=(1,))
PUBLISHED = Original(256, (1, 1, 2, 2, 4, 4), 2, attention=(3, 4, 5))


def convert(original: Original, state: dict, categories=(), **config) -> RADUNet2DModel:
    return guided_diffusion.convert_guided_diffusion(state, categories, **(original.config() | config))


# The same function


@pytest.mark.parametrize(
    "original",
    [
        SMALL,
        Original(32, (1, 2), 2, attention=(0, 1)),
        Original(32, (1, 2, 2), 2, attention=(2,)),
        Original(64, (1, 1, 2), 1, attention=()),
        Original(32, (1, 3, 2), 1, attention=(1,)),
    ],
    ids=str,
)
@pytest.mark.parametrize("categories", [(), ("nut", "tile", "wood")])
def test_noise_and_variance_are_those_of_the_original(original, categories):
    state = original.random_weights()
    x, timesteps = torch.randn(4, 3, 16, 16), torch.tensor([0, 20, 401, 999])
    mean = state["label_emb.weight"].mean(0)
    if categories:
        labels = torch.tensor([0, 1, 2, 3])
        label_emb = torch.stack([*state["label_emb.weight"][:3], mean])
    else:
        labels, label_emb = None, mean.expand(4, -1)
    model = convert(original, state, categories)
    with torch.no_grad():
        expected = original.forward(state, x, timesteps, label_emb)
        output = model(x, timesteps, labels)
    assert 0.1 < expected.std() < 10
    torch.testing.assert_close(torch.cat([output.sample, output.variance], 1), expected, rtol=0, atol=1e-4)


def test_every_number_of_the_original_is_used_exactly_once():
    state = SMALL.random_weights() | {"label_emb.weight": torch.zeros(1000, 128)}
    model = convert(SMALL, state)
    ours = torch.cat([p.detach().flatten() for p in model.unet.parameters()])
    originals = torch.cat([tensor.flatten() for name, tensor in state.items() if name != "label_emb.weight"])
    assert torch.equal(ours.sort().values, originals.sort().values)
    assert all(p.requires_grad for p in model.parameters())


def test_the_published_layout_fits_tensor_for_tensor():
    with torch.device("meta"):
        state = {name: torch.empty(shape) for name, shape in PUBLISHED.shapes().items()}
        expected = RADUNet2DModel.from_named_config("ran", categories=("nut",))
    assert sum(tensor.numel() for tensor in state.values()) == 552_814_086 + 1000 * 1024
    model = guided_diffusion.convert_guided_diffusion(state, ("nut",))
    assert dict(model.config) == dict(expected.config)
    shapes = [[(name, p.shape) for name, p in m.named_parameters()] for m in (model, expected)]
    assert shapes[0] == shapes[1]


def test_half_precision_checkpoints_become_float32():
    state = {name: tensor.half() for name, tensor in SMALL.random_weights().items()}
    assert {p.dtype for p in convert(SMALL, state).parameters()} == {torch.float32}


def test_the_feature_head_is_drawn_from_the_seed():
    state = SMALL.random_weights()
    heads = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        heads.append(convert(SMALL, state).feature_head)
    first, same, other = (head[2].weight for head in heads)
    assert torch.equal(first, same) and not torch.allclose(first, other)
    assert torch.equal(heads[0][0].weight, torch.ones(64)) and torch.equal(heads[0][0].bias, torch.zeros(64))


# Files


def test_the_script_writes_a_model_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(NAMED_CONFIGS, "ran", NAMED_CONFIGS["ran"] | SMALL.config())
    state = SMALL.random_weights()
    torch.save(state, tmp_path / "small.pt")
    arguments = [str(tmp_path / "small.pt"), "--output_dir", str(tmp_path / "init"), "--categories", "nut", "tile"]
    arguments += ["--feature_channels", "10", "--feature_stride", "8", "--sample_size", "32", "--seed", "5"]
    convert_guided_diffusion.main(convert_guided_diffusion.parse_args(arguments))

    loaded = RADUNet2DModel.from_pretrained(tmp_path / "init")
    torch.manual_seed(5)
    expected = convert(SMALL, state, ("nut", "tile"), feature_channels=10)
    assert list(loaded.config.categories) == ["nut", "tile"] and loaded.config.sample_size == 32
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), expected.parameters(), strict=True))
    assert loaded(torch.zeros(1, 3, 32, 32), 20).features.shape == (1, 10, 4, 4)
    printed = capsys.readouterr().out
    assert str(tmp_path / "init") in printed and f"{sum(p.numel() for p in loaded.unet.parameters()):,}" in printed


# Refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label_emb.weight": None}, r"lacks 1 of \d+ tensors, such as label_emb.weight\."),
        ({"out.2.bias": None, "out.2.b": torch.ones(1)}, "such as out.2.bias, and it has 1 that .* such as out.2.b"),
        (
            {"input_blocks.9.0.weight": torch.ones(1)},
            "has 1 that do not belong there, such as input_blocks.9.0.weight",
        ),
        ({"out.2.bias": torch.ones(3)}, r"1 have a wrong shape, such as out.2.bias, \(3,\) instead of \(6,\)"),
        ({"label_emb.weight": torch.ones(10, 128)}, r"label_emb.weight, \(10, 128\) instead of \(1000, 128\)"),
        ({"out.2.bias": "text"}, r"out.2.bias, \(\) instead of \(6,\)"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change, message):
    state = {name: value for name, value in (SMALL.random_weights() | change).items() if value is not None}
    with pytest.raises(ValueError, match=r"class-conditional 256x256_diffusion.pt, but .*" + message):
        convert(SMALL, state)


def test_more_categories_than_labels_are_refused():
    state = SMALL.random_weights()
    assert convert(SMALL, state, [str(i) for i in range(1000)]).unet.class_embedding.num_embeddings == 1001
    with pytest.raises(ValueError, match="1000 label embeddings, too few for 1001 categories"):
        convert(SMALL, state, [str(i) for i in range(1001)])


class Stranger:
    pass


@pytest.mark.parametrize("content", [b"", b"hello world", b"\x89PNG\r\n", pickle.dumps(Stranger(), protocol=2)])
def test_files_of_another_kind_are_refused(content, tmp_path):
    (tmp_path / "file.pt").write_bytes(content)
    with pytest.raises(ValueError, match="file.pt is not a torch file, or not all of one; it must be OpenAI's"):
        load_guided_diffusion(tmp_path / "file.pt")


def test_other_torch_files_are_refused(tmp_path):
    path = tmp_path / "file.pt"
    torch.save({"model": Stranger()}, path)
    with pytest.raises(ValueError, match="file.pt holds Python objects besides tensors, which are refused"):
        load_guided_diffusion(path)
    torch.save([torch.ones(1)], path)
    with pytest.raises(ValueError, match="file.pt holds a list, not named tensors; it must be"):
        load_guided_diffusion(path)
    torch.save({"weight": torch.ones(1)}, path)
    with pytest.raises(ValueError, match="but it lacks .*, and it has 1 that do not belong there, such as weight"):
        load_guided_diffusion(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not all of one"):
        load_guided_diffusion(path)
    with pytest.raises(FileNotFoundError, match="none.pt"):
        load_guided_diffusion(tmp_path / "none.pt")
