"""Where pipelines come from and where they go: embedded models, folders, the Hub; and what is refused."""

import copy
import json
import os
import sys
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils.torch_utils import is_compiled_module
from huggingface_hub import CommitInfo, HfApi, ModelCard
from safetensors import SafetensorError, safe_open

from .data.camera import change_camera
from .data.defects import add_defect
from .data.drawing import turn
from .data.duplicates import same_parts
from .data.pasting import paste_defects
from .data.twins import defective_twins
from .hub import WEIGHTS, check_repo_id, download, list_files, one_sentence, upload, write_code
from .image_processor import RADImageProcessor
from .image_reader import read
from .model_card import create_model_card
from .models.detail import DetailBranch
from .models.discriminator import RADDiscriminator
from .models.evidence import Evidence
from .models.false_alarms import FalseAlarmMixin
from .models.feature_extractor import RADFeatureExtractor
from .models.fitting import FittingMixin
from .models.fusion import Twins
from .models.gaussian import Moments
from .models.normality import NormalityModel
from .models.unet_rad import RADUNet2DModel
from .models.wiener import WienerFilter
from .pipeline_arguments import check_images
from .pipeline_fitting import RADFittingMixin
from .pipeline_output import RADPipelineOutput
from .pipeline_restoration import RADRestorationMixin
from .scheduler_rad import RADScheduler

EMBEDDED_DIR = Path(__file__).parent / "pretrained"
EMBEDDED_MODELS = ("synthetic", "mtd", "paper")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of the U-Net
COMPONENTS = {
    "unet": RADUNet2DModel,
    "scheduler": RADScheduler,
    "feature_extractor": RADFeatureExtractor,
    "normality": NormalityModel,
    "discriminator": RADDiscriminator,
}
# The largest settings of a pipeline that is loaded: what tables and buffers are made of before there are weights
LIMITS = {
    "resolution": 2048,
    "num_noise_samples": 64,
    "num_train_timesteps": 10_000,
    "num_respaced_timesteps": 10_000,
    "feature_channels": 4096,
    "num_summaries": 8192,
    "gaussian_size": 256,
    "gaussian_channels": 1024,
    "map_size": 512,
    "num_scores": 1_000_000,
    "num_different": 1_000_000,
}
if hasattr(os, "register_at_fork"):
    # A child has none of its parent's threads, and torch's next parallel loop would wait for them for ever
    os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))


