# minivllm on a CPU.
#
#   docker build -t minivllm --build-arg TORCH_INDEX=<an index with CPU builds of torch> .
#   docker run --rm -p 127.0.0.1:8000:8000 -v /path/to/model:/model:ro minivllm --model /model
#
# Without TORCH_INDEX, pip's own choice of torch is installed: a CUDA build of several GB.

FROM python:3.12-slim AS build
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/minivllm
ARG TORCH_INDEX=
RUN if [ -n "$TORCH_INDEX" ]; then \
        /opt/minivllm/bin/pip install --no-cache-dir --no-deps --index-url "$TORCH_INDEX" "torch>=2.6"; \
    fi
COPY pyproject.toml README.md .gitignore /src/
COPY csrc /src/csrc
COPY minivllm /src/minivllm
RUN /opt/minivllm/bin/pip install --no-cache-dir /src

FROM python:3.12-slim
COPY --from=build /opt/minivllm /opt/minivllm
RUN useradd --create-home minivllm
USER minivllm
WORKDIR /home/minivllm
ENV PATH=/opt/minivllm/bin:$PATH
EXPOSE 8000
# exec form: the server is process 1 and gets SIGTERM itself.
ENTRYPOINT ["python", "-m", "minivllm.entrypoints.openai.api_server"]
