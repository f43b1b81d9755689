"""How right, cheap and punctual specwise's load generator is, beside other clients.

A scripted server (``load_server.py``) on one core keeps the truth: when it read each request and
when it sent the first and the last chunk. Each client (``load_clients.py``) runs in a process of
its own on another core, alternated over the rounds, on the same open-loop Poisson load, at the same
times (`vllm bench serve` draws its own). Printed per client: TTFT p50 and p99 beside the server's,
CPU seconds of the whole process per 1,000 chunks, start-up until the server read the first request,
and lateness; medians over rounds, with their range, and ratios to specwise. ``bound`` is what a
uvloop protocol costs that counts the bytes it is handed and does nothing else.

    python benchmarks/load_client.py [--rounds 3] [--vllm-python PATH --tokenizer FOLDER]

Exits with 1 if a bar is missed: TTFT p99 within 10 % at 50,000 chunks/s, at most 0.010 CPU s per
1,000 chunks and as little beside aiohttp's as that is where aiohttp takes 0.026 (another machine
moves both), start-up under 1 s, lateness p99 under 2 ms at 50 to 400 requests/s.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from load_clients import CHUNKS

from specwise.measurement.arrivals import intended_times

# What `vllm bench serve` runs, without the entry point, which the CPU distribution breaks.
VLLM_BENCH = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""
CHUNK_LOADS = (5_000, 20_000, 50_000)
RATES = (50, 100, 200, 400)


# --- one run of one client ----------------------------------------------------------------------


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


def measure(client: str, setting: dict[str, Any], options: argparse.Namespace) -> dict[str, float]:
    """Run one client against the server and put its figures beside the server's log."""
    read_log(setting["url"])
    spawned_s = time.perf_counter()
    if client == "vllm bench serve":
        result = run_vllm_bench(setting, options)
    else:
        script = Path(__file__).with_name("load_clients.py")
        command = [sys.executable, script, client, json.dumps(setting)]
        done = subprocess.run(
            command,
            check=True,
            capture_output=True,
            text=True,
            preexec_fn=lambda: os.sched_setaffinity(0, {options.client_core}),
        )
        result = json.loads(done.stdout)
    log = read_log(setting["url"])
    true_ttft_s = [first - received for received, first, _ in log]
    chunks = len(log) * CHUNKS
    span_s = max(last for _, _, last in log) - min(received for received, _, _ in log)
    own = {share: percentile(result["ttft_s"], share) for share in (0.5, 0.99)}
    true = {share: percentile(true_ttft_s, share) for share in (0.5, 0.99)}
    return {
        "ttft_p50_ms": own[0.5] * 1e3,
        "true_p50_ms": true[0.5] * 1e3,
        "ttft_p99_ms": own[0.99] * 1e3,
        "true_p99_ms": true[0.99] * 1e3,
        "p99_ratio": own[0.99] / true[0.99],
        "cpu_s_per_1000": result["cpu_s"] / chunks * 1000,
        "startup_s": min(received for received, _, _ in log) - spawned_s,
        "lateness_p99_ms": percentile(result.get("lateness_s", []), 0.99) * 1e3,
        "chunks_per_s": chunks / span_s,
        "failed": result["failed"],
        "limited": float(bool(result.get("limits"))),
    }


