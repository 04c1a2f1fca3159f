"""What is installed: the packages that pyproject.toml lists, the wheel built from them, what importing them costs."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAPPED = {"mllm_vision.adapters": "adapters", "mllm_vision.recipes": "recipes", "mllm_vision.eval": "eval"}


@pytest.fixture(scope="module")
def setuptools_options():
    tomllib = pytest.importorskip("tomllib", reason="tomllib came with Python 3.11")
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def package_folders():
    """Every folder of the package and of the folders mapped into it that holds Python files, as a dotted name."""
    roots = {"mllm_vision": "mllm_vision"} | MAPPED
    return {
        ".".join((name, *file.parent.relative_to(ROOT / folder).parts))
        for name, folder in roots.items()
        for file in (ROOT / folder).rglob("*.py")
    }


def test_listed_packages_are_the_folders(setuptools_options):
    assert setuptools_options["package-dir"] == MAPPED
    assert len(setuptools_options["packages"]) == len(set(setuptools_options["packages"]))
    assert set(setuptools_options["packages"]) == package_folders()


def test_every_package_has_an_init():
    folders = {path.parent for folder in ("mllm_vision", *MAPPED.values()) for path in (ROOT / folder).rglob("*.py")}
    assert [folder for folder in sorted(folders) if not (folder / "__init__.py").exists()] == []


@pytest.mark.slow
def test_wheel_holds_the_package_and_nothing_else(tmp_path):
    source = tmp_path / "source"  # setuptools leaves a build folder, whose old files would end up in the next wheel
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "dist", "runs", "*.egg-info"))
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, source]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())

    assert {name.split("/")[0] for name in names} == {"mllm_vision", "mllm_vision-0.1.0.dist-info"}
    assert "mllm_vision/py.typed" in names
    for package, folder in (("mllm_vision", "mllm_vision"), *MAPPED.items()):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in {".py", ".yaml", ".safetensors"}:
                assert f"{package.replace('.', '/')}/{path.relative_to(ROOT / folder).as_posix()}" in names


def test_import_adds_at_most_half_a_second_to_transformers():
    # CPU time of a fresh interpreter, the best of three: other processes on the machine leave it nearly unchanged.
    code = (
        "import time, transformers; start = time.process_time(); import mllm_vision; print(time.process_time() - start)"
    )
    seconds = [
        float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
        for _ in range(3)
    ]
    assert min(seconds) <= 0.5


@pytest.mark.parametrize(
    "first",
    [
        "from transformers import AutoModel",
        "from transformers import LlavaConfig",
        "from peft import LoraConfig",
        "import mllm_vision.api",
    ],
)
def test_architectures_are_registered_whatever_is_imported_first(first):
    code = (
        f"import mllm_vision; {first}\n"
        "import sys; from transformers import AutoConfig, AutoModelForImageTextToText\n"
        "config = AutoConfig.for_model('mllm_vision_llava')\n"
        "assert type(config) in AutoModelForImageTextToText._model_mapping\n"
        "assert not any(type(finder).__module__.startswith('mllm_vision') for finder in sys.meta_path)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
