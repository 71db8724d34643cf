# The GPU stack: CUDA 13.0, PyTorch, Triton, DALI, torchao, flash-attn, xformers, NVIDIA's apex, and this project.
# Linted and held to constraints.txt and pyproject.toml by tests/test_deployment.py; not built yet, on any machine.
#
#   docker build --tag vavae-fast --build-arg MAX_JOBS=16 --build-arg TORCH_CUDA_ARCH_LIST=9.0 .    # an H100's kernels only
#   docker run --rm --gpus all --ipc host --volume "$PWD:/work" vavae-fast doctor
#   docker run --rm --gpus all --ipc host --volume "$PWD:/work" --entrypoint torchrun vavae-fast \
#       --nproc-per-node 8 -m vavae_fast train --config configs/lightningdit_xl_64ep.yaml data.data_path=latents --fused

ARG CUDA_VERSION=13.0.1
ARG UBUNTU_VERSION=24.04

# -- everything that needs a compiler, into one virtual environment ---------------------------------------------------
FROM nvidia/cuda:${CUDA_VERSION}-devel-ubuntu${UBUNTU_VERSION} AS build
SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# Ubuntu's archive keeps one version of a package, so a pinned one would not be found for long.
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends git python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

ENV PATH=/opt/venv/bin:${PATH} PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
COPY constraints.txt ./
# Of the index of CUDA 13.0 builds; constraints.txt has the versions.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cu130
# hadolint ignore=DL3013
RUN python3 -m venv /opt/venv \
    && pip install --constraint constraints.txt --index-url "${TORCH_INDEX}" torch torchvision

# Compiled here against that torch. A job takes up to 4 GB of memory; all of it takes hours on few cores.
ARG TORCH_CUDA_ARCH_LIST="8.0 9.0 10.0 12.0"
ARG MAX_JOBS=4
ARG FLASH_ATTN_VERSION=2.8.3.post2
ARG XFORMERS_VERSION=0.0.35
ARG APEX_COMMIT=6424da3b4faa6c8f062da4a48c424fff3f02d42d
RUN pip install setuptools==80.9.0 wheel==0.45.1 packaging==25.0 psutil==7.1.0 ninja==1.13.0

# It reads architectures in a way of its own: "8.0 9.0" is "80;90". A layer each, so that one that fails costs itself alone.
# hadolint ignore=DL3059
RUN archs="$(echo "${TORCH_CUDA_ARCH_LIST}" | tr --delete . | tr ' ' ';')" \
    && FLASH_ATTN_CUDA_ARCHS="${archs}" FLASH_ATTENTION_FORCE_BUILD=TRUE MAX_JOBS="${MAX_JOBS}" \
       pip install --no-build-isolation --no-binary flash-attn --constraint constraints.txt "flash-attn==${FLASH_ATTN_VERSION}"

# The package index has a build for CUDA 12, which does not load beside a torch for CUDA 13.
# hadolint ignore=DL3059
RUN FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST}" MAX_JOBS="${MAX_JOBS}" \
    pip install --no-build-isolation --no-binary xformers --constraint constraints.txt "xformers==${XFORMERS_VERSION}"

# NVIDIA's, from its repository: the project of that name in the package index is another one.
RUN git init --quiet apex \
    && git -C apex fetch --quiet --depth 1 https://github.com/NVIDIA/apex "${APEX_COMMIT}" \
    && git -C apex checkout --quiet FETCH_HEAD \
    && APEX_CPP_EXT=1 APEX_CUDA_EXT=1 APEX_GROUP_NORM=1 TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST}" MAX_JOBS="${MAX_JOBS}" \
       pip install --no-build-isolation --no-deps ./apex

# Last, so that a change of ours compiles none of the above again.
COPY pyproject.toml README.md LICENSE vavae-fast/
COPY vavae_fast vavae-fast/vavae_fast
COPY kernels vavae-fast/kernels
COPY csrc vavae-fast/csrc
COPY configs vavae-fast/configs
RUN pip install --constraint constraints.txt "./vavae-fast[all,dali,fp8,bench]"

# -- what runs: no toolkit but what Triton and csrc compile with on first use -----------------------------------------
FROM nvidia/cuda:${CUDA_VERSION}-base-ubuntu${UBUNTU_VERSION}
SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends cuda-minimal-build-13-0 g++ python3 python3-dev \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1001 vavae \
    && install --directory --owner vavae /work

COPY --from=build /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:/usr/local/cuda/bin:${PATH} PYTHONUNBUFFERED=1
USER 1001
WORKDIR /work

# Needs no GPU: every package is there, none is another of the same name, and what was compiled loads.
RUN vavae-fast doctor | tee /tmp/doctor.txt \
    && ! grep --extended-regexp "missing|misfit|not NVIDIA" /tmp/doctor.txt \
    && python3 -c "import torch, amp_C, fused_layer_norm_cuda, group_norm_cuda, flash_attn, nvidia.dali, torchao" \
    && python3 -c "from xformers import _cpp_lib; assert _cpp_lib._cpp_library_load_exception is None"

ENTRYPOINT ["vavae-fast"]
CMD ["--help"]
