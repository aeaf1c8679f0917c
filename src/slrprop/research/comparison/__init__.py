"""Every method under one protocol, at equal stored bytes."""
