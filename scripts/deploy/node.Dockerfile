# A node. It runs the code that is installed in the image, so build it from the node's own checkout: see compose.yaml.
ARG FLWR_VERSION=1.41.0
FROM flwr/supernode:${FLWR_VERSION}
WORKDIR /app
ENV FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1 FLWR_HOME=/tmp/flwr
COPY --chown=app:app constraints.txt pyproject.toml README.md checkout/
COPY --chown=app:app fedlabel checkout/fedlabel
COPY --chown=app:app clients checkout/clients
COPY --chown=app:app server checkout/server
RUN python -m pip install --no-cache-dir -c checkout/constraints.txt ./checkout
ENTRYPOINT ["fedlabel-node"]
