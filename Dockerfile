# The gateway without embedded stores: it needs DATABASE_URL, REDIS_URL and AAP_KEY_PEPPERS.
FROM python:3.13-slim AS build
WORKDIR /app
COPY requirements/runtime.txt requirements/
RUN python -m venv /venv && /venv/bin/pip install --no-cache-dir --no-compile --require-hashes -r requirements/runtime.txt
COPY core core
COPY keys keys
COPY webhooks webhooks
COPY metering metering
COPY inference inference
COPY gateway gateway
COPY migrations migrations
RUN echo /app > "$(/venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/aap_gateway.pth" \
    && printf '#!/venv/bin/python\nfrom gateway.cli import main\n\nmain()\n' > /venv/bin/aap && chmod +x /venv/bin/aap

FROM python:3.13-slim
RUN useradd --system --uid 10001 --create-home --home-dir /data aap
COPY --from=build /venv /venv
COPY --from=build /app /app
ENV PATH=/venv/bin:$PATH PYTHONDONTWRITEBYTECODE=1 AAP_HOST=0.0.0.0 AAP_DATA_DIR=/data AAP_CONFIG=/etc/aap/aap.toml \
    AAP_FIRST_RUN=false
USER aap
WORKDIR /app
EXPOSE 8080
# 127.0.0.1: a readiness that the outside cannot reach would be no use, and one that only the outside reaches neither.
HEALTHCHECK --interval=10s --timeout=3s --start-period=20s --retries=3 \
    CMD ["python", "-c", "import os, socket; s = socket.create_connection(('127.0.0.1', int(os.environ.get('AAP_PORT') or 8080)), 2); s.sendall(b'GET /readyz HTTP/1.1\\r\\nhost: localhost\\r\\nconnection: close\\r\\n\\r\\n'); raise SystemExit(b' 200 ' not in s.recv(64))"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["aap"]
CMD ["serve", "--no-worker"]
