# A node, with the app in it: the container is read-only, so the node runs no other. Build from the node's own checkout: see compose.yaml.
ARG FLWR_VERSION=1.41.0
FROM flwr/supernode:${FLWR_VERSION}
WORKDIR /app
ENV FLWR_HOME=/app/.flwr FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1
COPY --chown=app:app constraints.txt pyproject.toml README.md checkout/
COPY --chown=app:app fedlabel checkout/fedlabel
COPY --chown=app:app clients checkout/clients
COPY --chown=app:app server checkout/server
COPY --chown=app:app configs checkout/configs
RUN python -m pip install --no-cache-dir -c checkout/constraints.txt ./checkout \
    && flwr build --app checkout && flwr install ./*.fab && rm ./*.fab
ENTRYPOINT ["flower-supernode"]
