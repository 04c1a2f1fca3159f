"""Text with pictures of any size, for a language model behind a ViT-UHD."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase, ProcessorMixin
from transformers.processing_utils import MultiModalData

from mllm_vision.towers.vit_uhd.image_processing import ViTUHDImageProcessor

__all__ = ["ViTUHDProcessor"]


class ViTUHDProcessor(ProcessorMixin):
    """Tokenizer and image processor in one: every mark of an image becomes as many as the tower makes tokens of it.

    Args:
        image_processor: Of the tower.
        tokenizer: Of the language model; knows the mark as one token.
        chat_template: As in other processors.
        image_token: The mark, unless the tokenizer has an ``image_token`` of its own.

    Raises:
        ValueError: the mark is no token of the tokenizer.
    """

    def __init__(
        self,
        image_processor: ViTUHDImageProcessor,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None = None,
        image_token: str = "<image>",
    ):
        self.image_token = getattr(tokenizer, "image_token", None) or image_token
        ids = tokenizer.encode(self.image_token, add_special_tokens=False)
        if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
            raise ValueError(f"{self.image_token!r} is no token of this tokenizer; add it as a special token")
        self.image_token_id = ids[0]
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **kwargs: Any) -> str:
        """The marks of one encoded image; called by the base class."""
        height, width = (int(side) for side in image_inputs["image_sizes"][image_idx])
        side, merge = (kwargs.get(name) or getattr(self.image_processor, name) for name in ("patch_size", "merge_size"))
        return self.image_token * (height // (side * merge) * (width // (side * merge)))

    def _get_num_multimodal_tokens(
        self, image_sizes: Sequence[tuple[int, int]] | None = None, **kwargs: Any
    ) -> MultiModalData:
        """Of pictures (height, width) before they are resized; servers ask so for room before they encode."""
        if image_sizes is None:
            return MultiModalData()
        settings = self._merge_kwargs(**kwargs)["images_kwargs"]
        merge = settings.get("merge_size") or self.image_processor.merge_size
        patches = [self.image_processor.get_number_of_image_patches(*size, settings) for size in image_sizes]
        return MultiModalData(num_image_tokens=[n // merge**2 for n in patches], num_image_patches=patches)