class RADLoaderMixin(DiffusionPipeline):
    """Loads and saves a `RADPipeline`, as diffusers does and with more refused."""

    @classmethod
    def load(cls, name_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:
        """A pipeline's folder, which comes first as in diffusers, an embedded model by its name, or a Hub id."""
        name = os.path.expanduser(name_or_path)
        is_folder = (Path(name) / "model_index.json").is_file()
        embedded = name in EMBEDDED_MODELS and not is_folder
        return (cls.from_embedded if embedded else cls.from_pretrained)(name, **kwargs)

    @classmethod
    def from_embedded(cls, name: str = "synthetic", **kwargs: Any) -> Any:
        """A pipeline that comes with the package: "synthetic" (eight categories), "mtd" (magnetic tiles) or "paper"
        (impurities in eight papers)."""
        if name not in EMBEDDED_MODELS:
            raise ValueError(
                f"The embedded models are {', '.join(EMBEDDED_MODELS)}; got {str(name)!r}. "
                "Folders and Hub ids go to from_pretrained."
            )
        return cls.from_pretrained(EMBEDDED_DIR / name, **kwargs)

    @classmethod
    @torch.inference_mode(False)  # what is loaded there could not be used elsewhere
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:
        """As in diffusers, from a folder or the Hub, with two promises: weights are read from safetensors only, and no
        code of the folder or repository is ever run, whatever `trust_remote_code` says.

        Args:
            kwargs: As in diffusers; `dtype`, or `torch_dtype`, is the U-Net's alone, as in `to`.

        Raises:
            OSError: A file is missing or damaged, the pipeline names classes other than this package's, or the Hub can
                not or will not deliver; one sentence says which.
        """
        name = os.path.expanduser(pretrained_model_name_or_path)
        kwargs["trust_remote_code"] = False
        if kwargs.setdefault("use_safetensors", True) is False:
            raise ValueError("use_safetensors must be True: other weights can run code when they are read.")
        if Path(name).is_dir():
            check_pipeline_folder(Path(name), kwargs.get("variant"), passed=kwargs)
        else:
            check_repo_id(name)
        given = [kwargs.pop(key) for key in ("dtype", "torch_dtype") if kwargs.get(key) is not None]
        if len(given) > 1:
            raise ValueError("Give dtype or torch_dtype, not both.")
        dtypes = [dtype.get("unet", dtype.get("default")) if isinstance(dtype, dict) else dtype for dtype in given]
        pipeline = super().from_pretrained(name, **kwargs)
        if bad := pipeline._not_finite():
            raise OSError(f"{name} is refused: {bad} is not finite, its training or its fit has failed.")
        return pipeline.to(dtype=dtypes[0]) if dtypes else pipeline

    @torch.inference_mode(False)
    def to(self, *args: Any, **kwargs: Any) -> Any:
        """As in diffusers, to a device and to a type, but the type is the U-Net's alone, which takes nearly all of the
        time: its filter and detail branch, the extractor, the discriminator and the statistics of good images stay in
        float32.

        In bfloat16 the fused score of an image moves by less than .05, any other score and any value of a map by less
        than .25, in units of good-image deviation (measured on the embedded models); float16 is four times as fine. On
        the CPU float16 is refused when images are looked at: it takes many times as long there.
        `DiffusionPipeline.from_pretrained` has no such care: load in float32 with it, and then come here.
        """
        dtypes = [value for value in args if isinstance(value, torch.dtype)]
        if (named := kwargs.pop("dtype", None)) is not None:
            dtypes.append(named)
        if len(dtypes) > 1 or not all(dtype in DTYPES for dtype in dtypes):
            raise ValueError(
                f"dtype must be one of {', '.join(map(str, DTYPES))}, got {', '.join(map(repr, dtypes))}."
            )
        super().to(*(value for value in args if not isinstance(value, torch.dtype)), **kwargs)
        if dtypes:
            network: Any = getattr(self.unet, "_orig_mod", self.unet)
            fine = network.wiener_filter, network.detail  # differences of fine images need all of float32
            network.wiener_filter = network.detail = None
            torch.nn.Module.to(network, dtypes[0])  # diffusers' own warns of modules kept in float32, which are none
            network.wiener_filter, network.detail = fine
        return self

    @property
    def dtype(self) -> torch.dtype:
        """The U-Net's."""
        return self.unet.dtype

    @classmethod
    def download(cls, pretrained_model_name: str, **kwargs: Any) -> str:
        """Downloads the configurations and the weights of one variant to the cache; returns their folder.

        Args:
            pretrained_model_name: "user/repo".
            kwargs: variant, revision, token, cache_dir, local_files_only and force_download; components by name are
                not downloaded, what else `from_pretrained` takes is left alone.
        """
        known = ("variant", "revision", "token", "cache_dir", "local_files_only", "force_download")
        options = {name: kwargs[name] for name in known if kwargs.get(name) is not None}
        folder = download(pretrained_model_name, [name for name in COMPONENTS if name not in kwargs], **options)
        check_pipeline_folder(folder, kwargs.get("variant"), pretrained_model_name, passed=kwargs)
        return str(folder)

    @classmethod
    def load_config(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> dict[str, Any]:
        """As in diffusers, with this package's classes in the place of a repository's own code for them."""
        config = super().load_config(pretrained_model_name_or_path, **kwargs)
        config["_class_name"] = cls.__name__
        for name, component in COMPONENTS.items():
            if config.get(name, [None])[0] is not None:
                config[name] = [component.__module__, component.__name__]
        return config

    def with_normality(self, normality: NormalityModel | None) -> Any:
        """A pipeline of the same networks with other statistics of good images, or none; this one does not change."""
        components = self.components | {"normality": normality}
        config = self.config
        twin = type(self)(**components, resolution=config.resolution, num_noise_samples=config.num_noise_samples)
        twin.set_progress_bar_config(**getattr(self, "_progress_bar_config", {}))
        return twin

    def enable_model_cpu_offload(self, *args: Any, **kwargs: Any) -> None:
        """Refused: accelerate's hooks move a network when its `forward` is called, and this pipeline calls others."""
        raise NotImplementedError(
            "RADPipeline does not offload to the CPU: its networks are small, move them with pipe.to(device)."
        )

    enable_sequential_cpu_offload = enable_group_offload = enable_model_cpu_offload

    def _not_compiled(self) -> Any:
        """A pipeline of the same networks as they were before `torch.compile`, whose class nobody could load."""
        twin = copy.copy(self)  # not a new one, which would take parts to float32
        for name, module in self.components.items():
            if is_compiled_module(module):
                setattr(twin, name, module._orig_mod)
        return twin

    def _not_finite(self) -> str | None:
        """The first weight or statistic that is NaN or infinite."""
        for component in COMPONENTS:
            module = getattr(self, component, None)
            for key, values in module.state_dict().items() if isinstance(module, torch.nn.Module) else ():
                if not values.isfinite().all():
                    return f"{key} of {component}"
        return None

    # -- saving ---------------------------------------------------------------------------------------------------

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """As in diffusers: weights, configurations, and the code with which diffusers loads them without this package.

        Args:
            save_directory: Created if need be.
            variant: Part of the weights' file names, such as "fp16"; convert the pipeline itself first.
            push_to_hub: Also push to `repo_id`, by default the folder's name; further arguments as in `push_to_hub`.

        Raises:
            ValueError: Weights or statistics are not finite.
        """
        if not safe_serialization:
            raise ValueError("safe_serialization must be True: other weights can run code when they are read.")
        if any(is_compiled_module(module) for module in self.components.values()):
            self._not_compiled().save_pretrained(
                save_directory, safe_serialization, variant, max_shard_size, push_to_hub, **kwargs
            )
            return
        if bad := self._not_finite():
            raise ValueError(f"The pipeline is not saved: {bad} is not finite, its training or its fit has failed.")
        folder = Path(save_directory).expanduser()
        super().save_pretrained(folder, variant=variant, max_shard_size=max_shard_size)
        _forget_paths(folder)
        components = {name: type(module) for name, module in self.components.items() if module is not None}
        lineage = type(self).__mro__
        # One of each module, after those it imports; one file where this class itself was loaded from a repository
        contents = (
            upload,
            read,
            RADImageProcessor,
            RADPipelineOutput,
            Evidence,
            Moments,
            FalseAlarmMixin,
            Twins,
            create_model_card,
            FittingMixin,
            DetailBranch,
            WienerFilter,
            *COMPONENTS.values(),
            check_images,
            turn,
            add_defect,
            change_camera,
            same_parts,
            paste_defects,
            defective_twins,
            RADFittingMixin,
            RADRestorationMixin,
            RADLoaderMixin,
            lineage[lineage.index(RADLoaderMixin) - 1],
        )
        modules = list(dict.fromkeys(sys.modules[item.__module__] for item in contents))
        write_code(folder, modules, components)
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", folder.name), variant=variant, **kwargs)

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        variant: str | None = None,
        card: ModelCard | None = None,
        files: dict[str, Path] | None = None,
    ) -> CommitInfo:
        """Uploads all that `save_pretrained` writes and a model card in one commit: a reader sees all of it or none.

        Args:
            repo_id: "user/repo"; created if need be.
            commit_message, private, token, create_pr, variant: As in diffusers.
            card: From `create_model_card`. By default the repository's own stays, and a new one gets a card without
                metrics.
            files: Further files, such as the card's picture: where each goes in the repository, and where it is.

        Raises:
            OSError: In one sentence, whatever went wrong.
        """
        if card is None:
            with one_sentence(repo_id):
                keep = HfApi(token=token).file_exists(repo_id, "README.md")
            card = None if keep else create_model_card(self, repo_id=repo_id)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, variant=variant)
            if card is not None:
                card.save(Path(folder) / "README.md")
            return upload(
                repo_id,
                list_files(Path(folder)) | (files or {}),
                commit_message or f"Upload {type(self).__name__}",
                private=private,
                token=token,
                create_pr=create_pr,
            )


