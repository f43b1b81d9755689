"""What `specwise tap` adds to TTFT, beside a direct connection in the same run.

A scripted server (``load_server.py``) streams a chunk every 20 ms; specwise's own load generator
sends Poisson arrivals that keep about 200 streams open (or as many as asked), in turns directly and
through tap, the order turned round each time. ``framework`` is the same way through a plain aiohttp
proxy, which measures nothing: the reason why tap is not built on one. Added is the difference of
the percentiles of one round; printed are medians over the rounds, with their range. Tap has a core
to itself, server and load generator share the other: what they cost one another is in the direct
figure as well. What other processes took of both cores meanwhile is printed, too: direct, tap's
core is idle and takes such a process in; through tap, streams wait for it. So do they where the
machine itself stalls a core, which only the figures through tap show for tap's core: how late a
bare timer of half a millisecond is on each core is printed first.

Then batches of 10,000 connections are opened and dropped in various states, and tap's memory and
descriptors compared. Allocator pools and the garbage collector's threshold fill up in the first
half of the batches: the second half must add less than 4 MiB.

Tap runs with ``--realtime`` (``--ordinary``: without), as where p99 matters: at ordinary priority a
process that takes its core, be it for 1 % of the time, is what p99 then shows.

    python benchmarks/tap.py [latency] [connections] [--rounds 5] [--streams 200] [--batches 6]
                             [--ordinary]
                             [--tap-core 0] [--other-core 1]

Exits with 1 if the median of the rounds' added TTFT p99 is 1 ms or more, or something leaks.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CHUNKS = 64
STREAM_S = 0.050 + 0.020 * (CHUNKS - 1)

AIOHTTP_PROXY = """
import sys, asyncio, uvloop
from aiohttp import ClientSession, TCPConnector, web
upstream = sys.argv[1]
async def main():
    session = ClientSession(connector=TCPConnector(limit=0), auto_decompress=False)
    async def passed_on(request):
        body = await request.read()
        url = upstream + request.path_qs
        async with session.request(request.method, url, data=body) as answer:
            out = web.StreamResponse(status=answer.status)
            out.content_type = answer.content_type
            await out.prepare(request)
            async for piece in answer.content.iter_any():
                await out.write(piece)
            await out.write_eof()
            return out
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", passed_on)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = site._server.sockets[0].getsockname()[1]
    print(f"proxy at http://127.0.0.1:{port}", file=sys.stderr, flush=True)
    await asyncio.Event().wait()
uvloop.run(main())
"""

TIMER = """
import time
late_ms = []
for _ in range(2000):
    from_s = time.perf_counter()
    time.sleep(0.0005)
    late_ms.append((time.perf_counter() - from_s) * 1e3 - 0.5)
late_ms.sort()
print(f"p50 {late_ms[1000]:.2f} p99 {late_ms[1980]:.2f} max {late_ms[-1]:.2f} ms")
"""

CLIENT = """
import json, sys
sys.path.insert(0, sys.argv[1])
from load_clients import specwise_client
print(json.dumps(specwise_client(json.loads(sys.argv[2]))))
"""


def on(core: int, command: list[str]) -> list[str]:
    return ["taskset", "--cpu-list", str(core), *command]


def start(command: list[str], core: int) -> tuple[subprocess.Popen[str], str]:
    """A proxy on its core, and its address."""
    process = subprocess.Popen(on(core, command), stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        found = re.search(r"(?:tap|proxy) at (http://\S+)", line)
        if found:
            return process, found[1]
    raise RuntimeError("the proxy did not start")


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def measure(url: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    rate = options.streams / STREAM_S
    setting = {"url": url, "rate": rate, "count": int(rate * options.seconds), "seed": seed}
    here = str(Path(__file__).parent)
    command = [sys.executable, "-c", CLIENT, here, json.dumps(setting)]
    done = subprocess.run(
        on(options.other_core, command), check=True, capture_output=True, text=True
    )
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def shown(values: list[float]) -> str:
    return f"{statistics.median(values):6.2f} ({min(values):.2f}-{max(values):.2f})"


def drop_connections(url: str, count: int) -> None:
    """Open connections and leave them in every state: silent, half a head, half an answer."""
    host, port = url.removeprefix("http://").split(":")
    body = json.dumps({"model": "m", "prompt": "p", "stream": True, "max_tokens": CHUNKS})
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    states = (b"", b"POST /v1/comp", head.encode() + b'{"mod', (head + body).encode())
    for batch in range(count // 250):
        held = []
        for i in range(250):
            sock = socket.create_connection((host, int(port)), timeout=10)
            sock.sendall(states[i % 4])
            held.append(sock)
        time.sleep(0.07 if batch % 2 else 0.0)
        for sock in held:
            sock.close()


def state_of(pid: int) -> tuple[int, float]:
    """(open descriptors, resident MiB) of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return len(list(Path(f"/proc/{pid}/fd").iterdir())), pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def busy_s(core: int) -> float:
    """Seconds that the core has spent in processes."""
    for line in Path("/proc/stat").read_text().splitlines():
        if line.startswith(f"cpu{core} "):
            return sum(map(int, line.split()[1:4])) / os.sysconf("SC_CLK_TCK")
    raise RuntimeError(f"no core {core}")


