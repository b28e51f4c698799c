# zppo on a machine with NVIDIA GPUs: torch from PyPI brings CUDA's libraries, the host its driver (NVIDIA Container Toolkit).
#
#   docker build -t zppo .
#   docker run --rm --gpus all --ipc=host -v "$PWD:/work" -v "$HOME/.cache/huggingface:/root/.cache/huggingface" zppo train my-recipe.yaml
#
# Runs land in the mounted folder, below runs/.
FROM python:3.12-slim
RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends build-essential git && rm -rf /var/lib/apt/lists/*
COPY . /opt/zppo
RUN pip install --no-cache-dir -c /opt/zppo/constraints.txt '/opt/zppo[lora,gym,eval,trackers]'
WORKDIR /work
ENTRYPOINT ["zppo"]
