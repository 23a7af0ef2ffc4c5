"""What a team does with its sandboxes: transaction, decision, message to the host. No SQL, no HTTP."""
