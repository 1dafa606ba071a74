# hedwig on CPUs:  docker build -f docker/cpu.Dockerfile -t hedwig:cpu .
FROM python:3.12-slim
RUN apt-get update && apt-get install -y --no-install-recommends make && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 hedwig
WORKDIR /home/hedwig/app
COPY pyproject.toml constraints.txt README.md LICENSE NOTICE ./
COPY hedwig hedwig
COPY ray_jobs ray_jobs
COPY experiments experiments
RUN python -m pip install --no-cache-dir --constraint constraints.txt . && chown -R hedwig .
USER hedwig
ENV HF_HUB_OFFLINE=1 RAY_AUTH_MODE=token
ENTRYPOINT ["hedwig"]
CMD ["--help"]
