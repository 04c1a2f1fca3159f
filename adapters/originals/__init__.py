"""Layouts of authors' checkpoints, one file each, which defines `convert`. Found by file, see `mllm_vision.convert`."""
