"""Load servers, interleaved, and print latency percentiles and requests a second; the first is the baseline.

    python scripts/serving/load.py --examples stsb.jsonl --column sentence1 \
        --start dense=MODEL:dense sparse=MODEL:auto mapped=RUNTIME:auto --clients 1 8
    python scripts/serving/load.py --examples stsb.jsonl dense=127.0.0.1:8080 sparse=127.0.0.1:8081

`--start NAME=FOLDER:BACKEND` starts a server of server.py for it; "dense" is torch as it is. Outputs are compared
before anything is timed (`--tolerance` for one that rounds). In each round each server gets the same requests from as
many clients, one server after the other and in the reverse order in the next round. A client sends the next request
when it has the response, on a connection that it keeps. The latency is that of the client: with HTTP, JSON and
tokenization.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from hf_sparse.profiling.timer import in_rounds

ROUTES = {"embedding": "/embed", "reranker": "/rerank", "classifier": "/predict"}


class Result(NamedTuple):
    """What one server did in one round.

    Args:
        seconds: latency of each request.
        elapsed: of all together.
    """

    seconds: list[float]
    elapsed: float


def ask(connection: http.client.HTTPConnection, path: str, body: Any) -> Any:
    """Send a request and return the response.

    Raises:
        RuntimeError: if it is an error.
    """
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    content = json.loads(response.read())
    if response.status != http.HTTPStatus.OK:
        raise RuntimeError(f"{path} returned {response.status}: {content}")
    return content


def requests_of(kind: str, texts: Sequence[str], each: int) -> list[Any]:
    """Return bodies of requests.

    Args:
        each: examples in a request.
    """
    groups = [list(texts[start : start + each]) for start in range(0, len(texts), each)]
    if kind == "embedding":
        return [{"inputs": group, "truncate": True} for group in groups]
    if kind == "reranker":
        return [{"query": group[0], "texts": group, "truncate": True} for group in groups]
    return [{"inputs": [[text] for text in group], "truncate": True} for group in groups]


def numbers(answer: Any) -> list[float]:
    """Return the numbers of a response, those of labels in the order of the labels and not of the scores."""
    if isinstance(answer, list) and answer and isinstance(answer[0], dict):
        key = "index" if "index" in answer[0] else "label"
        return [float(each["score"]) for each in sorted(answer, key=lambda each: str(each[key]))]
    if isinstance(answer, list):
        return [number for each in answer for number in numbers(each)]
    return [float(answer)]


def compare(servers: Mapping[str, str], path: str, bodies: Sequence[Any], tolerance: float) -> None:
    """Refuse servers whose outputs differ from those of the first.

    Raises:
        RuntimeError: naming the server and the difference.
    """
    found = {}
    for name, address in servers.items():
        connection = http.client.HTTPConnection(address)
        found[name] = [number for body in bodies for number in numbers(ask(connection, path, body))]
    first = next(iter(found))
    for name, answers in found.items():
        apart = max(abs(a - b) for a, b in zip(answers, found[first], strict=True))
        if not apart <= tolerance:
            raise RuntimeError(
                f"the outputs of {name} differ from those of {first} by {apart:.1e}; {tolerance:.0e} is allowed"
            )


def send(address: str, path: str, bodies: Sequence[Any], clients: int) -> Result:
    """Send all requests, from several clients at once."""
    seconds: list[float] = []
    errors: list[BaseException] = []
    start = threading.Barrier(clients + 1)

    def work(number: int) -> None:
        connection = http.client.HTTPConnection(address)
        try:
            connection.connect()
            start.wait()
            for body in bodies[number::clients]:
                began = time.perf_counter()
                ask(connection, path, body)
                seconds.append(time.perf_counter() - began)
        except BaseException as error:  # noqa: BLE001  handed on below
            start.abort()
            errors.append(error)
        finally:
            connection.close()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    with contextlib.suppress(threading.BrokenBarrierError):
        start.wait()
    began = time.perf_counter()
    for thread in threads:
        thread.join()
    elapsed = time.perf_counter() - began
    for error in errors:
        if not isinstance(error, threading.BrokenBarrierError):
            raise error
    return Result(seconds, elapsed)


def measure(
    servers: Mapping[str, str], path: str, bodies: Sequence[Any], clients: int, rounds: int
) -> dict[str, list[Result]]:
    """Send the requests to each server in each round."""
    for address in servers.values():
        send(address, path, bodies[: 2 * clients], clients)  # what is made at the first call is not timed
    runs = {name: partial(send, address, path, bodies, clients) for name, address in servers.items()}
    return in_rounds(runs, rounds, warmup=0)


def summary(results: Sequence[Result], bodies: int) -> dict[str, float]:
    """Return percentiles of the latency in milliseconds, of all rounds together, and requests a second."""
    latencies = sorted(1e3 * second for result in results for second in result.seconds)
    cuts = statistics.quantiles(latencies, n=100, method="inclusive") if len(latencies) > 1 else latencies * 99
    rate = statistics.median(bodies / result.elapsed for result in results)
    return {"p50": cuts[49], "p90": cuts[89], "p99": cuts[98], "requests/s": rate}


def start_servers(wanted: Sequence[str], workers: int) -> tuple[dict[str, str], list[subprocess.Popen[str]]]:
    """Start servers, each on a free port, and return their addresses and processes."""
    servers: dict[str, str] = {}
    processes = []
    for each in wanted:
        name, _, rest = each.partition("=")
        folder, _, backend = rest.rpartition(":")
        command = [sys.executable, str(Path(__file__).with_name("server.py")), folder, "--port", "0"]
        command += ["--backend", backend, "--workers", str(workers)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        processes.append(process)
        assert process.stdout is not None
        ready = re.match(r"ready (\S+) ", process.stdout.readline())
        if ready is None:
            raise SystemExit(f"load: the server of {name} did not start")
        servers[name] = ready[1]
    return servers, processes


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("servers", nargs="*", metavar="NAME=HOST:PORT", help="that run already")
    parser.add_argument("--start", nargs="+", default=[], metavar="NAME=FOLDER:BACKEND", help="servers to start")
    parser.add_argument("--workers", type=int, default=1, help="processes of each server that is started (1)")
    parser.add_argument("--examples", required=True, metavar="FILE", help="JSON lines")
    parser.add_argument("--column", default="text")
    parser.add_argument("--count", type=int, default=256, help="examples (256)")
    parser.add_argument("--each", type=int, default=1, help="examples in a request (1)")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--tolerance", type=float, default=1e-3, help="difference of outputs that is allowed (1e-3)")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    lines = Path(options.examples).read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)[options.column] for line in lines[: options.count]]
    servers = dict(each.split("=", 1) for each in options.servers)
    started, processes = start_servers(options.start, options.workers)
    servers |= started
    rows: list[dict[str, Any]] = []
    try:
        connection = http.client.HTTPConnection(next(iter(servers.values())))
        connection.request("GET", "/info")
        kind = json.loads(connection.getresponse().read())["model_type"]
        bodies = requests_of(kind, texts, options.each)
        compare(servers, ROUTES[kind], bodies, options.tolerance)
        print(
            f"{len(bodies)} requests of {options.each} examples to {ROUTES[kind]}, {options.rounds} rounds, interleaved"
        )
        for clients in options.clients:
            found = measure(servers, ROUTES[kind], bodies, clients, options.rounds)
            for name, results in found.items():
                row = summary(results, len(bodies))
                rows.append({"server": name, "clients": clients, **row})
                said = "  ".join(f"{key} {value:8.2f}" for key, value in row.items())
                print(f"{clients} clients  {name:<12} {said}", flush=True)
        if options.json:
            Path(options.json).write_text(json.dumps(rows, indent=1), encoding="utf-8")
    finally:
        for process in processes:
            process.terminate()


if __name__ == "__main__":
    main()
