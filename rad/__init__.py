"""RAD: find defects with a diffusion model that has seen good parts only."""

from .image_processor import RADImageProcessor
from .models.discriminator import RADDiscriminator
from .models.evidence import Evidence
from .models.feature_extractor import RADFeatureExtractor
from .models.normality import NormalityModel
from .models.unet_rad import RADUNet2DModel
from .pipeline_output import AnomalyRegion, Decision, RADDenoisingOutput, RADPipelineOutput, RADRestorationOutput
from .pipeline_rad import RADPipeline
from .scheduler_rad import RADScheduler

__version__ = "0.1.0"
__all__ = [
    "AnomalyRegion",
    "Decision",
    "Evidence",
    "NormalityModel",
    "RADDenoisingOutput",
    "RADDiscriminator",
    "RADFeatureExtractor",
    "RADImageProcessor",
    "RADPipeline",
    "RADPipelineOutput",
    "RADRestorationOutput",
    "RADScheduler",
    "RADUNet2DModel",
]
