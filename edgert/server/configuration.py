"""What the daemon can be told."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Configuration:
    host: str = "127.0.0.1"
    port: int = 8343
