pytest_plugins = ["tests.fixtures.postgres", "tests.fixtures.clock", "tests.fixtures.fleet", "tests.fixtures.people"]
