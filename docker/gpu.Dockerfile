# hedwig on NVIDIA GPUs:  docker build -f docker/gpu.Dockerfile -t hedwig:gpu .
# The CUDA libraries come with torch's own wheels; the host needs the driver and the NVIDIA container toolkit only.
# Exact versions are those of constraints.txt; pin BASE by its digest where builds must repeat (BASE=python@sha256:…).
ARG BASE=python:3.12-slim-bookworm

FROM ${BASE} AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/hedwig
ENV PATH=/opt/hedwig/bin:$PATH
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE NOTICE ./
# The dependencies first, for a package that is still empty: a change of the code does not install them again.
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    mkdir hedwig && touch hedwig/__init__.py \
    && python -m pip install --constraint constraints.txt . && python -m pip uninstall --yes hedwig
# faiss-gpu and faiss-cpu are the same module, and the one installed last is imported: faiss-cpu goes first. The version
# is that of faiss-cpu, so an index written by one is read by the other.
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    version=$(sed -n 's/^faiss-cpu==//p' constraints.txt) && python -m pip uninstall --yes faiss-cpu \
    && python -m pip install --constraint constraints.txt "faiss-gpu==$version"
COPY hedwig hedwig
RUN --mount=type=secret,id=pip,target=/etc/pip.conf python -m pip install --no-deps .

FROM ${BASE}
RUN useradd --create-home --uid 1000 hedwig
COPY --from=build /opt/hedwig /opt/hedwig
COPY docker/healthcheck.py /opt/hedwig/
WORKDIR /home/hedwig/app
COPY ray_jobs ray_jobs
COPY experiments experiments
ENV PATH=/opt/hedwig/bin:$PATH HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
USER 1000:1000
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=10s --start-period=60s --retries=3 CMD ["python", "/opt/hedwig/healthcheck.py"]
CMD ["hedwig", "--help"]
