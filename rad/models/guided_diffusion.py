"""RAN's starting point: OpenAI's class-conditional guided-diffusion checkpoint `256x256_diffusion.pt` as our U-Net.

Both compute the same function; only names, and the layout of the attention's weights, differ. The feature head is ours
and starts at random. The checkpoint is linked from https://github.com/openai/guided-diffusion.
"""

import pickle
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel

from .unet_rad import RADUNet2DModel

ACCEPTED = "OpenAI's class-conditional 256x256_diffusion.pt"
NUM_LABELS = 1000  # ImageNet's classes

# Inside a block: the layer in diffusers, and the one in guided-diffusion
LAYERS = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
    "group_norm": "norm",
    "to_q": "qkv",
    "to_k": "qkv",
    "to_v": "qkv",
    "to_out.0": "proj_out",
}


def original_blocks(unet: UNet2DModel) -> dict[str, str]:
    """For each block of `unet`, its name in guided-diffusion, which numbers blocks through all levels."""
    blocks = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "conv_in": "input_blocks.0.0",
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    for side, original, number in (("down", "input_blocks", 1), ("up", "output_blocks", 0)):  # input_blocks.0: conv_in
        for level, block in enumerate(getattr(unet, f"{side}_blocks")):
            attends = hasattr(block, "attentions")
            for i in range(len(block.resnets)):
                blocks[f"{side}_blocks.{level}.resnets.{i}"] = f"{original}.{number}.0"
                if attends:
                    blocks[f"{side}_blocks.{level}.attentions.{i}"] = f"{original}.{number}.1"
                number += 1
            if getattr(block, "downsamplers", None):
                blocks[f"down_blocks.{level}.downsamplers.0"] = f"{original}.{number}.0"
                number += 1
            if getattr(block, "upsamplers", None):  # the last step of the level's last block, not a block of its own
                blocks[f"up_blocks.{level}.upsamplers.0"] = f"{original}.{number - 1}.{2 if attends else 1}"
    return blocks


def original_tensors(unet: UNet2DModel) -> dict[str, tuple[str, tuple[int, ...]]]:
    """For each tensor of `unet` but the class embedding, the name and shape of the one that it is taken from."""
    tensors = {}
    for block, original_block in original_blocks(unet).items():
        for name, tensor in unet.get_submodule(block).state_dict().items():
            layer, dot, kind = name.rpartition(".")  # no layer where the block is a single one
            original, shape = f"{original_block}.{LAYERS.get(layer, layer)}{dot}{kind}", tuple(tensor.shape)
            if ".qkv." in original:
                shape = (3 * shape[0], *shape[1:])
            if original.endswith(("qkv.weight", "proj_out.weight")):
                shape = (*shape, 1)  # a convolution over the flattened positions
            tensors[f"{block}.{name}"] = (original, shape)
    return tensors


def check_state_dict(state_dict: Mapping[str, torch.Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ValueError unless the names and shapes are those expected."""
    faults = []
    if missing := sorted(expected.keys() - state_dict.keys()):
        faults.append(f"it lacks {len(missing)} of {len(expected)} tensors, such as {missing[0]}")
    if unexpected := sorted(map(str, state_dict.keys() - expected.keys())):
        faults.append(f"it has {len(unexpected)} that do not belong there, such as {unexpected[0]}")
    shapes = {name: tuple(getattr(state_dict.get(name), "shape", ())) for name in expected.keys() - missing}
    if wrong := sorted(name for name, shape in shapes.items() if shape != expected[name]):
        name = wrong[0]
        faults.append(f"{len(wrong)} have a wrong shape, such as {name}, {shapes[name]} instead of {expected[name]}")
    if faults:
        raise ValueError(f"The checkpoint must be {ACCEPTED}, but {', and '.join(faults)}.")


def convert_guided_diffusion(
    state_dict: Mapping[str, torch.Tensor], categories: Sequence[str] = (), **config: Any
) -> RADUNet2DModel:
    """Our U-Net with guided-diffusion's weights.

    As in RAN, the i-th category starts from the i-th of the 1000 rows of the label embedding. The embedding of an
    unknown category is their mean, which is what the network saw on average. Without categories this mean becomes part
    of the time embedding's last bias, so that the network behaves as with an unknown category.

    Args:
        state_dict: The checkpoint's tensors. Those that need no change are used as they are, not copied.
        categories: Names of the categories to train on, at most 1000.
        config: Arguments of `RADUNet2DModel` in place of those of the named configuration "ran".

    Returns:
        The U-Net in float32; its feature head is drawn from torch's global generator.

    Raises:
        ValueError: Tensors are missing, left over or of another shape, or there are too many categories.
    """
    if len(categories) > NUM_LABELS:
        raise ValueError(f"There are {NUM_LABELS} label embeddings, too few for {len(categories)} categories.")
    with torch.device("meta"):  # weights that are replaced below take neither memory nor random numbers
        model = RADUNet2DModel.from_named_config("ran", categories=tuple(categories), **config)
    tensors = original_tensors(model.unet)
    time_embed_dim = model.unet.time_embedding.linear_2.out_features
    check_state_dict(state_dict, dict(tensors.values()) | {"label_emb.weight": (NUM_LABELS, time_embed_dim)})

    converted = {}
    for name, (original, _) in tensors.items():
        tensor = state_dict[original].float()
        if ".qkv." in original:  # rows: for each head its q, its k, its v
            part = ("to_q", "to_k", "to_v").index(name.split(".")[-2])
            tensor = tensor.unflatten(0, (-1, 3, model.config.attention_head_dim))[:, part].flatten(0, 1)
        converted[name] = tensor.squeeze(-1) if tensor.ndim == 3 else tensor  # a linear layer, not a 1-D convolution
    labels = state_dict["label_emb.weight"].float()
    unknown = labels.mean(0)
    if categories:
        converted["class_embedding.weight"] = torch.cat([labels[: len(categories)], unknown[None]])
    else:
        converted["time_embedding.linear_2.bias"] = converted["time_embedding.linear_2.bias"] + unknown
    model.unet.load_state_dict(converted, assign=True)  # strict: nothing of ours is left out

    model.feature_head.to_empty(device=labels.device)
    for layer in model.feature_head:
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()
    return model


def load_guided_diffusion(path: str | Path, categories: Sequence[str] = (), **config: Any) -> RADUNet2DModel:
    """`convert_guided_diffusion` of a file.

    Raises:
        OSError: The file cannot be opened.
        ValueError: It is not a torch file of tensors only, or not the right one.
    """
    try:
        state_dict = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # what a file of another kind raises is up to its bytes
        if isinstance(error, pickle.UnpicklingError) and zipfile.is_zipfile(path):
            fault = "holds Python objects besides tensors, which are refused, as loading them can run code"
        else:
            fault = "is not a torch file, or not all of one"
        raise ValueError(f"{path} {fault}; it must be {ACCEPTED}.") from error
    if not isinstance(state_dict, Mapping):
        raise ValueError(f"{path} holds a {type(state_dict).__name__}, not named tensors; it must be {ACCEPTED}.")
    return convert_guided_diffusion(state_dict, categories, **config)
