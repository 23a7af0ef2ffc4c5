"""How this host joins the fleet and stays in it: its key, its credentials, its heartbeat."""
