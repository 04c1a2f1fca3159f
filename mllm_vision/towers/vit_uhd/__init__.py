"""ViT-UHD: a vision transformer for pictures of any size, which merges tokens on the way (see `modeling`)."""

from typing import Any

from mllm_vision.registry import exported

__all__ = ["ViTUHDConfig", "ViTUHDImageProcessor", "ViTUHDModel", "ViTUHDProcessor"]


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return exported(__name__, name)


def register() -> None:
    """Make config and processors known to the Auto classes; the first config does so for the model."""
    from transformers.models.auto.configuration_auto import AutoConfig
    from transformers.models.auto.image_processing_auto import AutoImageProcessor
    from transformers.models.auto.processing_auto import AutoProcessor

    from mllm_vision.towers.vit_uhd.configuration import ViTUHDConfig
    from mllm_vision.towers.vit_uhd.image_processing import ViTUHDImageProcessor
    from mllm_vision.towers.vit_uhd.processing import ViTUHDProcessor

    AutoConfig.register(ViTUHDConfig.model_type, ViTUHDConfig, exist_ok=True)
    AutoImageProcessor.register(ViTUHDConfig, image_processor_classes={"pil": ViTUHDImageProcessor}, exist_ok=True)
    AutoProcessor.register(ViTUHDConfig, ViTUHDProcessor, exist_ok=True)
