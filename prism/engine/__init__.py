"""One model's engine: continuous batching over KV blocks. The heart is `schedule -> run -> commit`."""