def check_pipeline_folder(
    folder: Path, variant: str | None = None, name: str | None = None, passed: Collection[str] = ()
) -> None:
    """Raises OSError with one sentence if a saved pipeline is damaged, incomplete or of other classes than ours.

    Args:
        folder: Of the pipeline.
        variant: Of the weights.
        name: What to call it; by default the folder.
        passed: Components that need not be there.
    """
    name = str(folder) if name is None else name
    index = _read_json(folder / "model_index.json", f"{name} is no pipeline: it has no model_index.json.")
    _check_class(name, "pipeline", index.get("_class_name"), "RADPipeline")
    _check_limits(name, index)
    for component, entry in index.items():
        if component not in COMPONENTS and not isinstance(entry, list):
            continue  # a number such as the resolution
        if component.startswith("_") or component in passed or entry == [None, None]:
            continue
        expected = COMPONENTS.get(component)
        _check_class(name, component, entry, None if expected is None else expected.__name__)
        config = "scheduler_config.json" if component == "scheduler" else "config.json"
        missing = f"The pipeline {name} is incomplete: {component}/{config} is missing."
        settings = _read_json(folder / component / config, missing)
        _check_limits(name, settings)
        if component == "scheduler":
            continue
        dot = "" if variant is None else f".{variant}"
        weights = [*(folder / component).glob(f"{WEIGHTS}{dot}.safetensors")]
        weights += (folder / component).glob(f"{WEIGHTS}{dot}-*.safetensors")
        if not weights:
            raise OSError(
                f"The pipeline {name} is incomplete: {component}/ has no {WEIGHTS}{dot}.safetensors; give the variant "
                "it was saved with, if any. Other formats are not read."
            )
        shapes: dict[str, list[int]] = {}
        for path in weights:
            try:
                with safe_open(path, framework="pt") as file:
                    shapes |= {key: file.get_slice(key).get_shape() for key in file.keys()}
            except (SafetensorError, OSError) as error:
                raise OSError(f"{path} is damaged and cannot be read ({error}).") from error
        if component == "normality":  # all of it is buffers, which are made before weights are read
            with torch.device("meta"):
                expected = NormalityModel.from_config(settings).state_dict()
            shapes.setdefault("good_peaks", list(expected["good_peaks"].shape))  # which earlier models lack
            if shapes != {key: list(value.shape) for key, value in expected.items()}:
                raise OSError(f"{name} is refused: the weights of its normality model do not fit its settings.")


