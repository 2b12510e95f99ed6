"""No entry moves but the free ones, bit for bit, whatever the optimizer."""
