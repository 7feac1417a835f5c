"""The daemon (`edgert serve`, extra `serve`): starlette and uvicorn around the engines of several models.

configuration  what can be set, and the models to serve
state          what routes share: models, limits, metrics, life
models         the registry: several models under one budget
guard          what every request passes: Host, Origin, key, size, time
errors         failures in the clients' shape
metrics        counters and histograms, and their text
pages          health, statistics, adapters, dashboard
app, run       the pieces together; sockets, signals, systemd
"""