def _read_json(path: Path, missing: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise OSError(missing) from error
    except ValueError as error:
        raise OSError(f"{path} is damaged: it is not valid JSON ({error}).") from error
    if not isinstance(content, dict):
        raise OSError(f"{path} is damaged: it holds no JSON object.")
    return content


def _check_limits(name: str, settings: dict[str, Any]) -> None:
    """Refuses what would fill the memory before a weight is read."""
    for key, most in LIMITS.items():
        value = settings.get(key, 1)
        if value is None and key == "num_different":  # of a model that was fitted before it was counted
            continue
        if not isinstance(value, int) or not 1 <= value <= most:
            raise OSError(f"{name} is refused: its {key} is {value!r}, and must be a number from 1 to {most:,}.")


def _check_class(name: str, part: str, entry: Any, expected: str | None) -> None:
    """An entry of model_index.json is a class name or a module and a class name; ours is used, whatever the module."""
    if expected is None or (entry[-1] if isinstance(entry, list) and entry else entry) != expected:
        raise OSError(f"{name} is refused: its {part} is {entry!r}, which is no class of this package.")


def _forget_paths(folder: Path) -> None:
    """Leaves out of a saved pipeline's settings where its parts were loaded from, which is nobody else's business."""
    for path in (folder / "model_index.json", *folder.glob("*/*config.json")):
        settings = json.loads(path.read_text(encoding="utf-8"))
        if settings.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
