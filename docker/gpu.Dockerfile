# hedwig on NVIDIA GPUs:  docker build -f docker/gpu.Dockerfile -t hedwig:gpu .
# The CUDA libraries come with torch's own wheels; the host needs the driver and the NVIDIA container toolkit only.
FROM python:3.12-slim
RUN apt-get update && apt-get install -y --no-install-recommends make && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 hedwig
WORKDIR /home/hedwig/app
COPY pyproject.toml constraints.txt README.md LICENSE NOTICE ./
COPY hedwig hedwig
COPY ray_jobs ray_jobs
COPY experiments experiments
# faiss-gpu and faiss-cpu are the same module: the one installed last is the one imported, so faiss-cpu goes first.
RUN python -m pip install --no-cache-dir --constraint constraints.txt . \
    && python -m pip uninstall --yes faiss-cpu && python -m pip install --no-cache-dir "faiss-gpu>=1.12" \
    && chown -R hedwig .
USER hedwig
ENV HF_HUB_OFFLINE=1 RAY_AUTH_MODE=token
ENTRYPOINT ["hedwig"]
CMD ["--help"]
