"""What an agent sends to become a host."""

from __future__ import annotations

from tests.people.stage import CSR


def registration(token):
    return {
        "token": token,
        "address": "192.0.2.7:7001",
        "arch": "x86_64",
        "cpu_cores": 4,
        "memory_mb": 8192,
        "disk_gb": 100,
        "csr_pem": CSR,
    }
