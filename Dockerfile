# fuselm in a container, with the versions of constraints.txt.
#
#     docker build --target cpu --tag fuselm .     # or --target cuda, for NVIDIA GPUs
#     docker run --rm --user "$(id -u):$(id -g)" --volume "$PWD:/work" fuselm run my.yaml
#
# The CUDA stage needs no CUDA in its base image: torch's wheels bring the libraries, the host the driver.

FROM python:3.11-slim-bookworm AS base
ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PATH=/opt/fuselm/bin:$PATH
RUN python -m venv /opt/fuselm
WORKDIR /src
COPY constraints.txt ./

# torch changes seldom and is large, so it has a layer of its own.
FROM base AS build-cpu
RUN pip install --constraint constraints.txt --index-url https://download.pytorch.org/whl/cpu torch
COPY pyproject.toml README.md LICENSE ./
COPY src src
RUN pip install --constraint constraints.txt '.[lora]'

FROM base AS build-cuda
RUN pip install --constraint constraints.txt torch
COPY pyproject.toml README.md LICENSE ./
COPY src src
RUN pip install --constraint constraints.txt '.[qlora]'

# /cache holds converted models, compiled kernels and hub downloads. Anybody may write to it, so that
# the container can run as the user who owns the mounted folder; mount a volume there to keep it.
FROM python:3.11-slim-bookworm AS runtime
ENV PATH=/opt/fuselm/bin:$PATH \
    FUSELM_CACHE=/cache/fuselm \
    HF_HOME=/cache/huggingface \
    PYTHONUNBUFFERED=1
RUN mkdir -m 1777 /cache
WORKDIR /work
ENTRYPOINT ["fuselm"]
CMD ["--help"]

FROM runtime AS cuda
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=build-cuda /opt/fuselm /opt/fuselm

# The last stage is what `docker build .` makes.
FROM runtime AS cpu
COPY --from=build-cpu /opt/fuselm /opt/fuselm
