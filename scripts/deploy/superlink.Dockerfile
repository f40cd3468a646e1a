# The SuperLink, with what the server app needs. Build from the checkout: see compose.yaml.
ARG FLWR_VERSION=1.41.0
FROM flwr/superlink:${FLWR_VERSION}
WORKDIR /app
COPY --chown=app:app constraints.txt pyproject.toml README.md ./
COPY --chown=app:app fedlabel fedlabel
COPY --chown=app:app clients clients
COPY --chown=app:app server server
COPY --chown=app:app scripts/deploy/door.py door.py
RUN python -m pip install --no-cache-dir -c constraints.txt .
ENTRYPOINT ["flower-superlink"]
