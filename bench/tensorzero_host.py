"""Hosts the gateway inside TensorZero's Python package; runs in the peer's own environment, not in ours.

`_start_http_gateway` is what the package's `patch_openai_client` calls: it starts the full HTTP gateway (Rust, tokio)
on a free loopback port. The interpreter only waits for SIGTERM.
"""

import signal
import sys

from tensorzero.tensorzero import _start_http_gateway


def main() -> None:
    gateway = _start_http_gateway(
        config_file=sys.argv[1], clickhouse_url=None, postgres_url=None, valkey_url=None, async_setup=False
    )
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    print(f"ready {gateway.base_url}", flush=True)
    signal.sigwait({signal.SIGTERM})
    gateway.close()


if __name__ == "__main__":
    main()
