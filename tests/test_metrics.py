"""Metrics of one process and of several, and the log's two formats."""

import io
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from prism import logs
from prism.metrics import Metrics

CHILD = """
import os, sys
from prism.metrics import Metrics, forget_process
if sys.argv[1] == "text":
    for pid in sys.argv[2:]:
        forget_process(int(pid))
    sys.stdout.write(Metrics().text().decode())
else:
    metrics = Metrics()
    metrics.generation_tokens.labels("m").inc(int(sys.argv[1]))
    metrics.num_requests_waiting.labels("m").set(int(sys.argv[1]))
    metrics.slabs.labels("free", "", "w0").set(int(sys.argv[1]))
    metrics.time_to_first_token_seconds.labels("m").observe(0.3)
    print(os.getpid())
"""


def child(directory: Path, *args: str) -> str:
    env = os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(directory)}
    command = [sys.executable, "-c", CHILD, *args]
    return subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout


def test_names_are_vllm_s_with_our_prefix() -> None:
    metrics = Metrics()
    metrics.num_requests_running.labels("m").set(2)
    metrics.prefix_cache_hits.labels("m").inc(5)
    metrics.request_success.labels("m", "stop").inc()
    text = metrics.text().decode()
    assert 'prism:num_requests_running{model_name="m"} 2.0' in text
    assert 'prism:prefix_cache_hits_total{model_name="m"} 5.0' in text
    assert 'prism:request_success_total{finished_reason="stop",model_name="m"} 1.0' in text


def test_two_sets_in_one_process_do_not_meet() -> None:
    one, other = Metrics(), Metrics()
    one.evictions.labels("m").inc()
    assert "prism:evictions_total{" in one.text().decode()
    assert "prism:evictions_total{" not in other.text().decode()


def test_all_processes_come_out_of_any(tmp_path: Path) -> None:
    pids = [child(tmp_path, "3").strip(), child(tmp_path, "4").strip()]
    text = child(tmp_path, "text", pids[0])
    assert 'prism:generation_tokens_total{model_name="m"} 7.0' in text
    assert 'prism:num_requests_waiting{model_name="m"} 4.0' in text  # the first process has ended
    assert 'prism:time_to_first_token_seconds_count{model_name="m"} 2.0' in text
    assert 'prism:slabs{model="",owner="free",worker="w0"} 4.0' in text


@pytest.fixture
def restored_logger() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("prism", *logs.LIBRARIES)]
    before = [(logger.handlers[:], logger.level, logger.propagate) for logger in loggers]
    yield
    for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
        logger.handlers[:], logger.level, logger.propagate = handlers, level, propagate


@pytest.mark.usefixtures("restored_logger")
def test_log_lines() -> None:
    stream = io.StringIO()
    logs.setup("info", json=False, stream=stream)
    logging.getLogger("prism.gateway").info("hello\nforged", extra={"request_id": "r1"})
    logging.getLogger("prism.gateway").debug("unseen")
    line = stream.getvalue()
    assert line.count("\n") == 1
    assert line.endswith(" INFO gateway: hello\\nforged request_id=r1\n")


@pytest.mark.usefixtures("restored_logger")
def test_log_json() -> None:
    stream = io.StringIO()
    logs.setup("warning", json=True, stream=stream)
    try:
        raise ValueError("no")
    except ValueError:
        logging.getLogger("prism.x").exception("it failed", extra={"model": "m", "seconds": 0.5})
    record = json.loads(stream.getvalue())
    assert record["level"] == "error"
    assert (record["part"], record["message"]) == ("x", "it failed")
    assert (record["model"], record["seconds"]) == ("m", 0.5)
    assert "ValueError: no" in record["exception"]


@pytest.mark.usefixtures("restored_logger")
def test_errors_of_libraries_have_the_same_format() -> None:
    """They went to Python's last resort, as bare lines, and any client could write some."""
    stream = io.StringIO()
    logs.setup("debug", json=True, stream=stream)
    logging.getLogger("uvicorn.error").warning("Invalid HTTP request received.")
    assert not stream.getvalue()
    logging.getLogger("uvicorn.error").error("Exception in ASGI application")
    assert json.loads(stream.getvalue())["part"] == "uvicorn.error"
