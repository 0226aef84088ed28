# The trainer and its sweeps: `docker run IMAGE train ae`, `docker run IMAGE sweep ae`.
#   docker build -t dist-ae .                                                        for NVIDIA GPUs (some 6 GB)
#   docker build -t dist-ae:cpu --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu .     without (some 1 GB)
FROM python:3.11-slim

# Triton, which draws random numbers on a GPU, builds a part of itself with a C compiler when it is first used.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*

ARG TORCH_INDEX=""
WORKDIR /opt/dist-ae

# torch first: it is most of the image and changes least.
RUN pip install --no-cache-dir ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "torch>=2.10,<3" "torchvision>=0.25"
COPY pyproject.toml setup.py README.md LICENSE ./
COPY dist_ae dist_ae
COPY tune tune
RUN pip install --no-cache-dir ".[tune]"

RUN useradd --create-home --uid 1000 trainer && mkdir /runs && chown trainer /runs
USER trainer
WORKDIR /runs
ENV PYTHONUNBUFFERED=1 WANDB_MODE=offline
ENTRYPOINT ["dist-ae"]
CMD ["--help"]
