"""Makes rows true: compares what the database says with what the hosts say, and mends the difference."""
