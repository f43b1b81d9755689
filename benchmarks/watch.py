"""What watching costs: 100 replicas every 15 s, in shares of a core.

    python benchmarks/watch.py [--rounds 4]

Each replica is a server in another process that answers with a real vLLM 0.32's page of 59 kB (629
lines; benchmarks/vllm-metrics.txt), its counters growing. Bar: under 5 % of a core. The other side
of the ratio is the same loop with the whole page parsed, as prometheus_client's users would do it.
"""

from __future__ import annotations

import argparse
import http.server
import multiprocessing
import re
import statistics
import time
from pathlib import Path

from specwise.monitoring.watch import Watch
from specwise.vllm import metrics

REPLICAS, PERIOD_S, BAR = 100, 15.0, 0.05
PAGE = (Path(__file__).parent / "vllm-metrics.txt").read_text()
_COUNTER = re.compile(r"^(vllm:(?:spec_decode|generation)\S*_total\S*) (\S+)$", re.MULTILINE)


class _Replica(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    looks = 0

    def do_GET(self) -> None:
        type(self).looks += 1
        grown = _COUNTER.sub(lambda m: f"{m[1]} {float(m[2]) + 100 * self.looks}", PAGE).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(grown)))
        self.end_headers()
        self.wfile.write(grown)

    def log_message(self, *_: object) -> None:
        """No log: its writing would be timed."""


def serve(ports: multiprocessing.Queue) -> None:  # type: ignore[type-arg]
    """One process with one listening socket for all replicas, on ports of their own."""
    servers = [http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Replica) for _ in range(REPLICAS)]
    ports.put([server.server_port for server in servers])
    import threading  # noqa: PLC0415

    for server in servers:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    time.sleep(3600)


def cpu_s(urls: list[str], rounds: int) -> list[float]:
    """Processor seconds of each round after the first."""
    found = []
    with Watch(None) as watch:
        watch.round(urls)
        for _ in range(rounds):
            began = time.process_time()
            standings = watch.round(urls)
            found.append(time.process_time() - began)
            assert all(s.rate is not None for s in standings)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=4)
    rounds = parser.parse_args().rounds
    context = multiprocessing.get_context("spawn")
    ports = context.Queue()
    process = context.Process(target=serve, args=(ports,), daemon=True)
    process.start()
    urls = [f"http://127.0.0.1:{port}" for port in ports.get()]
    quick, whole = [], []
    parse = metrics.parse
    for _ in range(2):  # the two sides alternate
        quick += cpu_s(urls, rounds)
        metrics.parse = lambda text, histograms=None: parse(text)  # type: ignore[assignment]  # noqa: ARG005
        whole += cpu_s(urls, rounds)
        metrics.parse = parse
    process.kill()
    shares = {"specwise watch": quick, "parsing the whole page": whole}
    for name, seconds in shares.items():
        share = [s / PERIOD_S for s in seconds]
        print(
            f"{name}: {statistics.median(share):.2%} of a core for {REPLICAS} replicas every "
            f"{PERIOD_S:g} s ({min(share):.2%} to {max(share):.2%}); "
            f"{1000 * statistics.median(seconds) / REPLICAS:.1f} ms a replica"
        )
    mine = statistics.median(quick)
    print(f"ratio {mine / statistics.median(whole):.2f}; bar {BAR:.0%}")
    return 0 if mine / PERIOD_S <= BAR else 1


if __name__ == "__main__":
    raise SystemExit(main())
