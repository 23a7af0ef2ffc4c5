"""A pager in another's place: waits until that one has ended, then serves from its directory.

`page_by_page.py DIRECTORY READY_FD PAGES`: our own fault service with as many pages around a fault as told. One page
means no batching at all: an event at a time, and nothing brought ahead.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from agent.pager import faults
from agent.pager.abi import PAGE

if int(sys.argv[3]) * PAGE < faults.CHUNK:  # before the others take it by name
    faults.CHUNK = faults.PIECE = int(sys.argv[3]) * PAGE
    faults.MOST_AHEAD = 0

from agent.pager import __main__ as program
from agent.pager import serving
from agent.pager.daemon import AnotherPager, take_directory

POLL = 0.001


def take_when_free(directory: Path) -> int:
    while True:
        try:
            return take_directory(directory)
        except AnotherPager:
            time.sleep(POLL)


if faults.CHUNK == PAGE:
    serving.EVENTS_AT_ONCE = 1
    serving.RECORDED_FAULTS *= 16  # the same memory as before
program.take_directory = take_when_free
program.main(["--directory", sys.argv[1], "--ready-fd", sys.argv[2]])
