"""Where a figure was measured: written into every result, so that no number stands alone."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def machine() -> dict[str, Any]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "memory_gib": round(memory / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "load_before": round(os.getloadavg()[0], 2),
    }


def versions(*packages: str) -> dict[str, str]:
    return {"python": platform.python_version()} | {
        name: metadata.version(name) for name in sorted(packages)
    }


def spread(seconds: Sequence[float]) -> dict[str, float | int]:
    """Median and 95th percentile of some times, in seconds."""
    ordered = sorted(seconds)
    return {
        "runs": len(ordered),
        "p50_s": round(statistics.median(ordered), 4),
        "p95_s": round(ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))], 4),
    }


def write(name: str, result: dict[str, Any], *packages: str, where: dict[str, Any]) -> Path:
    """``results/NAME.json``: date, machine and versions above the numbers."""
    RESULTS.mkdir(exist_ok=True)
    head = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": where,
        "versions": versions(*packages),
    }
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(head | result, indent=2) + "\n", encoding="utf-8")
    print(f"{path}\n{json.dumps(result, indent=2)}")
    return path


def run_parts(
    name: str,
    parts: Mapping[str, Callable[[bool], dict[str, Any]]],
    packages: Sequence[str],
    about: str | None,
) -> None:
    """A script's command line: ``[PART ...] [--quick]``; each part keeps the others' numbers."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("parts", nargs="*", help=f"some of {', '.join(parts)}; all when none")
    parser.add_argument("--quick", action="store_true", help="a little of each, nothing written")
    options = parser.parse_args()
    if unknown := sorted(set(options.parts) - set(parts)):
        parser.error(f"no such part: {', '.join(unknown)}")
    for each in options.parts or parts:
        where = machine() | {"threads": 1}
        begun = time.perf_counter()
        found = parts[each](options.quick)
        found |= {"took_seconds": round(time.perf_counter() - begun), "load": where["load_before"]}
        print(f"{each}: {found['took_seconds']} s", file=sys.stderr, flush=True)
        if options.quick:
            print(json.dumps(found)[:300])
            continue
        path = RESULTS / f"{name}.json"
        held = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        held |= {each: found}
        write(name, {part: held[part] for part in parts if part in held}, *packages, where=where)
