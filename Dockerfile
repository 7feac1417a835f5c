# docs/daemon.md, "In a container"
FROM python:3.13-slim AS build
RUN apt-get update && apt-get install -y --no-install-recommends g++ ninja-build && rm -rf /var/lib/apt/lists/*
COPY . /source
RUN pip install --no-cache-dir --prefix /installed "/source[serve]"

FROM python:3.13-slim
COPY --from=build /installed /usr/local
RUN useradd --system --uid 990 --home-dir /var/lib/edgert --create-home edgert
USER edgert
ENV EDGERT_HOME=/var/lib/edgert EDGERT_HOST=0.0.0.0
VOLUME /var/lib/edgert
EXPOSE 8343
HEALTHCHECK --start-period=60s CMD ["python3", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8343/health', timeout=3)"]
ENTRYPOINT ["edgert", "serve"]