def children_s() -> float:
    """Processor time of the load generators that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def compare_latency(urls: dict[str, str], pids: dict[str, int], options: argparse.Namespace) -> int:
    """Print TTFT by way; returns how many requests failed, plus one if the bar is missed."""
    ttft: dict[str, list[dict[str, float]]] = {way: [] for way in urls}
    cores: dict[str, list[float]] = {way: [] for way in urls}
    others: dict[str, list[float]] = {way: [] for way in urls}
    failed = 0
    for name, core in (("tap's core", options.tap_core), ("the other", options.other_core)):
        timer = on(core, [sys.executable, "-c", TIMER])
        late = subprocess.run(timer, check=True, capture_output=True, text=True).stdout
        print(f"a timer on {name} is late by {late.strip()}", flush=True)

    def used_s() -> float:
        return children_s() + sum(cpu_s(pid) for pid in pids.values())

    def both_s() -> float:
        return busy_s(options.tap_core) + busy_s(options.other_core)

    for turn in range(options.rounds):
        for way in list(urls) if turn % 2 == 0 else list(urls)[::-1]:
            way_s = cpu_s(pids[way]) if way in pids else 0.0
            before_s, ours_s, all_s = time.perf_counter(), used_s(), both_s()
            result = measure(urls[way], turn, options)
            failed += result["failed"]
            foreign_s = both_s() - all_s - (used_s() - ours_s)
            others[way].append(max(0.0, foreign_s / 2 / (time.perf_counter() - before_s)))
            if way in pids:
                used = cpu_s(pids[way]) - way_s
                cores[way].append(used / (options.seconds + STREAM_S))
            ms = [s * 1e3 for s in result["ttft_s"]]
            ttft[way].append({"p50": percentile(ms, 0.5), "p99": percentile(ms, 0.99)})
    print(
        f"{os.cpu_count()} cores; {options.streams} streams, "
        f"{options.streams / STREAM_S * CHUNKS:,.0f} chunks/s; {options.rounds} rounds"
    )
    added = {}
    for way in urls:
        for share in ("p50", "p99"):
            values = [row[share] for row in ttft[way]]
            added[way, share] = [
                a[share] - b[share] for a, b in zip(ttft[way], ttft["direct"], strict=True)
            ]
            line = f"{way:<10} TTFT {share} {shown(values):<24} ms"
            if way != "direct":
                line += f"   added {shown(added[way, share]):<22} ms"
            print(line)
        if cores[way]:
            print(f"{way:<10} uses {statistics.median(cores[way]):.0%} of a core")
        print(f"{way:<10} other processes took {', '.join(f'{o:.0%}' for o in others[way])}")
    p99 = statistics.median(added["tap", "p99"])
    print(f"added TTFT p99 {p99:.2f} ms, bar 1 ms: {'ok' if p99 < 1 else 'MISSED'}")
    print(f"failed requests {failed}")
    return failed + (p99 >= 1)


def drop_batches(url: str, pid: int, options: argparse.Namespace) -> int:
    """Print what tap holds after each batch of dropped connections; 1 if it grows or has died."""
    states = [state_of(pid)]
    for _ in range(options.batches):
        drop_connections(url, options.dropped)
        time.sleep(1)
        states.append(state_of(pid))
    alive = not measure(url, 99, options)["failed"]
    print(
        f"{options.batches} times {options.dropped:,} connections dropped: "
        f"descriptors {', '.join(str(held) for held, _ in states)}; "
        f"resident MiB {', '.join(f'{mib:.1f}' for _, mib in states)}; "
        f"serves {'on' if alive else 'NO MORE'}"
    )
    middle = states[len(states) // 2]
    leak = states[-1][0] > states[0][0] + 2 or states[-1][1] > middle[1] + 4
    return int(leak or not alive)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("parts", nargs="*", default=["latency", "connections"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=8.0, help="of sending, each run")
    parser.add_argument("--dropped", type=int, default=10_000, help="connections in a batch")
    parser.add_argument("--batches", type=int, default=6)
    parser.add_argument("--tap-core", type=int, default=0)
    parser.add_argument("--other-core", type=int, default=1, help="of the server and the load")
    parser.add_argument("--ordinary", action="store_true", help="tap without --realtime")
    options = parser.parse_args()
    server = subprocess.Popen(
        [sys.executable, Path(__file__).with_name("load_server.py"), str(options.other_core)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdout is not None
    upstream = f"http://127.0.0.1:{int(server.stdout.readline())}"
    folder = tempfile.TemporaryDirectory()
    command = [sys.executable, "-m", "specwise.cli.main", "tap", "--upstream", upstream]
    command += ["--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0"]
    command += ["--records", folder.name]
    command += [] if options.ordinary else ["--realtime"]
    tap, tap_url = start(command, options.tap_core)
    proxy, proxy_url = start([sys.executable, "-c", AIOHTTP_PROXY, upstream], options.tap_core)
    failed = 0
    try:
        if "latency" in options.parts:
            urls = {"direct": upstream, "tap": tap_url, "framework": proxy_url}
            pids = {"tap": tap.pid, "framework": proxy.pid, "server": server.pid}
            failed += compare_latency(urls, pids, options)
        if "connections" in options.parts:
            failed += drop_batches(tap_url, tap.pid, options)
    finally:
        for process in (tap, proxy, server):
            process.kill()
            process.communicate()
        folder.cleanup()
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
