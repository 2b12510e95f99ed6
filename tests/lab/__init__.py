"""What tests share: references, cases, networks with planted behaviour, worker processes."""
