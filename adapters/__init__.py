"""Host families, one file each; every file defines `ADAPTER`. Found by file, see `mllm_vision.host`."""
