"""The Python client of the API: `Client` for plain code, `TrioClient` for Trio."""
