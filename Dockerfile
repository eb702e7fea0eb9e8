# ear on a GPU host:
#   docker build -t ear .
#   docker run --gpus all --shm-size 8g -v "$PWD:/ear" -it ear bash
# The repository is mounted, so results, DVC's cache and git stay on the host; the environment lies in the image.
FROM astral/uv:0.13.9-python3.12-bookworm-slim

# The compiler is for torch.compile (runtime.compile). Debian keeps no old versions, so a pinned one would stop installing.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc git libc6-dev make \
    && rm -rf /var/lib/apt/lists/*

ENV UV_LINK_MODE=copy UV_COMPILE_BYTECODE=1 DVC_NO_ANALYTICS=1 DO_NOT_TRACK=1
WORKDIR /ear

# The environment first: it changes less often than the code. CUDA's libraries come with torch's wheels.
COPY pyproject.toml requirements.txt README.md LICENSE ./
COPY ear ear
COPY stages stages
COPY flows flows
COPY conf conf
RUN uv venv /opt/ear \
    && uv pip install --python /opt/ear/bin/python --constraint requirements.txt --editable '.[trackers,playground,search,s3]'

ENV PATH=/opt/ear/bin:$PATH VIRTUAL_ENV=/opt/ear
# A mounted repository belongs to the host's user.
RUN git config --system --add safe.directory /ear
# Prefect's page and the playground; publish them on the host's loopback only: -p 127.0.0.1:4200:4200
EXPOSE 4200 7860
CMD ["ear", "doctor"]
