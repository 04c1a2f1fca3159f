"""``python -m mllm_vision`` is ``mllm-vision``; ``accelerate launch -m mllm_vision`` is that in several processes."""

from mllm_vision.cli import main

main()
