"""A machine as files: what /proc and /sys say, to be changed by a test."""

import shutil
from pathlib import Path

GIB = 1 << 30


class FakeMachine:
    """16 GiB, a cgroup of version 2 with a limit, two thermal zones, a battery, pressure files."""

    def __init__(self, root: Path, *, cgroup: int = 2) -> None:
        self.root, self.cgroup = root, cgroup
        self.meminfo(8 * GIB)
        self.stat(0)
        for name in ("memory", "io", "cpu"):
            self.pressure(name, 0)
        for zone in (0, 1):
            self.write(f"sys/class/thermal/thermal_zone{zone}/type", "cpu-thermal")
            self.temperature(zone, 50)
        self.write("sys/class/thermal/thermal_zone0/trip_point_0_type", "passive")
        self.write("sys/class/thermal/thermal_zone0/trip_point_0_temp", "80000")
        self.write("sys/class/thermal/thermal_zone0/trip_point_1_type", "critical")
        self.write("sys/class/thermal/thermal_zone0/trip_point_1_temp", "85000")
        self.write("sys/class/power_supply/BAT0/type", "Battery")
        self.battery("Charging", 90)
        self.write("sys/devices/system/cpu/cpufreq/policy0/cpuinfo_max_freq", "2000000")
        self.write("sys/devices/system/cpu/cpufreq/policy0/scaling_cur_freq", "1500000")
        if cgroup == 2:
            self.write("proc/self/cgroup", "0::/box/app\n")
            self.write("proc/self/mountinfo", "30 1 0:1 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n")
        else:
            self.write("proc/self/cgroup", "4:memory:/box/app\n")
            self.write("proc/self/mountinfo", "30 1 0:1 / /sys/fs/cgroup rw - cgroup cgroup rw,memory\n")
        self.group("box", 4 * GIB, GIB)
        self.group("box/app", None, GIB)

    def write(self, path: str, text: object) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")

    def remove(self, path: str) -> None:
        file = self.root / path
        shutil.rmtree(file) if file.is_dir() else file.unlink()

    def meminfo(self, available: int) -> None:
        self.write("proc/meminfo", f"MemTotal: {16 * GIB // 1024} kB\nMemAvailable: {available // 1024} kB")

    def group(self, name: str, limit: int | None, usage: int, cache: int = 0) -> None:
        path = f"sys/fs/cgroup/{name}"
        if self.cgroup == 2:
            self.write(f"{path}/memory.max", "max" if limit is None else limit)
            self.write(f"{path}/memory.current", usage)
            self.write(f"{path}/memory.stat", f"anon {usage - cache}\ninactive_file {cache}")
        else:
            self.write(f"{path}/memory.limit_in_bytes", (1 << 63) - 4096 if limit is None else limit)
            self.write(f"{path}/memory.usage_in_bytes", usage)
            self.write(f"{path}/memory.stat", f"cache {cache}\ntotal_inactive_file {cache}")

    def temperature(self, zone: int, celsius: float) -> None:
        self.write(f"sys/class/thermal/thermal_zone{zone}/temp", round(celsius * 1000))

    def pressure(self, name: str, seconds: float) -> None:
        total = round(seconds * 1e6)
        self.write(f"proc/pressure/{name}", f"some avg10=0.00 avg60=0.00 avg300=0.00 total={total}")

    def stat(self, major_faults: int) -> None:
        fields = ["0"] * 9 + [str(major_faults)] + ["0"] * 40
        self.write("proc/self/stat", "1 (a name) of its own) " + " ".join(fields))

    def battery(self, status: str, charge: float) -> None:
        self.write("sys/class/power_supply/BAT0/status", status)
        self.write("sys/class/power_supply/BAT0/capacity", charge)
