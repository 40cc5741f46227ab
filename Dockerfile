# The command `quire` on a CPU. The context is the repository:
#   docker build -t quire .
#   docker run --rm -it quire chat
#   docker run --rm -p 127.0.0.1:8000:8000 quire serve quire/demo --host 0.0.0.0
# pip takes torch from the index it is configured for; --build-arg PIP_EXTRA_INDEX_URL=... points
# it at another, such as PyTorch's own of CPU builds, which are far smaller.
FROM python:3.11-slim

ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS

WORKDIR /src
COPY pyproject.toml setup.py constraints.txt README.md LICENSE ./
COPY core_engine core_engine
COPY kernels kernels
COPY integrations integrations
# The compiler makes the native kernels and is not needed afterwards.
RUN apt-get update && apt-get install -y --no-install-recommends g++ \
    && QUIRE_REQUIRE_NATIVE=1 pip install --no-cache-dir -c constraints.txt ".[langchain,openai,outlines,server]" \
    && apt-get purge -y --auto-remove g++ && rm -rf /var/lib/apt/lists/* /src/*

# Downloaded models go to the volume; the process has no rights beyond it.
RUN useradd --create-home quire && mkdir /models && chown quire /models
USER quire
WORKDIR /home/quire
ENV HF_HOME=/models
VOLUME /models
EXPOSE 8000

ENTRYPOINT ["quire"]
CMD ["demo"]
