"""Service managers: what keeps the daemon running from a login, or a boot, on."""
