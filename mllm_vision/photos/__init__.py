"""Photographs composed from real cut-outs, with questions: data with known objects, counts and positions."""

from mllm_vision.photos.compose import Pasted, Photo, compose
from mllm_vision.photos.export import export_photos
from mllm_vision.photos.material import SPLITS, Material
from mllm_vision.photos.questions import FAMILIES, NEGATIVES, Asker, Question

__all__ = [
    "FAMILIES",
    "NEGATIVES",
    "SPLITS",
    "Asker",
    "Material",
    "Pasted",
    "Photo",
    "Question",
    "compose",
    "export_photos",
]
