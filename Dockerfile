# Two images from the same source:
#   docker build --target operator -t disttrain/operator .     no torch, below 250 MB
#   docker build --target trainer  -t disttrain/trainer  .     PyTorch
# Docker needs its buildx plugin, since BuildKit alone knows RUN --mount; Docker Desktop and Docker's own packages bring it.
# Both run as user 65532 on a read-only root file system, with /tmp as their only folder to write.
# --build-arg TORCH_INDEX=<url>  takes torch from there instead: PyTorch's index of CPU wheels makes 1 GB of 6.
# Without network: --build-arg PIP_NO_INDEX=1 --build-context wheels=<folder> --build-context build-wheels=<folder>.
ARG PYTHON_IMAGE=python:3.11-slim

FROM scratch AS wheels
FROM scratch AS build-wheels

FROM ${PYTHON_IMAGE} AS base
# A name for the user: getpass.getuser(), and so torch.compile, fails without one. And bytecode of the standard library, which the
# image lacks and a read-only root could never keep: every start would compile it again.
RUN echo 'disttrain:x:65532:65532:DistTrain:/tmp:/usr/sbin/nologin' >> /etc/passwd \
 && echo 'disttrain:x:65532:' >> /etc/group \
 && python -m compileall -q -j 0 -x '/(test|tests|lib2to3|site-packages|dist-packages)/' \
      "$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')"
ENV HOME=/tmp PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore

# The project's wheel. What builds it stays behind in this stage.
FROM base AS project
ARG PIP_NO_INDEX
WORKDIR /src
RUN --mount=type=bind,from=build-wheels,target=/wheels \
    --mount=type=bind,source=requirements/build.txt,target=/requirements.txt \
    python -m pip install --require-hashes --find-links /wheels -r /requirements.txt
COPY pyproject.toml README.md LICENSE ./
COPY operator operator
COPY trainer_image trainer_image
RUN python -m pip wheel --no-deps --no-build-isolation --no-index --wheel-dir /dist .

# PyTorch in a layer of its own, rebuilt when the locked requirements change and at no other time.
FROM base AS torch
ARG PIP_NO_INDEX
ARG TORCH_INDEX
# The lock's hashes are those of the default index, so that torch from another one has its version pinned, and all else its hash.
RUN --mount=type=bind,from=wheels,target=/wheels \
    --mount=type=bind,source=requirements/trainer.txt,target=/requirements/all.txt \
    --mount=type=bind,source=requirements/trainer-without-torch.txt,target=/requirements/rest.txt \
    if [ -n "$TORCH_INDEX" ]; then \
      python -m pip install --index-url "$TORCH_INDEX" "$(sed -n 's/^\(torch==[^ ]*\).*/\1/p' /requirements/all.txt)" \
      && python -m pip install --require-hashes -r /requirements/rest.txt; \
    else \
      python -m pip install --require-hashes --find-links /wheels -r /requirements/all.txt; \
    fi

FROM torch AS trainer
RUN --mount=type=bind,from=project,source=/dist,target=/dist python -m pip install --no-deps --no-index /dist/*.whl
USER 65532:65532
WORKDIR /tmp
ENTRYPOINT ["env", "--block-signal=TERM", "python", "-P", "-m", "disttrain_trainer"]

FROM base AS operator
ARG PIP_NO_INDEX
# The Kubernetes client is generated: 126 MB, of which most is documentation in docstrings, twice. It is kept as bytecode alone, and
# without the classes of every API, which neither the operator nor kopf uses: both send raw objects.
RUN --mount=type=bind,from=wheels,target=/wheels \
    --mount=type=bind,source=requirements/operator.txt,target=/requirements.txt \
    python -m pip install --require-hashes --find-links /wheels -r /requirements.txt \
 && client="$(python -c 'import importlib.util as u; print(u.find_spec("kubernetes").submodule_search_locations[0])')" \
 && find "$client" -name __pycache__ -prune -exec rm -r {} + \
 && rm -r "$client/client/api" "$client/aio/client/api" \
 && python -OO -m compileall -q -b "$client" \
 && find "$client" -name '*.py' -delete
# The wheel holds the trainer, too, which needs torch.
RUN --mount=type=bind,from=project,source=/dist,target=/dist python -m pip install --no-deps --no-index /dist/*.whl \
 && rm -r "$(python -c 'import importlib.util as u; print(u.find_spec("disttrain_trainer").submodule_search_locations[0])')"
USER 65532:65532
WORKDIR /
ENTRYPOINT ["disttrain-operator"]
