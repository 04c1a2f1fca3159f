"""Where a number was measured: what every result file states besides the number."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
from datetime import datetime, timezone
from importlib.metadata import distribution, version
from pathlib import Path
from typing import Any

import torch

import mllm_vision

CPU_INFO = Path("/proc/cpuinfo")


def environment() -> dict[str, Any]:
    """Versions, hardware, git state and date, as JSON holds them."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": version("transformers"),
            "mllm_vision": mllm_vision.__version__,
        },
        "hardware": {
            "system": f"{platform.system()} {platform.machine()}",
            "cpu": cpu_model(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        },
        "git": git_state(Path(mllm_vision.__file__)) or installed_from_git(),
    }


def cpu_model() -> str:
    """The processor's name; Linux keeps it where `platform` does not look."""
    if CPU_INFO.exists():
        for line in CPU_INFO.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def installed_from_git() -> dict[str, Any] | None:
    """The commit that was installed, where pip took the library from a repository; else None."""
    origin = json.loads(distribution("mllm-vision").read_text("direct_url.json") or "{}")
    commit = origin.get("vcs_info", {}).get("commit_id")
    return None if commit is None else {"commit": commit, "dirty": False}


def git_state(file: Path) -> dict[str, Any] | None:
    """Commit of the checkout that tracks ``file`` and whether tracked files differ from it; None if there is none."""
    git = shutil.which("git")
    if git is None:
        return None

    def ask(*arguments: str) -> str | None:
        done = subprocess.run([git, "-C", str(file.parent), *arguments], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None

    # A virtual environment may lie inside somebody's checkout: only a file that git tracks is part of one.
    if ask("ls-files", "--error-unmatch", file.name) is None:
        return None
    return {"commit": ask("rev-parse", "HEAD"), "dirty": bool(ask("status", "--porcelain", "--untracked-files=no"))}
