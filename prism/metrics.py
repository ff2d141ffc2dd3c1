"""All Prometheus metrics, declared once and used by every process.

Names are vLLM's with the prefix `prism:`, so that dashboards carry over. When the agent sets
PROMETHEUS_MULTIPROC_DIR before a process starts, all processes write to files in that folder and any
gateway's /metrics shows the sum of all; without it a process shows its own.
"""

from __future__ import annotations

import os

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, multiprocess

from prism.stalls import STALL_SECONDS

_MULTIPROC = "PROMETHEUS_MULTIPROC_DIR"
_TTFT = (0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.25, 0.5, 0.75, 1, 2.5, 5, 10, 20, 40, 80, 160)
_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.4, 0.8, 2, 5)
_LONG = (0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 60, 120, 300, 600, 1800)


class Metrics:
    """Every metric as an attribute. `model_name` is a label of all that concern one model."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._declare_engine()
        self._declare_requests()
        self._declare_cluster()
        self._declare_tenants()
        self._declare_loops()

    def _declare_engine(self) -> None:
        """Written by workers; gateways add what they hold for want of a worker to the waiting."""
        self.num_requests_running = self._gauge("num_requests_running", "Requests in engines", "livesum")
        self.num_requests_waiting = self._gauge("num_requests_waiting", "Requests that wait", "livesum")
        self.kv_cache_usage_perc = self._gauge(
            "kv_cache_usage_perc", "Share of a model's KV blocks in use; 1 is full", "livemax"
        )
        self.prefix_cache_queries = self._counter("prefix_cache_queries", "Prompt tokens looked up")
        self.prefix_cache_hits = self._counter("prefix_cache_hits", "Prompt tokens found")
        self.num_preemptions = self._counter("num_preemptions", "Sequences that gave their KV up")
        self.steps = self._counter("steps", "Steps that have run", "kind")
        self.step_tokens = self._counter("step_tokens", "Tokens that they computed", "kind")
        self.step_seconds = self._counter("step_seconds", "Time that they took", "kind")
        self.step_predicted_seconds = self._counter(
            "step_predicted_seconds", "Time that the profile, or shape and rates, had them take", "kind"
        )
        self.work_alone = self._counter(
            "work_alone",
            "Steps that had the device to themselves, and loads that had the link, of models in the profile; "
            "costs is a digest of what it says of them",
            "kind",
            "costs",
        )
        self.work_alone_seconds = self._counter("work_alone_seconds", "Time that these took", "kind", "costs")
        self.work_alone_predicted_seconds = self._counter(
            "work_alone_predicted_seconds", "Time that the profile had these take", "kind", "costs"
        )
        self.kv_host_bytes = self._gauge("kv_host_bytes", "KV that waits in host memory", "livesum")
        self.kv_blocks_saved = self._counter("kv_blocks_saved", "KV blocks copied to host memory")
        self.kv_blocks_fetched = self._counter("kv_blocks_fetched", "KV blocks copied back to the device")

    def _declare_requests(self) -> None:
        """Written by gateways."""
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of requests that started")
        self.generation_tokens = self._counter("generation_tokens", "Tokens generated")
        self.request_success = self._counter("request_success", "Choices finished", "finished_reason")
        self.request_failure = self._counter("request_failure", "Requests failed", "code")
        self.time_to_first_token_seconds = self._histogram("time_to_first_token_seconds", _TTFT)
        self.inter_token_latency_seconds = self._histogram("inter_token_latency_seconds", _TOKEN)
        self.e2e_request_latency_seconds = self._histogram("e2e_request_latency_seconds", _LONG)
        self.request_queue_time_seconds = self._histogram("request_queue_time_seconds", _LONG)
        self.request_prefill_time_seconds = self._histogram("request_prefill_time_seconds", _LONG)
        self.request_decode_time_seconds = self._histogram("request_decode_time_seconds", _LONG)
        self.resubmissions = self._counter(
            "resubmissions", "Requests sent again: a worker had died, or gave them back"
        )

    def _declare_cluster(self) -> None:
        """Written by workers, the controller (migrations) and the agent (restarts)."""
        self.slabs = Gauge(
            "prism:slabs",
            "Slabs by owner: free, retiring, weights, kv, workspace",
            ("owner", "model", "worker"),
            registry=self._registry,
            multiprocess_mode="livesum",
        )
        self.graphs = self._of_worker("graphs", "CUDA graphs of decode steps")
        self.graph_bytes = self._of_worker("graph_bytes", "Device memory that the driver took for them")
        self.unaccounted_bytes = self._of_worker(
            "unaccounted_bytes",
            "Device memory that no slab, graph or allocator of the worker held when it was last quiet",
        )
        self.activations = self._counter("activations", "Models brought into device memory")
        self.activation_seconds = self._histogram("activation_seconds", _LONG)
        self.migrations = self._counter("migrations", "Models moved, copied or merged", "result")
        self.evictions = self._counter("evictions", "Models whose weights gave way")
        self.worker_restarts = Counter(
            "prism:worker_restarts", "Workers started again", ("worker",), registry=self._registry
        )

    def _declare_tenants(self) -> None:
        """Written by workers, of configured tenants alone; gateways add what they hold to the waiting."""
        self.tenant_requests_running = self._of_tenant("requests_running", "Requests in engines")
        self.tenant_requests_waiting = self._of_tenant("requests_waiting", "Requests that wait")
        self.tenant_prompt_tokens = self._used_by_tenant("prompt_tokens", "Prompt tokens computed")
        self.tenant_generation_tokens = self._used_by_tenant("generation_tokens", "Tokens drawn")
        self.tenant_device_seconds = self._used_by_tenant(
            "device_seconds", "Time of devices, by the cost model: what shares are about"
        )

    def _declare_loops(self) -> None:
        """Written by workers and gateways."""
        self.loop_stalls = self._of_process(
            "loop_stalls", f"Times that a process's loop stood still for more than {STALL_SECONDS} s"
        )
        self.loop_stall_seconds = self._of_process("loop_stall_seconds", "Time in which it did")

    def _of_process(self, name: str, text: str) -> Counter:
        return Counter(f"prism:{name}", text, ("process",), registry=self._registry)

    def _of_tenant(self, name: str, text: str) -> Gauge:
        return Gauge(
            f"prism:tenant_{name}", text, ("tenant",), registry=self._registry, multiprocess_mode="livesum"
        )

    def _used_by_tenant(self, name: str, text: str) -> Counter:
        return Counter(f"prism:tenant_{name}", text, ("tenant",), registry=self._registry)

    def _gauge(self, name: str, text: str, mode: str) -> Gauge:
        return Gauge(
            f"prism:{name}",
            text,
            ("model_name",),
            registry=self._registry,
            multiprocess_mode=mode,  # type: ignore[arg-type]  # a Literal in the library
        )

    def _of_worker(self, name: str, text: str) -> Gauge:
        return Gauge(f"prism:{name}", text, ("worker",), registry=self._registry, multiprocess_mode="livesum")

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"prism:{name}", text, ("model_name", *labels), registry=self._registry)

    def _histogram(self, name: str, buckets: tuple[float, ...]) -> Histogram:
        text = name.replace("_", " ").capitalize()
        return Histogram(f"prism:{name}", text, ("model_name",), registry=self._registry, buckets=buckets)

    def text(self) -> bytes:
        """Everything in Prometheus' text format: of all processes, or of this one alone."""
        if _MULTIPROC not in os.environ:
            return generate_latest(self._registry)
        registry = CollectorRegistry()
        multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return generate_latest(registry)


def forget_process(pid: int) -> None:
    """Drop the gauges of a process that has ended; the agent calls it for each child."""
    if _MULTIPROC in os.environ:
        multiprocess.mark_process_dead(pid)  # type: ignore[no-untyped-call]