def run_vllm_bench(setting: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        command = [options.vllm_python, "-c", VLLM_BENCH]
        command += ["--backend", "openai-chat", "--endpoint", "/v1/chat/completions"]
        command += ["--base-url", setting["url"], "--model", "m", "--tokenizer", options.tokenizer]
        command += ["--dataset-name", "random", "--random-input-len", "32"]
        command += ["--random-output-len", str(CHUNKS), "--num-prompts", str(setting["count"])]
        command += ["--request-rate", str(setting["rate"]), "--seed", str(setting["seed"])]
        command += ["--num-warmups", "0", "--ready-check-timeout-sec", "0", "--disable-tqdm"]
        command += ["--save-result", "--save-detailed", "--result-dir", folder]
        command += ["--result-filename", "result.json"]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(
            command,
            check=True,
            capture_output=True,
            env=environment,
            preexec_fn=lambda: os.sched_setaffinity(0, {options.client_core}),
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        result = json.loads((Path(folder) / "result.json").read_text())
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"ttft_s": result["ttfts"], "failed": result["failed"], "cpu_s": cpu_s}


def read_log(url: str) -> list[list[float]]:
    with urllib.request.urlopen(url + "/log", timeout=30) as response:
        rows: list[list[float]] = json.load(response)
    return rows


# --- the comparison -----------------------------------------------------------------------------


def spread(values: list[float], digits: int) -> str:
    if any(map(math.isnan, values)):
        return "-"
    return f"{median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def column(rows: list[dict[str, float]], name: str) -> list[float]:
    return [row[name] for row in rows]


def compare(
    loads: list[tuple[str, float]], clients: list[str], options: argparse.Namespace, url: str
) -> dict[tuple[str, str], list[dict[str, float]]]:
    """Every client at every load, ``rounds`` times, the order turned round each time."""
    rows: dict[tuple[str, str], list[dict[str, float]]] = {}
    for label, rate in loads:
        for turn in range(options.rounds):
            count = max(50, int(rate * options.seconds))
            setting = {"url": url, "rate": rate, "count": count, "seed": turn}
            with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
                times_s = intended_times("poisson", rate, count, np.random.default_rng(turn))
                json.dump(times_s, file)
                file.flush()
                setting["times_file"] = file.name
                for client in clients if turn % 2 == 0 else clients[::-1]:
                    rows.setdefault((label, client), []).append(measure(client, setting, options))
        for client in clients:
            print_row(label, client, rows[label, client], rows[label, clients[0]])
    return rows


def print_row(
    label: str, client: str, rows: list[dict[str, float]], ours: list[dict[str, float]]
) -> None:
    cpu = median(column(rows, "cpu_s_per_1000"))
    ratio = cpu / median(column(ours, "cpu_s_per_1000"))
    late = column(rows, "lateness_p99_ms")
    print(
        f"{label:>14}  {client:<17}"
        f" {median(column(rows, 'chunks_per_s')):>8,.0f}"
        f"  {median(column(rows, 'true_p50_ms')):5.1f} {spread(column(rows, 'ttft_p50_ms'), 1):<18}"
        f" {median(column(rows, 'true_p99_ms')):5.1f} {spread(column(rows, 'ttft_p99_ms'), 1):<20}"
        f" {spread(column(rows, 'p99_ratio'), 3):<20}"
        f" {spread(column(rows, 'cpu_s_per_1000'), 4):<23} {ratio:4.1f}x"
        f"  {spread(column(rows, 'startup_s'), 2):<17}"
        f" {spread(late, 2):<17}"
        f" {sum(column(rows, 'failed')):.0f}"
        + (f"  flagged in {sum(column(rows, 'limited')):.0f}" if client == "specwise" else ""),
        flush=True,
    )


HEADER = (
    f"{'load':>14}  {'client':<17} {'chunks/s':>8}  {'TTFT p50 ms: true, seen':<24}"
    f" {'TTFT p99 ms: true, seen':<26} {'p99 seen/true':<20} {'CPU s/1,000 chunks':<23}"
    f" {'ratio':<6} {'start-up s':<17} {'lateness p99 ms':<17} failed"
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=6.0, help="of sending, each run")
    parser.add_argument(
        "--chunk-loads", type=int, nargs="+", default=CHUNK_LOADS, help="chunks/s; the last counts"
    )
    parser.add_argument("--rates", type=int, nargs="*", default=RATES, help="requests/s")
    parser.add_argument("--vllm-python", help="a Python that has vLLM, for `vllm bench serve`")
    parser.add_argument("--tokenizer", help="folder of a tokenizer, for `vllm bench serve`")
    parser.add_argument("--client-core", type=int, default=0)
    parser.add_argument("--server-core", type=int, default=1)
    options = parser.parse_args()
    clients = ["specwise", "bound", "aiohttp"]
    if options.vllm_python and options.tokenizer:
        clients.append("vllm bench serve")
    server = subprocess.Popen(
        [sys.executable, Path(__file__).with_name("load_server.py"), str(options.server_core)],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stdout is not None
        url = f"http://127.0.0.1:{int(server.stdout.readline())}"
        print(f"{os.cpu_count()} cores; {options.rounds} rounds; medians (range)\n{HEADER}")
        heavy = compare(
            [(f"{load:,} chunks/s", load / CHUNKS) for load in options.chunk_loads],
            clients,
            options,
            url,
        )
        rates = [(f"{rate} req/s", float(rate)) for rate in options.rates]
        punctual = compare(rates, ["specwise", "aiohttp"], options, url)
    finally:
        server.kill()
        server.communicate()
    return judge(f"{options.chunk_loads[-1]:,} chunks/s", heavy, punctual)


def judge(
    top_load: str,
    heavy: dict[tuple[str, str], list[dict[str, float]]],
    punctual: dict[tuple[str, str], list[dict[str, float]]],
) -> int:
    """Print every bar beside what was reached; 1 if one was missed."""
    top = heavy[top_load, "specwise"]
    cpu, bound, aiohttp = (
        median(column(heavy[top_load, client], "cpu_s_per_1000"))
        for client in ("specwise", "bound", "aiohttp")
    )
    late = [
        median(column(rows, "lateness_p99_ms"))
        for (_, client), rows in punctual.items()
        if client == "specwise"
    ]
    bars = [
        ("TTFT p99 seen/true - 1", abs(median(column(top, "p99_ratio")) - 1), 0.10),
        ("CPU s per 1,000 chunks", cpu, 0.010),
        ("CPU, share of aiohttp's", cpu / aiohttp, 0.010 / 0.026),
        ("start-up s", median(column(top, "startup_s")), 1.0),
        ("lateness p99 ms, worst rate", max(late, default=math.nan), 2.0),
    ]
    for name, value, bar in bars:
        verdict = "MISSED" if value > bar else "ok" if value <= bar else "-"
        print(f"{name:<30} {value:8.4f}  bar {bar:.3g}  {verdict}")
    print(f"{'CPU, ratio to the bound':<30} {cpu / bound:8.4f}")
    return int(any(value > bar for _, value, bar in bars))


if __name__ == "__main__":
    sys.exit(main())
