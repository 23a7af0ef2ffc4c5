from hypothesis import settings

settings.register_profile("noisy", deadline=None)  # machines are noisy: no example fails for its time
settings.load_profile("noisy")

pytest_plugins = [
    "tests.fixtures.postgres",
    "tests.fixtures.redis",
    "tests.fixtures.clock",
    "tests.fixtures.fleet",
    "tests.fixtures.daemon_fleet",
    "tests.fixtures.people",
    "tests.fixtures.team_lock",
    "tests.fixtures.github",
    "tests.fixtures.consoles",
    "tests.fixtures.local_terminals",
]
