# hedwig on CPUs:  docker build -f docker/cpu.Dockerfile -t hedwig:cpu .
#   docker run --rm --read-only --tmpfs /tmp -e HOME=/tmp --cap-drop ALL -p 127.0.0.1:8000:8000 hedwig:cpu hedwig --help
# Exact versions are those of constraints.txt; pin BASE by its digest where builds must repeat (BASE=python@sha256:…).
# A package index of your own, or one with torch's CPU wheels (4 GB less): --secret id=pip,src=pip.conf
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
