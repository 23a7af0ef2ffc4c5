"""The route table, and the callers of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from argon2 import PasswordHasher
from prometheus_client import CollectorRegistry

from capsule.http.app import resources
from capsule.http.people_ports import PeopleServices
from capsule.http.ports import Services
from capsule.http.spool import Spool
from capsule.http.system import SystemPages
from tests.people.callers import Matrix


@pytest.fixture
def route_table():
    """Every operation that is served."""
    nobody = PeopleServices(**dict.fromkeys(PeopleServices.__slots__))
    services = Services(**{**dict.fromkeys(Services.__slots__), "people": nobody})
    pages = SystemPages(services.ready, CollectorRegistry(), "")
    return [*resources(services, Spool(Path("nowhere"))), *pages.operations()]


@pytest.fixture
def matrix():
    """Callers and operations."""
    return Matrix()


@pytest.fixture
def verifications(monkeypatch):
    """The hashes that passwords are compared with, one for each time."""
    seen = []
    real = PasswordHasher.verify

    def verify(self, hash, password):  # noqa: A002 - the library's name
        seen.append(hash)
        return real(self, hash, password)

    monkeypatch.setattr(PasswordHasher, "verify", verify)
    return seen
