"""New models of pretrained parts, and the parts that PyPI packages bring along."""

from mllm_vision.assembly.joining import AssemblySpec, assemble, assemble_again

__all__ = ["AssemblySpec", "assemble", "assemble_again"]
