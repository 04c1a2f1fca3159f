"""Drawn scenes with questions: data that a small vision-language model can be trained and measured on anywhere."""

from mllm_vision.scenes.draw import SPLITS, Scene, label_patches, render, sample_scene
from mllm_vision.scenes.questions import FAMILIES, NEGATIVES, Question, caption

__all__ = [
    "FAMILIES",
    "NEGATIVES",
    "SPLITS",
    "Question",
    "Scene",
    "caption",
    "label_patches",
    "render",
    "sample_scene",
]
