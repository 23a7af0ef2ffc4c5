"""Every route and every kind of caller, with the answer that the table of access (capsule.auth.access) gives them."""

from __future__ import annotations

import pytest

from capsule.auth.access import ACCESS
from capsule.http.openapi import document

ROWS = sorted(ACCESS)


def test_every_route_has_a_row_and_every_row_a_route(route_table):
    """Nothing is served that nobody decided about; nothing is decided that is not served."""
    assert {row.alias_of or row.name for row in route_table} == set(ACCESS)


def test_an_alias_is_the_same_operation(route_table):
    """What is under two paths has the same access, since it is one row."""
    by_name = {row.name: row for row in route_table}
    assert len(by_name) == len(route_table)
    for row in route_table:
        if row.alias_of:
            assert row.access is by_name[row.alias_of].access


@pytest.mark.parametrize("name", ROWS)
async def test_who_may(people, matrix, route_table, name):
    """Each caller is let through or refused, with the status and the code of the table; the document says so, too."""
    await matrix.begin(people)
    wrong, paths = [], document(route_table, "")["paths"]
    rows = [row for row in route_table if name == (row.alias_of or row.name)]
    assert rows, "no route"
    for row in rows:
        for kind in matrix.kinds:
            expected = matrix.expected(row, kind)
            got = await matrix.ask(row, kind)
            if row.documented:
                assert str(got[0]) in paths[row.path][row.method.lower()]["responses"], f"{row.name}: {got}"
            if got not in expected:
                wrong.append(f"{row.method} {row.path} by {kind.name}: {got}, not {expected}")
    assert not wrong, "\n".join(wrong)
