"""What a session is made of: its phases, and the checks between them."""
