"""RAD: find defects with a diffusion model that has seen good parts only."""

from .image_processor import RADImageProcessor
from .models.feature_extractor import RADFeatureExtractor
from .models.normality import NormalityModel
from .models.unet_rad import RADUNet2DModel
from .pipeline_rad import (
    AnomalyRegion,
    RADDenoisingOutput,
    RADPipeline,
    RADPipelineOutput,
    RADRestorationOutput,
)
from .scheduler_rad import RADScheduler

__version__ = "0.1.0"
__all__ = [
    "AnomalyRegion",
    "NormalityModel",
    "RADDenoisingOutput",
    "RADFeatureExtractor",
    "RADImageProcessor",
    "RADPipeline",
    "RADPipelineOutput",
    "RADRestorationOutput",
    "RADScheduler",
    "RADUNet2DModel",
]
