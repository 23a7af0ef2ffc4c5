"""The pager: a process beside the agent that serves the page faults of every restored VM of the host."""
