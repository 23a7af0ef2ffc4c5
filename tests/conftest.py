import signal

from hypothesis import HealthCheck, settings

# Machines are noisy: no example fails for its time, and no test for the time that its first ones took to be made.
settings.register_profile("noisy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("noisy")

# Of a run in the background (`&`, nohup) the shell has these ignored, and so would every program under test.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGQUIT, signal.SIG_DFL)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

pytest_plugins = [
    "tests.fixtures.postgres",
    "tests.fixtures.redis",
    "tests.fixtures.clock",
    "tests.fixtures.fleet",
    "tests.fixtures.daemon_fleet",
    "tests.fixtures.people",
    "tests.fixtures.team_lock",
    "tests.fixtures.overtaking",
    "tests.fixtures.github",
    "tests.fixtures.consoles",
    "tests.fixtures.local_terminals",
]
