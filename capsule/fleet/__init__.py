"""What operators do with hosts: make them known, look at them, close, drain and delete them."""
