"""The engine's knobs for every model of the daemon. Imports nothing of the extra `serve`."""

from collections.abc import Mapping
from typing import Any

from edgert import settings


def knobs_of(given: Mapping[str, Any], device: str | None) -> dict[str, Any]:
    """Flags, variables and files; what none of them says as the device profile states it."""
    from edgert.loading import knob_values

    values = knob_values(given)
    if device is not None:
        for name, value in profile_knobs(device).items():
            if values[name] is None:
                values[name] = value
    return values


def profile_knobs(device: str) -> dict[str, Any]:
    from edgert.devices import load_device

    profile = load_device(device)
    stated: dict[str, Any] = {"context": profile.bundle.context_tokens, "isa": profile.cpu.isa}
    if profile.bundle.memory_mib is not None:
        stated["memory"] = profile.bundle.memory_mib << 20
    rows = {setting.name: setting for setting in settings.knobs()}
    return {name: rows[name].check(value, f"device {device}: {name}") for name, value in stated.items()}
