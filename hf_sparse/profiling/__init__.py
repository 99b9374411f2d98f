"""What takes how long: machine, timers, latency tables, speed records."""
