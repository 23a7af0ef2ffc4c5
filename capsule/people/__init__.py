"""People: accounts, sessions, teams, members, keys, the audit trail, platform admins."""
