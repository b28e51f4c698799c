# zppo on a machine with NVIDIA GPUs: torch from PyPI brings CUDA's libraries, the host its driver (NVIDIA Container Toolkit).
#
#   docker build -t zppo .
#   mkdir -p ~/.cache/huggingface
#   docker run --rm --gpus all --ipc=host --user "$(id -u):$(id -g)" -v "$PWD:/work" -v "$HOME/.cache/huggingface:/hf" zppo train my-recipe.yaml
#
# Runs land in the mounted folder, below runs/, and are yours, not root's. This file has not been built by us.
FROM python:3.12-slim
RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends build-essential git && rm -rf /var/lib/apt/lists/*
COPY . /opt/zppo
RUN pip install --no-cache-dir -c /opt/zppo/constraints.txt '/opt/zppo[lora,gym,eval,trackers]'
# For a user without a name and a home in here: torch asks for both, and so does triton, which wants the compiler too.
ENV HOME=/tmp USER=zppo HF_HOME=/hf
WORKDIR /work
ENTRYPOINT ["zppo"]
